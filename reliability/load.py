"""Load tests: memory over many images, and a server that is killed under load.

The server is a separate process; its clients compare every response.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from van_deploy.bundle import Bundle
from van_deploy.data.samples import verification_images
from van_deploy.runners.network import Network
from van_deploy.serve.triton import DATATYPES, served_name

IMAGES, REQUESTS = 50_000, 10_000
FEW = 20  # the small run uses a twentieth of the images
CLIENTS, KILLS = 64, 5
FLAT = 1.1  # largest ratio of the memory of the large run to that of the small run
TOLERANCE = 1e-4  # of the largest logit: the limit of FP32 artifacts everywhere
RETRY_S = 0.05
QUIET = subprocess.DEVNULL
VAN_DEPLOY = (sys.executable, "-m", "van_deploy")


@dataclass
class LoadResult:
    """Results of all clients.

    Attributes:
        answered: responses with status 200.
        wrong: responses whose logits differ from the artifact's.
        retries: requests sent again after a broken connection or status 503.
        latencies_ms: latency of every response.
        worst: largest relative difference of logits.
    """

    answered: int = 0
    wrong: int = 0
    retries: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    worst: float = 0.0


@dataclass(frozen=True)
class Requests:
    """Requests with one image in the binary protocol, and their expected logits."""

    path: str
    head: bytes
    rows: list[bytes]
    expected: npt.NDArray[np.float32]


def run_export(folder: Path, *options: str) -> Path:
    """Export a bundle with uint8 artifacts, and return its folder."""
    command = [*VAN_DEPLOY, "export", *options, "--embed-preprocess", "uint8", "-o", str(folder)]
    subprocess.run(command, check=True, stdout=QUIET, stderr=QUIET)
    return folder


def start_server(
    bundle: Path, *options: str, port: int = 0, log: Path | None = None
) -> tuple[subprocess.Popen[str], str]:
    """Start a server, and return its process and URL.

    Raises:
        RuntimeError: the server did not start.
    """
    command = [*VAN_DEPLOY, "serve", str(bundle), "--json", "--port", str(port), *options]
    errors = log.open("w", encoding="utf-8") if log else QUIET
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    text = ""
    while not text.endswith("}\n"):
        line = server.stdout.readline() if server.stdout else ""
        if not line:
            raise RuntimeError(f"the server did not start: code {server.wait()}")
        text += line
    return server, str(json.loads(text)["url"])


def infer_requests(folder: Path, artifact: str, count: int) -> Requests:
    """Return requests for an artifact with ``count`` distinct images."""
    bundle = Bundle.open(folder)
    with Network(bundle, artifact, threads=1) as network:
        images = verification_images(bundle.name, network.preprocessing, count, None)
        inputs, spec = network.prepare(images.values), network.input
        expected = [network.run(inputs[i : i + 1])["logits"] for i in range(count)]
    rows = [row.tobytes() for row in inputs]
    tensor = {"name": spec.name, "shape": [1, *spec.shape], "datatype": DATATYPES[spec.dtype]}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
    size = {"parameters": {"binary_data_size": len(rows[0])}}
    head = json.dumps({"inputs": [{**tensor, **size}], "outputs": outputs}).encode()
    path = f"/v2/models/{served_name(bundle, artifact)}/infer"
    return Requests(path, head, rows, np.concatenate(expected))


def send_requests(
    url: str, requests: Requests, result: LoadResult, count: int, clients: int, retry: bool = False
) -> None:
    """Send requests from concurrent clients, and compare every response.

    Args:
        url: URL of the server.
        requests: the requests, sent in turn.
        result: is updated with the responses.
        count: number of requests.
        clients: number of clients, each with its own connection.
        retry: whether a client repeats a request until it is answered.
    """
    numbers = iter(range(count))
    length = "Inference-Header-Content-Length"
    headers = {length: str(len(requests.head))}

    def client(_: int) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        for number in numbers:
            index, status, pending = number % len(requests.rows), 0, True
            while pending:
                start = time.perf_counter()
                try:
                    body = requests.head + requests.rows[index]
                    connection.request("POST", requests.path, body, headers)
                    response = connection.getresponse()
                    status, content = response.status, response.read()
                except (OSError, http.client.HTTPException):
                    connection.close()
                    status = 0
                pending = retry and status in {0, 503}
                result.retries += pending
                time.sleep(RETRY_S * pending)
            result.latencies_ms.append(1e3 * (time.perf_counter() - start))
            if status == 200:
                tail, expected = content[int(response.headers[length]) :], requests.expected[index]
                difference = np.abs(np.frombuffer(tail, np.float32) - expected).max()
                difference /= np.abs(expected).max()
                result.answered += 1
                result.worst = max(result.worst, float(difference))
                result.wrong += not difference <= TOLERANCE

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def table(count: int | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, one row for each load test, and the failed ones.

    Args:
        count: number of images and of requests; None for 50,000 and 10,000.
    """
    with tempfile.TemporaryDirectory(prefix="van-deploy-load-") as name:
        bundle = run_export(Path(name) / "bundle", "van_digits")
        rows = evaluate_and_quantize(Path(name), bundle, count or IMAGES)
        rows.append(kill_server_under_load(bundle, count or REQUESTS))
    faults = [" | ".join(row) for row in rows if row[3] != "yes"]
    return ["load", "amount", "result", "passed"], rows, faults


