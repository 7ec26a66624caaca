"""A server of a bundle as a process, and many clients that compare each answer it gives."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.data import check_images
from van_deploy.runners.network import Network
from van_deploy.serve.triton import DATATYPES, served_name

TOLERANCE = 1e-4  # of the largest logit: what FP32 artifacts are allowed everywhere else
RETRY_S = 0.05


@dataclass
class Load:
    """What the clients saw.

    Attributes:
        answered: requests with an answer of 200.
        wrong: of these, with other logits than the artifact's own.
        again: requests sent once more, after a connection that broke or a status of 503.
        statuses: of every answer.
        latencies_ms: of every answer.
        worst: relative difference of logits.
    """

    answered: int = 0
    wrong: int = 0
    again: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    worst: float = 0.0

    def compare(self, logits: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        """Count an answer of 200."""
        difference = float("inf")
        if logits.shape == expected.shape:
            difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
        self.answered += 1
        self.worst = max(self.worst, difference)
        self.wrong += not difference <= TOLERANCE


@dataclass(frozen=True)
class Requests:
    """Requests of one image in the binary protocol, and the logits the artifact itself gives."""

    path: str
    head: bytes
    rows: list[bytes]
    expected: npt.NDArray[np.float32]


def exported(folder: Path, *words: str) -> Path:
    """Return a bundle whose artifacts also take bytes."""
    command = [sys.executable, "-m", "van_deploy", "export", *words, "--output", str(folder)]
    command += ["--embed-preprocess", "uint8", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def started(
    bundle: Path, *words: str, port: int = 0, log: Path | None = None
) -> tuple[subprocess.Popen[str], str]:
    """Return a server that answers, and its address.

    Raises:
        RuntimeError: it did not start.
    """
    command = [sys.executable, "-m", "van_deploy", "serve", str(bundle), "--port", str(port)]
    errors = log.open("w", encoding="utf-8") if log else subprocess.DEVNULL
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


def infer_requests(folder: Path, artefact: str, count: int) -> Requests:
    """Return ``count`` distinct images as requests for an artifact."""
    bundle = Bundle.open(folder)
    with Network(bundle, artefact, threads=1) as network:
        images = check_images(bundle.name, network.preprocessing, count, None)
        inputs, given = network.prepare(images.values), network.input
        expected = [network.run(inputs[i : i + 1])["logits"] for i in range(count)]
    rows = [row.tobytes() for row in inputs]
    tensor = {"name": given.name, "shape": [1, *given.shape], "datatype": DATATYPES[given.dtype]}
    wanted = [{"name": "logits", "parameters": {"binary_data": True}}]
    size = {"parameters": {"binary_data_size": len(rows[0])}}
    head = json.dumps({"inputs": [{**tensor, **size}], "outputs": wanted}).encode()
    path = f"/v2/models/{served_name(bundle, artefact)}/infer"
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
            found.statuses[status] += 1
            found.latencies_ms.append(1e3 * (time.perf_counter() - start))
            if status == 200:
                tail = content[int(response.headers.get(length, "0")) :]
                found.compare(np.frombuffer(tail, np.float32), requests.expected[which])

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
