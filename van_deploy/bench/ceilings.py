"""What a device can do at best: measured, or on paper for GPUs that are not at hand.

Measured by large matrix products and a large copy, in a worker, on a CPU with the same number of
threads as the contenders of that run. On paper: dense figures (NVIDIA often prints twice that,
with structured sparsity), at boost clock, from NVIDIA's data sheets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from van_deploy.environment.hardware import cpu
from van_deploy.errors import MissingDependency, UsageError

__all__ = ["DEVICES", "Ceilings", "measured_ceilings", "measured_gpu_ceilings", "paper_ceilings"]

SIDE = 1536  # of the square matrices: 27 MB in float32, past the caches of most cores
COPY_BYTES = 256 * 2**20
TERA, GIGA = 1e12, 1e9
GPU_SIDE = 8192
GPU_COPY_BYTES = 2 * 2**30  # forty times an H100's second-level cache


@dataclass(frozen=True)
class Ceilings:
    """A device's limits.

    Attributes:
        ops_per_s: operations a second (a multiply-add is two) of large matrix
            products, by precision; what was not measured is absent.
        vector_ops_per_s: operations a second outside matrix products, or None
            where it is the same silicon (CPUs: float32's figure is used).
        bytes_per_s: memory traffic a second of a large copy, reads and writes both counted.
        source: ``measured``, or where figures on paper come from.
        how: what was run for each figure, or the remark that belongs to a paper one.
    """

    ops_per_s: dict[str, float]
    bytes_per_s: float
    source: str
    how: dict[str, str]
    vector_ops_per_s: float | None = None


def _sheet(
    source: str, fp32: float, fp16: float, int8: float, gigabytes: float, tf32: float | None
) -> Ceilings:
    ops = {"fp32": fp32 * TERA, "fp16": fp16 * TERA, "bf16": fp16 * TERA, "int8": int8 * TERA}
    if tf32 is not None:
        ops["tf32"] = tf32 * TERA
    else:
        del ops["bf16"]  # before Ampere
    note = {"all": "on paper: dense peak at boost clock; nothing here was measured"}
    return Ceilings(ops, gigabytes * GIGA, source, note, vector_ops_per_s=fp32 * TERA)


DEVICES: dict[str, Ceilings] = {
    "t4": _sheet("NVIDIA T4 data sheet (2019)", 8.1, 65, 130, 320, None),
    "a10": _sheet("NVIDIA A10 data sheet (2022)", 31.2, 125, 250, 600, 62.5),
    "a100": _sheet("NVIDIA A100 80GB SXM data sheet (2021)", 19.5, 312, 624, 2039, 156),
    "l4": _sheet("NVIDIA L4 data sheet (2023)", 30.3, 121, 242, 300, 60),
    "l40s": _sheet("NVIDIA L40S data sheet (2023)", 91.6, 362, 733, 864, 183),
    "h100": _sheet("NVIDIA H100 SXM data sheet (2023)", 67, 989, 1979, 3350, 494),
    "h200": _sheet("NVIDIA H200 SXM data sheet (2024)", 67, 989, 1979, 4800, 494),
    "rtx4090": _sheet("NVIDIA Ada architecture white paper (2022)", 82.6, 165.2, 660.6, 1008, 82.6),
}
"""By name, in lower case. Matrix products run at ``ops_per_s``; everything else, the
depth-wise convolutions included, at ``vector_ops_per_s``, which is FP32's."""


def measured_ceilings(threads: int, seconds: float = 0.5) -> Ceilings:
    """Return this processor's limits with ``threads`` threads.

    Of two libraries' products the faster counts. Every figure is the best of
    repeated runs during ``seconds``. bfloat16 is measured where the processor has
    instructions for it: elsewhere nothing runs in it, and one product takes seconds.
    """
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.rand(SIDE, SIDE) for _ in range(2))
    operations = 2.0 * SIDE**3
    how = {"fp32": f"torch.mm {SIDE}^3"}
    rates = {"fp32": operations / _best_s(lambda: torch.mm(a, b), seconds)}
    if cpu().has_bfloat16:
        half_a, half_b = a.bfloat16(), b.bfloat16()
        how["bf16"] = f"torch.mm {SIDE}^3 in bfloat16"
        rates["bf16"] = operations / _best_s(lambda: torch.mm(half_a, half_b), seconds)
    for precision, (call, words) in _onnxruntime_products(threads).items():
        rate = operations / _best_s(call, seconds)
        if rate > rates.get(precision, 0.0):
            rates[precision], how[precision] = rate, words
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.empty_like(source)
    copied = 2 * COPY_BYTES / _best_s(lambda: target.copy_(source), seconds)
    how["memory"] = f"torch copy of {COPY_BYTES // 2**20} MiB, read and written"
    return Ceilings(rates, copied, "measured", how)


