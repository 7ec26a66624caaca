"""Profile a network: time by kind of PyTorch module, layer or kernel."""

import copy
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from van_deploy.bench.contenders import CUDA_GRAPH, create_runner
from van_deploy.bench.document import Contender, ProfileLine
from van_deploy.errors import UsageError

LABEL_PREFIX = "van:"
ELEMENTWISE = "elementwise (gate, residual, scale)"
# Number of runs that are averaged.
RUNS = 5

# Kinds of GPU kernels by name; the first match counts. Names do not distinguish 3x3 from 5x5.
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

# Kinds of layers by the name of the PyTorch module, which is also the name of the graph's node;
# the first match counts. The kernel sizes are those of the published variants.
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
    (r"", ELEMENTWISE),
)


def layer_kind(name: str, kinds: Sequence[tuple[str, str]] = LAYER_KINDS) -> str:
    """Return the kind of a layer or a GPU kernel from its name.

    The name of a fused layer contains those of all its parts; the first part counts.

    >>> layer_kind("block1.0.attn.proj_1 + block1.0.attn.activation"), layer_kind("block1.0")
    ('1x1', 'elementwise (gate, residual, scale)')
    >>> layer_kind("sm90_xmma_gemm_f16", KERNEL_KINDS)
    'matrix product'
    """
    return next(kind for pattern, kind in kinds if re.search(pattern, name.partition(" + ")[0]))


def profile_contender(contender: Contender, runner: Any, batch: Any) -> list[ProfileLine]:
    """Return the time of a contender's open runner by kind of layer.

    Eager PyTorch is profiled by module, compiled PyTorch by kernel, ONNX Runtime and TensorRT by
    the layers they report, whose names are those of the ONNX nodes.

    Raises:
        UsageError: the runtime has no profiler, or a wrong one: TensorRT reports no layers of a
            CUDA graph that it replays; on a GPU ONNX Runtime reports the time in which the host
            launches each node (4.6 of 16.7 ms on an H200).
    """
    runtime, on_gpu = contender.runtime, contender.device != "cpu"
    if runtime == "tensorrt" and contender.mode != CUDA_GRAPH:
        return _profile_tensorrt(runner, batch)
    if runtime == "onnxruntime" and not on_gpu:
        return _profile_onnxruntime(contender, runner.threads, batch)
    if runtime == "pytorch" and contender.mode in ("eager", "channels-last"):
        import torch

        images = torch.from_numpy(batch).to(runner.device, runner.dtype)
        return profile_modules(runner.model, images)
    if runtime in ("pytorch", "inductor") and on_gpu:
        resident = runner.resident_batch(batch)
        resident.launch()
        return profile_kernels(resident.launch)
    raise UsageError(
        f"'{contender.name}' cannot be profiled.",
        "Profile PyTorch without compilation or autocast, TensorRT without a CUDA graph, or ONNX "
        "Runtime on a CPU.",
    )


def profile_modules(model: Any, images: Any) -> list[ProfileLine]:
    """Return the time of an eager network by kind of layer: kernel time, or CPU time on a CPU.

    Args:
        model: a VAN in eval mode, which is not changed.
        images: its input, on the device of the model.
    """
    import torch
    from torch.profiler import record_function

    def with_label(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with record_function(LABEL_PREFIX + layer_kind(name)):
                return forward(*arguments)

        return run

    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if not [*layer.children()]:
            layer.forward = with_label(name, layer.forward)
    with torch.no_grad():
        model(images)
        events = _torch_events(lambda: model(images))
    times: list[tuple[str, float]] = []
    for event in events:
        own = [kernel.duration for kernel in event.kernels]
        if not images.is_cuda:
            own = [event.self_cpu_time_total] * bool(event.self_cpu_time_total)
        label = event
        while label is not None and not label.name.startswith(LABEL_PREFIX):
            label = label.cpu_parent
        if label is not event:
            kind = ELEMENTWISE if label is None else str(label.name[len(LABEL_PREFIX) :])
            times += [(kind, float(microseconds)) for microseconds in own]
    return _sum_by_kind(times)


def profile_kernels(launch: Callable[[], object]) -> list[ProfileLine]:
    """Return the GPU time of a launch by kind of kernel.

    This includes CUDA graphs and compiled networks, whose kernels are not those of one module.
    """
    return _sum_by_kind(
        (layer_kind(event.name.lower(), KERNEL_KINDS), float(event.time_range.elapsed_us()))
        for event in _torch_events(launch)
        if event.device_type.name != "CPU" and not event.is_user_annotation
    )


def _torch_events(launch: Callable[[], object]) -> Iterable[Any]:
    import torch
    from torch.profiler import profile

    with profile() as profiler:  # of the CPU, and of CUDA where it is available
        for _ in range(RUNS):
            launch()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler.events() or ()


def _profile_onnxruntime(contender: Contender, threads: int, batch: Any) -> list[ProfileLine]:
    """Return ONNX Runtime's profile of a graph, from a new session with the same options."""
    with tempfile.TemporaryDirectory() as folder:
        runner = create_runner(contender, threads)
        runner.profile_folder = Path(folder)
        with runner:
            for _ in range(RUNS + 1):
                runner.run_all(batch)
        (file,) = Path(folder).glob("*.json")
        events = json.loads(file.read_text(encoding="utf-8"))
    nodes = [event for event in events if event.get("cat") == "Node"]
    nodes = nodes[len(nodes) // (RUNS + 1) :]  # without the first run
    return _sum_by_kind((layer_kind(node["name"]), node["dur"]) for node in nodes)


def _profile_tensorrt(runner: Any, batch: Any) -> list[ProfileLine]:
    """Return the time of an engine by kind of layer, from TensorRT's ``IProfiler``."""
    times: list[tuple[str, float]] = []

    class Profiler(runner.trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            runner.trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, ms: float) -> None:
            times.append((layer_kind(name), 1e3 * ms))

    runner.run_all(batch)
    profiler = Profiler()
    for context in runner.contexts.values():
        context.profiler = profiler
    for _ in range(RUNS):
        runner.run_all(batch)
    return _sum_by_kind(times)


def _sum_by_kind(times: Iterable[tuple[str, float]]) -> list[ProfileLine]:
    """Sum the microseconds of all calls by kind; return the average of a run, longest first."""
    parts: dict[str, list[float]] = defaultdict(list)
    for kind, microseconds in times:
        parts[kind].append(microseconds)
    total = sum(map(sum, parts.values())) or 1.0
    lines = [
        ProfileLine(kind, sum(us) / RUNS / 1e3, 100 * sum(us) / total, len(us) / RUNS)
        for kind, us in parts.items()
    ]
    return sorted(lines, key=lambda line: -line.ms)
