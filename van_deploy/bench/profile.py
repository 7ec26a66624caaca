"""Where the time of a network goes, summed by the kind of PyTorch module that asked for it."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from van_deploy.bench.contenders import runner_of
from van_deploy.bench.document import Contender, ProfileLine
from van_deploy.errors import UsageError

LABEL = "van:"
OTHER = "elementwise (gate, residual, scale)"
# How many are averaged.
RUNS = 5

# What a kernel's name tells of it; the first match counts. Names do not tell 3x3 from 5x5.
KERNEL_KINDS = (
    (r"^triton_poi.*(gelu|erf)", "elementwise with GELU"),
    (r"^triton_poi", "elementwise"),
    (r"depthwise|dwconv|_dw_|c1_k1|grouped_direct", "depth-wise convolution"),
    (r"memcpy|memset|copy_kernel|direct_copy", "copy"),
    (r"nchwtonhwc|nhwctonchw|transpose|tensortransform", "layout"),
    (r"triton_tem.*conv|fprop|implicit_gemm|conv2d|convolve", "convolution"),
    (r"gemm|triton_tem|nvjet|cutlass|cublas", "matrix product"),
    (r"layer_?norm|triton_(per|red)", "reduction (LayerNorm, mean)"),
    (r"gelu|erf", "elementwise with GELU"),
    (r"elementwise|vectorized", "elementwise"),
    (r"", "other"),
)

# What the name of a PyTorch module tells, which the graph's nodes bear, too; the first counts.
# The kernel sizes are the published variants'.
LAYER_KINDS = (
    (r"Quantize|\.int8|\.dequantized", "quantise"),
    (r"Reorder|Reformat|Cast|\.cast|Transpose", "reformat"),
    (r"conv_spatial", "dw 7x7 d3"),
    (r"conv0", "dw 5x5"),
    (r"dwconv", "dw 3x3"),
    (r"proj_[12]|conv1|fc[12]", "1x1"),
    (r"activation|\.act\b|act_kernel", "GELU"),
    (r"patch_embed", "patch embedding"),
    (r"block.*norm", "BatchNorm"),
    (r"norm", "LayerNorm"),
    (r"head", "head"),
    (r"", OTHER),
)


def kind_of(name: str, kinds: Sequence[tuple[str, str]] = LAYER_KINDS) -> str:
    """Return what a name tells of a layer of a session or an engine, or of a GPU's kernel.

    A fused layer's name holds those of all its parts; the first counts.

    >>> kind_of("block1.0.attn.proj_1 + block1.0.attn.activation"), kind_of("block1.0")
    ('1x1', 'elementwise (gate, residual, scale)')
    >>> kind_of("sm90_xmma_gemm_f16", KERNEL_KINDS)
    'matrix product'
    """
    first = name.partition(" + ")[0]
    return next(kind for sign, kind in kinds if re.search(sign, first))


def profile_of(contender: Contender, runner: Any, batch: Any) -> list[ProfileLine]:
    """Return where the time of a contender's opened runner goes, by kind of layer.

    PyTorch is profiled by module where it is eager, by kernel where it is compiled; ONNX
    Runtime and TensorRT by the layers they report, found again in the ONNX graph by name.

    Raises:
        UsageError: its runtime tells nothing, or nothing true: on a GPU ONNX Runtime reports how
            long the host took to launch each node (4.6 of 16.7 ms on an H200).
    """
    runtime, on_gpu = contender.runtime, contender.device != "cpu"
    if runtime == "tensorrt":
        return _by_layer(runner, batch)
    if runtime == "onnxruntime" and not on_gpu:
        return _by_node(contender, batch)
    if runtime == "pytorch" and contender.mode in ("eager", "channels-last"):
        import torch

        return by_module(runner.model, torch.from_numpy(batch).to(runner.device, runner.dtype))
    if runtime in ("pytorch", "inductor") and on_gpu:
        resident = runner.resident_batch(batch)
        resident.launch()
        return by_kernel(resident.launch)
    raise UsageError(
        f"'{contender.name}' does not say where its time goes.",
        "Profile PyTorch, TensorRT, or ONNX Runtime on a CPU.",
    )


def by_module(model: Any, images: Any) -> list[ProfileLine]:
    """Return an eager network's time by kind of layer: of its kernels, or of the processor.

    Args:
        model: a VAN in eval mode.
        images: its input, on the device it runs on.
    """
    import torch
    from torch.profiler import record_function

    def labelled(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with record_function(LABEL + kind_of(name)):
                return forward(*arguments)

        return run

    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if not [*layer.children()]:
            layer.forward = labelled(name, layer.forward)
    with torch.no_grad():
        model(images)
        events = _profiled(lambda: model(images))
    times: list[tuple[str, float]] = []
    for event in events:
        own = [kernel.duration for kernel in event.kernels]
        if not images.is_cuda:
            own = [event.self_cpu_time_total] * bool(event.self_cpu_time_total)
        above = event
        while above is not None and not above.name.startswith(LABEL):
            above = above.cpu_parent
        if above is not event:
            kind = OTHER if above is None else str(above.name[len(LABEL) :])
            times += [(kind, float(microseconds)) for microseconds in own]
    return _summed(times)


def by_kernel(launch: Callable[[], object]) -> list[ProfileLine]:
    """Return what runs on the GPU in a launch, by kind of kernel.

    It sees into CUDA graphs and compiled networks, whose kernels belong to no one module.
    """
    return _summed(
        (kind_of(event.name.lower(), KERNEL_KINDS), float(event.time_range.elapsed_us()))
        for event in _profiled(launch)
        if event.device_type.name != "CPU" and not event.is_user_annotation
    )


def _profiled(launch: Callable[[], object]) -> Iterable[Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as profiler:
        for _ in range(RUNS):
            launch()
        if on_gpu:
            torch.cuda.synchronize()
    return profiler.events() or ()


def _by_node(contender: Contender, batch: Any) -> list[ProfileLine]:
    """Return ONNX Runtime's own profile of a graph, from a session like the contender's."""
    with tempfile.TemporaryDirectory() as folder:
        runner = runner_of(contender, 1)
        runner.profile_folder, runner.threads = Path(folder), None
        with runner:
            for _ in range(RUNS + 1):
                runner.run_all(batch)
        (file,) = Path(folder).glob("*.json")
        events = json.loads(file.read_text(encoding="utf-8"))
    nodes = [event for event in events if event.get("cat") == "Node"]
    nodes = nodes[len(nodes) // (RUNS + 1) :]  # the first run prepares
    return _summed((kind_of(node["name"]), node["dur"]) for node in nodes)


def _by_layer(runner: Any, batch: Any) -> list[ProfileLine]:
    """Return an engine's time by kind of layer, by TensorRT's ``IProfiler``."""
    times: list[tuple[str, float]] = []

    class Profiler(runner.trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            runner.trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, ms: float) -> None:
            times.append((kind_of(name), 1e3 * ms))

    runner.run_all(batch)
    profiler = Profiler()
    for context in runner.contexts.values():
        context.profiler = profiler
    for _ in range(RUNS):
        runner.run_all(batch)
    return _summed(times)


def _summed(times: Iterable[tuple[str, float]]) -> list[ProfileLine]:
    """Return the kinds and microseconds of all calls, a run's share of each, longest first."""
    parts: dict[str, list[float]] = defaultdict(list)
    for kind, microseconds in times:
        parts[kind].append(microseconds)
    total = sum(map(sum, parts.values())) or 1.0
    lines = [
        ProfileLine(kind, sum(us) / RUNS / 1e3, 100 * sum(us) / total, len(us) / RUNS)
        for kind, us in parts.items()
    ]
    return sorted(lines, key=lambda line: -line.ms)
