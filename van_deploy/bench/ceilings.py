"""What a device can do at best: measured, or on paper for GPUs that are not at hand.

Measured by large matrix products and a large copy, in a worker, on a CPU with the same number of
threads as the contenders of that run. On paper: dense figures (NVIDIA often prints twice that,
with structured sparsity), at boost clock, from NVIDIA's data sheets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from van_deploy.bench.gpu import Clock, span_ms, torch_clock
from van_deploy.environment.hardware import cpu
from van_deploy.errors import UsageError


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
"""Source, and T operations a second in FP32, TF32, FP16 and INT8, and GB/s. Before Ampere (TF32:
0) there is no BF16 either. Matrix products run at these rates; everything else, the depth-wise
convolutions included, at FP32's."""


def measured_ceilings(device: str, threads: int = 1, seconds: float = 0.5) -> Ceilings:
    """Return a device's own limits, by PyTorch on random data: fastest of ``seconds`` of calls.

    On a GPU products are of 8192^3 and the copy is 2 GiB, forty times an H100's second-level
    cache; on a CPU 1536^3 (27 MB in float32, past the caches of most cores) and 256 MiB. A CPU
    is measured in bfloat16 where it has instructions for it: elsewhere one product takes seconds.
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
    rates: dict[str, float] = {}
    for precision, kind in kinds.items():
        factors = [torch.randn(side, side, device=device).to(kind) for _ in range(2)]
        rates[precision] = 2.0 * side**3 / _fastest_s(torch.mm, factors, seconds)
    shape = (side, side)
    bytes_ = [torch.randint(-127, 128, shape, device=device, dtype=torch.int8) for _ in range(2)]
    rates["int8"] = 2.0 * side**3 / _fastest_s(torch._int_mm, [bytes_[0], bytes_[1].t()], seconds)
    how = dict.fromkeys(rates, f"PyTorch, product of {side}^3")
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _fastest_s(target.copy_, [source], seconds)
    how["memory"] = f"PyTorch, copy of {size // 2**20} MiB, read and written"
    return Ceilings(rates, copied, "measured", how)


def _fastest_s(call: Callable[..., object], arguments: Sequence[Any], seconds: float) -> float:
    """Return the seconds of the fastest of repeated calls, on a GPU by CUDA events."""
    import torch

    device = arguments[0].device
    clock = torch_clock(device=device.index or 0) if device.type == "cuda" else Clock()
    best, end = math.inf, time.perf_counter() + seconds
    call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    while time.perf_counter() < end or best == math.inf:
        best = min(best, span_ms(clock, lambda: call(*arguments)) / 1e3)
    return best


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
    source, fp32, tf32, fp16, int8, gigabytes = known
    ops = {"fp32": fp32, "fp16": fp16, "int8": int8}
    if tf32:
        ops |= {"bf16": fp16, "tf32": tf32}
    rates = {kind: 1e12 * rate for kind, rate in ops.items()}
    note = {"all": "on paper: dense peak at boost clock; nothing here was measured"}
    return Ceilings(rates, 1e9 * gigabytes, source, note, vector_ops_per_s=rates["fp32"])
