"""Measure the server: against a real Triton, against its own inference, under the worst bodies.

    python -m benchmarks.serve load BUNDLE --requests 10000 --clients 64
    python -m benchmarks.serve triton BUNDLE --requests 1200
    python -m benchmarks.serve worst BUNDLE --seconds 30
    python -m benchmarks.serve              # all of it, on bundles of its own

``load`` sends requests of one image over so many connections, in the binary protocol, and
compares each answer with the artifact's own. With one thread an instance all of inference is in
the threads that run batches, whose processor time the server counts: the rest of its processor
time is its own.

``triton`` gives the same requests in turns to this server and to a real Triton with the Python
backend (:mod:`reliability.tritonserver`), with equal threads, instances and batching.

``worst`` lets 16 clients in a process of their own send the worst bodies known, again and again,
and asks ``/v2/health/live`` meanwhile; the memory is that of the server and its processes, above
what they have after full batches of sound requests.

All of it is ``load`` with 10,000 requests on van_digits and with 2,000 on van_b0 at 224, and
``triton`` and ``worst`` on van_b0. ``python -m reliability --only requests`` sends the
10,000 spoiled requests.

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
from reliability.load import Load, drive, export_test_bundle, infer_requests, started
from reliability.tritonserver import PYTHON, triton_running
from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle
from van_deploy.runners.network import Network
from van_deploy.serve.triton import DATATYPES, served_name

DISTINCT, ROUNDS, ATTACKERS, INSTANCES = 64, 6, 16, 2


def main() -> int:
    """Run the asked measurement and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("measure", nargs="?", choices=list(MEASURES))
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--artifact", default="fp32-uint8")
    parser.add_argument("--requests", type=int, help="10,000, or 1,200 for triton")
    parser.add_argument("--clients", type=int, default=64, help="of load and triton")
    parser.add_argument("--seconds", type=float, default=30.0, help="of worst")
    given = parser.parse_args()
    if given.measure and given.bundle is None:
        parser.error("name a bundle")
    table = Table(("measure", "figures"))
    table.notes.append("Preprocessing inside, two instances of one thread, random weights.")
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        wanted = [(given.measure, given.bundle, given.requests)]
        if not given.measure:
            small = export_test_bundle(Path(name) / "van_digits", "van_digits")
            large = export_test_bundle(Path(name) / "van_b0", "van_b0", "--weights", "random")
            wanted = [("load", small, 10_000), ("load", large, 2000)]
            wanted += [("triton", large, 1200), ("worst", large, 0)]
        for measure, given.bundle, given.requests in wanted:
            start = time.monotonic()
            MEASURES[measure](given, table)
            print(f"{measure}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return table.print_json()


def load(given: argparse.Namespace, table: Table) -> None:
    """Measure whether every answer comes and is right, and what the server itself costs."""
    count, found = given.requests or 10_000, Load()
    requests = infer_requests(given.bundle, given.artifact, DISTINCT)
    with ours(given) as (url, _):
        drive(url, requests, Load(), DISTINCT, given.clients)  # warm
        before, start = server_metrics(url), time.perf_counter()
        drive(url, requests, found, count, given.clients)
        seconds = time.perf_counter() - start
        spent = {name: value - before[name] for name, value in server_metrics(url).items()}
    rows, batches = (spent[f"van_deploy_batch_rows_{what}"] for what in ("sum", "count"))
    cpu, infer = spent["process_cpu_seconds_total"], spent["van_deploy_infer_cpu_seconds_total"]
    manifest = Bundle.open(given.bundle).manifest
    p50, p99 = np.percentile(found.latencies_ms, [50, 99])
    table.row(
        f"{manifest.name} at {manifest.preprocessing.image_size} px, {count:,} requests, "
        f"{given.clients} clients",
        f"{found.answered / seconds:.1f} images/s, mean batch {rows / batches:.1f}, latency p50 "
        f"{p50:.0f} ms and p99 {p99:.0f} ms, {1e3 * cpu / count:.2f} ms of processor time an "
        f"image, {100 * (1 - infer / cpu):.2f} % of it outside inference, "
        f"{count - found.answered} lost, {found.wrong} wrong, largest relative difference "
        f"{found.worst:.1e}",
    )


def triton(given: argparse.Namespace, table: Table) -> None:
    """Measure this server's throughput over a real Triton's, round by round."""
    requests, found = infer_requests(given.bundle, given.artifact, DISTINCT), Load()
    share, rates = (given.requests or 1200) // (2 * ROUNDS), {"ours": [], "triton": []}
    with (
        tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name,
        contextlib.ExitStack() as stack,
    ):
        package, how = Path(name) / "package", {"instances": INSTANCES, "threads": 1}
        how |= {"backend": "python", "triton_release": "24.10", "triton_python": PYTHON}
        open_bundle(given.bundle).package(package, artifacts=(given.artifact,), **how)
        running = stack.enter_context(triton_running(package / "models", Path(name) / "server"))
        urls = {"ours": stack.enter_context(ours(given))[0], "triton": f"http://{running.http}"}
        for url in urls.values():
            drive(url, requests, Load(), DISTINCT, given.clients)
        for index in range(ROUNDS):
            for server in sorted(urls, reverse=bool(index % 2)):
                start = time.perf_counter()
                drive(urls[server], requests, found, share, given.clients)
                rates[server].append(share / (time.perf_counter() - start))
            ours_now, theirs = (values[-1] for values in rates.values())
            figures = f"{ours_now:.1f} images/s here, {theirs:.1f} in Triton"
            table.row(f"beside Triton, round {index + 1}", figures)
    low, ratio, high = np.percentile(np.divide(rates["ours"], rates["triton"]), [25, 50, 75])
    wrong = found.wrong + len(found.latencies_ms) - found.answered
    figures = f"{ratio:.2f} x (quartiles {low:.2f} to {high:.2f}), {wrong} wrong answers"
    table.row(
        "throughput over Triton's Python backend: threads, instances, batching alike", figures
    )


def worst(given: argparse.Namespace, table: Table) -> None:
    """Measure ``/v2/health/live`` and the server's memory while the worst bodies come."""
    bodies, latencies, peak = worst_requests(given.bundle, given.artifact), [], 0.0
    usual = infer_requests(given.bundle, given.artifact, DISTINCT)
    with ours(given) as (url, pid):
        drive(url, usual, Load(), 2 * DISTINCT, DISTINCT)  # full batches in every instance
        idle = memory_mib(pid)
        attacking = multiprocessing.get_context("spawn").Process(
            target=attack, args=(url, bodies), daemon=True
        )
        attacking.start()
        time.sleep(3)
        end = time.perf_counter() + given.seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            urllib.request.urlopen(f"{url}/v2/health/live", timeout=60).close()
            latencies.append(1e3 * (time.perf_counter() - start))
            peak = max(peak, memory_mib(pid))
            time.sleep(0.02)
        attacking.kill()
        attacking.join()
    p50, p99, most = np.percentile(latencies, [50, 99, 100])
    table.row(
        f"{ATTACKERS} clients with the worst bodies",
        f"/v2/health/live p50 {p50:.0f}, p99 {p99:.0f}, most {most:.0f} ms of {len(latencies)}; "
        f"memory {peak - idle:.0f} MiB above {idle:.0f}",
    )


def attack(url: str, bodies: list[bytes]) -> None:
    """Send the worst bodies from so many clients at once, until this process is ended."""
    host, port = url.removeprefix("http://").split(":")

    def client(first: int) -> None:
        for raw in itertools.islice(itertools.cycle(bodies), first, None):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 30) as c:
                c.sendall(raw)
                c.recv(65536)

    with ThreadPoolExecutor(ATTACKERS) as pool:
        list(pool.map(client, range(ATTACKERS)))


