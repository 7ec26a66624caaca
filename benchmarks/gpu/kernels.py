"""The fused kernels on a GPU: checked, timed one by one, tuned, and as a whole network.

    python benchmarks/gpu/kernels.py all --variant van_b0 --batch 128 --dtype fp16 --out K.json

``count`` needs no GPU. With ``TRITON_INTERPRET=1`` every step runs on the CPU, at tiny sizes,
to rehearse it: ``--variant tiny --size 32 --batch 1``. Each row is written as soon as it is
known; a kernel that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # processes are forked below

import torch
import triton

from van_deploy.kernels import launch, network, plain
from van_deploy.kernels.launch import TILES, Launch, Tile, recorded
from van_deploy.kernels.network import FusedVan, Plan, fused
from van_deploy.model.random_weights import random_van, smooth_pictures
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TINY = VanConfig((16, 32, 32, 48), (1, 2, 1, 1), (2, 2, 2, 2), num_classes=10)
PLANS = {
    "auto": None,
    "apart": Plan.apart(),
    "gate": Plan(gate=True, widen=False, tail=False, chain=False),
    "tail": Plan(gate=True, widen=False, tail=True, chain=False),
    "widen": Plan(gate=True, widen=True, tail=True, chain=False),
    "chain": Plan(gate=True, widen=False, tail=True, chain=True),
    "all": Plan(),
}
L2_BYTES = 128 * 2**20  # buffers that are rotated hold at least this together
ON_GPU = not launch.INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Call:
    """One call of one of the network's steps, on real data."""

    step: str
    arguments: tuple[Any, ...]
    key: str
    launch: Launch

    @property
    def name(self) -> str:
        """Return the shape class, and what follows a fused tail."""
        then = self.launch.arguments[18] if self.step == "mlp_tail" else 0
        return self.key + (f"/then{then}" if then else "")

    @property
    def specification(self) -> tuple[Any, ...]:
        """Return the step and its arguments' shapes and types: enough to compile it elsewhere."""
        return self.step, tuple(
            (tuple(a.shape), a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a
            for a in self.arguments
        )

    def run(self, arguments: tuple[Any, ...] | None = None) -> list[torch.Tensor]:
        """Run the kernel and return its outputs."""
        outs = getattr(network._KERNELS, self.step)(*(arguments or self.arguments))
        return outs if isinstance(outs, list) else [outs]


class Results:
    """The rows so far, in memory and in a file."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.document: dict[str, Any] = {"rows": []}

    @property
    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.seconds - (time.monotonic() - self.start)

    def add(self, **row: Any) -> None:
        """Add a row, write the file and print it."""
        row["at_s"] = round(time.monotonic() - self.start, 1)
        self.document["rows"].append(row)
        self.path.write_text(json.dumps(self.document, indent=1))
        print(" ".join(f"{k}={_short(v)}" for k, v in row.items()), flush=True)

    @contextlib.contextmanager
    def guarded(self, **row: Any) -> Iterator[None]:
        """Make a failure inside a row, and go on."""
        try:
            yield
        except Exception as error:
            where = traceback.format_exc().splitlines()[-7:]
            self.add(**row, error=f"{type(error).__name__}: {error}"[:600], where=where)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


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


def built(name: str, dtype: torch.dtype, plan: Plan | None = None) -> FusedVan:
    """Return the fused network, on no device's terms yet."""
    model = fused(original(name), dtype, plan=plan, fallback=True)
    model.fallbacks = ()
    return model


def launches_of(
    model: FusedVan, name: str, batch: int, size: int, plan: Plan | None
) -> list[Launch]:
    """Return every launch of the network for a batch, without running it."""
    import copy

    ghost = copy.deepcopy(model).to("meta")
    ghost.plan = plan
    with recorded(run=False) as launches, torch.no_grad():
        ghost(torch.empty(batch, configuration(name).in_chans, size, size, device="meta"))
    return launches


def operations(made: Launch) -> int:
    """Return the floating-point operations of a launch, two a multiply-add."""
    shapes = [tuple(a.shape) for a in made.arguments if isinstance(a, torch.Tensor)]
    kind, x = made.key.split("/")[0], shapes[0]
    pixels = x[0] * x[1] * x[2]
    if kind == "depthwise":
        return 2 * pixels * x[3] * shapes[1][0] ** 2
    if kind == "pointwise":
        return 2 * pixels * math.prod(shapes[1])
    if kind == "gated":
        wide = math.prod(shapes[8]) if made.arguments[14] else 0
        return 2 * pixels * (2 * math.prod(shapes[1]) + wide)
    if kind == "mlp_tail":
        following = shapes[3][0] ** 2 if len(shapes[7]) == 2 else 0
        return 2 * pixels * (9 * x[3] + math.prod(shapes[3]) + following)
    return 2 * math.prod(shapes[3][:3]) * math.prod(shapes[1])


def calls_of(model: FusedVan, x: torch.Tensor, plan: Plan | None) -> list[Call]:
    """Run the network once and return every call of a kernel, in order."""
    calls: list[Call] = []
    real = network._KERNELS

    def noted(step: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with recorded() as launches:
                outs = getattr(real, step)(*arguments)
            calls.append(Call(step, arguments, launches[-1].key, launches[-1]))
            return outs

        return run

    steps = ("depthwise", "pointwise", "gated", "mlp_tail", "patches")
    network._KERNELS = network._Steps(**{step: noted(step) for step in steps})
    model.plan = plan
    try:
        with torch.no_grad():
            model(x)
    finally:
        network._KERNELS = real
    return calls


def candidates(made: Launch, limit: int = 99) -> list[Tile]:
    """Return the tiles to try for a launch: its own first."""
    own, kind = dict(made.tile), made.key.split("/")[0]
    tensors = [a for a in made.arguments if isinstance(a, torch.Tensor)]
    pixels = math.prod(tensors[0].shape[:3])
    few = pixels < 8192
    changes: list[Tile] = []
    if kind == "depthwise":
        height, channels = tensors[0].shape[1], tensors[0].shape[3]
        side = tensors[1].shape[0]
        wide = 64 if channels % 64 == 0 else 32
        rows = [1, 2, 4] if few else [3, 4, 5, 7]
        changes = [{"ROWS": r} for r in rows if (r - 1) * (3 if side == 7 else 1) < height]
        changes += [{"BLOCK_C": wide}, {"BLOCK_C": wide, "num_warps": 8}, {"BLOCK_P": 64}]
        changes += [{"UNROLL": 1}, {"BLOCK_P": 16}, {"BLOCK_P": 16, "num_warps": 2}]
        changes += [{"BLOCK_P": 8, "num_warps": 1}, {"BLOCK_P": 8, "num_warps": 1, "ROWS": 2}]
        if made.arguments[11]:
            changes += [{"ERF": 0}]
    elif kind == "pointwise":
        tiles = [(16, 16), (16, 64), (32, 32), (32, 64), (64, 32)]
        if not few:
            tiles = [(64, 32), (64, 64), (128, 32), (128, 64), (128, 128), (64, 256), (256, 64)]
        outer = tensors[1].shape[0]
        for m, n in tiles:
            if n <= 16 or n < 2 * outer:
                warps = 8 if m * n > 8192 else 4 if m * n > 1024 else 2
                changes.append({"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps})
        changes += [{"num_stages": own["num_stages"] % 4 + 1}, {"BLOCK_K": 32}]
        if made.arguments[8] == 1 and not few:
            changes += [{"ERF": 0}]
    elif kind == "gated":
        sizes = (16, 32) if few else (32, 64, 128)
        changes = [{"BLOCK_M": m, "num_warps": warps} for m in sizes for warps in (4, 8)]
        changes += [{"num_stages": 1}, {"num_stages": 3}, {"BLOCK_J": 16 if few else 64}]
    elif kind == "mlp_tail":
        block_c = launch.power_block(tensors[5].shape[3], 256)
        for rows, p in ((1, 16), (1, 32), (2, 16)) if few else ((1, 64), (2, 64), (4, 64), (2, 32)):
            for h in (32, 64):
                for warps in (4, 8):
                    if rows * p * (h + block_c) <= 96 * warps * 32:
                        changes.append(
                            {"ROWS": rows, "BLOCK_P": p, "BLOCK_H": h, "num_warps": warps}
                        )
        changes += [{"UNROLL": 1}, {"ERF": 0}, {"BLOCK_H": 16}]
    else:
        for m, n in ((16, 32), (32, 32), (64, 32), (64, 64), (128, 64)):
            changes.append({"BLOCK_M": m, "BLOCK_N": n})
        changes += [{"num_stages": 2}]
    tiles_seen, found = set(), []
    for change in [{}, *changes]:
        tile = {**own, **change}
        if (text := str(tile)) not in tiles_seen:
            tiles_seen.add(text)
            found.append(tile)
    return found[:limit]


def _launch_of(step: str, arguments: tuple[Any, ...], key: str, tile: Tile) -> Launch:
    """Return the launch that a step makes with ``tile``, without running it."""
    before = TILES.get(key)
    TILES[key] = tile
    try:
        with recorded(run=False) as launches:
            getattr(network._KERNELS, step)(*arguments)
        return launches[-1]
    finally:
        TILES.pop(key)
        if before is not None:
            TILES[key] = before


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
    return f"{made.kernel.fn.__name__} {parts} {made.tile}"


Job = tuple[str, tuple[Any, ...], str, Tile]


def _compile(job: Job) -> str:
    """Compile one launch into Triton's cache, in a process of its own."""
    step, arguments, key, tile = job
    ghosts = tuple(
        torch.empty_strided(a[0], a[1], dtype=a[2], device="meta") if isinstance(a, tuple) else a
        for a in arguments
    )
    try:
        made = _launch_of(step, ghosts, key, tile)
        known = [a.dtype if isinstance(a, torch.Tensor) else a for a in made.arguments]
        made.kernel.warmup(*known, grid=made.grid, **made.tile)
    except Exception as error:
        return f"{key} {tile}: {type(error).__name__} {error}"[:300]
    return ""


class Compiler:
    """Processes that compile kernels; made before this process uses the GPU."""

    def __init__(self, results: Results) -> None:
        self.results, self.seen = results, set[str]()
        self.pool = multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1))

    def compile(self, jobs: list[tuple[Call, Tile]]) -> Any:
        """Start to compile each call with its tile, in parallel."""
        wanted = []
        for call, tile in jobs:
            with contextlib.suppress(Exception):  # told when it is timed
                made = _launch_of(call.step, call.arguments, call.key, tile)
                if (text := _signature(made)) not in self.seen:
                    self.seen.add(text)
                    wanted.append((*call.specification, call.key, tile))
        if launch.INTERPRETED:
            self.results.add(step="precompile", kernels=len(wanted), skipped="interpreted")
            return None
        return self.pool.map_async(_compile, wanted, chunksize=1)

    def wait(self, waiting: Any) -> bool:
        """Wait until the kernels of :meth:`compile` are in the cache; whether most are."""
        if waiting is None:
            return True
        found, failures = [""], [""]
        start = time.monotonic()
        with self.results.guarded(step="precompile"):
            found = waiting.get(timeout=max(10.0, self.results.left))
            failures = [f for f in found if f]
            self.results.add(
                step="precompile",
                kernels=len(found),
                waited_s=round(time.monotonic() - start, 1),
                failed=len(failures),
                failures=failures[:20],
            )
        return 2 * len(failures) < len(found)


def timed(run: Callable[[int], Any], copies: int, budget_s: float = 0.05) -> float:
    """Return the median seconds of ``run(i)``, i going round ``copies`` sets of inputs.

    On a GPU by replays of a CUDA graph that holds one run on every set.
    """
    if not ON_GPU:
        start = time.perf_counter()
        run(0)
        return time.perf_counter() - start
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    repeats = copies * max(1, 8 // copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(repeats):
            run(number % copies)
    return replay_time(graph, budget_s) / repeats


def replay_time(graph: Any, budget_s: float) -> float:
    """Return the median seconds of a CUDA graph's replay, over about ``budget_s``."""
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    graph.replay()
    events[1].record()
    torch.cuda.synchronize()
    once = events[0].elapsed_time(events[1]) / 1e3
    count = max(5, min(200, int(budget_s / max(once, 1e-6))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False))
    return spans[count // 2]


def copy_bandwidth() -> float:
    """Return bytes read and written a second by a large copy on the device."""
    source = torch.randn(2**28 if ON_GPU else 2**16, device=DEVICE)
    target = torch.empty_like(source)
    seconds = timed(lambda _: target.copy_(source), 1, 0.1)
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


def error_of(call: Call) -> float:
    """Return the relative error of a kernel against float64 PyTorch; NaN if it left a hole."""
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in call.arguments]
    expected = getattr(plain, call.step)(*doubles)
    expected = expected if isinstance(expected, list) else [expected]
    with poisoned():
        found = call.run(tuple(walled(a) for a in call.arguments))
    pairs = zip(found, expected, strict=True)
    return max(float((f.double() - e).norm() / e.norm()) for f, e in pairs)


def unique(calls: list[Call]) -> dict[str, tuple[Call, int]]:
    """Return one call of each shape class, and how many there are."""
    counts = Counter(call.name for call in calls)
    return {call.name: (call, counts[call.name]) for call in calls}


def gather(args: Any, model: FusedVan, batch: int, plans: list[str]) -> dict[str, tuple[Call, int]]:
    """Return the calls of several plans on the device."""
    x = images(args.variant, batch, args.size).to(DEVICE)
    found: dict[str, tuple[Call, int]] = {}
    for name in plans:
        for key, value in unique(calls_of(model, x, PLANS[name])).items():
            found.setdefault(key, value)
    return found


def check(args: Any, results: Results, model: FusedVan, batch: int) -> None:
    """Compare every kernel with float64 PyTorch at the network's shapes."""
    limit = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 1e-5}[args.dtype]
    for key, (call, _) in gather(args, model, batch, ["apart", "tail", "all"]).items():
        with results.guarded(step="check", key=key), torch.no_grad():
            error = error_of(call)
            results.add(step="check", key=key, relative_error=error, passed=error <= limit)


def every_launch(
    args: Any, results: Results, model: FusedVan, batch: int, bandwidth: float, all_tiles: bool
) -> None:
    """Time every launch, with the tiles there are to try, and keep the best of each."""
    for name, (call, count) in gather(args, model, batch, ["tail", "apart", "all"]).items():
        key = call.key
        if results.left < (70 if batch > 1 else 45):  # what the network's steps need
            results.add(step="each", key=name, skipped="budget")
            continue
        copies = max(1, min(12, L2_BYTES // max(call.launch.bytes, 1)))
        sets = [call.arguments] + [
            tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in call.arguments)
            for _ in range(copies - 1)
        ]
        tried: list[dict[str, Any]] = []
        base: list[torch.Tensor] = []
        before = TILES.get(key)
        alone = not all_tiles or "/then" in name
        for tile in [dict(call.launch.tile)] if alone else candidates(call.launch, args.tries):
            TILES[key] = tile
            try:
                with torch.no_grad(), poisoned():
                    outs = call.run()
                base = base or [o.clone() for o in outs]
                pairs = zip(outs, base, strict=True)
                off = max(
                    float((o.float() - b.float()).norm() / b.float().norm()) for o, b in pairs
                )
                del outs
                with torch.no_grad():
                    seconds = timed(lambda i: call.run(sets[i]), copies, args.span)
                tried.append({"us": round(seconds * 1e6, 2), "tile": tile, "off": off})
            except Exception as error:
                tried.append({"error": f"{type(error).__name__}: {error}"[:200], "tile": tile})
            finally:
                TILES.pop(key, None)
        if before is not None:
            TILES[key] = before
        good = sorted((t for t in tried if t.get("off", 1.0) < 2e-2), key=lambda t: t["us"])
        if not good:
            results.add(step="each", key=name, batch=batch, error="no tile works", tried=tried[:3])
            continue
        best, moved, done = good[0], call.launch.bytes, operations(call.launch)
        if not alone:
            TILES[key] = best["tile"]
        results.add(
            step="each",
            key=name,
            batch=batch,
            count=count,
            bytes=moved,
            operations=done,
            us=best["us"],
            default_us=tried[0].get("us"),
            gb_s=round(moved / best["us"] / 1e3, 1),
            of_copy=round(moved / best["us"] * 1e6 / bandwidth, 3),
            tflop_s=round(done / best["us"] / 1e6, 2),
            tile=best["tile"],
        )
        results.document["rows"][-1]["tried"] = tried
    tuned = {k: dict(sorted(v.items())) for k, v in sorted(TILES.items())}
    results.document["tuned"] = tuned
    results.add(step="tuned", batch=batch, keys=len(tuned))


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the signal-to-noise ratio of logits in dB."""
    noise = (found.double() - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise))


def fidelity(args: Any, results: Results, model: FusedVan) -> None:
    """Compare logits with those of the original network in float64."""
    import copy

    with results.guarded(step="sqnr"), torch.no_grad():
        x = images(args.variant, 2, args.size)
        double = copy.deepcopy(original(args.variant)).double().to(DEVICE)
        expected = double(x.double().to(DEVICE)).cpu()
        for name in ("auto", "apart", "all"):
            model.plan = PLANS[name]
            found = model(x.to(DEVICE)).cpu()
            results.add(step="sqnr", plan=name, db=round(sqnr(found, expected), 2))


def captured(run: Callable[[], torch.Tensor]) -> Any:
    """Return a CUDA graph of ``run``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        run()
    return graph


def time_network(results: Results, model: Any, x: torch.Tensor, profile: bool, **row: Any) -> None:
    """Time a network under a CUDA graph, and share the time among its kernels."""
    batch = len(x)
    if not ON_GPU:
        seconds = timed(lambda _: model(x), 1)
        results.add(step="network", batch=batch, ms=seconds * 1e3, **row)
        return
    graph = captured(lambda: model(x))
    seconds = replay_time(graph, 0.3)
    row |= {"batch": batch, "ms": round(seconds * 1e3, 4), "images_s": round(batch / seconds, 1)}
    results.add(step="network", **row)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA]) as seen:
            graph.replay()
            torch.cuda.synchronize()
        events = [e for e in seen.key_averages() if e.self_device_time_total > 0]
        rows = sorted(events, key=lambda e: -e.self_device_time_total)
        shares = [[e.key[:70], e.count, round(e.self_device_time_total, 1)] for e in rows[:24]]
        total = round(sum(e.self_device_time_total for e in rows), 1)
        results.add(
            step="profile", batch=batch, plan=row.get("plan"), total_us=total, kernels=shares
        )


def whole(args: Any, results: Results, model: FusedVan, batches: list[int], plans: str) -> None:
    """Time the whole network with each plan."""
    for batch in batches:
        x = images(args.variant, batch, args.size).to(DEVICE, DTYPES[args.dtype])
        for name in plans.split(","):
            plan = PLANS[name]
            if results.left < 0:
                results.add(step="network", batch=batch, plan=name, skipped="budget")
                continue
            with results.guarded(step="network", batch=batch, plan=name):
                model.plan = plan
                time_network(results, model, x, name in ("auto", "apart"), plan=name)
    model.plan = None


def compiled(args: Any, results: Results, model: FusedVan, batches: list[int]) -> None:
    """Time the network through torch.compile, and build the inductor package."""
    for batch in batches:
        if results.left < 20:
            results.add(step="compiled", batch=batch, skipped="budget")
            continue
        x = images(args.variant, batch, args.size).to(DEVICE, DTYPES[args.dtype])
        with results.guarded(step="compiled", batch=batch):
            start = time.monotonic()
            torch._dynamo.reset()
            faster = torch.compile(model, fullgraph=True, dynamic=False)
            with torch.no_grad():
                faster(x)
            spent = round(time.monotonic() - start, 1)
            time_network(results, faster, x, batch == batches[-1], plan="compiled", compile_s=spent)
    if results.left < 20 or not ON_GPU:
        return
    with results.guarded(step="aoti"), torch.no_grad():
        start = time.monotonic()
        x = images(args.variant, batches[0], args.size).to(DEVICE, DTYPES[args.dtype])
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(args.out.with_suffix(".pt2").resolve())
        )
        package = torch._inductor.aoti_load_package(path)
        off = float((package(x) - model(x)).norm() / model(x).norm())
        spent = round(time.monotonic() - start, 1)
        results.add(step="aoti", batch=batches[0], compile_s=spent, off=off)
        time_network(results, package, x, False, plan="aoti")


