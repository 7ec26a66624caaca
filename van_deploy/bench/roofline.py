"""The least time a network can take: its operations and bytes against a device's limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from van_deploy.bench.ceilings import Ceilings, paper_ceilings
from van_deploy.bench.contender import Contender
from van_deploy.bench.race import Row
from van_deploy.bundle import Bundle
from van_deploy.config.sizes import ImageSize, sides_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from van_deploy.model.variants import VanConfig

__all__ = [
    "Limit",
    "PaperLimit",
    "PaperLimits",
    "Reached",
    "Work",
    "kernel_traffic_bytes",
    "limit_of",
    "measured_limits",
    "paper_limits",
    "work_of",
    "work_of_file",
]

FREE = {"QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Shape", "Constant"}
"""They move or relabel numbers; what they cost is not arithmetic."""

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
ASSUMED = {"fp32": ("fp32", "tf32", "fp16"), "fp16": ("fp16",), "int8": ("fp16",)}
"""On paper, the floating-point arithmetic an engine made from an artifact may use. The quantised
parts of an INT8 graph run at the INT8 rate, the rest of it in FP16."""


@dataclass(frozen=True)
class Work:
    """What one batch asks of a device.

    Attributes:
        batch: images.
        operations: all of them.
        matrix_ops: operations of ordinary and 1x1 convolutions and matrix products in
            floating point; a multiply-add is two.
        quantized_ops: the same where both factors are quantised.
        depthwise_ops: of depth-wise convolutions.
        other_ops: one for each number the remaining operators make.
        weights: number of weights read.
        quantized_weights: how many of those are stored in 8 bits.
        input_values: numbers in the input.
        output_values: numbers in the output.
        operator_values: numbers that pass through memory if every operator reads its
            inputs from it and writes its outputs to it.
    """

    batch: int
    operations: int
    matrix_ops: int
    quantized_ops: int
    depthwise_ops: int
    other_ops: int
    weights: int
    quantized_weights: int
    input_values: int
    output_values: int
    operator_values: int


@dataclass(frozen=True)
class Limit:
    """The least time for some work on some device, and what sets it.

    Attributes:
        ms: the least time: no runtime can be faster.
        bound: which limit that is.
        compute_ms: all operations at the device's rates.
        memory_ms: the weights, the input and the output once through memory, everything
            between them kept in caches.
        traffic_ms: every operator's inputs and outputs through memory: what a run time
            that fuses nothing and caches nothing would need for that alone.
        source: where the device's figures come from.
    """

    ms: float
    bound: Literal["compute", "memory"]
    compute_ms: float
    memory_ms: float
    traffic_ms: float
    source: str


@dataclass(frozen=True)
class Reached:
    """A row's time against the least possible time for the same graph.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: of the input in pixels.
        work: what one batch asks of the device.
        limit: the least time for it.
        percent_of_limit: 100 is the least possible time.
    """

    contender: str
    batch: int
    image_size: ImageSize
    work: Work
    limit: Limit
    percent_of_limit: float


@dataclass(frozen=True)
class PaperLimit:
    """The least time of one graph at one batch size.

    Attributes:
        graph: the artifact.
        precision: of the arithmetic.
        batch: images.
        operations: of one batch.
        limit: the least time.
    """

    graph: str
    precision: str
    batch: int
    operations: int
    limit: Limit


@dataclass(frozen=True)
class PaperLimits:
    """What a bundle could do at best on a GPU that is not at hand; nothing here was measured.

    Attributes:
        device: the GPU.
        source: where its figures come from.
        note: what they are worth.
        ceilings: the figures.
        limits: one a graph, precision and batch.
    """

    device: str
    source: str
    note: str
    ceilings: Ceilings
    limits: tuple[PaperLimit, ...]


def paper_limits(bundle: Bundle, device: str, batches: Sequence[int]) -> PaperLimits:
    """Return the least time of each ONNX artifact on ``device``, on paper.

    Raises:
        UsageError: there are no figures for the device.
        BundleError: a file is not the manifest's.
    """
    ceilings = paper_ceilings(device)
    limits = []
    for artefact in bundle.artefacts.values():
        if artefact.kind != "onnx":
            continue
        path = bundle.verified(artefact.name)
        for batch in sorted(set(batches)):
            work = work_of_file(path, batch, bundle.manifest.preprocessing.image_size)
            for kind in ASSUMED.get(artefact.precision, ("fp16",)):
                limit = limit_of(work, ceilings, kind)
                if limit is not None:
                    precision = f"int8 + {kind}" if work.quantized_ops else kind
                    given = (artefact.name, precision, batch, work.operations, limit)
                    limits.append(PaperLimit(*given))
    return PaperLimits(device, ceilings.source, ceilings.how["all"], ceilings, tuple(limits))


def measured_limits(
    contenders: Sequence[Contender], rows: Sequence[Row], ceilings: Ceilings
) -> tuple[Reached, ...]:
    """Return each row's time over the least possible time for the same graph."""
    by_name = {c.name: c for c in contenders}
    graphs = {name: c.file for name, c in by_name.items() if c.file.endswith(".onnx")}
    plain = next((graphs[n] for n in graphs if by_name[n].precision == "fp32"), None)
    counted: dict[tuple[str, int, ImageSize], Work] = {}
    result = []
    for row in rows:
        file = graphs.get(row.contender, plain)  # PyTorch and engines do the same arithmetic
        if not row.images_per_s or file is None:
            continue
        key = (file, row.batch, row.image_size)
        counted[key] = counted.get(key) or work_of_file(Path(file), row.batch, row.image_size)
        limit = limit_of(counted[key], ceilings, by_name[row.contender].precision)
        if limit is not None:
            percent = 100 * limit.ms / (1e3 * row.batch / row.images_per_s)
            place = (row.contender, row.batch, row.image_size)
            result.append(Reached(*place, counted[key], limit, percent))
    return tuple(result)