def evaluate_and_quantize(folder: Path, bundle: Path, count: int) -> list[list[str]]:
    """Return the peak memory of two commands on ``count`` noise images and on a few of them."""
    selection, rng, few = folder / "images.toml", np.random.default_rng(0), count // FEW
    fast = ("--method", "minmax", "--no-equalize", "--no-bias-correction", "--force")
    for number in range(count):
        label = folder / ("few" if number < few else "more") / str(number % 10)
        label.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(label / f"{number}.png", compress_level=0)

    def peak(command: str, more: tuple[str, ...], images: str, number: int) -> float:
        """Return the peak memory of a command in MB; infinite where it failed."""
        selection.write_text(f"[images]\ncount = {number}\n", encoding="utf-8")
        arguments = [*VAN_DEPLOY, command, str(bundle), *more, "--images", str(folder / images)]
        process = subprocess.Popen(arguments, stdout=QUIET, stderr=QUIET)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        # Exit code 1, a failed gate, is expected.
        return usage.ru_maxrss * 1024e-6 if process.returncode <= 1 else math.inf

    rows = []
    for command, more in (
        ("evaluate", ("--artifact", "fp32")),
        ("quantize", ("--precision", "int8", "--calibration", str(selection), *fast)),
    ):
        small, start = peak(command, more, "few", few), time.monotonic()
        large = peak(command, more, "more", count - few)
        amount = f"{count:,} images, {time.monotonic() - start:.0f} s"
        passed = "yes" if large <= FLAT * small < math.inf else "NO"
        detail = f"peak {large:.0f} MB, {small:.0f} MB for {few:,}"
        rows.append([f"`{command}` on generated images", amount, detail, passed])
    return rows


def kill_server_under_load(bundle: Path, count: int) -> list[str]:
    """Return the result of requests to a server that is killed five times and restarted.

    Every client repeats its request until it is answered; every response is compared.
    """
    options = ("--artifact", "fp32-uint8", "--threads", "1", "--no-compare")
    requests, rng = infer_requests(bundle, "fp32-uint8", 16), random.Random(0)
    server, url = start_server(bundle, *options)
    port, kills, result = int(url.rsplit(":", 1)[1]), 0, LoadResult()
    try:
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send_requests, url, requests, result, count, CLIENTS, retry=True)
            while kills < KILLS and not sending.done():
                threshold = count * (kills + rng.random()) / (KILLS + 1)
                while result.answered < threshold and not sending.done():
                    time.sleep(0.01)
                server.kill()
                server.wait()
                server, _ = start_server(bundle, *options, port=port)
                kills += 1
            sending.result()
    finally:
        server.terminate()
        server.wait()
    load = f"`serve` under {CLIENTS} clients, killed {kills} times and restarted"
    passed = result.answered == count and not result.wrong and kills == KILLS
    correct = result.answered - result.wrong
    detail = f"{correct:,} correct, {result.wrong} wrong; {result.retries} retries"
    return [load, f"{count:,} requests", detail, "yes" if passed else "NO"]
