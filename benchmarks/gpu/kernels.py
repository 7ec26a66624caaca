"""The fused kernels on a GPU: checked, tuned one by one, and as a whole network.

    python benchmarks/gpu/kernels.py all --variant van_b0,van_b2 --dtype fp16 --out K.json

``check`` compares each kernel with float64 PyTorch, ``network`` times the network with the
stored tiles, ``all`` tunes as well; ``count`` needs no GPU. ``store`` writes the tuned tiles of
``--out`` where the package reads them. With ``TRITON_INTERPRET=1`` every step runs on the CPU,
to rehearse it: ``--variant tiny --size 16 --batch 1 --tries 2``. Each row is written as soon as
it is known; a kernel that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # processes are forked below

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from van_deploy.kernels import launch, network, plain, steps
from van_deploy.kernels.launch import FEW, TILES, Launch, Tile, recorded
from van_deploy.kernels.network import FusedVan, fused
from van_deploy.model.random_weights import random_van, smooth_pictures
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 1e-5}
TINY = VanConfig((16, 32, 32, 48), (1, 2, 1, 1), (2, 2, 2, 2), num_classes=10)
L2_BYTES = 128 * 2**20  # buffers that are rotated hold at least this together
ON_GPU = not launch.INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Call:
    """One call of one of the network's steps."""

    step: str
    arguments: tuple[Any, ...]
    launch: Launch

    @property
    def key(self) -> str:
        """Return its shape class."""
        return self.launch.key

    def launch_with(self, tile: Tile) -> Launch:
        """Return the launch with another tile, without running it."""
        with trying(self.key, tile), recorded(run=False) as launches:
            getattr(steps, self.step)(*self.arguments)
        return launches[-1]


@contextlib.contextmanager
def trying(key: str, tile: Tile) -> Iterator[None]:
    """Use ``tile`` for ``key`` inside."""
    before = TILES.get(key)
    TILES[key] = tile
    try:
        yield
    finally:
        TILES.pop(key)
        if before is not None:
            TILES[key] = before


class Results:
    """The rows so far, in memory and in a file."""

    def __init__(self, path: Path, seconds: float) -> None:
        """Start the clock of the budget."""
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.document: dict[str, Any] = {"rows": [], "tuned": {}}
        self.always: dict[str, Any] = {}

    @property
    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.seconds - (time.monotonic() - self.start)

    def add(self, quiet: dict[str, Any] | None = None, **row: Any) -> None:
        """Add a row, write the file and print the row without ``quiet``."""
        row = {**self.always, **row, "at_s": round(time.monotonic() - self.start, 1)}
        self.document["rows"].append(row | (quiet or {}))
        self.path.write_text(json.dumps(self.document, indent=1))
        print(" ".join(f"{k}={_short(v)}" for k, v in row.items()), flush=True)

    @contextlib.contextmanager
    def guarded(self, needs: float = 0.0, **row: Any) -> Iterator[bool]:
        """Make a failure inside a row and go on; yield whether ``needs`` seconds are left."""
        if self.left < needs:
            self.add(**row, skipped="budget")
        try:
            yield self.left >= needs
        except Exception as error:
            where = traceback.format_exc().splitlines()[-7:]
            self.add(**row, error=f"{type(error).__name__}: {error}"[:600], where=where)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def configuration(name: str) -> VanConfig:
    """Return a variant's architecture, or the tiny one for rehearsals."""
    return TINY if name == "tiny" else VARIANTS[name].config


@functools.cache
def original(name: str) -> VAN:
    """Return the seeded random network of natural statistics."""
    return random_van(configuration(name))


@functools.cache
def images(name: str, batch: int, size: int) -> torch.Tensor:
    """Return seeded images ``(batch, C, size, size)`` float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        few = smooth_pictures(min(batch, 16), configuration(name).in_chans, size)
    return few.repeat(math.ceil(batch / len(few)), 1, 1, 1)[:batch]


def built(name: str, dtype: torch.dtype) -> FusedVan:
    """Return the fused network, on no device's terms yet."""
    model = fused(original(name), dtype, fallback=True)
    model.fallbacks = ()
    return model


