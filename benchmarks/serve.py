"""Measure the server: against a real Triton, against its own inference, under the worst bodies.

    python -m benchmarks.serve load BUNDLE --requests 10000 --clients 64
    python -m benchmarks.serve triton BUNDLE --requests 2000
    python -m benchmarks.serve worst BUNDLE --seconds 30
    python -m benchmarks.serve top1 BUNDLE FOLDER...
    python -m benchmarks.serve claims       # all of it, on a van_b0 of its own, as claims

``load`` sends requests of one image over so many connections, in the binary protocol, and
compares each answer with the artefact's own. With one thread an instance all of inference is in
the threads that run batches, whose processor time the server counts: the rest of its processor
time is its own.

``triton`` gives the same requests in turns to this server and to a real Triton with the Python
backend (:mod:`reliability.tritonserver`), with equal threads, instances and batching.

``worst`` lets 16 clients in a process of their own send the worst bodies known, again and again,
and asks ``/v2/health/live`` meanwhile; the memory is that of the server and its processes.

``top1`` compares the whole way from each file: timm's transform and the plain graph against
bytes and the graph with preprocessing inside.

The result is one JSON document on standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reliability.requests import started
from reliability.tritonserver import PYTHON, triton_running
from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle
from van_deploy.data import check_images, find_images, open_image
from van_deploy.model.pixels import pixels_from_image
from van_deploy.runners.network import Network
from van_deploy.serve.triton_model import DATATYPES, served_name

DISTINCT = 64
TOLERANCE = 1e-4  # of the largest logit: what FP32 artefacts are allowed everywhere else
LIVE_S = 0.2
OWN_MIB = 900  # see docs/serving.md: what is held, parsed and decoded at once
OWN = (  # the preprocessing of the checkpoint beside this repository, from its README
    *("--image-size", "64", "--crop-pct", "1.0"),
    *("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
)


@dataclass
class Load:
    """What the clients saw."""

    answered: int = 0
    wrong: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    worst_difference: float = 0.0
    failures: list[str] = field(default_factory=list)


@dataclass
class Requests:
    """Images as raw requests, and what the artefact itself answers."""

    raw: list[bytes]
    expected: npt.NDArray[np.float32]


def main() -> int:
    """Run the asked measurement and return the exit code: 1 if a figure was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("load", "triton", "worst", "top1"):
        command = commands.add_parser(name)
        command.add_argument("bundle", type=Path)
        command.add_argument("--artefact", default="fp32-uint8")
        command.add_argument("--requests", type=int, default=10_000 if name == "load" else 2000)
        command.add_argument("--clients", type=int, default=16 if name == "worst" else 64)
        command.add_argument("--instances", type=int, default=2)
        command.add_argument("--rounds", type=int, default=10)
        command.add_argument("--seconds", type=float, default=30.0)
        command.add_argument("--limit", type=int, help="at most so many images of each folder")
        if name == "top1":
            command.add_argument("folders", type=Path, nargs="+")
    claims = commands.add_parser("claims")
    claims.add_argument("--checkpoint", help="trained weights for the comparison of classes")
    claims.add_argument("--folders", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    measure = {"load": load, "triton": triton, "worst": worst, "top1": top1}
    if arguments.command == "claims":
        result = all_claims(parser, arguments)
    else:
        result = measure[arguments.command](arguments)
        result["passed"] = all(claim["met"] for claim in result["claims"])
    print(json.dumps(result, indent=1))
    return int(not all(claim["met"] for claim in result["claims"]))


def claim(text: str, measured: str, met: bool) -> dict[str, Any]:
    """Return one claim as benchmarks print it."""
    return {"claim": text, "measured": measured, "met": bool(met)}


def all_claims(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return every claim on the server, measured on bundles made for it."""
    claims = []
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        bundle = exported(Path(folder) / "van_b0", "van_b0", "--weights", "random")
        for command, measure in (("load", load), ("triton", triton), ("worst", worst)):
            claims += measure(parser.parse_args([command, str(bundle)]))["claims"]
        if arguments.checkpoint:
            bundle = exported(Path(folder) / "own", arguments.checkpoint, *OWN)
            words = ["top1", str(bundle), *map(str, arguments.folders)]
            claims += top1(parser.parse_args(words))["claims"]
    rows = [[entry["claim"], entry["measured"]] for entry in claims]
    notes = ["van_b0 at 224 pixels, preprocessing inside, random weights, two instances."]
    return {"columns": ["what", "measured"], "rows": rows, "claims": claims, "notes": notes}


def exported(folder: Path, *words: str) -> Path:
    """Return a bundle whose artefacts also take bytes."""
    command = [sys.executable, "-m", "van_deploy", "export", *words, "--output", str(folder)]
    command += ["--embed-preprocess", "uint8", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return whether every answer came and was right, and what the server itself cost."""
    requests, found = requests_of(arguments), Load()
    with ours(arguments) as (url, _):
        asyncio.run(drive(url, requests, found, DISTINCT, arguments.clients))  # warm
        found, before, start = Load(), server_metrics(url), time.perf_counter()
        asyncio.run(drive(url, requests, found, arguments.requests, arguments.clients))
        seconds = time.perf_counter() - start
        spent = {name: value - before[name] for name, value in server_metrics(url).items()}
    own = 1 - spent["infer_cpu"] / spent["cpu"]
    lost = arguments.requests - found.answered
    p50, p99 = np.percentile(found.latencies_ms, [50, 99])
    clients = f"{arguments.requests:,} requests, {arguments.clients} clients"
    return {
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "images_per_s": round(found.answered / seconds, 1),
        "cpu_ms_an_image": round(1e3 * spent["cpu"] / found.answered, 3),
        "own_cpu_share": round(own, 4),
        "mean_batch": round(spent["rows"] / spent["batches"], 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "worst_relative_difference": found.worst_difference,
        "statuses": dict(found.statuses),
        "failures": found.failures[:5],
        "claims": [
            claim(
                f"{clients}: none lost, none wrong",
                f"{lost} lost, {found.wrong} wrong",
                not lost and not found.wrong,
            ),
            claim("processor time outside inference <= 5 %", f"{100 * own:.2f} %", own <= 0.05),
        ],
    }


def triton(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return this server's throughput over a real Triton's, round by round."""
    requests, share = requests_of(arguments), arguments.requests // arguments.rounds
    rates: dict[str, list[float]] = {"ours": [], "triton": []}
    found = {name: Load() for name in rates}
    with (
        tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name,
        contextlib.ExitStack() as stack,
    ):
        package = Path(name) / "package"
        options = {"instances": arguments.instances, "threads": 1, "triton_python": PYTHON}
        open_bundle(arguments.bundle).package(
            package,
            artefacts=(arguments.artefact,),
            backend="python",
            triton_release="24.10",
            **options,
        )
        running = stack.enter_context(triton_running(package / "models", Path(name) / "server"))
        urls = {"ours": stack.enter_context(ours(arguments))[0], "triton": f"http://{running.http}"}
        for url in urls.values():
            asyncio.run(drive(url, requests, Load(), DISTINCT, arguments.clients))
        for index in range(arguments.rounds):
            for server in sorted(urls, reverse=bool(index % 2)):
                start = time.perf_counter()
                asyncio.run(drive(urls[server], requests, found[server], share, arguments.clients))
                rates[server].append(share / (time.perf_counter() - start))
            note(f"{rates['ours'][-1]:.1f} images/s here, {rates['triton'][-1]:.1f} in Triton")
    low, ratio, high = np.percentile(np.divide(rates["ours"], rates["triton"]), [25, 50, 75])
    wrong = sum(seen.wrong + seen.statuses.total() - seen.answered for seen in found.values())
    measured = f"{ratio:.2f} x (quartiles {low:.2f} to {high:.2f}), {wrong} wrong answers"
    text = "throughput >= 1.0 x Triton's Python backend, equal threads, instances and batching"
    medians = {name: round(float(np.median(values)), 1) for name, values in rates.items()}
    return {"images_per_s": medians, "claims": [claim(text, measured, ratio >= 1 and not wrong)]}


def worst(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how long ``/v2/health/live`` took, and the memory, while the worst bodies came."""
    bundle = Bundle.open(arguments.bundle)
    latencies, peak = [], 0
    with ours(arguments) as (url, pid):
        idle = memory_of(pid)
        process = multiprocessing.get_context("spawn").Process(
            target=attack, args=(url, bundle, arguments.artefact, arguments.clients), daemon=True
        )
        process.start()
        time.sleep(3)
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            urllib.request.urlopen(f"{url}/v2/health/live", timeout=60).close()
            latencies.append(time.perf_counter() - start)
            peak = max(peak, memory_of(pid))
            time.sleep(0.02)
        process.kill()
        process.join()
    p50, p99 = np.percentile(latencies, [50, 99])
    more = (peak - idle) / 2**20
    return {
        "asked": len(latencies),
        "live_ms": {
            "p50": round(1e3 * p50, 1),
            "p99": round(1e3 * p99, 1),
            "max": round(1e3 * max(latencies), 1),
        },
        "memory_mib": {"idle": idle >> 20, "peak": peak >> 20},
        "claims": [
            claim("/v2/health/live within 200 ms at p99", f"{1e3 * p99:.0f} ms", p99 <= LIVE_S),
            claim(f"memory within {OWN_MIB} MiB above idle", f"{more:.0f} MiB", more <= OWN_MIB),
        ],
    }


def attack(url: str, bundle: Bundle, artefact: str, clients: int) -> None:
    """Send the worst bodies from so many clients at once, until this process is ended."""
    from concurrent.futures import ThreadPoolExecutor

    host, port = url.removeprefix("http://").split(":")
    bodies = worst_requests(bundle, artefact)

    def client(first: int) -> None:
        for raw in itertools.islice(itertools.cycle(bodies), first, None):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 30) as c:
                c.sendall(raw)
                c.recv(65536)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def worst_requests(bundle: Bundle, artefact: str) -> list[bytes]:
    """Return requests that cost the most to refuse or to answer, by what was found."""
    network = Network(bundle, artefact)
    infer, tensor = f"/v2/models/{served_name(bundle, artefact)}/infer", network.input
    opening = json.dumps({"inputs": [{"name": tensor.name, "shape": [1], "datatype": "UINT8"}]})
    opening = opening.removesuffix("}]}") + ', "data": '
    mebibyte = 2**20 - 1000

    def listed(item: str) -> bytes:
        return f"{opening}[{','.join([item] * (mebibyte // (len(item) + 1)))}]}}]}}".encode()

    size = network.max_batch * int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
    shape = [network.max_batch, *tensor.shape]
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": tensor.name,
                    "shape": shape,
                    "datatype": DATATYPES[tensor.dtype],
                    "parameters": {"binary_data_size": size},
                }
            ]
        }
    ).encode()
    side = (7000).to_bytes(4, "big")
    header, rows = (
        side + side + bytes([8, 6, 0, 0, 0]),
        zlib.compress(bytes(7000 * (4 * 7000 + 1)), 9),
    )
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )
    form = b"multipart/form-data; boundary=x"
    return [
        *(request(infer, listed(item)) for item in ("[]", "{}", '{"a":[1]}', "1.5", "7", '"ab"')),
        request(infer, opening.encode() + b"[" * mebibyte),
        request(infer, f'{opening}["{"x" * 100_000}"{",1" * 1000}]}}]}}'.encode()),
        request(infer, gzip.compress(bytes(32 * 2**20)), b"Content-Encoding: gzip\r\n"),
        request(infer, head + bytes(size), b"Inference-Header-Content-Length: %d\r\n" % len(head)),
        request("/predict", png),
        request("/predict", b"\r\n--" * (8 * 2**20), b"Content-Type: %b\r\n" % form),
        request("/predict", bytes(32 * 2**20)),
        request(
            "/predict", b"1\r\nx\r\n" * 200_000, b"Transfer-Encoding: chunked\r\n", length=False
        ),
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 200_000,
        b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 3000,
    ]


