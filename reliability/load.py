"""Long work: many images with flat memory, and a server that is killed under load.

The server is a process, and its many clients compare each answer it gives.
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
FEW = 20  # the same work on a twentieth of the images
CLIENTS, KILLS = 64, 5
FLAT = 1.1  # times the memory of the small run
TOLERANCE = 1e-4  # of the largest logit: what FP32 artifacts are allowed everywhere else
RETRY_S = 0.05
QUIET = subprocess.DEVNULL


@dataclass
class Load:
    """What the clients saw.

    Attributes:
        answered: requests with an answer of 200.
        wrong: of these, with other logits than the artifact's own.
        again: requests sent once more, after a connection that broke or a status of 503.
        latencies_ms: of every answer.
        worst: relative difference of logits.
    """

    answered: int = 0
    wrong: int = 0
    again: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    worst: float = 0.0


@dataclass(frozen=True)
class Requests:
    """Requests of one image in the binary protocol, and the logits the artifact itself gives."""

    path: str
    head: bytes
    rows: list[bytes]
    expected: npt.NDArray[np.float32]


def export_test_bundle(folder: Path, *words: str) -> Path:
    """Return a bundle whose artifacts also take bytes."""
    command = [sys.executable, "-m", "van_deploy", "export", *words, "--output", str(folder)]
    command += ["--embed-preprocess", "uint8", "--json"]
    subprocess.run(command, check=True, stdout=QUIET, stderr=QUIET)
    return folder


def started(
    bundle: Path, *words: str, port: int = 0, log: Path | None = None
) -> tuple[subprocess.Popen[str], str]:
    """Return a server that answers, and its address.

    Raises:
        RuntimeError: it did not start.
    """
    command = [sys.executable, "-m", "van_deploy", "serve", str(bundle), "--port", str(port)]
    errors = log.open("w", encoding="utf-8") if log else QUIET
    server = subprocess.Popen(
        [*command, "--json", *words], stdout=subprocess.PIPE, stderr=errors, text=True
    )
    text = ""
    while not text.endswith("}\n"):
        line = server.stdout.readline() if server.stdout else ""
        if not line:
            raise RuntimeError(f"the server did not start: code {server.wait()}")
        text += line
    return server, str(json.loads(text)["url"])


def infer_requests(folder: Path, artifact: str, count: int) -> Requests:
    """Return ``count`` distinct images as requests for an artifact."""
    bundle = Bundle.open(folder)
    with Network(bundle, artifact, threads=1) as network:
        images = verification_images(bundle.name, network.preprocessing, count, None)
        inputs, given = network.prepare(images.values), network.input
        expected = [network.run(inputs[i : i + 1])["logits"] for i in range(count)]
    rows = [row.tobytes() for row in inputs]
    tensor = {"name": given.name, "shape": [1, *given.shape], "datatype": DATATYPES[given.dtype]}
    wanted = [{"name": "logits", "parameters": {"binary_data": True}}]
    size = {"parameters": {"binary_data_size": len(rows[0])}}
    head = json.dumps({"inputs": [{**tensor, **size}], "outputs": wanted}).encode()
    path = f"/v2/models/{served_name(bundle, artifact)}/infer"
    return Requests(path, head, rows, np.concatenate(expected))


def drive(
    url: str, requests: Requests, found: Load, count: int, clients: int, *, retry: bool = False
) -> None:
    """Send so many requests from so many connections, and compare each answer.

    Args:
        url: of the server.
        requests: sent in turns.
        found: what came back is added to it.
        count: how many are sent.
        clients: each on a connection of its own.
        retry: whether a client asks again, until it is answered.
    """
    numbers = iter(range(count))
    length = "Inference-Header-Content-Length"
    headers = {length: str(len(requests.head))}

    def client(_: int) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        for number in numbers:
            which, status, asking = number % len(requests.rows), 0, True
            while asking:
                start = time.perf_counter()
                try:
                    body = requests.head + requests.rows[which]
                    connection.request("POST", requests.path, body, headers)
                    response = connection.getresponse()
                    status, content = response.status, response.read()
                except (OSError, http.client.HTTPException):
                    connection.close()
                    status = 0
                asking = retry and status in {0, 503}
                found.again += asking
                time.sleep(RETRY_S * asking)
            found.latencies_ms.append(1e3 * (time.perf_counter() - start))
            if status == 200:
                tail, own = content[int(response.headers[length]) :], requests.expected[which]
                difference = np.abs(np.frombuffer(tail, np.float32) - own).max() / np.abs(own).max()
                found.answered += 1
                found.worst = max(found.worst, float(difference))
                found.wrong += not difference <= TOLERANCE

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def table(count: int | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row for each load, and those that did not hold.

    Args:
        count: of images and of requests; None for 50,000 and 10,000.
    """
    with tempfile.TemporaryDirectory(prefix="van-deploy-load-") as name:
        bundle = export_test_bundle(Path(name) / "bundle", "van_digits")
        rows = evaluate_and_quantize(Path(name), bundle, count or IMAGES)
        rows.append(serve_killed(bundle, count or REQUESTS))
    faults = [" | ".join(row) for row in rows if row[3] != "yes"]
    return ["load", "how much", "what happened", "held"], rows, faults


