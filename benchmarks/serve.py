"""Measure the server: throughput against the bare artefact, and every answer compared.

    python benchmarks/serve.py load BUNDLE --requests 10000 --clients 64
    python benchmarks/serve.py top1 BUNDLE FOLDER...
    python benchmarks/serve.py claims       # both, on a van_b0 of its own, as claims

``load`` starts ``van-deploy serve`` as a process of its own and goes round by round: the
artefact alone (no requests), then its share of the requests from so many connections at
once, each answer compared with the artefact's own. The ratio is the median over the
rounds, since other work on the machine comes and goes; its quartiles say how far it can
be trusted. Client and server share the processor, so it is a lower bound. Two figures do
not depend on other work: ``busy``, the share of the time in which a batch was running,
and ``cpu_ratio``, the artefact's own processor time over the whole server's, an image.

``top1`` compares the whole way from each file: timm's transform and the plain graph
against bytes and the graph with preprocessing inside.

The result is one JSON document on standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.data import check_images, find_images, open_image
from van_deploy.model.pixels import pixels_from_image
from van_deploy.runners.network import Network
from van_deploy.serve.protocol import DATATYPES
from van_deploy.serve.service import served_name

DISTINCT = 64
BARE_SECONDS = 4.0
OWN = (  # the preprocessing of the checkpoint beside this repository, from its README
    *("--image-size", "64", "--crop-pct", "1.0"),
    *("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
)
TOLERANCE = 1e-4
"""Of the largest logit: what FP32 artefacts are allowed everywhere else."""


@dataclass
class Load:
    """What the clients saw."""

    answered: int = 0
    wrong: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    worst_difference: float = 0.0
    failures: list[str] = field(default_factory=list)


def main() -> int:
    """Run the asked measurement and return the exit code: 1 if an answer was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help="throughput, and every answer compared")
    load.add_argument("bundle", type=Path)
    load.add_argument("--artefact", default="fp32-uint8")
    load.add_argument("--images", type=Path, help="folder of pictures; samples by default")
    load.add_argument("--requests", type=int, default=10_000)
    load.add_argument("--rounds", type=int, default=10)
    load.add_argument("--clients", type=int, default=64)
    load.add_argument("--threads", type=int, default=2)
    load.add_argument("--instances", type=int, default=1)
    load.add_argument("--queue-limit", type=int, default=256)
    load.add_argument("--max-delay-ms", type=float, default=1.0)
    load.add_argument("--bare-seconds", type=float, default=BARE_SECONDS)
    top1 = commands.add_parser("top1", help="the same first class from every file")
    top1.add_argument("bundle", type=Path)
    top1.add_argument("folders", type=Path, nargs="+")
    top1.add_argument("--artefact", default="fp32-uint8")
    top1.add_argument("--limit", type=int, help="at most so many images of each folder")
    claims = commands.add_parser("claims", help="what this project claims, in one table")
    claims.add_argument("--checkpoint", help="trained weights for the comparison of classes")
    claims.add_argument("--folders", type=Path, nargs="*", default=[])
    claims.add_argument("--requests", default="10000")
    arguments = parser.parse_args()
    if arguments.command == "claims":
        result = measure_claims(parser, arguments)
        print(json.dumps(result, indent=1))
        return int(not all(claim["met"] for claim in result["claims"]))
    result = measure_load(arguments) if arguments.command == "load" else measure_top1(arguments)
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


