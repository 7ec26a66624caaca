"""The fused kernels on a GPU: checked, tuned one by one, and as a whole network.

    python benchmarks/gpu/kernels.py all --variant van_b0,van_b2 --dtype fp16 --out K.json

``check`` compares each kernel with float64 PyTorch, ``network`` times the network with the
stored tiles, ``all`` tunes as well; ``count`` needs no GPU. ``store`` writes the tuned tiles of
``--out`` where the package reads them. With ``TRITON_INTERPRET=1`` every step runs on the CPU,
to rehearse it: ``--variant tiny --size 16 --batch 1 --tries 2``. Each row is written as soon as
it is known; a kernel that fails is a note.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tiles import candidates

from van_deploy.files import write_atomic
from van_deploy.kernels import launch, network, ops, reference
from van_deploy.kernels.launch import TILES, Launch, Tile, record_launches
from van_deploy.kernels.network import FusedVan, fuse_van
from van_deploy.model.van import random_van, smooth_images
from van_deploy.model.variants import VARIANTS, VanConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 1e-5}
TINY = VanConfig((16, 32, 32, 48), (1, 2, 1, 1), (2, 2, 2, 2), num_classes=10)
CONFIGURATIONS = {"tiny": TINY, **{name: variant.config for name, variant in VARIANTS.items()}}
L2_BYTES = 128 * 2**20  # buffers that are rotated hold at least this together
ON_GPU = not launch.INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Call:
    """One call of one of the network's steps."""

    step: str
    arguments: tuple[Any, ...]
    launch: Launch


class Log:
    """Rows, notes and facts in a file that is replaced whenever a row or a note is added."""

    def __init__(self, path: Path, **facts: Any) -> None:
        """Begin with some facts."""
        self._path, self.facts = path, facts
        self._added: dict[str, list[Any]] = {"rows": [], "notes": []}

    def add(self, kind: str, value: Any) -> None:
        """Add to the ``rows`` or the ``notes``, and print it."""
        self._added[kind].append(value)
        print(value if kind == "notes" else json.dumps(value)[1:-1].replace('"', ""), flush=True)
        write_atomic(self._path, json.dumps({**self._added, "facts": self.facts}, indent=1))

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Make a failure inside a note and go on."""
        try:
            yield
        except Exception as error:
            self.add("notes", f"{what}: {type(error).__name__}: {error}"[:600])


@functools.cache
def images(name: str, batch: int, size: int) -> torch.Tensor:
    """Return seeded images ``(batch, C, size, size)`` float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        few = smooth_images(min(batch, 16), CONFIGURATIONS[name].in_chans, size)
    return few.repeat(math.ceil(batch / len(few)), 1, 1, 1)[:batch]


def built(name: str, dtype: torch.dtype) -> FusedVan:
    """Return the fused network, on no device's terms yet."""
    model = fuse_van(random_van(CONFIGURATIONS[name]), dtype, fallback=True)
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
            with record_launches(run=x.device.type != "meta") as launches:
                out = getattr(ops, step)(*arguments)
            calls.setdefault(launches[-1].key, Call(step, arguments, launches[-1]))
            counts[launches[-1].key] += 1
            return out

        return run

    network.ops = SimpleNamespace(**{step: noted(step) for step in ops.__all__})
    try:
        with torch.no_grad():
            model(x)
    finally:
        network.ops = ops
    return calls, counts


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


def poisoned() -> Any:
    """Return a context in which kernels allocate NaN, so that what they do not write shows."""
    empty, like = torch.empty, torch.empty_like
    return mock.patch.multiple(
        torch,
        empty=lambda *a, **k: empty(*a, **k).fill_(math.nan),
        empty_like=lambda *a, **k: like(*a, **k).fill_(math.nan),
    )


