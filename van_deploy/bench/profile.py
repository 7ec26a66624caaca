"""Where the time of a network goes, summed by the kind of PyTorch module that asked for it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["ProfileLine", "by_kernel", "by_module", "kind_of_module"]

LABEL = "van:"
OTHER = "elementwise (gate, residual, scale)"

KERNEL_KINDS = (
    (r"depthwise|dwconv|_dw_|c1_k1|grouped_direct", "depth-wise convolution"),
    (r"memcpy|memset|copy_kernel|direct_copy", "copy"),
    (r"nchwtonhwc|nhwctonchw|transpose", "layout"),
    (r"triton_tem.*conv|fprop|implicit_gemm|conv2d|convolve", "convolution"),
    (r"gemm|triton_tem|nvjet|cutlass|cublas", "matrix product"),
    (r"layer_?norm|triton_(per|red)", "reduction (LayerNorm, mean)"),
    (r"gelu|erf", "elementwise with GELU"),
    (r"triton_poi|elementwise|vectorized", "elementwise"),
)
"""What a kernel's name tells of it; the first match counts. Names do not tell 3x3 from 5x5."""


@dataclass(frozen=True)
class ProfileLine:
    """One part of a network's time.

    Attributes:
        kind: what kind of module or kernel.
        ms: of one run.
        percent: of all kinds.
        calls: kernels or operators in one run.
    """

    kind: str
    ms: float
    percent: float
    calls: float


def kind_of_module(module: Any) -> str:
    """Return what a layer is called in a profile: ``dw 7x7 d3``, ``1x1``, ``GELU`` ...

    >>> from torch import nn
    >>> kind_of_module(nn.Conv2d(8, 8, 7, groups=8, dilation=3)), kind_of_module(nn.GELU())
    ('dw 7x7 d3', 'GELU')
    """
    kernel = getattr(module, "kernel_size", None)
    if kernel is None:
        return {"Linear": "head"}.get(type(module).__name__, type(module).__name__)
    size = f"{kernel[0]}x{kernel[1]}"
    if module.groups > 1:
        dilation = f" d{module.dilation[0]}" if module.dilation[0] > 1 else ""
        return f"dw {size}{dilation}"
    return size if size == "1x1" else f"{size} stride {module.stride[0]}"


def by_module(model: Any, images: Any, runs: int = 5) -> list[ProfileLine]:
    """Return an eager network's time by kind of layer: of its kernels, or of the processor.

    Args:
        model: any ``nn.Module`` in eval mode.
        images: its input, on the device it runs on.
        runs: how many are averaged.
    """
    import torch
    from torch.profiler import record_function

    handles: list[Any] = []
    open_ranges: list[Any] = []

    def enter(module: Any, _: Any) -> None:
        open_ranges.append(record_function(LABEL + kind_of_module(module)))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for module in model.modules():
        if not any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad():
            model(images)
            events = _profiled(lambda: model(images), runs)
    finally:
        for handle in handles:
            handle.remove()
    on_gpu = images.is_cuda
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.name.startswith(LABEL) or _is_on_device(event):
            continue
        microseconds = (
            sum(kernel.duration for kernel in event.kernels)
            if on_gpu
            else event.self_cpu_time_total
        )
        if microseconds:
            parts[_label_above(event)][0] += microseconds
            parts[_label_above(event)][1] += len(event.kernels) if on_gpu else 1
    return _lines(parts, runs)


def by_kernel(launch: Callable[[], object], runs: int = 5) -> tuple[list[ProfileLine], list[Any]]:
    """Return what runs on the GPU in a launch: by kind of kernel, and the 25 longest by name.

    It sees into CUDA graphs and compiled networks, whose kernels belong to no one module.
    """
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in _profiled(launch, runs):
        if not _is_on_device(event) or getattr(event, "is_user_annotation", False):
            continue
        for parts, key in ((kinds, kind_of_kernel(event.name)), (names, event.name[:160])):
            parts[key][0] += event.time_range.elapsed_us()
            parts[key][1] += 1
    return _lines(kinds, runs), _lines(names, runs)[:25]


def kind_of_kernel(name: str) -> str:
    """Return what a GPU kernel's name tells of it.

    >>> kind_of_kernel("triton_poi_fused_convolution_gelu_3"), kind_of_kernel("sm90_xmma_gemm_f16")
    ('elementwise with GELU', 'matrix product')
    """
    lowered = name.lower()
    if lowered.startswith("triton_poi"):
        return "elementwise with GELU" if re.search("gelu|erf", lowered) else "elementwise"
    return next((kind for sign, kind in KERNEL_KINDS if re.search(sign, lowered)), "other")


def _profiled(launch: Callable[[], object], runs: int) -> Iterable[Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(runs):
            launch()
        if on_gpu:
            torch.cuda.synchronize()
    events: Iterable[Any] = profiler.events() or ()
    return events


def _is_on_device(event: Any) -> bool:
    return event.device_type.name != "CPU"


def _label_above(event: Any) -> str:
    while event is not None:
        if event.name.startswith(LABEL):
            return str(event.name[len(LABEL) :])
        event = event.cpu_parent
    return OTHER


def _lines(parts: dict[str, list[float]], runs: int) -> list[ProfileLine]:
    total = sum(microseconds for microseconds, _ in parts.values())
    lines = [
        ProfileLine(kind, microseconds / runs / 1e3, 100 * microseconds / total, calls / runs)
        for kind, (microseconds, calls) in parts.items()
    ]
    return sorted(lines, key=lambda line: -line.ms)