def count(args: Any, results: Results, model: FusedVan, batch: int) -> None:
    """Print launches, bytes and operations of each plan; needs no GPU."""
    for name, plan in PLANS.items():
        made = launches_of(model, args.variant, batch, args.size, plan)
        results.add(
            step="count",
            plan=name,
            batch=batch,
            launches=len(made),
            mb_an_image=round(sum(one.bytes for one in made) / batch / 1e6, 2),
            gflop_an_image=round(sum(operations(one) for one in made) / batch / 1e9, 3),
        )


def everything_to_compile(
    args: Any, model: FusedVan, batches: list[int], tiles: bool
) -> list[tuple[Call, Tile]]:
    """Return every call and tile that the steps will run, on no device."""
    import copy

    ghost = copy.deepcopy(model).to("meta")
    made: list[tuple[Call, Tile]] = []
    for batch in batches:
        shape = (batch, configuration(args.variant).in_chans, args.size, args.size)
        for dtype in {torch.float32, DTYPES[args.dtype]}:
            x = torch.empty(shape, device="meta", dtype=dtype)
            found: dict[str, Call] = {}
            for name in ("tail", "apart", "all"):
                with recorded(run=False):
                    for call in calls_of(ghost, x, PLANS[name]):
                        found.setdefault(call.name, call)
            for call in found.values():
                alone = not tiles or "/then" in call.name
                tried = [dict(call.launch.tile)] if alone else candidates(call.launch, args.tries)
                made += [(call, tile) for tile in tried]
    return made


