"""Check, tune and time the fused kernels on a GPU, one by one and as a whole network.

    python benchmarks/gpu/kernels.py all --variant van_b0,van_b2 --dtype fp16 --out K.json

``check`` compares each kernel with PyTorch in float64, ``network`` times the network with the
stored tiles, ``all`` also tunes the tiles; ``count`` needs no GPU. ``store`` writes the tuned tiles
of ``--out`` to the package. With ``TRITON_INTERPRET=1`` every step runs on the CPU as a rehearsal:
``--variant tiny --size 16 --batch 1 --tries 2``. Each row is written at once; a kernel that fails
is a note.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from van_deploy.bench.gpu import Timer, repeat_for, torch_timer
from van_deploy.files import write_atomic
from van_deploy.kernels import launch, network, ops, reference
from van_deploy.kernels.launch import FEW, TILES, Launch, Tile, power_of_two_block, record_launches
from van_deploy.kernels.network import FusedVan, fuse_van
from van_deploy.model.van import random_van, smooth_images
from van_deploy.model.variants import VARIANTS, VanConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MAX_RELATIVE_ERROR = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 1e-5}
TINY = VanConfig((16, 32, 32, 48), (1, 2, 1, 1), (2, 2, 2, 2), num_classes=10)
CONFIGURATIONS = {"tiny": TINY, **{name: variant.config for name, variant in VARIANTS.items()}}
L2_BYTES = 128 * 2**20  # minimum total size of rotating inputs, so that none stays in the L2 cache
TILE_SIZES = {
    "depthwise": ("ROWS", "BLOCK_P", "BLOCK_C", "num_warps"),
    "pointwise": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "REPEAT", "num_warps", "num_stages"),
    "layer_norm": ("BLOCK_M", "num_warps"),
    "patches": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
}
ON_GPU = not launch.INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Call(NamedTuple):
    """One call of an operator of the network."""

    op: str
    arguments: tuple[Any, ...]
    launch: Launch


class Results:
    """Rows, notes and facts in a JSON file that is replaced at each new row or note.

    Attributes:
        failures: how many kernels and networks failed; a note says why.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        """Start without rows."""
        self.path, self.facts = path, facts
        self.failures = 0
        self.document: dict[str, Any] = {"rows": [], "notes": [], "facts": facts}

    def add(self, kind: str, value: Any) -> None:
        """Add to the ``rows`` or the ``notes``, and print it."""
        self.document[kind].append(value)
        print(value if kind == "notes" else json.dumps(value)[1:-1].replace('"', ""), flush=True)
        write_atomic(self.path, json.dumps(self.document, indent=1))

    @contextlib.contextmanager
    def note_failure(self, what: str) -> Iterator[None]:
        """Add a note for an exception in the block, and continue after it."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            self.add("notes", f"{what}: {type(error).__name__}: {error}"[:600])


def fused_network(name: str, dtype: torch.dtype) -> FusedVan:
    """Return the fused network, which may run on any device."""
    model = fuse_van(random_van(CONFIGURATIONS[name]), dtype, fallback=True)
    model.fallbacks = ()
    return model


def operations(recorded: Launch) -> int:
    """Return the floating-point operations of a launch; a multiply-add counts as two."""
    shapes = [tuple(a.shape) for a in recorded.arguments if isinstance(a, torch.Tensor)]
    kind, x = recorded.key.split("/")[0], shapes[0]
    pixels = x[0] * x[1] * x[2]
    if kind == "depthwise":
        return 2 * pixels * x[3] * shapes[1][0] ** 2
    if kind == "pointwise":
        return 2 * pixels * math.prod(shapes[1])
    if kind == "layer_norm":
        return 8 * math.prod(x)
    return 2 * math.prod(shapes[3][:3]) * math.prod(shapes[1])


def record_calls(model: FusedVan, x: torch.Tensor) -> tuple[dict[str, Call], Counter[str]]:
    """Run the network once; return one call of each shape class, and their counts."""
    calls: dict[str, Call] = {}
    counts: Counter[str] = Counter()

    def recording(op: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with record_launches(run=x.device.type != "meta") as launches:
                out = getattr(ops, op)(*arguments)
            calls.setdefault(launches[-1].key, Call(op, arguments, launches[-1]))
            counts[launches[-1].key] += 1
            return out

        return run

    stand_in = SimpleNamespace(**{op: recording(op) for op in ops.__all__})
    with mock.patch.object(network, "ops", stand_in), torch.no_grad():
        model(x)
    return calls, counts


def call_seconds(run: Callable[[int], Any], copies: int, span: float = 0.01) -> float:
    """Return the median seconds of ``run(i)``, where i cycles through ``copies`` sets of inputs.

    On a GPU from replays of a CUDA graph that contains a run of each set.
    """
    if not ON_GPU:
        return Timer().time_ms(lambda: run(0)) / 1e3
    repeats = copies * max(1, 8 // copies)
    graph = capture(lambda: [run(number % copies) for number in range(repeats)], 1)
    return replay_seconds(graph, span) / repeats


def capture(run: Callable[[], Any], warmup: int = 2) -> Any:
    """Return a CUDA graph of ``run``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        run()
    return graph


