"""The time TensorRT for RTX takes to build each kind of graph of one network.

``python -m benchmarks.kinds CHECKPOINT``: classifier and feature maps, dynamic and static batch,
fixed and dynamic size, FP32, FP16 and BF16; seconds to parse and build, alternating, medians. No
GPU is needed. ``docs/backbones.md`` shows the table.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from pathlib import Path

import onnx
import torch

from van_deploy.config import BatchRange, BuildOptions
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.backend import RTX, load_backend
from van_deploy.engine.build import engine_from_onnx
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.model.checkpoint import ALL_STAGES, load_van
from van_deploy.precision.fp16 import bf16_from_fp32, default_fp32_nodes, fp16_from_fp32

ROUNDS = 3
SIZES = SizeRange(64, (64, 96), (128, 160))
Kind = tuple[str, int | None, SizeRange | None, str]


def create_graphs(spec: str) -> dict[Kind, onnx.ModelProto]:
    """Return each kind of graph of a network: outputs, static batch, dynamic sizes, precision."""
    graphs: dict[Kind, onnx.ModelProto] = {}
    for outputs, indices in (("classifier", None), ("feature maps", ALL_STAGES)):
        network = load_van(spec, out_indices=indices).model
        folded = fold_van(network, torch.zeros(1, network.config.in_chans, 64, 96)).model
        for batch, sizes in itertools.product((None, 2), (None, SIZES)):
            fp32 = onnx_from_van(folded, (64, 96), batch=batch, sizes=sizes)
            nodes = default_fp32_nodes(fp32)
            graphs[outputs, batch, sizes, "fp32"] = fp32
            graphs[outputs, batch, sizes, "fp16"] = fp16_from_fp32(fp32, nodes)
            graphs[outputs, batch, sizes, "bf16"] = bf16_from_fp32(fp32, nodes)
    return graphs


def build_seconds(graph: onnx.ModelProto, kind: Kind) -> float:
    """Return the seconds to parse and build a graph for SM89."""
    _, batch, sizes, precision = kind
    profile = BatchRange(1, 2, 4) if batch is None else BatchRange(batch, batch, batch)
    options = BuildOptions(targets=("sm_89",), profiles=(profile,), dynamic_size=sizes)
    with tempfile.TemporaryDirectory() as folder:
        source, plan = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        onnx.save(graph, source)
        backend = load_backend(RTX)
        sidecar = engine_from_onnx(
            source, plan, backend=backend, options=options, precision=precision
        )
    return sidecar.parse_seconds + sidecar.build_seconds


def main() -> None:
    """Print one line for each kind; the ratio is to a classifier with a dynamic batch."""
    graphs = create_graphs(sys.argv[1] if len(sys.argv) > 1 else "van_digits")
    seconds: dict[Kind, list[float]] = {kind: [] for kind in graphs}
    for _, (kind, graph) in itertools.product(range(ROUNDS), graphs.items()):
        seconds[kind].append(build_seconds(graph, kind))
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    for (outputs, batch, sizes, precision), value in medians.items():
        name = f"{outputs}, {f'batch {batch}' if batch else 'dynamic batch'}, {sizes or '64x96'}"
        reference = medians["classifier", None, None, precision]
        print(f"{name + ', ' + precision:55} {value:6.2f} s {value / reference:6.2f}")


if __name__ == "__main__":
    main()
