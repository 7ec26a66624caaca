"""Spoiled HTTP requests, thousands of them, sent to a server that must not mind.

Each case is some connections at once, with one or two requests on each: sound ones whose JSON,
headers, tensors, images or raw bytes were spoiled. What comes back must be a status of 2xx, 4xx
or 503, or nothing where the request was not complete. A traceback in the log, another status and
a server that does not answer afterwards are faults.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from reliability.corruption import Draw, corrupt_bytes, corrupt_json, find_failure, one_of
from reliability.load import exported, started

TOTAL, AT_ONCE, MEAN = 10_000, 64, 48  # requests, connections of a case at most and about
SILENCE_S = 1.0  # then nothing more comes: the request was not complete
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


def request(draw: Draw, image: bytes) -> bytes:
    """Return what a client sends as one request."""
    kind = one_of(draw, "json", "binary", "image", "get")
    headers = {"Host": "x", "Connection": one_of(draw, "close", "keep-alive")}
    path, method, body = "/predict", "POST", image
    if kind == "get":
        path, method, body = one_of(draw, *PATHS), "GET", b""
    elif kind == "image":
        body = corrupt_bytes(draw, image) if draw(st.booleans()) else image
    else:
        path, rows = f"/v2/models/{NAME}/infer", one_of(draw, 1, 2, 8, 9, 0)
        tail = bytes(rows * ROW) if kind == "binary" else b""
        values = {"parameters": {"binary_data_size": len(tail)}} if tail else {"data": [7] * ROW}
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": [rows, 64, 64, 3], **values}
        wanted = [{"name": "logits", "parameters": {"binary_data": True}}]
        document = {"id": "1", "inputs": [tensor], "outputs": wanted}
        head = json.dumps(corrupt_json(draw, document) if draw(st.booleans()) else document)
        headers |= {"Inference-Header-Content-Length": str(len(head))} if tail else {}
        body = head.encode() + tail
    headers["Content-Length"] = str(len(body))
    if one_of(draw, True, False, False):
        headers[one_of(draw, *HEADERS)] = one_of(draw, *VALUES)
    if one_of(draw, True, False, False, False):
        method, path = one_of(draw, "GET", "HEAD", "PUT", "\x80", "CONNECT"), one_of(draw, *PATHS)
    version = one_of(draw, "1.1", "1.1", "1.0", "3.0")
    lines = [f"{method} {path} HTTP/{version}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def connections(draw: Draw, image: bytes) -> list[bytes]:
    """Return what some clients send at once."""
    found = []
    for _ in range(draw(st.integers(AT_ONCE // 2, AT_ONCE))):
        raw = b"".join(request(draw, image) for _ in range(one_of(draw, 1, 1, 1, 2)))
        way = one_of(draw, "whole", "whole", "whole", "spoiled", "cut")
        raw = corrupt_bytes(draw, raw[:600]) + raw[600:] if way == "spoiled" else raw
        found.append(raw[: draw(st.integers(0, len(raw)))] if way == "cut" else raw)
    return found


def answers(address: tuple[str, int], raw: bytes) -> list[int]:
    """Return the statuses that a server gives to what a client sends."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(address, SILENCE_S) as client:
        with contextlib.suppress(ConnectionError):  # the server may have had enough of it
            client.sendall(raw)
        while piece := client.recv(65536):
            received += piece
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def fuzz_requests(url: str, seed: int, count: int, image: bytes) -> tuple[Counter[int], list[str]]:
    """Return how often each status came (0: no answer) and what must not have happened."""
    host, port = url.removeprefix("http://").split(":")
    address, statuses = (host, int(port)), Counter[int]()

    def case(draw: Draw) -> None:
        every = connections(draw, image)
        for raw, codes in zip(every, pool.map(partial(answers, address), every), strict=True):
            statuses.update(codes or [0])
            wrong = [code for code in codes if code // 100 not in {1, 2, 4} and code != 503]
            assert not wrong, f"status {wrong} to {raw[:300]!r}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        faults = [fault] if (fault := find_failure(case, seed, count // MEAN)) else []
    if answers(address, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n") != [200]:
        faults.append("the server does not answer any more")
    return statuses, faults


def table(count: int | None, seed: int = 0) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row a status, and the faults of so many cases."""
    with tempfile.TemporaryDirectory(prefix="van-deploy-requests-") as name:
        bundle, log = exported(Path(name) / "bundle", "van_digits"), Path(name) / "log"
        server, url = started(bundle, "--threads", "1", "--read-timeout-s", "0.5", log=log)
        image = (bundle / "golden/0.png").read_bytes()
        try:
            statuses, faults = fuzz_requests(url, seed, count or TOTAL, image)
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