def request(path: str, body: bytes, headers: bytes = b"", *, length: bool = True) -> bytes:
    """Return a whole POST request whose connection ends with it."""
    size = b"Content-Length: %d\r\n" % len(body) if length else b""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
    return head + headers + size + b"\r\n" + body


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
            tops = [
                plain.run(floats)["logits"].argmax(axis=1),
                embedded.run(embedded.prepare(pixels))["logits"].argmax(axis=1),
            ]
            changed += int((tops[0] != tops[1]).sum())
    measured = f"{len(paths) - changed:,} of {len(paths):,} images"
    text = "bytes in: the same top-1 as the file pipeline"
    return {"claims": [claim(text, measured, bool(paths) and not changed)]}


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


def requests_of(arguments: argparse.Namespace) -> Requests:
    """Return distinct images as raw requests of the binary protocol."""
    bundle = Bundle.open(arguments.bundle)
    with Network(bundle, arguments.artefact, threads=1) as network:
        images = check_images(bundle.name, network.preprocessing, DISTINCT, None)
        inputs = network.prepare(images.values)
        expected = [network.run(inputs[i : i + 1])["logits"] for i in range(DISTINCT)]
        given = network.input
    name, raw = served_name(bundle, arguments.artefact), []
    for row in inputs:
        values = row[None].tobytes()
        tensor = {"name": given.name, "shape": [1, *row.shape], "datatype": DATATYPES[given.dtype]}
        tensor["parameters"] = {"binary_data_size": len(values)}
        wanted = [{"name": "logits", "parameters": {"binary_data": True}}]
        head = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
        lines = [f"POST /v2/models/{name}/infer HTTP/1.1", "Host: x"]
        lines += [f"Content-Length: {len(head) + len(values)}"]
        lines += [f"Inference-Header-Content-Length: {len(head)}", "", ""]
        raw.append("\r\n".join(lines).encode() + head + values)
    return Requests(raw, np.concatenate(expected))