def work_of_file(path: Path, batch: int, image_size: ImageSize | None = None) -> Work:
    """Return the work of one batch through the graph in ``path``."""
    import onnx

    return work_of(onnx.load_model(path, load_external_data=False), batch, image_size)


def work_of(model: ModelProto, batch: int, image_size: ImageSize | None = None) -> Work:
    """Return the work of one batch through ``model``, counted node by node.

    Args:
        model: a graph whose first dimension is the batch.
        batch: images.
        image_size: of the input where it is not the graph's own.
    """
    import onnx

    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    _fix_input_(graph, batch, image_size)
    inferred = onnx.shape_inference.infer_shapes(graph, data_prop=True).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
    }
    weights = {tensor.name: tensor for tensor in inferred.initializer}
    shapes |= {name: list(tensor.dims) for name, tensor in weights.items()}
    counts = _count(inferred.node, shapes, set(weights))
    eight_bit = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    stored = {name: math.prod(tensor.dims) for name, tensor in weights.items()}
    return Work(
        batch=batch,
        weights=sum(stored.values()),
        quantized_weights=sum(stored[n] for n, t in weights.items() if t.data_type in eight_bit),
        input_values=sum(math.prod(shapes[value.name]) for value in inferred.input),
        output_values=sum(math.prod(shapes[value.name]) for value in inferred.output),
        **counts,
    )


def limit_of(work: Work, ceilings: Ceilings, precision: str) -> Limit | None:
    """Return the least time for ``work`` in ``precision``, or None without its rate.

    A graph with quantised parts does those at the INT8 rate and the rest at that of
    ``precision``; of ``int8`` that is FP16's on a GPU and FP32's on a CPU. A GPU's FP32 is TF32.
    """
    rates = ceilings.ops_per_s
    kind = precision
    if precision == "int8":
        kind = "fp16" if "fp16" in rates else "fp32"
    elif precision not in rates and precision == "fp32":
        kind = "tf32"
    if kind not in rates or (work.quantized_ops and "int8" not in rates):
        return None
    vector = ceilings.vector_ops_per_s or rates.get("fp32") or rates[kind]
    seconds = work.matrix_ops / rates[kind] + (work.depthwise_ops + work.other_ops) / vector
    if work.quantized_ops:
        seconds += work.quantized_ops / rates["int8"]
    size = BYTES[kind]
    once = work.quantized_weights + size * (work.weights - work.quantized_weights)
    once += 4 * (work.input_values + work.output_values)  # both stay float32
    compute_ms, memory_ms = 1e3 * seconds, 1e3 * once / ceilings.bytes_per_s
    return Limit(
        ms=max(compute_ms, memory_ms),
        bound="compute" if compute_ms >= memory_ms else "memory",
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        traffic_ms=1e3 * size * work.operator_values / ceilings.bytes_per_s,
        source=ceilings.source,
    )


