"""HTTP fuzzing: thousands of mutated requests to a server.

Each case opens some connections at once, with one or two requests on each: valid requests whose
JSON, headers, tensors, images or raw bytes were mutated. The response must be a status of 2xx, 4xx
or 503, or none where the request is incomplete. A traceback in the log, another status and a
server that does not respond afterwards are faults.
"""

import contextlib
import json
import re
import socket
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from reliability.corruption import Draw, corrupt_bytes, corrupt_document, find_failure, one_of
from reliability.load import run_export, run_server
from reliability.outcome import Outcome

TOTAL, MAX_CONNECTIONS, MEAN_CONNECTIONS = 10_000, 64, 48  # requests in all, connections of a case
SILENCE_S = 1.0  # without a response the request is incomplete
NAME, ROW = "van_digits-fp32-uint8", 64 * 64 * 3
HEADERS = (
    *("Inference-Header-Content-Length", "Content-Length", "Content-Encoding", "Content-Type"),
    *("Transfer-Encoding", "Expect", "Authorization", "Upgrade", "Connection", "Host", "X-\x80"),
)
VALUES = (
    *("", "0", "-1", "x", "9" * 5000, "1e3", "chunked", "gzip", "\x80\xff", "a" * 70_000),
    *("100-continue", "multipart/form-data", "multipart/form-data; boundary=x", "websocket"),
)
PATHS = (
    *("/", "/predict", "/v2", "/models", "/metrics", "/v2/health/live", "/%ff%00", "//", "*"),
    *(f"/v2/models/{NAME}", f"/v2/models/{NAME}/versions/1/infer", f"/v2/models/{NAME}/config"),
    *("/v2/models/%ED%A0%80/infer", "/../../etc/passwd", "/predict?top=%F0", "/" + "a" * 9000),
    *(f"/predict?top={top}" for top in ("5", "0", "x", "9" * 5000, "%00", "2&model=%ff", "&&=")),
)


def draw_request(draw: Draw, image: bytes) -> bytes:
    """Draw one request: an image, tensors in JSON or binary, or none, with corruptions."""
    kind, rows = one_of(draw, "json", "binary", "image", "get"), one_of(draw, 1, 2, 8, 9, 0)
    tail = bytes(rows * ROW) if kind == "binary" else b""
    if kind == "get":
        method, path, body = "GET", one_of(draw, *PATHS), b""
    elif kind == "image":
        method, path = "POST", "/predict"
        body = corrupt_bytes(draw, image) if draw(st.booleans()) else image
    else:
        values = {"parameters": {"binary_data_size": len(tail)}} if tail else {"data": [7] * ROW}
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": [rows, 64, 64, 3], **values}
        outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
        head = json.dumps({"id": "1", "inputs": [tensor], "outputs": outputs}).encode()
        head = corrupt_document(draw, head) if draw(st.booleans()) else head
        method, path, body = "POST", f"/v2/models/{NAME}/infer", head + tail
    if one_of(draw, True, False, False, False, False):
        method, path = one_of(draw, "GET", "HEAD", "PUT", "\x80", "CONNECT"), one_of(draw, *PATHS)
    lines = [f"{method} {path} HTTP/{one_of(draw, '1.1', '1.1', '1.0', '3.0')}", "Host: x"]
    lines += [f"Connection: {one_of(draw, 'close', 'keep-alive')}", f"Content-Length: {len(body)}"]
    lines += [f"Inference-Header-Content-Length: {len(body) - len(tail)}"] if tail else []
    if one_of(draw, True, False, False):
        index = draw(st.integers(1, len(lines)))
        lines[index : index + 1] = [f"{one_of(draw, *HEADERS)}: {one_of(draw, *VALUES)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def draw_connection(draw: Draw, image: bytes) -> bytes:
    """Draw the data of one connection: one or two requests, whole, corrupt or cut."""
    raw = b"".join(draw_request(draw, image) for _ in range(one_of(draw, 1, 1, 1, 2)))
    mutation = one_of(draw, "whole", "whole", "whole", "corrupt", "cut")
    if mutation == "cut":
        return raw[: draw(st.integers(0, len(raw)))]
    return corrupt_bytes(draw, raw[:600]) + raw[600:] if mutation == "corrupt" else raw


def send(address: tuple[str, int], raw: bytes) -> list[int]:
    """Send data over a new connection, and return the statuses of all responses."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(address, SILENCE_S) as client:
        with contextlib.suppress(ConnectionError):  # the server may close the connection first
            client.sendall(raw)
        while piece := client.recv(65536):
            received += piece
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def fuzz_requests(url: str, seed: int, count: int, image: bytes) -> tuple[Counter[int], list[str]]:
    """Return the number of responses by status (0: no response), and the faults."""
    host, port = url.removeprefix("http://").split(":")
    address, statuses = (host, int(port)), Counter[int]()

    def case(draw: Draw) -> None:
        count = draw(st.integers(MAX_CONNECTIONS // 2, MAX_CONNECTIONS))
        sent = [draw_connection(draw, image) for _ in range(count)]
        for raw, codes in zip(sent, pool.map(partial(send, address), sent), strict=True):
            statuses.update(codes or [0])
            wrong = [code for code in codes if code // 100 not in {1, 2, 4} and code != 503]
            assert not wrong, f"status {wrong} to {raw[:300]!r}"

    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        faults = [fault] if (fault := find_failure(case, seed, count // MEAN_CONNECTIONS)) else []
    if send(address, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n") != [200]:
        faults.append("the server does not respond any more")
    return statuses, faults


def run(options: Namespace) -> Iterator[Outcome]:
    """Fuzz a server of its own."""
    flags = ("--threads", "1", "--read-timeout-s", "0.5")
    with tempfile.TemporaryDirectory(prefix="van-deploy-requests-") as name:
        bundle, log = run_export(Path(name) / "bundle", "van_digits"), Path(name) / "log"
        image = (bundle / "golden/0.png").read_bytes()
        with run_server(bundle, *flags, log=log) as (server, url):
            statuses, faults = fuzz_requests(url, options.seed, options.count or TOTAL, image)
        text, what = log.read_text(encoding="utf-8"), "mutated requests"
    if "raceback" in text or server.returncode:
        faults.append(f"the server ended with {server.returncode}: {text[-3000:]}")
    for code, count in sorted(statuses.items()):
        yield Outcome(what, f"status {code}" if code else "no response", runs=count)
    yield from (Outcome(what, "failed", fault, 0) for fault in faults)
