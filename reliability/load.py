"""Load tests: memory over many images, and a server that is killed under load.

The server is a separate process; its clients compare every response.
"""

import contextlib
import http.client
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.table import run_van_deploy
from reliability.outcome import Outcome
from van_deploy.bundle import Bundle
from van_deploy.data.samples import verification_images
from van_deploy.runners.network import Network
from van_deploy.serve.triton import DATATYPES, served_name

IMAGES, REQUESTS = 10_000, 10_000
FEW = 20  # the small run uses a twentieth of the images
CLIENTS, KILLS = 64, 5
FLAT = 1.1  # largest ratio of the memory of the large run to that of the small run
TOLERANCE = 1e-4  # of the largest logit: the limit of FP32 artifacts everywhere
RETRY_S = 0.05
HEAD_LENGTH = "Inference-Header-Content-Length"
FAST = "--no-equalize --no-bias-correction --force"
VAN_DEPLOY = (sys.executable, "-m", "van_deploy")
# Path, headers, bodies with one image each in the binary protocol, and their expected logits.
Requests = tuple[str, dict[str, str], list[bytes], npt.NDArray[np.float32]]


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


def run_export(folder: Path, *options: str) -> Path:
    """Export a bundle with uint8 artifacts, and return its folder."""
    run_van_deploy("export", *options, "--embed-preprocess", "uint8", "--output", folder)
    return folder


@contextlib.contextmanager
def run_server(
    bundle: Path,
    *options: str,
    port: int = 0,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve a bundle inside the block; yield the process and its URL.

    Raises:
        ValueError: the server did not start.
    """
    command = [*VAN_DEPLOY, "serve", str(bundle), "--json", "--port", str(port), *options]
    pipes: Any = {"stdout": subprocess.PIPE, "text": True}
    with (
        open(log or os.devnull, "w", encoding="utf-8") as errors,
        subprocess.Popen(command, stderr=errors, env=environment, **pipes) as server,
    ):
        try:
            lines = itertools.takewhile(lambda line: line != "}\n", server.stdout or ())
            yield server, str(json.loads("".join(lines) + "}")["url"])
        finally:
            server.terminate()


def infer_requests(folder: Path, artifact: str, count: int) -> Requests:
    """Return requests for an artifact with ``count`` distinct images."""
    bundle = Bundle.open(folder)
    with Network(bundle, artifact, threads=1) as network:
        images = verification_images(bundle.name, network.preprocessing, count, None)
        inputs, spec = network.prepare(images.values), network.input
        expected = [network.run(inputs[i : i + 1])["logits"] for i in range(count)]
    tensor = {"name": spec.name, "shape": [1, *spec.shape], "datatype": DATATYPES[spec.dtype]}
    size = {"parameters": {"binary_data_size": inputs[0].nbytes}}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [{**tensor, **size}], "outputs": outputs}).encode()
    path = f"/v2/models/{served_name(bundle, artifact)}/infer"
    bodies = [head + row.tobytes() for row in inputs]
    return path, {HEAD_LENGTH: str(len(head))}, bodies, np.concatenate(expected)


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
    numbers, (path, headers, bodies, expected) = iter(range(count)), requests

    def client(_: int) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        for number in numbers:
            index, status, pending = number % len(bodies), 0, True
            while pending:
                start = time.perf_counter()
                try:
                    connection.request("POST", path, bodies[index], headers)
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
                logits = np.frombuffer(content[int(response.headers[HEAD_LENGTH]) :], np.float32)
                difference = np.abs(logits - expected[index]).max() / np.abs(expected[index]).max()
                result.answered += 1
                result.worst = max(result.worst, float(difference))
                result.wrong += not difference <= TOLERANCE

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def evaluate_and_quantize(folder: Path, bundle: Path, count: int) -> Iterator[Outcome]:
    """Compare the peak memory of two commands on ``count`` noise images with that on a few."""
    selection, rng, few = folder / "set.toml", np.random.default_rng(0), count // FEW
    for number in range(count):
        label = folder / ("few" if number < few else "more") / str(number % 10)
        label.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(label / f"{number}.png", compress_level=0)
    for command, more in (
        ("evaluate", "--artifact fp32"),
        ("quantize", f"--precision int8 --calibration {selection} --method minmax {FAST}"),
    ):
        peaks = []
        for name, number in (("few", few), ("more", count - few)):
            selection.write_text(f"[images]\ncount = {number}\n", encoding="utf-8")
            words = (command, bundle, *more.split(), "--images", folder / name)
            peaks.append(run_van_deploy(*words, codes=(0, 1))["peak_bytes"] / 1e6)
        small, large = peaks  # exit code 1, a failed gate, is expected
        text = f"peak {large:.0f} MB, {small:.0f} MB for {few:,}"
        failure = "" if large <= FLAT * small else text
        yield Outcome(f"`{command}` on generated images", text, failure, count)


def kill_server_under_load(bundle: Path, count: int) -> Outcome:
    """Send requests to a server that is killed five times and restarted.

    Every client repeats its request until it is answered; every response is compared.
    """
    options = ("--artifact", "fp32-uint8", "--threads", "1", "--no-compare")
    requests, rng = infer_requests(bundle, "fp32-uint8", 16), random.Random(0)
    result, kills, all_requests = LoadResult(), 0, (count, CLIENTS, True)
    thresholds = [count * (number + rng.random()) / (KILLS + 1) for number in range(KILLS)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{port}"
        sending = pool.submit(send_requests, url, requests, result, *all_requests)
        for threshold in (*thresholds, math.inf):
            with run_server(bundle, *options, port=port) as (server, _):
                while result.answered < threshold and not sending.done():
                    time.sleep(0.01)
                kills += not sending.done()
                server.kill()
        sending.result()
    what = f"`serve` under {CLIENTS} clients, killed {kills} times and restarted"
    correct = result.answered - result.wrong
    text = f"{correct:,} correct, {result.wrong} wrong; {result.retries} retries"
    return Outcome(what, text, "" if (correct, kills) == (count, KILLS) else text, count)


def run(options: Namespace) -> Iterator[Outcome]:
    """Run the load tests."""
    with tempfile.TemporaryDirectory(prefix="van-deploy-load-") as name:
        bundle = run_export(Path(name) / "bundle", "van_digits")
        yield from evaluate_and_quantize(Path(name), bundle, options.count or IMAGES)
        yield kill_server_under_load(bundle, options.count or REQUESTS)