def operations(made: Launch) -> int:
    """Return the floating-point operations of a launch, two a multiply-add."""
    shapes = [tuple(a.shape) for a in made.arguments if isinstance(a, torch.Tensor)]
    kind, x = made.key.split("/")[0], shapes[0]
    pixels = x[0] * x[1] * x[2]
    if kind == "depthwise":
        return 2 * pixels * x[3] * shapes[1][0] ** 2
    if kind == "pointwise":
        return 2 * pixels * math.prod(shapes[1])
    if kind == "layer_norm":
        return 8 * math.prod(x)
    return 2 * math.prod(shapes[3][:3]) * math.prod(shapes[1])


def calls_of(model: FusedVan, x: torch.Tensor) -> tuple[dict[str, Call], Counter[str]]:
    """Run the network once; return one call of each shape class, and their counts."""
    calls: dict[str, Call] = {}
    counts: Counter[str] = Counter()

    def noted(step: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with recorded(run=x.device.type != "meta") as launches:
                out = getattr(steps, step)(*arguments)
            calls.setdefault(launches[-1].key, Call(step, arguments, launches[-1]))
            counts[launches[-1].key] += 1
            return out

        return run

    network.steps = SimpleNamespace(**{step: noted(step) for step in steps.__all__})
    try:
        with torch.no_grad():
            model(x)
    finally:
        network.steps = steps
    return calls, counts


def unmade(model: FusedVan, batch: int, size: int) -> tuple[dict[str, Call], Counter[str]]:
    """Return the calls of the network on no device."""
    channels = model.patch_embed1.weight.shape[2]
    x = torch.empty(batch, channels, size, size, device="meta", dtype=model.dtype)
    return calls_of(copy.deepcopy(model).to("meta"), x)


def candidates(call: Call) -> list[Tile]:
    """Return the tiles to try for a call: its own first."""
    made, kind = call.launch, call.key.split("/")[0]
    own, shapes = dict(made.tile), [a.shape for a in made.arguments if isinstance(a, torch.Tensor)]
    few = math.prod(shapes[-1][:3]) < FEW
    names: tuple[str, ...]
    tries: list[tuple[int, ...]] = []
    if kind == "depthwise":
        names = ("ROWS", "BLOCK_P", "BLOCK_C", "num_warps")
        height, channels, side = shapes[0][1], shapes[0][3], shapes[1][0]
        dilation = int(call.key.split("/")[1].split("x")[1])
        if few:
            tries = [(1, 4, 32, 2), (1, 16, 32, 4), (2, 8, 32, 2), (3, 8, 32, 4), (4, 8, 32, 2)]
        elif side == 3:
            tries = [(4, 32, 32, 4), (7, 16, 32, 4), (7, 8, 32, 2), (14, 8, 32, 4)]
        elif dilation == 1:
            tries = [(14, 8, 32, 4), (7, 16, 32, 4), (7, 8, 32, 2)]
        else:
            tries = [(10, 8, 32, 4), (10, 16, 32, 4), (5, 16, 32, 4), (3, 16, 32, 4)]
        tries = [t for t in tries if (t[0] - 1) * dilation < height and channels % t[2] == 0]
    elif kind == "pointwise":
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "REPEAT", "num_warps", "num_stages")
        inner = shapes[1][1]
        k, n, whole = own["BLOCK_K"], own["BLOCK_N"], launch.power_block(inner, 64)
        if few:
            tries = [(16, 32, k, 1, 2, 4), (16, 64, k, 1, 4, 4), (32, 32, k, 1, 4, 4)]
            tries += [(64, 32, k, 1, 4, 4), (16, 16, k, 1, 1, 4)]
            tries += [(16, 32, 128, 1, 4, 3)] if inner % 128 == 0 else []
        else:
            tries = [(64, n, k, 1, 4, 3), (128, n, k, 1, 4, 4), (128, n, k, 1, 8, 3)]
            tries += [(256, n, k, 1, 8, 3), (128, 64, k, 1, 4, 3)]
            tries += [(64, n, whole, 4, 4, 3)] if inner == whole else []
    elif kind == "layer_norm":
        names = ("BLOCK_M", "num_warps")
        m = own["BLOCK_M"]
        tries = [(m * 2, 4), (max(1, m // 2), 4), (max(1, m // 2), 2), (m * 2, 8)]
    else:
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        n = own["BLOCK_N"]
        tries = [(128, n, 4, 3), (64, n, 4, 4), (64, n, 4, 2), (64, min(64, n), 2, 3)]
        if few:
            tries = [(16, 16, 2, 4), (16, 32, 4, 5), (32, 32, 4, 3)]
    found = [own]
    for values in tries:
        tile = {**own, **dict(zip(names, values, strict=True))}
        if tile not in found:
            found.append(tile)
    return found


Job = tuple[str, tuple[Any, ...], str, Tile]


def _compile(job: Job) -> str:
    """Compile one launch into Triton's cache, in a process of its own."""
    step, arguments, key, tile = job
    try:
        TILES[key] = tile
        with recorded(run=False) as launches:
            getattr(steps, step)(
                *(
                    torch.empty_strided(a[0], a[1], dtype=a[2], device="meta")
                    if isinstance(a, tuple)
                    else a
                    for a in arguments
                )
            )
        made = launches[-1]
        known = [a.dtype if isinstance(a, torch.Tensor) else a for a in made.arguments]
        made.kernel.warmup(*known, grid=made.grid, **made.tile)
    except Exception as error:
        return f"{key} {tile}: {type(error).__name__} {error}"[:300]
    return ""


class Compiler:
    """Processes that compile kernels; made before this process uses the GPU."""

    def __init__(self, results: Results) -> None:
        """Fork the processes."""
        self.results, self.seen = results, set[str]()
        self.pool = multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1))

    def compile(self, calls: dict[str, Call], tries: int) -> Any:
        """Start to compile each call with its first tiles, in parallel."""
        wanted: list[Job] = []
        if launch.INTERPRETED:
            return None
        for call in calls.values():
            plain_arguments = tuple(
                (tuple(a.shape), a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a
                for a in call.arguments
            )
            for tile in candidates(call)[:tries]:
                text = _signature(call.launch_with(tile))
                if text not in self.seen:
                    self.seen.add(text)
                    wanted.append((call.step, plain_arguments, call.key, tile))
        return self.pool.map_async(_compile, wanted, chunksize=1)

    def wait(self, waiting: Any, **row: Any) -> None:
        """Wait until the kernels of :meth:`compile` are in the cache."""
        if waiting is None:
            return
        start = time.monotonic()
        with self.results.guarded(step="precompile", **row):
            found = waiting.get(timeout=max(10.0, self.results.left))
            failures = [f for f in found if f]
            self.results.add(
                {"failures": failures[:20]},
                step="precompile",
                **row,
                kernels=len(found),
                waited_s=round(time.monotonic() - start, 1),
                failed=len(failures),
            )


def _signature(made: Launch) -> str:
    """Return what a launch's machine code depends on."""
    parts = []
    for value, parameter in zip(made.arguments, made.kernel.params, strict=False):
        if isinstance(value, torch.Tensor):
            parts.append(str(value.dtype))
        elif parameter.is_constexpr or not isinstance(value, int) or isinstance(value, bool):
            parts.append(str(value))
        else:
            parts.append("1" if value == 1 else "16" if value % 16 == 0 else "i")
    return f"{made.key.split('/')[0]} {parts} {made.tile}"


def timed(run: Callable[[int], Any], copies: int, span: float = 0.01) -> float:
    """Return the median seconds of ``run(i)``, i going round ``copies`` sets of inputs.

    On a GPU by replays of a CUDA graph that holds one run on every set.
    """
    if not ON_GPU:
        start = time.perf_counter()
        run(0)
        return time.perf_counter() - start
    repeats = copies * max(1, 8 // copies)
    graph = captured(lambda: [run(number % copies) for number in range(repeats)], 1)
    return replay_time(graph, span) / repeats


def captured(run: Callable[[], Any], warm: int = 2) -> Any:
    """Return a CUDA graph of ``run``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(warm):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        run()
    return graph


def replay_time(graph: Any, span: float) -> float:
    """Return the median seconds of a CUDA graph's replay, over about ``span`` seconds."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    once = events[0].elapsed_time(events[1]) / 1e3
    count = max(5, min(200, int(span / max(once, 1e-6))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
    return spans[count // 2]


def copy_bandwidth() -> float:
    """Return bytes read and written a second by a large copy on the device."""
    source = torch.randn(2**28 if ON_GPU else 2**16, device=DEVICE)
    target = torch.empty_like(source)
    seconds = timed(lambda _: torch.add(source, 1.0, out=target), 1, 0.05)
    return 2 * source.numel() * source.element_size() / seconds


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what kernels allocate with NaN, so that what they do not write shows."""
    empty, like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(math.nan)
    torch.empty_like = lambda *a, **k: like(*a, **k).fill_(math.nan)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, like


def walled(tensor: Any) -> Any:
    """Return a tensor's copy with NaN before and behind it."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
        return tensor
    flat = torch.full((tensor.numel() + 256,), math.nan, dtype=tensor.dtype, device=tensor.device)
    flat[128:-128] = tensor.reshape(-1)
    return flat[128:-128].view(tensor.shape)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error; NaN if the kernel left a hole."""
    return float((found.to(expected.dtype) - expected).norm() / expected.norm())


def tune(args: Any, results: Results, model: FusedVan, batch: int, bandwidth: float) -> None:
    """Check and time every kernel of the network, and keep its best tile."""
    x = images(args.variant, batch, args.size).to(DEVICE, model.dtype)
    calls, counts = calls_of(model, x)
    for key, call in calls.items():
        row = {"step": "each", "key": key, "batch": batch}
        with results.guarded(6.0, **row) as enough, torch.no_grad():
            if enough:
                tune_call(args, results, call, counts[key], batch, bandwidth)
    results.document["tuned"] = {k: dict(sorted(v.items())) for k, v in sorted(TILES.items())}


def tune_call(
    args: Any, results: Results, call: Call, count: int, batch: int, bandwidth: float
) -> None:
    """Check and time one kernel with its tiles."""
    run = getattr(steps, call.step)
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in call.arguments]
    expected = getattr(plain, call.step)(*doubles).float()
    del doubles
    guarded = tuple(walled(a) for a in call.arguments)
    copies = max(1, min(12, L2_BYTES // max(call.launch.bytes, 1)))
    sets = [call.arguments] + [
        tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in call.arguments)
        for _ in range(copies - 1)
    ]

    def attempt(tile: Tile) -> dict[str, Any]:
        try:
            with trying(call.key, tile):
                with poisoned():
                    error = off(run(*guarded), expected)
                seconds = timed(lambda i: run(*sets[i]), copies, args.span)
        except Exception as failure:
            return {"error": f"{type(failure).__name__}: {failure}"[:200], "tile": tile}
        return {"us": round(seconds * 1e6, 2), "tile": tile, "relative_error": error}

    tiles = candidates(call)[: args.tries]
    tried = [attempt(tile) for tile in tiles]
    good = [t for t in tried if t.get("relative_error", math.inf) <= LIMITS[args.dtype]]
    bad = len(tried) - len(good)
    if not good:
        results.add({"tried": tried}, step="each", key=call.key, batch=batch, error="no tile works")
        return
    best = min(good, key=lambda t: t["us"])
    if len(tiles) > 1:
        TILES[call.key] = best["tile"]
    moved, done = call.launch.bytes, operations(call.launch)
    results.add(
        {"tried": tried},
        step="each",
        key=call.key,
        batch=batch,
        count=count,
        bytes=moved,
        operations=done,
        us=best["us"],
        default_us=tried[0].get("us"),
        of_copy=round(moved / best["us"] * 1e6 / bandwidth, 3),
        tflop_s=round(done / best["us"] / 1e6, 2),
        relative_error=best["relative_error"],
        failed_tiles=bad,
        tile=best["tile"],
    )


def fidelity(args: Any, results: Results, model: FusedVan) -> None:
    """Compare logits with those of the original network in float64."""
    with results.guarded(step="sqnr"), torch.no_grad():
        x = images(args.variant, 2, args.size)
        double = copy.deepcopy(original(args.variant)).double().to(DEVICE)
        expected = double(x.double().to(DEVICE))
        noise = (model(x.to(DEVICE)).double() - expected).square().sum()
        db = float(10 * torch.log10(expected.square().sum() / noise))
        results.add(step="sqnr", plan="apart", db=round(db, 2))


def whole(args: Any, results: Results, model: FusedVan, batch: int, tiles: str) -> None:
    """Time the network under a CUDA graph, and share the time among its kernels."""
    x = images(args.variant, batch, args.size).to(DEVICE, model.dtype)
    row: dict[str, Any] = {"plan": "apart", "tiles": tiles}
    with results.guarded(1.0, step="network", batch=batch, **row) as enough, torch.no_grad():
        if enough:
            time_network(results, model, x, row)


def time_network(results: Results, model: FusedVan, x: torch.Tensor, row: dict[str, Any]) -> None:
    """Add the rows of :func:`whole`."""
    batch = len(x)
    if not ON_GPU:
        row |= {"batch": batch, "ms": timed(lambda _: model(x), 1) * 1e3}
        results.add(step="network", **row)
        return
    graph = captured(lambda: model(x))
    seconds = replay_time(graph, 0.25)
    row |= {"batch": batch, "ms": round(seconds * 1e3, 4), "images_s": round(batch / seconds, 1)}
    results.add(step="network", **row)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        graph.replay()
        torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    rows = sorted(events, key=lambda e: -e.self_device_time_total)
    shares = [[e.key[:70], e.count, round(e.self_device_time_total, 1)] for e in rows[:16]]
    total = round(sum(e.self_device_time_total for e in rows), 1)
    results.add(step="profile", batch=batch, plan="apart", total_us=total, kernels=shares)


def count(args: Any, results: Results, model: FusedVan, batch: int) -> None:
    """Print launches, bytes and operations; needs no GPU."""
    calls, counts = unmade(model, batch, args.size)
    made = [(calls[key].launch, times) for key, times in counts.items()]
    results.add(
        step="count",
        variant=args.variant,
        batch=batch,
        launches=counts.total(),
        mb_an_image=round(sum(one.bytes * n for one, n in made) / batch / 1e6, 2),
        gflop_an_image=round(sum(operations(one) * n for one, n in made) / batch / 1e9, 3),
    )


def arguments() -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["count", "check", "network", "all", "store"])
    parser.add_argument("--variant", default="van_b0", help="one or several, comma-separated")
    parser.add_argument("--batch", default="128,1,8", help="one or several, comma-separated")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="fp16", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--budget", type=float, default=110.0, help="seconds")
    parser.add_argument("--span", type=float, default=0.008, help="seconds to time each tile")
    parser.add_argument("--tries", type=int, default=99, help="tiles to try for each launch")
    parser.add_argument("--tiles", type=Path, help="tuned tiles to start from: JSON of this script")
    return parser.parse_args()


def store(args: Any) -> int:
    """Write the tuned tiles where the package reads them."""
    document = json.loads(args.out.read_text())
    folder = Path(launch.__file__).parent
    path = folder / f"tuned_sm{document['capability'].replace('.', '')}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    lines = [
        f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((known | document["tuned"]).items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} tiles in {path}")
    return 0


def main() -> int:
    """Run the steps that were asked for."""
    args = arguments()
    if args.step == "store":
        return store(args)
    results = Results(args.out, args.budget)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(4)  # the networks are made while other processes compile
    if args.tiles:
        TILES.update(json.loads(args.tiles.read_text())["tuned"])
    variants, batches = args.variant.split(","), [int(b) for b in args.batch.split(",")]
    args.tries = args.tries if args.step == "all" else 1
    compiler = None if args.step == "count" else Compiler(results)
    waiting: list[tuple[str, FusedVan, int, Any]] = []
    for name in variants:
        args.variant, model = name, built(name, DTYPES[args.dtype])
        for batch in batches:
            if compiler is None:
                count(args, results, model, batch)
            else:
                jobs = compiler.compile(unmade(model, batch, args.size)[0], args.tries)
                waiting.append((name, model, batch, jobs))
    if compiler is None:
        return 0
    results.document |= {
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU, interpreted",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if ON_GPU else "0.0",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "variant": variants[0],
        "dtype": args.dtype,
        "size": args.size,
    }
    for name, _, batch, jobs in waiting:
        compiler.wait(jobs, variant=name, batch=batch)
    print("step=timing: from here on the machine is needed alone", flush=True)
    bandwidth = copy_bandwidth()
    results.add(step="copy", gb_s=round(bandwidth / 1e9, 1), device=results.document["device"])
    for args.variant, model, batch, _ in waiting:
        results.always = {"variant": args.variant}
        model.to(DEVICE)
        if batch == batches[0]:
            fidelity(args, results, model)
        if args.step != "check":
            whole(args, results, model, batch, "default" if args.step == "all" else "stored")
        if args.step != "network":
            tune(args, results, model, batch, bandwidth)
        if args.step == "all":
            whole(args, results, model, batch, "tuned")
    compiler.pool.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
