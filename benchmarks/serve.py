"""Benchmark the server: its overhead, a comparison with Triton, and the most expensive requests.

    python -m benchmarks.serve load BUNDLE --requests 10000 --clients 64
    python -m benchmarks.serve triton BUNDLE --requests 1200
    python -m benchmarks.serve worst BUNDLE --seconds 30
    python -m benchmarks.serve              # everything, on newly exported bundles

``load`` sends requests with one image from concurrent clients in the binary protocol, and compares
each response with the artifact's own outputs. With one thread per instance, all inference runs in
the batch threads, whose processor time the server measures; the rest is overhead.

``triton`` sends the same requests alternately to this server and to a real Triton with the Python
backend (:mod:`reliability.tritonserver`), with equal threads, instances and batching.

``worst`` sends the most expensive known requests from 16 clients in another process, and measures
``/v2/health/live`` meanwhile; the memory is that of the server and its processes, above their
memory after full batches of valid requests.

Everything is ``load`` with 10,000 requests on van_digits and with 2,000 on van_b0 at 224, and
``triton`` and ``worst`` on van_b0. ``python -m reliability --only requests`` sends 10,000 mutated
requests.

The result is one JSON document on standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import socket
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.table import Table
from reliability.load import LoadResult, infer_requests, run_export, send_requests, start_server
from reliability.tritonserver import PYTHON, run_tritonserver
from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle
from van_deploy.runners.network import Network
from van_deploy.serve.triton import DATATYPES, served_name

DISTINCT, ROUNDS, ATTACKERS, INSTANCES = 64, 6, 16, 2


def main() -> int:
    """Run the requested benchmarks and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("measure", nargs="?", choices=list(MEASURES))
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--artifact", default="fp32-uint8")
    parser.add_argument("--requests", type=int, help="10,000, or 1,200 for triton")
    parser.add_argument("--clients", type=int, default=64, help="of load and triton")
    parser.add_argument("--seconds", type=float, default=30.0, help="of worst")
    args = parser.parse_args()
    if args.measure and args.bundle is None:
        parser.error("give a bundle")
    table = Table(("measure", "figures"))
    table.notes.append("Embedded preprocessing, two instances of one thread, random weights.")
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        runs = [(args.measure, args.bundle, args.requests)]
        if not args.measure:
            small = run_export(Path(name) / "van_digits", "van_digits")
            large = run_export(Path(name) / "van_b0", "van_b0", "--weights", "random")
            runs = [("load", small, 10_000), ("load", large, 2000)]
            runs += [("triton", large, 1200), ("worst", large, 0)]
        for measure, args.bundle, args.requests in runs:
            start = time.monotonic()
            MEASURES[measure](args, table)
            print(f"{measure}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return table.print_json()


def load(args: argparse.Namespace, table: Table) -> None:
    """Measure throughput and overhead, and count lost and wrong responses."""
    count, result = args.requests or 10_000, LoadResult()
    requests = infer_requests(args.bundle, args.artifact, DISTINCT)
    with run_server(args) as (url, _):
        send_requests(url, requests, LoadResult(), DISTINCT, args.clients)  # warm-up
        before, start = server_metrics(url), time.perf_counter()
        send_requests(url, requests, result, count, args.clients)
        seconds = time.perf_counter() - start
        delta = {name: value - before[name] for name, value in server_metrics(url).items()}
    rows, batches = (delta[f"van_deploy_batch_rows_{name}"] for name in ("sum", "count"))
    cpu, infer = delta["process_cpu_seconds_total"], delta["van_deploy_infer_cpu_seconds_total"]
    manifest = Bundle.open(args.bundle).manifest
    p50, p99 = np.percentile(result.latencies_ms, [50, 99])
    table.row(
        f"{manifest.name} at {manifest.preprocessing.image_size} px, {count:,} requests, "
        f"{args.clients} clients",
        f"{result.answered / seconds:.1f} images/s, mean batch {rows / batches:.1f}, latency p50 "
        f"{p50:.0f} ms and p99 {p99:.0f} ms, {1e3 * cpu / count:.2f} ms of processor time an "
        f"image, {100 * (1 - infer / cpu):.2f} % of it outside inference, "
        f"{count - result.answered} lost, {result.wrong} wrong, largest relative difference "
        f"{result.worst:.1e}",
    )


def triton(args: argparse.Namespace, table: Table) -> None:
    """Measure the ratio of this server's throughput to Triton's in alternating rounds."""
    requests, result = infer_requests(args.bundle, args.artifact, DISTINCT), LoadResult()
    share, rates = (args.requests or 1200) // (2 * ROUNDS), {"van-deploy": [], "triton": []}
    with (
        tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name,
        contextlib.ExitStack() as stack,
    ):
        package, options = Path(name) / "package", {"instances": INSTANCES, "threads": 1}
        options |= {"backend": "python", "triton_release": "24.10", "triton_python": PYTHON}
        open_bundle(args.bundle).package(package, artifacts=(args.artifact,), **options)
        running = stack.enter_context(run_tritonserver(package / "models", Path(name) / "server"))
        url, _ = stack.enter_context(run_server(args))
        urls = {"van-deploy": url, "triton": f"http://{running.http}"}
        for url in urls.values():
            send_requests(url, requests, LoadResult(), DISTINCT, args.clients)
        for index in range(ROUNDS):
            for server in sorted(urls, reverse=bool(index % 2)):
                start = time.perf_counter()
                send_requests(urls[server], requests, result, share, args.clients)
                rates[server].append(share / (time.perf_counter() - start))
            own, other = (values[-1] for values in rates.values())
            figures = f"{own:.1f} images/s, Triton {other:.1f} images/s"
            table.row(f"compared with Triton, round {index + 1}", figures)
    low, ratio, high = np.percentile(np.divide(rates["van-deploy"], rates["triton"]), [25, 50, 75])
    wrong = result.wrong + len(result.latencies_ms) - result.answered
    figures = f"{ratio:.2f} x (quartiles {low:.2f} to {high:.2f}), {wrong} wrong responses"
    table.row("throughput / Triton's Python backend, same threads, instances, batching", figures)


def worst(args: argparse.Namespace, table: Table) -> None:
    """Measure ``/v2/health/live`` and the server's memory under the most expensive requests."""
    bodies, latencies, peak = expensive_requests(args.bundle, args.artifact), [], 0.0
    valid = infer_requests(args.bundle, args.artifact, DISTINCT)
    with run_server(args) as (url, pid):
        # Full batches in every instance.
        send_requests(url, valid, LoadResult(), 2 * DISTINCT, DISTINCT)
        idle = memory_mib(pid)
        attacking = multiprocessing.get_context("spawn").Process(
            target=attack, args=(url, bodies), daemon=True
        )
        attacking.start()
        time.sleep(3)
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            urllib.request.urlopen(f"{url}/v2/health/live", timeout=60).close()
            latencies.append(1e3 * (time.perf_counter() - start))
            peak = max(peak, memory_mib(pid))
            time.sleep(0.02)
        attacking.kill()
        attacking.join()
    p50, p99, largest = np.percentile(latencies, [50, 99, 100])
    table.row(
        f"{ATTACKERS} clients with the most expensive requests",
        f"/v2/health/live p50 {p50:.0f}, p99 {p99:.0f}, max {largest:.0f} ms of {len(latencies)}; "
        f"memory {peak - idle:.0f} MiB above {idle:.0f}",
    )


def attack(url: str, bodies: list[bytes]) -> None:
    """Send the most expensive requests from concurrent clients until the process is killed."""
    host, port = url.removeprefix("http://").split(":")

    def client(first: int) -> None:
        for raw in itertools.islice(itertools.cycle(bodies), first, None):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 30) as c:
                c.sendall(raw)
                c.recv(65536)

    with ThreadPoolExecutor(ATTACKERS) as pool:
        list(pool.map(client, range(ATTACKERS)))