def measure_claims(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the claims on the server, measured on bundles made for it."""
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        bundle = exported(Path(folder) / "van_b0", "van_b0", "--weights", "random")
        words = ["load", str(bundle), "--requests", arguments.requests]
        load = measure_load(parser.parse_args(words))
        claims = load_claims(load)
        if arguments.checkpoint:
            bundle = exported(Path(folder) / "own", arguments.checkpoint, *OWN)
            words = ["top1", str(bundle), *map(str, arguments.folders)]
            top1 = measure_top1(parser.parse_args(words))
            same = f"{top1['images'] - top1['other_top1']:,} of {top1['images']:,} images"
            text = "bytes in: the same first class as the file pipeline"
            claims.append(claim(text, same, top1["passed"]))
    columns = ["images/s served", "bare images/s", "p50 ms", "p99 ms", "mean batch", "busy"]
    bare = float(np.median([max(entry["bare"].values()) for entry in load["rounds"]]))
    row = [load["served_images_per_s"], round(bare, 1), load["p50_ms"], load["p99_ms"]]
    row += [load["mean_batch"], load["busy"]]
    note = (
        "van_b0 at 224 pixels with preprocessing inside, random weights, 2 threads. Client and "
        "server share the processor. `cpu_ratio`, the artefact's own processor time over the "
        f"whole server's, was {load['cpu_ratio']:.2f}."
    )
    rows = [[str(value) for value in row]]
    return {"columns": columns, "rows": rows, "claims": claims, "notes": [note]}


def load_claims(load: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is claimed of the server under load."""
    low, high = load["ratio_quartiles"]
    return [
        claim(
            "throughput >= 0.9 x the bare artefact",
            f"{load['ratio']:.2f} x (quartiles {low:.2f} to {high:.2f})",
            load["ratio"] >= 0.9,
        ),
        claim(
            f"{load['requests']:,} requests, 64 clients: none lost, none wrong",
            f"{load['lost']} lost, {load['wrong']} wrong",
            load["passed"],
        ),
        claim(
            "p99 bounded by the queue limit",
            f"{load['p99_ms']:.0f} ms; a full queue and two batches take {load['bound_ms']:.0f} ms",
            load["p99_ms"] <= load["bound_ms"],
        ),
    ]


def claim(text: str, measured: str, met: bool) -> dict[str, Any]:
    """Return one claim as benchmarks print it."""
    return {"claim": text, "measured": measured, "met": bool(met)}


def exported(folder: Path, *words: str) -> Path:
    """Return a bundle whose artefacts also take bytes."""
    command = [sys.executable, "-m", "van_deploy", "export", *words, "--output", str(folder)]
    command += ["--embed-preprocess", "uint8", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def measure_load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return throughput with and without the server, and what became of every request."""
    bundle = Bundle.open(arguments.bundle)
    with bare_network(bundle, arguments) as network:
        chosen = check_images(bundle.name, network.preprocessing, DISTINCT, arguments.images)
        pixels = chosen.values
        inputs = network.prepare(pixels)
        answers = [network.run(inputs[i : i + 1])["logits"] for i in range(DISTINCT)]
    expected = np.concatenate(answers)
    command = [
        *(sys.executable, "-m", "van_deploy", "serve", str(arguments.bundle), "--port", "0"),
        *("--artefact", arguments.artefact, "--threads", str(arguments.threads), "--json"),
        *("--instances", str(arguments.instances), "--no-compare"),
        *("--queue-limit", str(arguments.queue_limit)),
        *("--max-delay-ms", str(arguments.max_delay_ms)),
    ]
    load, rounds, seconds = Load(), [], 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server_url(server)
            name = served_name(bundle, arguments.artefact)
            requests = [
                request_bytes(url, name, network, inputs[i : i + 1]) for i in range(DISTINCT)
            ]
            idle = server_metrics(url)
            for share in shares(arguments.requests, arguments.rounds):
                bare = bare_throughput(bundle, arguments, inputs)
                before, start = load.answered, time.perf_counter()
                asyncio.run(drive(url, requests, expected, load, share, arguments.clients))
                wall = time.perf_counter() - start
                seconds += wall
                served = (load.answered - before) / wall
                rounds.append({"bare": bare, "served": round(served, 1)})
                note(f"{load.answered} answered: {rounds[-1]}")
            metrics = {k: v - idle[k] for k, v in server_metrics(url).items()}
        finally:
            server.terminate()
            server.wait(60)
    metrics["seconds"] = seconds
    metrics["bare_cpu"] = bare_cpu_seconds(bundle, arguments, inputs)
    return load_report(arguments, rounds, load, metrics, network.max_batch)


def bare_cpu_seconds(
    bundle: Bundle, arguments: argparse.Namespace, inputs: npt.NDArray[Any]
) -> float:
    """Return the processor time of one image at the largest batch, without any server."""
    with bare_network(bundle, arguments, spin=False) as network:
        rows = inputs[: network.max_batch]
        network.run(rows)
        start, count, end = time.process_time(), 0, time.perf_counter() + arguments.bare_seconds
        while time.perf_counter() < end:
            network.run(rows)
            count += len(rows)
        return (time.process_time() - start) / count


def shares(total: int, rounds: int) -> list[int]:
    """Return how many requests each round sends.

    >>> shares(10, 3)
    [4, 3, 3]
    """
    return [total // rounds + (index < total % rounds) for index in range(rounds)]


def load_report(
    arguments: argparse.Namespace,
    rounds: list[dict[str, Any]],
    load: Load,
    metrics: dict[str, float],
    max_batch: int,
) -> dict[str, Any]:
    """Return the figures of one run."""
    ratios = [entry["served"] / max(entry["bare"].values()) for entry in rounds]
    low, ratio, high = np.percentile(ratios, [25, 50, 75])
    rate = float(np.median([entry["served"] for entry in rounds]))
    p50, p99 = np.percentile(load.latencies_ms, [50, 99]) if load.latencies_ms else (0.0, 0.0)
    return {
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "rounds": rounds,
        "served_images_per_s": round(rate, 1),
        "ratio": round(float(ratio), 3),
        "ratio_quartiles": [round(float(low), 3), round(float(high), 3)],
        "busy": round(metrics["infer"] / metrics["seconds"] / arguments.instances, 3),
        "cpu_ms_an_image": {
            "artefact": round(1e3 * metrics["bare_cpu"], 3),
            "server": round(1e3 * metrics["cpu"] / load.answered, 3),
        },
        "cpu_ratio": round(metrics["bare_cpu"] * load.answered / metrics["cpu"], 3),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "bound_ms": round(1e3 * (arguments.queue_limit + 2 * max_batch) / rate, 1),
        "requests": arguments.requests,
        "answered": load.answered,
        "lost": arguments.requests - load.answered,
        "wrong": load.wrong,
        "worst_relative_difference": load.worst_difference,
        "statuses": load.statuses,
        "failures": load.failures[:5],
        "mean_batch": round(metrics["rows"] / max(metrics["batches"], 1.0), 2),
        "passed": load.answered == arguments.requests and load.wrong == 0,
    }


def bare_network(bundle: Bundle, arguments: argparse.Namespace, spin: bool = True) -> Network:
    """Return the artefact without a server, as `van-deploy bench` runs it (with spinning)."""
    return Network(bundle, arguments.artefact, threads=arguments.threads, spin=spin)


def bare_throughput(
    bundle: Bundle, arguments: argparse.Namespace, inputs: npt.NDArray[Any]
) -> dict[str, float]:
    """Return images a second at the optimum and the largest batch, without any server.

    With spinning threads and without: alone the first is faster, beside other work
    the second. The best of all is what the server is measured against.
    """
    rates = {}
    for spin in (True, False):
        with bare_network(bundle, arguments, spin) as network:
            optimum = bundle.manifest.batch.opt
            for batch in sorted({optimum, min(network.max_batch, len(inputs))}):
                rows = inputs[:batch]
                network.run(rows)
                count, start = 0, time.perf_counter()
                while time.perf_counter() - start < arguments.bare_seconds / 4:
                    network.run(rows)
                    count += batch
                name = f"batch {batch}{'' if spin else ', no spinning'}"
                rates[name] = round(count / (time.perf_counter() - start), 1)
    return rates


def request_bytes(url: str, name: str, network: Network, rows: npt.NDArray[Any]) -> bytes:
    """Return a whole HTTP request: JSON, then the tensor as bytes."""
    raw = rows.tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": network.input.name,
                    "shape": list(rows.shape),
                    "datatype": DATATYPES[network.input.dtype],
                    "parameters": {"binary_data_size": len(raw)},
                }
            ],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()
    lines = [
        f"POST /v2/models/{name}/infer HTTP/1.1",
        f"Host: {url.removeprefix('http://')}",
        f"Content-Length: {len(head) + len(raw)}",
        f"Inference-Header-Content-Length: {len(head)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + head + raw


async def drive(
    url: str,
    requests: list[bytes],
    expected: npt.NDArray[Any],
    load: Load,
    count: int,
    clients: int,
) -> None:
    """Send so many requests from so many connections and compare each answer."""
    numbers = iter(range(count))
    host, port = url.removeprefix("http://").split(":")

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in numbers:
            which = number % len(requests)
            start = time.perf_counter()
            writer.write(requests[which])
            status, headers, body = await read_response(reader)
            load.latencies_ms.append(1e3 * (time.perf_counter() - start))
            load.statuses[status] = load.statuses.get(status, 0) + 1
            if status == "200":
                compare(load, headers, body, expected[which])
            else:
                load.failures.append(body.decode(errors="replace"))
        writer.close()
        await writer.wait_closed()

    results = await asyncio.gather(*(client() for _ in range(clients)), return_exceptions=True)
    load.failures += [repr(r) for r in results if isinstance(r, BaseException)]


async def read_response(
    reader: asyncio.StreamReader,
) -> tuple[str, dict[str, str], bytes]:
    """Return status, headers and body of one HTTP response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])
    }
    body = await reader.readexactly(int(headers["content-length"]))
    return head[0].split(" ")[1], headers, body