async def drive(url: str, requests: Requests, found: Load, count: int, clients: int) -> None:
    """Send so many requests from so many connections and compare each answer."""
    numbers = iter(range(count))
    host, port = url.removeprefix("http://").split(":")

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in numbers:
            which = number % len(requests.raw)
            start = time.perf_counter()
            writer.write(requests.raw[which])
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
            found.latencies_ms.append(1e3 * (time.perf_counter() - start))
            status = int(head[0].split()[1])
            found.statuses[status] += 1
            if status == 200:
                compare(
                    found,
                    body[int(headers["inference-header-content-length"]) :],
                    requests.expected[which],
                )
            else:
                found.failures.append(body.decode(errors="replace"))
        writer.close()

    results = await asyncio.gather(*(client() for _ in range(clients)), return_exceptions=True)
    found.failures += [repr(result) for result in results if isinstance(result, BaseException)]


def compare(found: Load, tail: bytes, expected: npt.NDArray[np.float32]) -> None:
    """Count one answer, and whether it is the artefact's own."""
    found.answered += 1
    logits = np.frombuffer(tail, np.float32)
    if logits.shape != expected.shape:
        found.wrong += 1
        return
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    found.worst_difference = max(found.worst_difference, difference)
    found.wrong += not difference <= TOLERANCE


def server_metrics(url: str) -> dict[str, float]:
    """Return how many batches ran, their rows, and processor times in seconds."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()

    def total(name: str) -> float:
        starts = (name + "{", name + " ")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(starts))

    return {
        "rows": total("van_deploy_batch_rows_sum"),
        "batches": total("van_deploy_batch_rows_count"),
        "infer_cpu": total("van_deploy_infer_cpu_seconds_total"),
        "cpu": total("process_cpu_seconds_total"),
    }


def memory_of(pid: int) -> int:
    """Return the resident bytes of a process and of those below it."""
    pages = 0
    for process in [pid, *children_of(pid)]:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def children_of(pid: int) -> list[int]:
    """Return the processes below one, at any depth."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            found += [child, *children_of(child)]
    return found


def note(text: str) -> None:
    """Write progress to standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