def worst_requests(folder: Path, artifact: str) -> list[bytes]:
    """Return requests that cost the most to refuse or to answer, by what was found."""
    network, mib = Network(Bundle.open(folder), artifact), 2**20
    given, infer = network.input, f"/v2/models/{served_name(network.bundle, artifact)}/infer"
    described = {"name": given.name, "datatype": DATATYPES[given.dtype]}
    shape = [network.max_batch, *given.shape]
    size = int(np.prod(shape)) * np.dtype(given.dtype).itemsize
    tensor = {**described, "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    opening = json.dumps({"inputs": [{**described, "shape": [1]}]}).removesuffix("}]}")

    def listed(item: str, count: int = 0) -> bytes:
        count = count or (mib - 1000) // (len(item) + 1)
        return f'{opening}, "data": [{",".join([item] * count)}]}}]}}'.encode()

    png = io.BytesIO()  # 196 MB of pixels in a few kilobytes
    Image.new("RGBA", (7000, 7000)).save(png, "PNG", compress_level=9)
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
    return [
        *(post(infer, listed(item)) for item in ("[]", "{}", '{"a":[1]}', "1.5", "7", '"ab"')),
        post(infer, f'{opening}, "data": '.encode() + b"[" * (mib - 1000)),
        post(infer, listed(f'"{"x" * 100_000}"' + ",1" * 1000, 1)),
        post(infer, head + bytes(size), f"Inference-Header-Content-Length: {len(head)}"),
        post("/predict", png.getvalue()),
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


MEASURES = {"load": load, "triton": triton, "worst": worst}


@contextlib.contextmanager
def ours(given: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Serve the bundle with one thread an instance; give its address and process."""
    words = ("--artifact", given.artifact, "--threads", "1", "--no-compare")
    server, url = started(given.bundle, *words, "--instances", str(INSTANCES))
    try:
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(60)


def server_metrics(url: str) -> Counter[str]:
    """Return the server's figures by their names, summed over their labels."""
    found = Counter[str]()
    with urllib.request.urlopen(f"{url}/metrics") as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for sample in family.samples:
                found[sample.name] += sample.value
    return found


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process and of those below it."""
    server, total = psutil.Process(pid), 0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