def evaluate_and_quantize(folder: Path, bundle: Path, count: int) -> list[list[str]]:
    """Return what so many images of noise took in two commands, against a few of them."""
    selection, rng, few = folder / "images.toml", np.random.default_rng(0), count // FEW
    plainest = ("--method", "minmax", "--no-equalize", "--no-bias-correction", "--force")
    for number in range(count):
        place = folder / ("few" if number < few else "more") / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png", compress_level=0)

    def peak(command: str, more: tuple[str, ...], images: str, number: int) -> float:
        """Return the most memory of a command, in MB; infinite where it failed."""
        selection.write_text(f"[images]\ncount = {number}\n", encoding="utf-8")
        words = [sys.executable, "-m", "van_deploy", command, str(bundle), *more]
        process = subprocess.Popen(
            [*words, "--images", str(folder / images)], stdout=QUIET, stderr=QUIET
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_maxrss * 1024e-6 if process.returncode <= 1 else math.inf  # no gate is met

    rows = []
    for command, more in (
        ("evaluate", ("--artifact", "fp32")),
        ("quantize", ("--precision", "int8", "--calibration", str(selection), *plainest)),
    ):
        small, start = peak(command, more, "few", few), time.monotonic()
        large = peak(command, more, "more", count - few)
        much = f"{count:,} images, {time.monotonic() - start:.0f} s"
        held = "yes" if large <= FLAT * small < math.inf else "NO"
        detail = f"peak {large:.0f} MB, {small:.0f} MB for {few:,}"
        rows.append([f"`{command}` over generated images", much, detail, held])
    return rows


def serve_killed(bundle: Path, count: int) -> list[str]:
    """Return what became of requests to a server that is killed five times and started again.

    Every client asks again until it is answered; every answer is compared.
    """
    words = ("--artifact", "fp32-uint8", "--threads", "1", "--no-compare")
    requests, rng = infer_requests(bundle, "fp32-uint8", 16), random.Random(0)
    server, url = started(bundle, *words)
    port, kills, found = int(url.rsplit(":", 1)[1]), 0, Load()
    try:
        with ThreadPoolExecutor(1) as pool:
            driving = pool.submit(drive, url, requests, found, count, CLIENTS, retry=True)
            while kills < KILLS and not driving.done():
                enough = count * (kills + rng.random()) / (KILLS + 1)
                while found.answered < enough and not driving.done():
                    time.sleep(0.01)
                server.kill()
                server.wait()
                server, _ = started(bundle, *words, port=port)
                kills += 1
            driving.result()
    finally:
        server.terminate()
        server.wait()
    what = f"`serve` under {CLIENTS} clients, killed {kills} times and started again"
    right = f"{found.answered - found.wrong:,} right, {found.wrong} wrong"
    held = found.answered == count and not found.wrong and kills == KILLS
    detail = f"{right}; sent again {found.again} times"
    return [what, f"{count:,} requests", detail, "yes" if held else "NO"]