def _best_s(call: Callable[[], object], seconds: float) -> float:
    """Return the seconds of the fastest of repeated calls."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _onnxruntime_products(threads: int) -> dict[str, tuple[Callable[[], object], str]]:
    """Return ONNX Runtime's products by precision; none where it is not installed.

    uint8 times int8 is its fast form on CPUs.
    """
    import numpy as np
    from onnx import TensorProto

    from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

    calls: dict[str, tuple[Callable[[], object], str]] = {}
    forms = (
        ("fp32", "MatMul", TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT, np.float32),
        ("int8", "MatMulInteger", TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, np.uint8),
    )
    for precision, operator, left, right, result, kind in forms:
        runner = OnnxRuntimeRunner(_product(operator, left, right, result), threads=threads)
        try:
            opened = runner.__enter__()
        except MissingDependency:
            return {}
        batch = np.ones((SIDE, SIDE), kind)
        calls[precision] = (
            lambda opened=opened, batch=batch: opened.run(batch),  # type: ignore[misc]
            f"ONNX Runtime {operator} {SIDE}^3",
        )
    return calls


def _product(operator: str, left: int, right: int, result: int) -> Any:
    """Return a graph that multiplies its input by a constant matrix."""
    import numpy as np
    from onnx import helper, numpy_helper

    values = np.ones((SIDE, SIDE), np.float32 if right == 1 else np.int8)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", left, (SIDE, SIDE))],
        [helper.make_tensor_value_info("c", result, (SIDE, SIDE))],
        [numpy_helper.from_array(values, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    return model


def measured_gpu_ceilings(device: str, seconds: float = 0.5) -> Ceilings:
    """Return a GPU's own limits, by PyTorch and CUDA events, on random data.

    A copy of 2 GiB on the device counts bytes read and bytes written; products are of 8192^3.
    Medians, not bests: what a network meets is the clock that lasts.
    """
    import torch

    rates: dict[str, float] = {}
    how: dict[str, str] = {}
    operations = 2.0 * GPU_SIDE**3
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for precision, kind in kinds.items():
            a, b = (torch.randn(GPU_SIDE, GPU_SIDE, device=device, dtype=kind) for _ in range(2))
            out = torch.empty_like(a)
            rate = operations / _median_s(lambda: torch.mm(a, b, out=out), seconds)  # noqa: B023
            rates[precision], how[precision] = rate, f"torch.mm {GPU_SIDE}^3 in {precision}"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    left, right = (
        torch.randint(-127, 128, (GPU_SIDE, GPU_SIDE), device=device, dtype=torch.int8)
        for _ in range(2)
    )
    right = right.t()
    rates["int8"] = operations / _median_s(lambda: torch._int_mm(left, right), seconds)
    how["int8"] = f"torch._int_mm {GPU_SIDE}^3"
    source = torch.randn(GPU_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * GPU_COPY_BYTES / _median_s(lambda: target.copy_(source), seconds)
    how["memory"] = f"copy of {GPU_COPY_BYTES // 2**20} MiB on the device, read and written"
    return Ceilings(rates, copied, "measured", how)


def _median_s(call: Callable[[], object], seconds: float) -> float:
    """Return the median seconds of a call on the GPU, by CUDA events."""
    import statistics

    import torch

    samples: list[float] = []
    end = time.perf_counter() + seconds
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    while time.perf_counter() < end or len(samples) < 5:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / 1e3)
    return statistics.median(samples)


def paper_ceilings(name: str) -> Ceilings:
    """Return the limits on paper of the GPU ``name``.

    Raises:
        UsageError: it is not in the table.
    """
    known = DEVICES.get(name.lower().replace(" ", "").replace("-", ""))
    if known is None:
        raise UsageError(
            f"There are no figures for the device '{name}'.", f"Known: {', '.join(DEVICES)}."
        )
    return known
