"""The roofline model: the minimum time of a network from its operations and bytes.

The limits of a device are measured with large matrix products and a large copy, in a worker, on a
CPU with as many threads as the contenders. For other GPUs they are the dense rates at boost clock
of NVIDIA's data sheets, which often print twice that, with structured sparsity.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from van_deploy.bench.document import Ceilings, Contender, PaperLimits, RooflineEntry, Row
from van_deploy.bench.gpu import Timer, repeat_for, torch_timer
from van_deploy.bundle import Bundle
from van_deploy.config.sizes import ImageSize, height_width
from van_deploy.environment.hardware import cpu
from van_deploy.errors import UsageError
from van_deploy.model.variants import VanConfig

# Source, tera-operations per second in FP32, TF32, FP16 and INT8, and GB/s. GPUs before Ampere
# (TF32: 0) have no BF16 either. Matrix products run at these rates; everything else, the depth-wise
# convolutions included, at FP32's.
DEVICES: dict[str, tuple[str, float, float, float, float, float]] = {
    "t4": ("NVIDIA T4 data sheet (2019)", 8.1, 0, 65, 130, 320),
    "a10": ("NVIDIA A10 data sheet (2022)", 31.2, 62.5, 125, 250, 600),
    "a100": ("NVIDIA A100 80GB SXM data sheet (2021)", 19.5, 156, 312, 624, 2039),
    "l4": ("NVIDIA L4 data sheet (2023)", 30.3, 60, 121, 242, 300),
    "l40s": ("NVIDIA L40S data sheet (2023)", 91.6, 183, 362, 733, 864),
    "h100": ("NVIDIA H100 SXM data sheet (2023)", 67, 494, 989, 1979, 3350),
    "h200": ("NVIDIA H200 SXM data sheet (2024)", 67, 494, 989, 1979, 4800),
    "rtx4090": ("NVIDIA Ada architecture white paper (2022)", 82.6, 82.6, 165.2, 660.6, 1008),
}

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
# Precisions of an engine built from an artifact, for published limits; FP16 if not listed. The
# 1x1 convolutions of an INT8 graph run at the INT8 rate.
ENGINE_PRECISIONS = {"fp32": ("fp32", "tf32", "fp16"), "bf16": ("bf16",)}


def measure_ceilings(device: str, threads: int = 1, seconds: float = 0.5) -> Ceilings:
    """Measure the limits of a device with PyTorch: the fastest of ``seconds`` of calls.

    On a GPU a matrix product has 8192^3 multiply-adds and the copy 2 GiB, forty times an H100's
    L2 cache; on a CPU 1536^3 (27 MB in float32, more than the caches of most cores) and 256 MiB.
    bfloat16 is measured only on a CPU that has instructions for it, because otherwise one product
    takes seconds.
    """
    import torch

    on_gpu = device != "cpu"
    torch.set_num_threads(threads)
    side, size = (8192, 2 * 2**30) if on_gpu else (1536, 256 * 2**20)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if on_gpu:
        kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
    elif not cpu().has_bfloat16:
        del kinds["bf16"]
    torch.backends.cuda.matmul.allow_tf32 = True

    def fastest_s(call: Callable[..., object], *arguments: Any) -> float:
        place = arguments[0].device
        timer = torch_timer(device=place.index or 0) if on_gpu else Timer()
        call(*arguments)
        if on_gpu:
            torch.cuda.synchronize(place)
        return min(repeat_for(seconds, 1, lambda: timer.time_ms(lambda: call(*arguments)))) / 1e3

    rates: dict[str, float] = {}
    for precision, kind in kinds.items():
        factors = [torch.randn(side, side, device=device).to(kind) for _ in range(2)]
        rates[precision] = 2.0 * side**3 / fastest_s(torch.mm, *factors)
    shape = (side, side)
    a, b = (torch.randint(-127, 128, shape, device=device, dtype=torch.int8) for _ in range(2))
    rates["int8"] = 2.0 * side**3 / fastest_s(torch._int_mm, a, b.t())
    source = torch.randn(size // 4, device=device)
    copied = 2 * size / fastest_s(torch.empty_like(source).copy_, source)
    return Ceilings(rates, copied, "measured")


def paper_limits(bundle: Bundle, device: str, batches: Sequence[int]) -> PaperLimits:
    """Return the minimum time of each ONNX artifact on ``device`` from published figures.

    Raises:
        UsageError: the device is not in :data:`DEVICES`.
    """
    published = DEVICES.get(device.lower().replace(" ", "").replace("-", ""))
    if published is None:
        names = ", ".join(DEVICES)
        raise UsageError(f"There are no figures for the device '{device}'.", f"Known: {names}.")
    source, fp32, tf32, fp16, int8, gigabytes = published
    ops = {"fp32": fp32, "fp16": fp16, "int8": int8, "vector": fp32}
    if tf32:
        ops |= {"bf16": fp16, "tf32": tf32}
    rates = {kind: 1e12 * rate for kind, rate in ops.items()}
    ceilings, limits = Ceilings(rates, 1e9 * gigabytes, source), list[RooflineEntry | None]()
    config, size = bundle.manifest.architecture, bundle.manifest.preprocessing.image_size
    files = [artifact for artifact in bundle.artifacts.values() if artifact.kind == "onnx"]
    for artifact, batch in itertools.product(files, sorted(set(batches))):
        for kind in ENGINE_PRECISIONS.get(artifact.precision, ("fp16",)):
            precision = f"int8 + {kind}" if artifact.precision == "int8" else kind
            engine = Contender(artifact.name, "tensorrt", precision, embedded=artifact.embedded)
            limits.append(minimum_time(config, ceilings, engine, batch, size))
    return PaperLimits(device, ceilings, tuple(filter(None, limits)))


def measure_limits(
    config: VanConfig, contenders: Mapping[str, Contender], rows: Sequence[Row], ceilings: Ceilings
) -> tuple[RooflineEntry, ...]:
    """Return the minimum time for each row, and the share of it that the row reaches.

    Args:
        config: of the network.
        contenders: of the rows, by name.
        rows: failed rows are ignored.
        ceilings: measured limits of the device.
    """
    result = list[RooflineEntry]()
    for row in rows:
        contender = contenders[row.contender]
        minimum = minimum_time(config, ceilings, contender, row.batch, row.image_size)
        if row.images_per_s and minimum:
            ms = 1e3 * row.batch / row.images_per_s
            result.append(replace(minimum, percent_of_limit=100 * minimum.least_ms / ms))
    return tuple(result)


def minimum_time(
    config: VanConfig, ceilings: Ceilings, contender: Contender, batch: int, size: ImageSize
) -> RooflineEntry | None:
    """Return the minimum time of one batch from the shapes; None without a rate for its precision.

    For the unfused time, one kernel is a convolution with the elementwise operators after it: bias,
    GELU, gate or residual. In a block the maps of C channels are transferred 15 times (``proj_1``
    2, ``conv0`` 2, ``conv_spatial`` 2, ``conv1`` with the gate 3, ``proj_2`` with the residual 3,
    ``fc1`` 1, ``fc2`` with the residual 2), the hidden maps 4 times (``fc1`` 1, ``dwconv`` with
    the GELU 2, ``fc2`` 1). The weights are read once per batch.

    Args:
        config: of the network.
        ceilings: of the device.
        contender: whose precision and input count. The 1x1 convolutions of ``int8 + fp16`` run at
            the INT8 rate and have weights of one byte, all else is FP16; for ``int8`` the
            non-quantised precision is FP16 on a GPU and FP32 on a CPU. FP32 is TF32 on a GPU.
        batch: images per call.
        size: of an image in pixels.

    >>> from van_deploy.model.variants import VARIANTS
    >>> config, ceilings = VARIANTS["van_b0"].config, Ceilings({"fp16": 1e15}, 1e12, "")
    >>> minimum = minimum_time(config, ceilings, Contender("", "", "fp16"), 1000, 224)
    >>> int(minimum.unfused_ms)  # MB per image, at 1 TB/s
    55
    """
    precision, (k0, k1) = contender.precision, config.lka_kernels
    rates, int8 = ceilings.ops_per_s, "int8" in precision
    kind = precision.removeprefix("int8 + ")
    if kind == "int8":
        kind = "fp16" if "fp16" in rates else "fp32"
    elif kind == "fp32" and "fp32" not in rates:
        kind = "tf32"
    if kind not in rates or (int8 and "int8" not in rates):
        return None
    names = ("embed_dims", "depths", "mlp_ratios")  # of the stages that are computed
    config = replace(config, **{n: getattr(config, n)[: len(config.stages)] for n in names})
    sides, channels = height_width(size), config.in_chans
    maps = sum(map(math.prod, config.feature_map_shapes(sides).values()))
    ends = (1 if contender.embedded == "uint8" else 4) * channels * math.prod(sides)
    ends += 4 * (config.num_classes + maps)  # outputs are float32
    pointwise = depthwise = values = pointwise_weights = 0
    for stage, (dim, hidden) in enumerate(zip(config.embed_dims, config.hidden_dims, strict=True)):
        values += channels * math.prod(sides)  # the patch embedding reads it
        sides, channels, depth = config.stage_sizes(size)[stage], dim, config.depths[stage]
        pixels = math.prod(sides)
        pointwise_weights += depth * dim * (3 * dim + 2 * hidden)
        pointwise += depth * pixels * dim * (3 * dim + 2 * hidden)
        depthwise += depth * pixels * (dim * (k0**2 + k1**2) + 9 * hidden)
        # the embedding writes its maps; the LayerNorm reads and writes them; then the blocks
        values += pixels * (3 * dim + depth * (15 * dim + 4 * hidden))
    macs, width = config.mac_count(size), BYTES[kind]
    weights = width * config.parameter_count() - int8 * (width - 1) * pointwise_weights
    compute_s = 2 * batch * (macs - pointwise - depthwise) / rates[kind]
    compute_s += 2 * batch * pointwise / rates["int8" if int8 else kind]
    compute_s += 2 * batch * depthwise / (rates.get("vector") or rates.get("fp32") or rates[kind])
    memory_s = (weights + batch * ends) / ceilings.bytes_per_s
    unfused_ms = 1e3 * (width * batch * values + weights) / ceilings.bytes_per_s
    bound: Literal["compute", "memory"] = "compute" if compute_s >= memory_s else "memory"
    least_ms = 1e3 * max(compute_s, memory_s)
    entry = (contender.name, precision, batch, size, 2 * batch * macs)
    return RooflineEntry(*entry, least_ms, bound, unfused_ms)