def compare(load: Load, headers: dict[str, str], body: bytes, expected: npt.NDArray[Any]) -> None:
    """Count one answer, and whether it is the artefact's own."""
    load.answered += 1
    tail = body[int(headers["inference-header-content-length"]) :]
    logits = np.frombuffer(tail, np.float32)
    if logits.shape != expected.shape:
        load.wrong += 1
        return
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    load.worst_difference = max(load.worst_difference, difference)
    load.wrong += not difference <= TOLERANCE


def server_url(server: subprocess.Popen[str]) -> str:
    """Return where a starting server answers, once it says so."""
    text = ""
    while not text.endswith("}\n"):
        line = server.stdout.readline() if server.stdout else ""
        if not line:
            raise SystemExit("the server did not start")
        text += line
    return str(json.loads(text)["url"])


def server_metrics(url: str) -> dict[str, float]:
    """Return how many batches ran and for how long, their rows, and the processor time."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()

    def total(name: str) -> float:
        starts = (name + "{", name + " ")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(starts))

    return {
        "rows": total("van_deploy_batch_rows_sum"),
        "batches": total("van_deploy_batch_rows_count"),
        "infer": total("van_deploy_infer_seconds_sum"),
        "cpu": total("process_cpu_seconds_total"),
    }


def measure_top1(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how many files got another first class from bytes than from timm's floats."""
    bundle = Bundle.open(arguments.bundle)
    paths = [
        path for folder in arguments.folders for path in find_images(folder)[: arguments.limit]
    ]
    changed, worst = [], 0.0
    with Network(bundle, "fp32") as plain, Network(bundle, arguments.artefact) as embedded:
        transform = plain.preprocessing.transform()
        for start in range(0, len(paths), 16):
            some = paths[start : start + 16]
            images = [open_image(path) for path in some]
            floats = np.stack([transform(image).numpy() for image in images])
            pixels = np.stack([pixels_from_image(i, plain.preprocessing) for i in images])
            expected = plain.run(floats)["logits"]
            found = embedded.run(embedded.prepare(pixels))["logits"]
            worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
            other = expected.argmax(axis=1) != found.argmax(axis=1)
            changed += [str(path) for path, differs in zip(some, other, strict=True) if differs]
    return {
        "images": len(paths),
        "other_top1": len(changed),
        "files": changed[:10],
        "worst_relative_difference": worst,
        "passed": bool(paths) and not changed,
    }


def note(text: str) -> None:
    """Write progress to standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
