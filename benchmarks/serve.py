"""Measure the server: against a real Triton, against its own inference, under the worst bodies.

    python -m benchmarks.serve load BUNDLE --requests 10000 --clients 64
    python -m benchmarks.serve triton BUNDLE --requests 1200
    python -m benchmarks.serve worst BUNDLE --seconds 30
    python -m benchmarks.serve top1 BUNDLE FOLDER...
    python -m benchmarks.serve claims       # all but top1, on bundles of its own: 6 minutes

``load`` sends requests of one image over so many connections, in the binary protocol, and
compares each answer with the artefact's own. With one thread an instance all of inference is in
the threads that run batches, whose processor time the server counts: the rest of its processor
time is its own.

``triton`` gives the same requests in turns to this server and to a real Triton with the Python
backend (:mod:`reliability.tritonserver`), with equal threads, instances and batching.

``worst`` lets 16 clients in a process of their own send the worst bodies known, again and again,
and asks ``/v2/health/live`` meanwhile; the memory is that of the server and its processes, above
what they have after full batches of sound requests.

``top1`` compares the whole way from each file: timm's transform and the plain graph against
bytes and the graph with preprocessing inside.

``claims`` runs ``load`` with 10,000 requests on van_digits and with 2,000 on van_b0 at 224, and
``triton`` and ``worst`` on van_b0. ``make fuzz`` sends the 10,000 spoiled requests.

The result is one JSON document on standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import multiprocessing
import re
import socket
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from reliability.clients import Load, drive, exported, infer_requests, started
from reliability.tritonserver import PYTHON, triton_running
from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle
from van_deploy.data import find_images, open_image
from van_deploy.model.pixels import pixels_from_image
from van_deploy.runners.network import Network
from van_deploy.serve.triton_model import DATATYPES, served_name

DISTINCT = 64
LIVE_MS = 200
OWN_MIB = 900  # see docs/serving.md: what is held, parsed and decoded at once
OWN = (  # the preprocessing of the checkpoint beside this repository, from its README
    *("--image-size", "64", "--crop-pct", "1.0"),
    *("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
)
METRICS = {
    "rows": "van_deploy_batch_rows_sum",
    "batches": "van_deploy_batch_rows_count",
    "infer_cpu": "van_deploy_infer_cpu_seconds_total",
    "cpu": "process_cpu_seconds_total",
}


def main() -> int:
    """Run the asked measurement and return the exit code: 1 if a figure was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    requests = {"load": 10_000, "triton": 1200, "worst": 0, "top1": 0}
    for name, count in requests.items():
        command = commands.add_parser(name)
        command.add_argument("bundle", type=Path)
        command.add_argument("--artefact", default="fp32-uint8")
        command.add_argument("--requests", type=int, default=count)
        command.add_argument("--clients", type=int, default=16 if name == "worst" else 64)
        command.add_argument("--instances", type=int, default=2)
        command.add_argument("--rounds", type=int, default=6)
        command.add_argument("--seconds", type=float, default=30.0)
        command.add_argument("--limit", type=int, help="at most so many images of each folder")
        if name == "top1":
            command.add_argument("folders", type=Path, nargs="+")
    claims = commands.add_parser("claims")
    claims.add_argument("--scale", type=float, default=1.0, help="of requests and seconds")
    claims.add_argument("--checkpoint", help="trained weights for the comparison of classes")
    claims.add_argument("--folders", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.command == "claims":
        result = all_claims(parser, arguments)
    else:
        result = MEASURES[arguments.command](arguments)
    print(json.dumps(result, indent=1))
    return int(not all(claim["met"] for claim in result["claims"]))


def claim(text: str, measured: str, met: bool) -> dict[str, Any]:
    """Return one claim as benchmarks print it."""
    return {"claim": text, "measured": measured, "met": bool(met)}


def all_claims(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return every claim on the server, measured on bundles made for it."""
    scale, claims = arguments.scale, []
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        large = exported(Path(name) / "van_b0", "van_b0", "--weights", "random")
        small = exported(Path(name) / "van_digits", "van_digits")
        wanted = [
            ["load", str(small), "--requests", str(round(10_000 * scale))],
            ["load", str(large), "--requests", str(round(2000 * scale))],
            ["triton", str(large), "--requests", str(round(1200 * scale))],
            ["worst", str(large), "--seconds", str(30 * scale)],
        ]
        if arguments.checkpoint:
            own = exported(Path(name) / "own", arguments.checkpoint, *OWN)
            wanted.append(["top1", str(own), *map(str, arguments.folders)])
        for words in wanted:
            start, result = time.monotonic(), MEASURES[words[0]](parser.parse_args(words))
            claims += result["claims"]
            note(f"{' '.join(words)}: {time.monotonic() - start:.0f} s\n{json.dumps(result)}")
    rows = [[entry["claim"], entry["measured"]] for entry in claims]
    notes = ["van_b0 at 224 pixels, preprocessing inside, random weights, two instances."]
    return {"columns": ["what", "measured"], "rows": rows, "claims": claims, "notes": notes}


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return whether every answer came and was right, and what the server itself cost."""
    bundle, count, clients = arguments.bundle, arguments.requests, arguments.clients
    requests, found = infer_requests(bundle, arguments.artefact, DISTINCT), Load()
    with ours(arguments) as (url, _):
        drive(url, requests, Load(), DISTINCT, clients)  # warm
        before, start = server_metrics(url), time.perf_counter()
        drive(url, requests, found, count, clients)
        seconds = time.perf_counter() - start
        spent = {name: value - before[name] for name, value in server_metrics(url).items()}
    own, lost = 1 - spent["infer_cpu"] / spent["cpu"], count - found.answered
    p50, p99 = np.percentile(found.latencies_ms, [50, 99])
    who = f"{Bundle.open(bundle).name}: {count:,} requests, {clients} clients"
    claims = [
        claim(
            f"{who}: none lost, none wrong",
            f"{lost} lost, {found.wrong} wrong, in {seconds:.0f} s",
            not lost and not found.wrong,
        )
    ]
    if Bundle.open(bundle).manifest.preprocessing.image_size >= 224:  # else inference is nothing
        text = "of the processor's time outside inference <= 5 %"
        claims.append(claim(f"{who}: {text}", f"{100 * own:.2f} %", own <= 0.05))
    return {
        "images_per_s": round(found.answered / seconds, 1),
        "cpu_ms_an_image": round(1e3 * spent["cpu"] / max(found.answered, 1), 3),
        "own_cpu_share": round(own, 4),
        "mean_batch": round(spent["rows"] / max(spent["batches"], 1), 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "worst_relative_difference": found.worst,
        "statuses": dict(found.statuses),
        "claims": claims,
    }


def triton(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return this server's throughput over a real Triton's, round by round."""
    requests = infer_requests(arguments.bundle, arguments.artefact, DISTINCT)
    share, rates = arguments.requests // (2 * arguments.rounds), {"ours": [], "triton": []}
    found = Load()
    with (
        tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name,
        contextlib.ExitStack() as stack,
    ):
        package, how = Path(name) / "package", {"instances": arguments.instances, "threads": 1}
        how |= {"backend": "python", "triton_release": "24.10", "triton_python": PYTHON}
        open_bundle(arguments.bundle).package(package, artefacts=(arguments.artefact,), **how)
        running = stack.enter_context(triton_running(package / "models", Path(name) / "server"))
        urls = {"ours": stack.enter_context(ours(arguments))[0], "triton": f"http://{running.http}"}
        for url in urls.values():
            drive(url, requests, Load(), DISTINCT, arguments.clients)
        for index in range(arguments.rounds):
            for server in sorted(urls, reverse=bool(index % 2)):
                start = time.perf_counter()
                drive(urls[server], requests, found, share, arguments.clients)
                rates[server].append(share / (time.perf_counter() - start))
            note(f"{rates['ours'][-1]:.1f} images/s here, {rates['triton'][-1]:.1f} in Triton")
    low, ratio, high = np.percentile(np.divide(rates["ours"], rates["triton"]), [25, 50, 75])
    wrong = found.wrong + found.statuses.total() - found.answered
    measured = f"{ratio:.2f} x (quartiles {low:.2f} to {high:.2f}), {wrong} wrong answers"
    text = "throughput >= 1.0 x Triton's Python backend, equal threads, instances and batching"
    medians = {server: round(float(np.median(values)), 1) for server, values in rates.items()}
    return {"images_per_s": medians, "claims": [claim(text, measured, ratio >= 1 and not wrong)]}


def worst(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how long ``/v2/health/live`` took, and the memory, while the worst bodies came."""
    bodies, latencies, peak = worst_requests(arguments.bundle, arguments.artefact), [], 0.0
    usual = infer_requests(arguments.bundle, arguments.artefact, DISTINCT)
    with ours(arguments) as (url, pid):
        drive(url, usual, Load(), 2 * DISTINCT, DISTINCT)  # full batches in every instance
        idle = memory_mib(pid)
        attacking = multiprocessing.get_context("spawn").Process(
            target=attack, args=(url, bodies, arguments.clients), daemon=True
        )
        attacking.start()
        time.sleep(3)
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            urllib.request.urlopen(f"{url}/v2/health/live", timeout=60).close()
            latencies.append(1e3 * (time.perf_counter() - start))
            peak = max(peak, memory_mib(pid))
            time.sleep(0.02)
        attacking.kill()
        attacking.join()
    p50, p99, most = np.percentile(latencies, [50, 99, 100])
    live = f"p50 {p50:.0f}, p99 {p99:.0f}, most {most:.0f} ms of {len(latencies)}"
    more = f"{peak - idle:.0f} MiB above {idle:.0f}"
    return {
        "claims": [
            claim(f"worst bodies: /v2/health/live at p99 <= {LIVE_MS} ms", live, p99 <= LIVE_MS),
            claim(f"worst bodies: memory <= {OWN_MIB} MiB", more, peak - idle <= OWN_MIB),
        ],
    }


def attack(url: str, bodies: list[bytes], clients: int) -> None:
    """Send the worst bodies from so many clients at once, until this process is ended."""
    host, port = url.removeprefix("http://").split(":")

    def client(first: int) -> None:
        for raw in itertools.islice(itertools.cycle(bodies), first, None):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 30) as c:
                c.sendall(raw)
                c.recv(65536)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def worst_requests(folder: Path, artefact: str) -> list[bytes]:
    """Return requests that cost the most to refuse or to answer, by what was found."""
    network, mib = Network(Bundle.open(folder), artefact), 2**20
    given, infer = network.input, f"/v2/models/{served_name(network.bundle, artefact)}/infer"
    described = {"name": given.name, "datatype": DATATYPES[given.dtype]}
    shape = [network.max_batch, *given.shape]
    size = int(np.prod(shape)) * np.dtype(given.dtype).itemsize
    tensor = {**described, "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    opening = json.dumps({"inputs": [{**described, "shape": [1]}]}).removesuffix("}]}")

    def listed(item: str, count: int = 0) -> bytes:
        count = count or (mib - 1000) // (len(item) + 1)
        return f'{opening}, "data": [{",".join([item] * count)}]}}]}}'.encode()

    side = (7000).to_bytes(4, "big")
    rows = zlib.compress(bytes(7000 * (4 * 7000 + 1)), 9)
    header = side + side + bytes([8, 6, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
    return [
        *(post(infer, listed(item)) for item in ("[]", "{}", '{"a":[1]}', "1.5", "7", '"ab"')),
        post(infer, f'{opening}, "data": '.encode() + b"[" * (mib - 1000)),
        post(infer, listed(f'"{"x" * 100_000}"' + ",1" * 1000, 1)),
        post(infer, gzip.compress(bytes(32 * mib)), "Content-Encoding: gzip"),
        post(infer, head + bytes(size), f"Inference-Header-Content-Length: {len(head)}"),
        post("/predict", png),
        post("/predict", b"\r\n--" * (8 * mib), "Content-Type: multipart/form-data; boundary=x"),
        post("/predict", bytes(32 * mib)),
        post("/predict", b"1\r\nx\r\n" * 200_000, "Transfer-Encoding: chunked", length=False),
        live + b"a: b\r\n" * 200_000,
        (live + b"\r\n") * 3000,
    ]


def post(path: str, body: bytes, header: str = "X: y", *, length: bool = True) -> bytes:
    """Return a whole POST request whose connection ends with it."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", header]
    lines += [f"Content-Length: {len(body)}"] * length
    return "\r\n".join([*lines, "", ""]).encode() + body


def top1(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how many files got another top-1 from bytes than from timm's floats."""
    bundle = Bundle.open(arguments.bundle)
    paths = [p for folder in arguments.folders for p in find_images(folder)[: arguments.limit]]
    changed = 0
    with Network(bundle, "fp32") as plain, Network(bundle, arguments.artefact) as embedded:
        transform = plain.preprocessing.transform()
        for start in range(0, len(paths), 16):
            images = [open_image(path) for path in paths[start : start + 16]]
            floats = np.stack([transform(image).numpy() for image in images])
            pixels = np.stack([pixels_from_image(i, plain.preprocessing) for i in images])
            outputs = (plain.run(floats), embedded.run(embedded.prepare(pixels)))
            first, second = (found["logits"].argmax(axis=1) for found in outputs)
            changed += int((first != second).sum())
    measured = f"{len(paths) - changed:,} of {len(paths):,} images"
    text = "bytes in: the same top-1 as the file pipeline"
    return {"claims": [claim(text, measured, bool(paths) and not changed)]}


MEASURES = {"load": load, "triton": triton, "worst": worst, "top1": top1}


@contextlib.contextmanager
def ours(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Serve the bundle with one thread an instance; give its address and process."""
    words = ("--artefact", arguments.artefact, "--threads", "1", "--no-compare")
    server, url = started(arguments.bundle, *words, "--instances", str(arguments.instances))
    try:
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(60)


def server_metrics(url: str) -> dict[str, float]:
    """Return how many batches ran, their rows, and processor times in seconds."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    pattern = r"^%s(?:{.*})? (.*)$"
    return {
        name: sum(float(value) for value in re.findall(pattern % metric, text, re.MULTILINE))
        for name, metric in METRICS.items()
    }


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process and of those below it."""
    server, total = psutil.Process(pid), 0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def note(text: str) -> None:
    """Write progress to standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