def replay_seconds(graph: Any, span: float) -> float:
    """Return the median seconds of a CUDA graph's replay, over about ``span`` seconds."""
    timer = torch_timer()
    graph.replay()  # also uploads the graph
    estimate_ms = timer.time_ms(graph.replay, 2) / 2
    replays = max(1, min(20, round(1e3 * span / 5 / max(estimate_ms, 1e-3))))
    groups_ms = repeat_for(span, 5, lambda: timer.time_ms(graph.replay, replays))
    return median(groups_ms) / replays / 1e3


def copy_bandwidth() -> float:
    """Return the bytes read and written per second by a large copy on the device."""
    source = torch.randn(2**28 if ON_GPU else 2**16, device=DEVICE)
    target = torch.empty_like(source)
    seconds = call_seconds(lambda _: torch.add(source, 1.0, out=target), 1, 0.05)
    return 2 * source.numel() * source.element_size() / seconds


def nan_allocations() -> Any:
    """Return a context in which outputs are allocated as NaN, which reveals missing writes."""
    empty, like = torch.empty, torch.empty_like
    return mock.patch.multiple(
        torch,
        empty=lambda *a, **k: empty(*a, **k).fill_(math.nan),
        empty_like=lambda *a, **k: like(*a, **k).fill_(math.nan),
    )