def expensive_requests(folder: Path, artifact: str) -> list[bytes]:
    """Return the known requests that are the most expensive to refuse or to answer."""
    network, mib = Network(Bundle.open(folder), artifact), 2**20
    spec, infer = network.input, f"/v2/models/{served_name(network.bundle, artifact)}/infer"
    description = {"name": spec.name, "datatype": DATATYPES[spec.dtype]}
    shape = [network.max_batch, *spec.shape]
    size = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
    tensor = {**description, "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    opening = json.dumps({"inputs": [{**description, "shape": [1]}]}).removesuffix("}]}")

    def json_list(item: str, count: int = 0) -> bytes:
        count = count or (mib - 1000) // (len(item) + 1)
        return f'{opening}, "data": [{",".join([item] * count)}]}}]}}'.encode()

    png = io.BytesIO()  # 196 MB of pixels in a few kilobytes
    Image.new("RGBA", (7000, 7000)).save(png, "PNG", compress_level=9)
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
    return [
        *(post(infer, json_list(item)) for item in ("[]", "{}", '{"a":[1]}', "1.5", "7", '"ab"')),
        post(infer, f'{opening}, "data": '.encode() + b"[" * (mib - 1000)),
        post(infer, json_list(f'"{"x" * 100_000}"' + ",1" * 1000, 1)),
        post(infer, head + bytes(size), f"Inference-Header-Content-Length: {len(head)}"),
        post("/predict", png.getvalue()),
        post("/predict", b"\r\n--" * (8 * mib), "Content-Type: multipart/form-data; boundary=x"),
        post("/predict", bytes(32 * mib)),
        post("/predict", b"1\r\nx\r\n" * 200_000, "Transfer-Encoding: chunked", length=False),
        live + b"a: b\r\n" * 200_000,
        (live + b"\r\n") * 3000,
    ]


def post(path: str, body: bytes, header: str = "X: y", *, length: bool = True) -> bytes:
    """Return the bytes of a POST request that closes its connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", header]
    lines += [f"Content-Length: {len(body)}"] * length
    return "\r\n".join([*lines, "", ""]).encode() + body


MEASURES = {"load": load, "triton": triton, "worst": worst}


@contextlib.contextmanager
def run_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Serve the bundle with one thread per instance; yield its URL and process id."""
    options = ("--artifact", args.artifact, "--threads", "1", "--no-compare")
    server, url = start_server(args.bundle, *options, "--instances", str(INSTANCES))
    try:
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(60)


def server_metrics(url: str) -> Counter[str]:
    """Return the server's metrics by name, summed over their labels."""
    metrics = Counter[str]()
    with urllib.request.urlopen(f"{url}/metrics") as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for sample in family.samples:
                metrics[sample.name] += sample.value
    return metrics


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process and its descendants."""
    server, total = psutil.Process(pid), 0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
