"""The least time a network can take: its operations and bytes against a device's limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from van_deploy.bench.ceilings import Ceilings, paper_ceilings
from van_deploy.bench.contender import Contender
from van_deploy.bench.timing import Row
from van_deploy.bundle import Bundle
from van_deploy.config.sizes import ImageSize, sides_of

if TYPE_CHECKING:
    from van_deploy.model.variants import VanConfig

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
ASSUMED = {"fp32": ("fp32", "tf32", "fp16"), "bf16": ("bf16",)}
"""On paper, the floating-point arithmetic an engine made from an artifact may use; FP16 where
nothing else is listed. The 1x1 convolutions of an INT8 graph run at the INT8 rate."""


@dataclass(frozen=True)
class Work:
    """What one batch asks of a device. A multiply-add is two operations.

    Attributes:
        batch: images.
        operations: all of them.
        matrix_ops: of ordinary and 1x1 convolutions and the head in floating point.
        quantized_ops: of 1x1 convolutions in INT8.
        vector_ops: of depth-wise convolutions.
        weights: how many.
        ends: numbers in the input and the output.
        traffic: numbers that pass through memory with one kernel a step.
    """

    batch: int
    operations: int
    matrix_ops: int
    quantized_ops: int
    vector_ops: int
    weights: int
    ends: int
    traffic: int


@dataclass(frozen=True)
class Limit:
    """The least time for some work on some device, and what sets it.

    Attributes:
        ms: the least time: no runtime can be faster.
        bound: which limit that is.
        compute_ms: all operations at the device's rates.
        memory_ms: the weights, the input and the output once through memory, everything
            between them kept in caches.
        traffic_ms: what one kernel a step moves through memory.
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
    """A row's time against the least possible time for the same network.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: side of the input in pixels.
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
        ceilings: the figures.
        limits: one a graph, precision and batch.
    """

    device: str
    source: str
    ceilings: Ceilings
    limits: tuple[PaperLimit, ...]


def paper_limits(bundle: Bundle, device: str, batches: Sequence[int]) -> PaperLimits:
    """Return the least time of each ONNX artifact on ``device``, on paper.

    Raises:
        UsageError: there are no figures for the device.
    """
    ceilings, limits = paper_ceilings(device), []
    config, size = bundle.manifest.architecture, bundle.manifest.preprocessing.image_size
    for artefact in bundle.artefacts.values():
        int8 = artefact.precision == "int8"
        kinds = ASSUMED.get(artefact.precision, ("fp16",)) if artefact.kind == "onnx" else ()
        for batch in sorted(set(batches)):
            work = work_of(config, size, batch, int8=int8)
            for kind in kinds:
                if limit := limit_of(work, ceilings, kind):
                    precision = f"int8 + {kind}" if int8 else kind
                    given = (artefact.name, precision, batch, work.operations, limit)
                    limits.append(PaperLimit(*given))
    return PaperLimits(device, ceilings.source, ceilings, tuple(limits))


def measured_limits(
    config: VanConfig,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    ceilings: Ceilings | None,
) -> tuple[Reached, ...]:
    """Return each row's time over the least possible time for the same network."""
    precisions = {contender.name: contender.precision for contender in contenders}
    result = []
    for row in rows if ceilings else ():
        kind = precisions[row.contender]
        work = work_of(config, row.image_size, row.batch, int8=kind == "int8")
        if row.images_per_s and ceilings and (limit := limit_of(work, ceilings, kind)):
            percent = 100 * limit.ms / (1e3 * row.batch / row.images_per_s)
            place = (row.contender, row.batch, row.image_size)
            result.append(Reached(*place, work, limit, percent))
    return tuple(result)


def work_of(config: VanConfig, image_size: ImageSize, batch: int, *, int8: bool = False) -> Work:
    """Return the work of one batch, from the shapes of the network alone.

    A step is a convolution with what follows it element by element: bias, GELU, gate or
    residual. In a block the C wide maps cross memory 15 times (``proj_1`` 2, ``conv0`` 2,
    ``conv_spatial`` 2, ``conv1`` with the gate 3, ``proj_2`` with the residual 3, ``fc1`` 1,
    ``fc2`` with the residual 2), the hidden ones 4 times (``fc1`` 1, ``dwconv`` with the GELU
    2, ``fc2`` 1). The weights are read once a batch.

    Args:
        config: the network.
        image_size: of the input.
        batch: images.
        int8: whether its 1x1 convolutions are quantised.
    """
    (k0, k1), sides, channels = config.lka_kernels, sides_of(image_size), config.in_chans
    pointwise = depthwise = values = 0
    for stage, (dim, hidden) in enumerate(zip(config.embed_dims, config.hidden_dims, strict=True)):
        values += channels * math.prod(sides)  # the patch embedding reads it
        sides, channels, depth = config.sides_after(stage, sides), dim, config.depths[stage]
        pixels = math.prod(sides)
        pointwise += depth * pixels * dim * (3 * dim + 2 * hidden)
        depthwise += depth * pixels * (dim * (k0**2 + k1**2) + 9 * hidden)
        # it writes its maps; the LayerNorm reads and writes them; then the blocks
        values += pixels * (3 * dim + depth * (15 * dim + 4 * hidden))
    rest = config.mac_count(image_size) - pointwise - depthwise
    pointwise, depthwise, rest = (2 * batch * macs for macs in (pointwise, depthwise, rest))
    return Work(
        batch=batch,
        operations=pointwise + depthwise + rest,
        matrix_ops=rest + (0 if int8 else pointwise),
        quantized_ops=pointwise if int8 else 0,
        vector_ops=depthwise,
        weights=config.parameter_count(),
        ends=batch * (config.in_chans * math.prod(sides_of(image_size)) + config.num_classes),
        traffic=batch * values + config.parameter_count(),
    )


def limit_of(work: Work, ceilings: Ceilings, precision: str) -> Limit | None:
    """Return the least time for ``work`` in ``precision``, or None without its rate.

    What is quantised runs at the INT8 rate and the rest at that of ``precision``; of ``int8``
    that is FP16's on a GPU and FP32's on a CPU. A GPU's FP32 is TF32.
    """
    rates, kind = ceilings.ops_per_s, precision
    if precision == "int8":
        kind = "fp16" if "fp16" in rates else "fp32"
    elif precision == "fp32" and "fp32" not in rates:
        kind = "tf32"
    if kind not in rates or (work.quantized_ops and "int8" not in rates):
        return None
    vector = ceilings.vector_ops_per_s or rates.get("fp32") or rates[kind]
    seconds = work.matrix_ops / rates[kind] + work.vector_ops / vector
    if work.quantized_ops:
        seconds += work.quantized_ops / rates["int8"]
    size = BYTES[kind]
    once = size * work.weights + 4 * work.ends  # both ends stay float32
    compute_ms, memory_ms = 1e3 * seconds, 1e3 * once / ceilings.bytes_per_s
    return Limit(
        ms=max(compute_ms, memory_ms),
        bound="compute" if compute_ms >= memory_ms else "memory",
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        traffic_ms=1e3 * size * work.traffic / ceilings.bytes_per_s,
        source=ceilings.source,
    )


def kernel_traffic_bytes(config: VanConfig, image_size: ImageSize, batch: int) -> int:
    """Return the bytes through memory in FP16 with one kernel a step and nothing fused further.

    >>> from van_deploy.model.variants import VARIANTS
    >>> kernel_traffic_bytes(VARIANTS["van_b0"].config, 224, 1000) // 10**9  # MB an image
    55
    """
    return 2 * work_of(config, image_size, batch).traffic