def pad_with_nan(tensor: Any) -> Any:
    """Return a copy of a tensor with NaN before and after it, which reveals reads out of bounds."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
        return tensor
    flat = torch.full((tensor.numel() + 256,), math.nan, dtype=tensor.dtype, device=tensor.device)
    flat[128:-128] = tensor.reshape(-1)
    return flat[128:-128].view(tensor.shape)


def candidates(launch: Launch) -> list[Tile]:
    """Return the tiles to try for a launch; the first is its own."""
    kind, own = launch.key.split("/")[0], dict(launch.tile)
    shapes = [a.shape for a in launch.arguments if isinstance(a, torch.Tensor)]
    has_few_pixels = math.prod(shapes[-1][:3]) < FEW
    values: list[tuple[int, ...]]
    if kind == "depthwise":
        height, channels, side = shapes[0][1], shapes[0][3], shapes[1][0]
        dilation = int(launch.key.split("/")[1].split("x")[1])
        if has_few_pixels:
            values = [(1, 4, 32, 2), (1, 16, 32, 4), (2, 8, 32, 2), (3, 8, 32, 4), (4, 8, 32, 2)]
        elif side == 3:
            values = [(4, 32, 32, 4), (7, 16, 32, 4), (7, 8, 32, 2), (14, 8, 32, 4)]
        elif dilation == 1:
            values = [(14, 8, 32, 4), (7, 16, 32, 4), (7, 8, 32, 2)]
        else:
            values = [(10, 8, 32, 4), (10, 16, 32, 4), (5, 16, 32, 4), (3, 16, 32, 4)]
        values = [v for v in values if (v[0] - 1) * dilation < height and channels % v[2] == 0]
    elif kind == "pointwise":
        inner = shapes[1][1]
        k, n, whole = own["BLOCK_K"], own["BLOCK_N"], power_of_two_block(inner, 64)
        if has_few_pixels:
            values = [(16, 32, k, 1, 2, 4), (16, 64, k, 1, 4, 4), (32, 32, k, 1, 4, 4)]
            values += [(64, 32, k, 1, 4, 4), (16, 16, k, 1, 1, 4)]
            values += [(16, 32, 128, 1, 4, 3)] if inner % 128 == 0 else []
        else:
            values = [(64, n, k, 1, 4, 3), (128, n, k, 1, 4, 4), (128, n, k, 1, 8, 3)]
            values += [(256, n, k, 1, 8, 3), (128, 64, k, 1, 4, 3)]
            values += [(64, n, whole, 4, 4, 3)] if inner == whole else []
    elif kind == "layer_norm":
        m = own["BLOCK_M"]
        values = [(m * 2, 4), (max(1, m // 2), 4), (max(1, m // 2), 2), (m * 2, 8)]
    else:
        kind, n = "patches", own["BLOCK_N"]
        values = [(128, n, 4, 3), (64, n, 4, 4), (64, n, 4, 2), (64, min(64, n), 2, 3)]
        if has_few_pixels:
            values = [(16, 16, 2, 4), (16, 32, 4, 5), (32, 32, 4, 3)]
    tiles = [own, *({**own, **dict(zip(TILE_SIZES[kind], v, strict=True))} for v in values)]
    return [tile for place, tile in enumerate(tiles) if tile not in tiles[:place]]


def tune_network(
    args: Any, results: Results, model: FusedVan, x: torch.Tensor, bandwidth: float
) -> None:
    """Check and time each kernel of the network, and keep its best tile."""
    calls, counts = record_calls(model, x)
    for key, call in calls.items():
        labels = {"network": args.variant, "batch": len(x), "kernel": key, "calls": counts[key]}
        failure = results.note_failure(f"{args.variant}, batch {len(x)}, {key}")
        with failure, torch.no_grad():
            row = tune_kernel(args, call, bandwidth)
            results.facts["tuned"] = {k: dict(sorted(v.items())) for k, v in sorted(TILES.items())}
            results.add("rows", {**labels, **row})


def tune_kernel(args: Any, call: Call, bandwidth: float) -> dict[str, Any]:
    """Check and time a kernel with all tiles; keep the best tile and return its figures."""
    run = getattr(ops, call.op)
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in call.arguments]
    expected = getattr(reference, call.op)(*doubles).float()
    del doubles
    padded = tuple(pad_with_nan(a) for a in call.arguments)
    copies = max(1, min(12, L2_BYTES // max(call.launch.bytes, 1)))
    sets = [call.arguments] + [
        tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in call.arguments)
        for _ in range(copies - 1)
    ]

    def try_tile(tile: Tile) -> tuple[float, float, Tile]:
        """Return microseconds, relative error and the tile; raise if the error is too large."""
        with mock.patch.dict(TILES, {call.launch.key: tile}):
            with nan_allocations():
                actual = run(*padded).to(expected.dtype)
            error = float((actual - expected).norm() / expected.norm())  # NaN after a missing write
            if not error <= MAX_RELATIVE_ERROR[args.dtype]:
                raise RuntimeError(f"relative error {error:.2g}")
            return call_seconds(lambda i: run(*sets[i]), copies, args.span) * 1e6, error, tile

    tiles, passed, failed = candidates(call.launch)[: args.tries], [], list[str]()
    for tile in tiles:
        try:
            passed.append(try_tile(tile))
        except Exception as error:  # noqa: PERF203 - try the next tile
            failed.append(f"{tile}: {type(error).__name__}: {error}"[:200])
    if not passed:
        raise RuntimeError(f"no tile works: {'; '.join(failed)}")
    us, error, tile = min(passed, key=lambda one: one[0])
    if len(tiles) > 1:
        TILES[call.launch.key] = tile
    size = call.launch.bytes
    return {
        "us": round(us, 2),
        "default us": round(passed[0][0], 2),
        "MB": round(size / 1e6, 2),
        "of copy": round(size / us * 1e6 / bandwidth, 3),
        "TFLOP/s": round(operations(call.launch) / us / 1e6, 2),
        "relative error": error,
        "tiles that fail": len(failed),
    }


def time_network(args: Any, results: Results, model: FusedVan, x: torch.Tensor, tiles: str) -> None:
    """Time the network as a CUDA graph."""
    failure = results.note_failure(f"{args.variant}, batch {len(x)}, {tiles} tiles")
    with failure, torch.no_grad():
        graph = capture(lambda: model(x)) if ON_GPU else None
        seconds = replay_seconds(graph, 0.25) if graph else call_seconds(lambda _: model(x), 1)
        labels = {"network": args.variant, "batch": len(x), "precision": args.dtype}
        what = "the network as a CUDA graph" if graph else "the network"
        results.add("rows", {**labels, "what": f"{what}, {tiles} tiles", "ms": seconds * 1e3})


def count(args: Any, model: FusedVan, batch: int) -> None:
    """Print launches, bytes and operations; no GPU is needed."""
    shape = (batch, CONFIGURATIONS[args.variant].in_chans, args.size, args.size)
    x = torch.empty(shape, device="meta", dtype=model.dtype)
    calls, counts = record_calls(copy.deepcopy(model).to("meta"), x)
    launches = [(calls[key].launch, times) for key, times in counts.items()]
    size = sum(one.bytes * n for one, n in launches) / batch / 1e6
    flops = sum(operations(one) * n for one, n in launches) / batch / 1e9
    print(
        f"{args.variant}, batch {batch}: {counts.total()} launches, {size:.2f} MB and "
        f"{flops:.3f} GFLOP per image"
    )


def store(path: Path) -> int:
    """Write the tuned tiles to the file that the package reads."""
    facts = json.loads(path.read_text())["facts"]
    if facts["capability"] == "0.0":
        raise SystemExit(f"'{path}' was written without a GPU: there is nothing to store")
    name = f"tuned_sm{facts['capability'].replace('.', '')}.json"
    target = Path(launch.__file__).with_name(name)
    stored = json.loads(target.read_text()) if target.is_file() else {}
    tiles = sorted((stored | facts["tuned"]).items())
    lines = [f"{json.dumps(key)}: {json.dumps(tile)}" for key, tile in tiles]
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} tiles in {target}")
    return 0


def main() -> int:
    """Run the requested steps; return 1 if a kernel or a network failed."""
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
    if unknown := {*variants} - {*CONFIGURATIONS}:
        parser.error(f"'{min(unknown)}' is not one of {', '.join(CONFIGURATIONS)}")
    models = {name: fused_network(name, DTYPES[args.dtype]) for name in variants}
    if args.step == "count":
        for args.variant, batch in itertools.product(variants, batches):
            count(args, models[args.variant], batch)
        return 0
    capability = torch.cuda.get_device_capability() if ON_GPU else (0, 0)
    results, bandwidth = Results(args.out, capability="{}.{}".format(*capability)), copy_bandwidth()
    args.tries = args.tries if args.step == "all" else 1
    results.add("notes", f"Copy bandwidth of this device: {bandwidth / 1e9:.1f} GB/s.")
    for args.variant, batch in itertools.product(variants, batches):
        model, config = models[args.variant].to(DEVICE), CONFIGURATIONS[args.variant]
        torch.manual_seed(1)
        x = smooth_images(batch, config.in_chans, args.size).to(DEVICE, model.dtype)
        if args.step != "check":
            time_network(args, results, model, x, "stored")
        if args.step != "network":
            tune_network(args, results, model, x, bandwidth)
        if args.tries > 1:
            time_network(args, results, model, x, "tuned")
    print(f"{results.failures} kernels and networks failed")
    return int(results.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
