"""Spoiled HTTP requests, thousands of them, sent to a server that must not mind.

Each case is one connection with one or two requests on it, made by a seeded generator: sound
ones whose JSON, headers, tensors, images, forms or raw bytes were spoiled. What comes back must
be a status of 2xx, 4xx or 503, or nothing where the request was not complete. A traceback in
the log, another status and a server that does not answer afterwards are faults.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import socket
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reliability.clients import exported, started
from reliability.spoiled import generator_of, spoiled_bytes, spoiled_json

TOTAL, CLIENTS = 10_000, 32
SILENCE_S = 1.0  # then nothing more comes: the request was not complete
NAME, ROW = "van_digits-fp32-uint8", 64 * 64 * 3
HEADERS = (
    *("Inference-Header-Content-Length", "Content-Length", "Content-Encoding", "Content-Type"),
    *("Transfer-Encoding", "Expect", "Authorization", "Upgrade", "Connection", "Host", "X-\x80"),
)
VALUES = (
    *("", "0", "-1", "x", "9" * 5000, "1e3", "chunked", "gzip", "deflate", "br", "\x80\xff"),
    *("100-continue", "multipart/form-data", "multipart/form-data; boundary=x", "websocket"),
    *("close", "a" * 70_000),
)
PATHS = (
    *("/", "/predict", "/v2", "/models", "/metrics", "/v2/health/live", "/v2/models/stats"),
    *(f"/v2/models/{NAME}", f"/v2/models/{NAME}/versions/1/infer", f"/v2/models/{NAME}/config"),
    *("/%ff%00", "/v2/models/%ED%A0%80/infer", "/../../etc/passwd", "/predict?top=%F0"),
    *("*", "//", "/" + "a" * 9000),
    *(f"/predict?top={top}" for top in ("5", "0", "x", "9" * 5000, "%00", "2&model=%ff", "&&=")),
)
FORM = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'


def case(index: int, image: bytes) -> bytes:
    """Return what one client sends."""
    rng = generator_of("requests", index)
    raw = b"".join(_request(rng, image) for _ in range(1 + (rng.random() < 0.2)))
    if rng.random() < 0.15:
        raw = spoiled_bytes(rng, raw[:600]) + raw[600:]
    return raw if rng.random() < 0.9 else raw[: rng.randrange(len(raw))]


def _request(rng: random.Random, image: bytes) -> bytes:
    kind = rng.choice(("json", "binary", "image", "form", "get"))
    headers = {"Host": "x", "Connection": rng.choice(("close", "close", "keep-alive"))}
    path, method, body = "/predict", "POST", spoiled_bytes(rng, image)
    if kind == "get":
        path, method, body = rng.choice(PATHS), "GET", b""
    elif kind in {"json", "binary"}:
        path, rows = f"/v2/models/{NAME}/infer", rng.choice((1, 1, 1, 2, 8, 9, 0))
        tail = rng.randbytes(rows * ROW) if kind == "binary" else b""
        values = {"parameters": {"binary_data_size": len(tail)}} if tail else {"data": [7] * ROW}
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": [rows, 64, 64, 3], **values}
        wanted = [{"name": "logits", "parameters": {"classification": 2, "binary_data": True}}]
        document = {"id": "1", "inputs": [tensor], "outputs": wanted}
        spoiled = spoiled_json(rng, document) if rng.random() < 0.6 else document
        head = json.dumps(spoiled).encode()
        headers |= {"Inference-Header-Content-Length": str(len(head))} if tail else {}
        body = head + tail
    else:
        body = image if rng.random() < 0.4 else body
        if kind == "form":
            headers["Content-Type"] = "multipart/form-data; boundary=x"
            body = rng.choice((FORM, b"", b"--x\r\n", b"--x--")) + body + b"\r\n--x--\r\n"
    if rng.random() < 0.15:
        headers["Content-Encoding"] = rng.choice(("gzip", "deflate"))
        body = gzip.compress(body)[: rng.choice((None, -3))]
    path = rng.choice(PATHS) if rng.random() < 0.1 else path
    headers["Content-Length"] = str(len(body))
    if rng.random() < 0.25:
        headers[rng.choice(HEADERS)] = rng.choice(VALUES)
    if rng.random() < 0.1:
        method = rng.choice(("GET", "POST", "HEAD", "PUT", "\x80", "CONNECT"))
    lines = [f"{method} {path} HTTP/{rng.choice(('1.1', '1.1', '1.1', '1.0', '3.0'))}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def answers(address: tuple[str, int], raw: bytes) -> list[int]:
    """Return the statuses that a server gives to what a client sends."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(address, SILENCE_S) as client:
        with contextlib.suppress(ConnectionError):  # the server may have had enough of it
            client.sendall(raw)
        while piece := client.recv(65536):
            received += piece
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def fuzz_requests(url: str, first: int, count: int, image: bytes) -> tuple[Counter[int], list[str]]:
    """Return how often each status came (0: no answer) and what must not have happened."""
    host, port = url.removeprefix("http://").split(":")
    address, faults, statuses = (host, int(port)), list[str](), Counter[int]()
    numbers = range(first, first + count)
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = pool.map(lambda index: answers(address, case(index, image)), numbers)
        for index, codes in zip(numbers, found, strict=True):
            statuses.update(codes or [0])
            wrong = [code for code in codes if code // 100 not in {1, 2, 4} and code != 503]
            faults += [f"case {index}: status {code}" for code in wrong]
    if answers(address, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n") != [200]:
        faults.append("the server does not answer any more")
    return statuses, faults


def table(count: int | None, first: int = 0) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row a status, and the faults of so many cases."""
    with tempfile.TemporaryDirectory(prefix="van-deploy-requests-") as name:
        bundle, log = exported(Path(name) / "bundle", "van_digits"), Path(name) / "log"
        server, url = started(bundle, "--threads", "1", "--read-timeout-s", "0.5", log=log)
        image = (bundle / "golden/0.png").read_bytes()
        try:
            statuses, faults = fuzz_requests(url, first, count or TOTAL, image)
        finally:
            server.terminate()
            code = server.wait(60)
        said = log.read_text(encoding="utf-8")
    faults += ["a traceback in the log"] * ("raceback" in said)
    faults += [f"the server ended with {code}"] * (code != 0)
    if faults:
        print(said[-3000:], file=sys.stderr)
    rows = [[str(code) if code else "none", str(n)] for code, n in sorted(statuses.items())]
    return ["status", "answers"], rows, faults