def walled(tensor: Any) -> Any:
    """Return a tensor's copy with NaN before and behind it."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
        return tensor
    flat = torch.full((tensor.numel() + 256,), math.nan, dtype=tensor.dtype, device=tensor.device)
    flat[128:-128] = tensor.reshape(-1)
    return flat[128:-128].view(tensor.shape)


def tune(args: Any, log: Log, model: FusedVan, batch: int, bandwidth: float) -> None:
    """Check and time every kernel of the network, and keep its best tile."""
    x = images(args.variant, batch, args.size).to(DEVICE, model.dtype)
    calls, counts = calls_of(model, x)
    for key, call in calls.items():
        place = {"network": args.variant, "batch": batch, "kernel": key, "calls": counts[key]}
        with log.guarded(f"{args.variant}, batch {batch}, {key}"), torch.no_grad():
            found = tuned(args, call, bandwidth)
            log.facts["tuned"] = {k: dict(sorted(v.items())) for k, v in sorted(TILES.items())}
            log.add("rows", {**place, **found})


def tuned(args: Any, call: Call, bandwidth: float) -> dict[str, Any]:
    """Check and time one kernel with its tiles; keep the best one and return its figures."""
    run = getattr(ops, call.step)
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in call.arguments]
    expected = getattr(reference, call.step)(*doubles).float()
    del doubles
    guarded = tuple(walled(a) for a in call.arguments)
    copies = max(1, min(12, L2_BYTES // max(call.launch.bytes, 1)))
    sets = [call.arguments] + [
        tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in call.arguments)
        for _ in range(copies - 1)
    ]

    def attempt(tile: Tile) -> tuple[float, float, Tile]:
        """Return microseconds, relative error, and the tile; what errs too much is an error."""
        with mock.patch.dict(TILES, {call.launch.key: tile}):
            with poisoned():
                found = run(*guarded).to(expected.dtype)
            error = float((found - expected).norm() / expected.norm())  # NaN where it left a hole
            if not error <= LIMITS[args.dtype]:
                raise RuntimeError(f"relative error {error:.2g}")
            return timed(lambda i: run(*sets[i]), copies, args.span) * 1e6, error, tile

    tiles, good, bad = candidates(call.launch)[: args.tries], [], list[str]()
    for tile in tiles:
        try:
            good.append(attempt(tile))
        except Exception as failure:  # noqa: PERF203 - each on its own
            bad.append(f"{tile}: {type(failure).__name__}: {failure}"[:200])
    if not good:
        raise RuntimeError(f"no tile works: {'; '.join(bad)}")
    us, error, tile = min(good, key=lambda one: one[0])
    if len(tiles) > 1:
        TILES[call.launch.key] = tile
    moved, done = call.launch.bytes, operations(call.launch)
    return {
        "us": round(us, 2),
        "default us": round(good[0][0], 2),
        "MB": round(moved / 1e6, 2),
        "of copy": round(moved / us * 1e6 / bandwidth, 3),
        "TFLOP/s": round(done / us / 1e6, 2),
        "relative error": error,
        "tiles that fail": len(tiles) - len(good),
    }


def whole(args: Any, log: Log, model: FusedVan, batch: int, tiles: str) -> None:
    """Time the network under a CUDA graph."""
    x = images(args.variant, batch, args.size).to(DEVICE, model.dtype)
    with log.guarded(f"{args.variant}, batch {batch}, {tiles} tiles"), torch.no_grad():
        graph = captured(lambda: model(x)) if ON_GPU else None
        seconds = replay_time(graph, 0.25) if graph else timed(lambda _: model(x), 1)
        place = {"network": args.variant, "batch": batch, "precision": args.dtype}
        what = f"the network as a CUDA graph, {tiles} tiles"
        log.add("rows", {**place, "what": what, "ms": seconds * 1e3})


def count(args: Any, model: FusedVan, batch: int) -> None:
    """Print launches, bytes and operations; needs no GPU."""
    channels = model.patch_embed1.weight.shape[2]
    x = torch.empty(batch, channels, args.size, args.size, device="meta", dtype=model.dtype)
    calls, counts = calls_of(copy.deepcopy(model).to("meta"), x)
    made = [(calls[key].launch, times) for key, times in counts.items()]
    moved = sum(one.bytes * n for one, n in made) / batch / 1e6
    done = sum(operations(one) * n for one, n in made) / batch / 1e9
    print(
        f"{args.variant}, batch {batch}: {counts.total()} launches, {moved:.2f} MB and "
        f"{done:.3f} GFLOP an image"
    )


def store(path: Path) -> int:
    """Write the tuned tiles where the package reads them."""
    facts = json.loads(path.read_text())["facts"]
    folder = Path(launch.__file__).parent
    target = folder / f"tuned_sm{facts['capability'].replace('.', '')}.json"
    known = json.loads(target.read_text()) if target.is_file() else {}
    both = sorted((known | facts["tuned"]).items())
    lines = [f"{json.dumps(key)}: {json.dumps(tile)}" for key, tile in both]
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} tiles in {target}")
    return 0


def main() -> int:
    """Run the steps that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["count", "check", "network", "all", "store"])
    parser.add_argument("--variant", default="van_b0", help="one or several, comma-separated")
    parser.add_argument("--batch", default="128,1,8", help="one or several, comma-separated")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="fp16", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--span", type=float, default=0.008, help="seconds to time each tile")
    parser.add_argument("--tries", type=int, default=99, help="tiles to try for each launch")
    args = parser.parse_args()
    if args.step == "store":
        return store(args.out)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    variants, batches = args.variant.split(","), [int(b) for b in args.batch.split(",")]
    models = {name: built(name, DTYPES[args.dtype]) for name in variants}
    if args.step == "count":
        for args.variant, batch in itertools.product(variants, batches):
            count(args, models[args.variant], batch)
        return 0
    where = torch.cuda.get_device_capability() if ON_GPU else (0, 0)
    log, bandwidth = Log(args.out, capability=".".join(map(str, where))), copy_bandwidth()
    args.tries = args.tries if args.step == "all" else 1
    log.add("notes", f"Copying on this device: {bandwidth / 1e9:.1f} GB/s.")
    for args.variant, batch in itertools.product(variants, batches):
        model = models[args.variant].to(DEVICE)
        if args.step != "check":
            whole(args, log, model, batch, "stored")
        if args.step != "network":
            tune(args, log, model, batch, bandwidth)
        if args.step == "all":
            whole(args, log, model, batch, "tuned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
