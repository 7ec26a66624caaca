"""Benchmarks of the server: overhead, a comparison with Triton, and expensive requests."""

import contextlib
import io
import multiprocessing
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.table import Table
from reliability.load import (
    LoadResult,
    Requests,
    infer_requests,
    run_export,
    run_server,
    send_requests,
)
from reliability.tritonserver import PYTHON, run_tritonserver
from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle

ARTIFACT, INSTANCES, CLIENTS = "fp32-uint8", 2, 64
DISTINCT, ROUNDS = 64, 6
OPTIONS = (
    *("--artifact", ARTIFACT, "--threads", "1", "--instances", str(INSTANCES), "--no-compare"),
)


def serve(requests: int = 10_000, seconds: float = 30.0) -> Table:
    """Serving.

    Two instances with one thread each and embedded preprocessing; van_b0 has random weights. 64
    clients send requests with one image in the binary protocol, and each response is compared with
    the artifact's own outputs. All inference runs in the batch threads, whose processor time the
    server measures; the rest of its processor time is overhead. Triton runs the Python backend with
    equal threads, instances and batching. The most expensive known requests come from 16 clients;
    the memory is that of the server and its processes, above their memory after full batches of
    valid requests.

    Args:
        requests: number of requests to van_digits; a fifth of them to van_b0, and a hundredth to
            each of van_b0 and Triton in each round of the comparison.
        seconds: duration of the expensive requests.
    """
    table = Table(("measure", "figures"))
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        small = run_export(Path(name) / "van_digits", "van_digits")
        large = run_export(Path(name) / "van_b0", "van_b0", "--weights", "random")
        add_load_row(table, small, requests)
        add_load_row(table, large, requests // 5)
        add_triton_rows(table, large, requests // 100)
        add_expensive_row(table, large, seconds)
    return table


def add_load_row(table: Table, bundle: Path, count: int) -> None:
    """Measure throughput and overhead, and count lost and wrong responses."""
    result, requests = LoadResult(), infer_requests(bundle, ARTIFACT, DISTINCT)
    with run_server(bundle, *OPTIONS) as (_, url):
        send_requests(url, requests, LoadResult(), DISTINCT, CLIENTS)  # warm-up
        before, start = server_metrics(url), time.perf_counter()
        send_requests(url, requests, result, count, CLIENTS)
        seconds, delta = time.perf_counter() - start, server_metrics(url)
    delta.subtract(before)
    rows, batches = (delta[f"van_deploy_batch_rows_{name}"] for name in ("sum", "count"))
    cpu, infer = delta["process_cpu_seconds_total"], delta["van_deploy_infer_cpu_seconds_total"]
    manifest = Bundle.open(bundle).manifest
    p50, p99 = np.percentile(result.latencies_ms, [50, 99])
    table.row(
        f"{manifest.name} at {manifest.preprocessing.image_size} px, {count:,} requests, "
        f"{CLIENTS} clients",
        f"{result.answered / seconds:.1f} images/s, mean batch {rows / batches:.1f}, latency p50 "
        f"{p50:.0f} ms and p99 {p99:.0f} ms, {1e3 * cpu / count:.2f} ms of processor time an "
        f"image, {100 * (1 - infer / cpu):.2f} % of it outside inference, "
        f"{count - result.answered} lost, {result.wrong} wrong, largest relative difference "
        f"{result.worst:.1e}",
    )


def add_triton_rows(table: Table, bundle: Path, count: int) -> None:
    """Measure the ratio of this server's throughput to Triton's in alternating rounds."""
    requests, result = infer_requests(bundle, ARTIFACT, DISTINCT), LoadResult()
    rates: dict[str, list[float]] = {"van-deploy": [], "triton": []}
    with (
        tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name,
        contextlib.ExitStack() as stack,
    ):
        package, options = Path(name) / "package", dict[str, Any](backend="python", threads=1)
        options |= {"instances": INSTANCES, "triton_release": "24.10", "triton_python": PYTHON}
        open_bundle(bundle).package(package, artifacts=(ARTIFACT,), **options)
        running = stack.enter_context(run_tritonserver(package / "models", Path(name) / "server"))
        if running.process.poll() is not None:
            raise RuntimeError(f"Triton does not run: {running.log_text()[-2000:]}")
        _, url = stack.enter_context(run_server(bundle, *OPTIONS))
        urls = {"van-deploy": url, "triton": f"http://{running.http}"}
        for url in urls.values():
            send_requests(url, requests, LoadResult(), DISTINCT, CLIENTS)
        for index in range(ROUNDS):
            for server in sorted(urls, reverse=bool(index % 2)):
                start = time.perf_counter()
                send_requests(urls[server], requests, result, count, CLIENTS)
                rates[server].append(count / (time.perf_counter() - start))
    low, ratio, high = np.percentile(np.divide(rates["van-deploy"], rates["triton"]), [25, 50, 75])
    own, other = (np.median(values) for values in rates.values())
    wrong = result.wrong + len(result.latencies_ms) - result.answered
    table.row(
        f"compared with Triton, {ROUNDS} rounds of {count} requests each",
        f"{own:.1f} images/s, Triton {other:.1f} images/s, ratio by round {ratio:.2f} (quartiles "
        f"{low:.2f} to {high:.2f}), {wrong} wrong responses",
    )


def add_expensive_row(table: Table, bundle: Path, seconds: float) -> None:
    """Measure ``/v2/health/live`` and the server's memory under the most expensive requests."""
    valid, latencies, peak = infer_requests(bundle, ARTIFACT, DISTINCT), list[float](), 0.0
    attacks = expensive_requests(valid[0])
    with run_server(bundle, *OPTIONS) as (server, url):
        # Full batches in every instance.
        send_requests(url, valid, LoadResult(), 2 * DISTINCT, DISTINCT)
        idle = memory_mib(server.pid)
        attacking = multiprocessing.get_context("spawn").Process(target=attack, args=(url, attacks))
        attacking.start()
        time.sleep(3)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            urllib.request.urlopen(f"{url}/v2/health/live", timeout=60).close()
            latencies.append(1e3 * (time.perf_counter() - start))
            peak = max(peak, memory_mib(server.pid))
            time.sleep(0.02)
        attacking.kill()
        attacking.join()
    p50, p99, largest = np.percentile(latencies, [50, 99, 100])
    table.row(
        f"{2 * len(attacks)} clients with the most expensive requests",
        f"/v2/health/live p50 {p50:.0f}, p99 {p99:.0f}, max {largest:.0f} ms of {len(latencies)}; "
        f"memory {peak - idle:.0f} MiB above {idle:.0f}",
    )


def attack(url: str, attacks: Sequence[Requests]) -> None:
    """Send requests from two clients for each kind until the process is killed."""
    with ThreadPoolExecutor(len(attacks)) as pool:
        list(pool.map(lambda one: send_requests(url, one, LoadResult(), 10**9, 2), attacks))


def expensive_requests(infer: str) -> list[Requests]:
    """Return the known requests that are the most expensive to refuse; ``infer`` is a path."""
    mib, png = 2**20, io.BytesIO()  # 196 MB of pixels in a few kilobytes
    Image.new("RGBA", (7000, 7000)).save(png, "PNG", compress_level=9)
    start = b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1], "data": ["ab"'
    items = (b",[]", b",{}", b',{"a":[1]}', b",1.5", b",7")
    bodies = [start + item * ((mib - 1000) // len(item)) + b"]}]}" for item in items]
    pairs = [(infer, body) for body in (*bodies, b"[" * (mib - 1000))]
    pairs += [("/predict", png.getvalue()), ("/predict", bytes(32 * mib))]
    return [(path, {}, [body], np.ones((1, 1), np.float32)) for path, body in pairs]


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