def arguments() -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["count", "check", "each", "network", "tune", "all"])
    parser.add_argument("--variant", default="van_b0", choices=[*VARIANTS, "tiny"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="fp16", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--budget", type=float, default=190.0, help="seconds")
    parser.add_argument("--span", type=float, default=0.015, help="seconds to time each tile")
    parser.add_argument("--plans", default=",".join(PLANS), help="for the whole network")
    parser.add_argument("--tries", type=int, default=99, help="tiles to try for each launch")
    parser.add_argument("--tiles", type=Path, help="tuned tiles to start from: JSON of this script")
    return parser.parse_args()


def main() -> int:
    """Run the steps that were asked for."""
    args = arguments()
    results = Results(args.out, args.budget)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.tiles:
        TILES.update(json.loads(args.tiles.read_text())["tuned"])
    batches = sorted({1, args.batch})
    model = built(args.variant, DTYPES[args.dtype])
    print(f"built after {time.monotonic() - results.start:.1f} s", flush=True)
    if args.step == "count":
        count(args, results, model, args.batch)
        return 0
    tuning = args.step in ("tune", "all")
    compiler = Compiler(results)
    shapes = sorted({1, 8, args.batch}) if args.step in ("network", "all") else batches
    first = compiler.compile(everything_to_compile(args, model, shapes, False))
    second = third = None
    if tuning or args.step == "each":
        second = compiler.compile(everything_to_compile(args, model, [args.batch], True))
    if tuning and args.batch > 1:
        third = compiler.compile(everything_to_compile(args, model, [1], True))
    model.to(DEVICE)
    results.document |= {
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "variant": args.variant,
        "dtype": args.dtype,
        "size": args.size,
    }
    bandwidth = copy_bandwidth()
    results.add(step="copy", gb_s=round(bandwidth / 1e9, 1), device=results.document["device"])
    if not compiler.wait(first):
        args.tries = 2  # each would be compiled when it is timed
    if args.step in ("check", "all"):
        check(args, results, model, args.batch)
    if args.step in ("network", "all"):
        fidelity(args, results, model)
        whole(args, results, model, shapes, "auto,apart" if tuning else args.plans)
    if args.step in ("each", "tune", "all"):
        compiler.wait(second)
        every_launch(args, results, model, args.batch, bandwidth, True)
    if tuning:
        compiler.wait(third)
        if args.batch > 1:
            every_launch(args, results, model, 1, bandwidth, True)
        compiler.wait(compiler.compile(everything_to_compile(args, model, shapes, False)))
        whole(args, results, model, shapes, args.plans)
    if args.step in ("network", "all"):
        compiled(args, results, model, batches)
    compiler.pool.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