def kernel_traffic_bytes(
    config: VanConfig, image_size: ImageSize, batch: int, value_bytes: int = 2
) -> float:
    """Return the bytes through device memory with one kernel a step and nothing fused further.

    A step is a convolution with what follows it element by element: bias, GELU, gate or
    residual. In a block the C wide maps cross memory 15 times (``proj_1`` 2, ``conv0`` 2,
    ``conv_spatial`` 2, ``conv1`` with the gate 3, ``proj_2`` with the residual 3, ``fc1`` 1,
    ``fc2`` with the residual 2), the hidden ones 4 times (``fc1`` 1, ``dwconv`` with the GELU
    2, ``fc2`` 1). The weights are read once a batch.

    >>> from van_deploy.model.variants import VARIANTS
    >>> round(kernel_traffic_bytes(VARIANTS["van_b0"].config, 224, 1000) / 1e9)  # MB an image
    55
    """
    values, sides, channels = 0, sides_of(image_size), config.in_chans
    for stage, width in enumerate(config.embed_dims):
        values += channels * sides[0] * sides[1]  # the patch embedding reads it
        sides = config.sides_after(stage, sides)
        pixels, channels = sides[0] * sides[1], width
        values += 3 * width * pixels  # it writes its maps; the LayerNorm reads and writes them
        block = 15 * width + 4 * config.hidden_dims[stage]
        values += config.depths[stage] * block * pixels
    return value_bytes * (batch * values + config.parameter_count())


def _fix_input_(model: ModelProto, batch: int, image_size: ImageSize | None) -> None:
    """Set the free dimensions of the input and forget every inferred shape."""
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        dims[0].dim_value = batch
        if image_size is not None and len(dims) == 4:
            sides = (1, 2) if dims[3].dim_value in {1, 3, 4} else (2, 3)  # bytes come NHWC
            for axis, side in zip(sides, sides_of(image_size), strict=True):
                dims[axis].dim_value = side


def _count(nodes: Any, shapes: Mapping[str, list[int]], constants: set[str]) -> dict[str, int]:
    """Return the operations of every node by kind, and the numbers all of them touch."""
    makers = {output: node for node in nodes for output in node.output}
    counts = dict.fromkeys(("matrix_ops", "quantized_ops", "depthwise_ops", "other_ops"), 0)
    touched = 0
    for node in nodes:
        if node.op_type in FREE:
            continue
        kind, operations = _operations(node, shapes, makers)
        counts[kind] += operations
        names = (*node.input, *node.output)
        touched += sum(math.prod(shapes[name]) for name in names if name in shapes)
    return {"operations": sum(counts.values()), **counts, "operator_values": touched}


def _operations(
    node: NodeProto, shapes: Mapping[str, list[int]], makers: Mapping[str, NodeProto]
) -> tuple[str, int]:
    """Return what kind of work a node is and how many operations."""
    made = math.prod(shapes.get(node.output[0], [0]))
    if node.op_type in {"Conv", "QLinearConv", "ConvInteger"}:
        weight = shapes[node.input[3] if node.op_type == "QLinearConv" else node.input[1]]
        operations = 2 * made * math.prod(weight[1:])
        if weight[1] == 1 and weight[0] > 1 and _groups(node) == weight[0]:
            return "depthwise_ops", operations
        return _float_or_not(node, makers), operations
    if node.op_type in {"Gemm", "MatMul", "QLinearMatMul", "MatMulInteger"}:
        inner = shapes[node.input[0]][-1]
        return _float_or_not(node, makers), 2 * made * inner
    if node.op_type == "ReduceMean":
        return "other_ops", math.prod(shapes.get(node.input[0], [0]))
    return "other_ops", made


def _float_or_not(node: NodeProto, makers: Mapping[str, NodeProto]) -> str:
    """Return whether both factors of a product are quantised, as the kind of work."""
    if node.op_type in {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger"}:
        return "quantized_ops"
    factors = [makers.get(name) for name in node.input[:2]]
    quantized = all(f is not None and f.op_type == "DequantizeLinear" for f in factors)
    return "quantized_ops" if quantized else "matrix_ops"


def _groups(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)
