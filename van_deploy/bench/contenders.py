"""Who can be timed: every artifact of a bundle in every runtime here, and why not others."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx

from van_deploy.bench.document import Contender
from van_deploy.bundle import Artifact, Bundle
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import ImageSize, height_width
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.environment.packages import execution_providers
from van_deploy.errors import BundleError, MissingDependency, UsageError
from van_deploy.graph.files import save_onnx
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.network import original_network
from van_deploy.runners.onnxruntime import CUDA, OnnxRuntimeRunner, OpenVinoRunner
from van_deploy.runners.tensorrt import TensorRtRunner

# Eager PyTorch, the network as it came: what ratios are given against on a CPU. Its process
# keeps the memory it frees, as every other's. On a GPU they are against PyTorch's fastest mode.
REFERENCE = "pytorch"

# The mode of an engine that is recorded once and launched as one piece.
CUDA_GRAPH = "cuda-graph"

# Mode and precision by name.
PYTORCH = {
    REFERENCE: ("eager", "fp32"),
    "pytorch-channels-last": ("channels-last", "fp32"),
    "pytorch-compile": ("compile", "fp32"),
    "pytorch-autocast": ("autocast", "bf16"),
}
PYTORCH_ON_GPU = {
    REFERENCE: ("eager", "fp32"),
    "pytorch-channels-last-fp16": ("channels-last", "fp16"),
    "pytorch-compile-fp16": ("compile", "fp16"),
    "pytorch-compile-bf16": ("compile", "bf16"),
}

# Of ONNX Runtime: NCHW, NHWC, and NCHW as one CUDA graph: on an H200 NCHW was the faster layout
# for van_b0 in FP32, TF32 and FP16 at batch 128 (docs/gpu-results.md).
ON_CUDA: Mapping[str, Mapping[str, Any]] = {
    "ort-cuda": {},
    "ort-cuda-nhwc": {"prefer_nhwc": True},
    "ort-cuda-graph": {"cuda_graph": True},
}

# How an artifact runs: what to call it, and what is special of the contender.
Changes = Mapping[str, Any]
ON_CPU: Mapping[str, Changes] = {
    "ort-cpu": {"runtime": "onnxruntime", "mode": "ort-cpu"},
    "openvino": {"runtime": "openvino"},
    "openvino-bf16": {"runtime": "openvino", "precision": "bf16"},  # of what is not quantised
    "ort-cuda": {},
}
COMPILED: Mapping[str, Mapping[str, Changes]] = {
    "engine": {
        "tensorrt": {"runtime": "tensorrt"},
        "tensorrt-graph": {"runtime": "tensorrt", "mode": CUDA_GRAPH},
    },
    "package": {"inductor": {"runtime": "inductor"}},
}

FOR_GPUS = {
    "fp16": "FP16 is for GPUs: CPUs cast it to FP32 and back",
    "bf16": "ONNX Runtime has no BF16 convolution for CPUs: the file is for GPUs",
}
NO_BF16 = "this processor has no bfloat16 instructions"

# Contenders by name, and of those that cannot start the reasons, one phrase each.
Entries = tuple[dict[str, Contender], dict[str, str]]


def contenders_of(bundle: Bundle, settings: BenchSettings) -> Entries:
    """Return every contender of a bundle on a device, and why others cannot start.

    Args:
        bundle: the digests of its files are checked.
        settings: the device, and what all variants of ONNX Runtime's CUDA provider have in common.

    Raises:
        BundleError: there is no artifact, or a file is not the manifest's.
    """
    if not bundle.artifacts:
        raise BundleError(
            f"The bundle '{bundle.path}' has no artifact to time.",
            "Make one with `van-deploy export`.",
        )
    found, skipped, device = dict[str, Contender](), dict[str, str](), settings.device or "cpu"
    folder, digest = str(bundle.path), bundle.manifest.weights.sha256
    for name, (mode, precision) in (PYTORCH if device == "cpu" else PYTORCH_ON_GPU).items():
        given = (name, "pytorch", precision, folder, mode)
        found[name] = Contender(*given, sha256=digest, device=device)
        if mode == "autocast" and not cpu().has_bfloat16:
            skipped[name] = NO_BF16
    ways = ON_CPU
    cuda = CudaOptions(False, settings.tf32, settings.conv_search, settings.fuse_conv_bias)
    if device != "cpu":
        options = {way: asdict(replace(cuda, **own)) for way, own in ON_CUDA.items()}
        ways = {w: {"mode": "ort-cuda", "options": given} for w, given in options.items()}
    for artifact in bundle.artifacts.values():
        profiles = artifact.engine.profiles if artifact.engine else ()
        plain = Contender(
            name=artifact.name,
            runtime="onnxruntime",
            precision=artifact.precision,
            file=str(bundle.verified_path(artifact.name)),
            embedded=artifact.embedded,
            sha256=artifact.sha256,
            min_batch=min((p.min for p in profiles), default=1),
            max_batch=max((p.max for p in profiles), default=None),
            device=device,
        )
        for way, changes in COMPILED.get(artifact.kind, ways).items():
            name = f"{way}/{artifact.name}"
            found[name] = replace(plain, name=name, **changes)
            if obstacle := _obstacle(way, artifact, device):
                skipped[name] = obstacle
    return {name: one for name, one in found.items() if name not in skipped}, skipped


def _obstacle(way: str, artifact: Artifact, device: str) -> str:
    """Return why an artifact does not run in some way on a device; "" if it does."""
    targets = artifact.engine.targets if artifact.engine else ()
    for_gpu = way.startswith(("ort-cuda", "tensorrt")) or any(t.startswith("sm_") for t in targets)
    target = artifact.made_with.get("settings", {}).get("target", "cpu")
    if device != "cpu" and not for_gpu:
        return "compiled for a CPU: time it with --device cpu"
    if device != "cpu":
        no_provider = way.startswith("ort-cuda") and CUDA not in execution_providers()
        return f"no {CUDA} in ONNX Runtime" if no_provider else ""
    if for_gpu:
        driver, there = nvidia_driver(), "it runs on a GPU: time it with --device cuda:0"
        return there if driver and driver.gpus else "no NVIDIA GPU answers here"
    if artifact.kind in COMPILED:
        return ""
    if artifact.precision == "int8" and target != "cpu":
        return f"quantised for {target}; for a CPU use `van-deploy quantize --target cpu`"
    if way.startswith("openvino") and importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: `pip install 'van-deploy[openvino]'`"
    no_bf16 = way == "openvino-bf16" and not cpu().has_bfloat16
    return FOR_GPUS.get(artifact.precision, NO_BF16 if no_bf16 else "")


def chosen(entries: Entries, patterns: Sequence[str]) -> Entries:
    """Return the entries whose names match one of the patterns, in the entries' order.

    A pattern is a name, the start of one before a ``/``, or holds ``*``. No
    pattern chooses all. A runner asked for that cannot start is an error.

    Raises:
        UsageError: a pattern matches nothing.
        MissingDependency: all a pattern matches cannot start.
    """
    ready, skipped = entries
    picked = set[str]() if patterns else {*ready, *skipped}
    for pattern in patterns:
        names = [n for n in (*ready, *skipped) if fnmatch.filter((n, n.split("/")[0]), pattern)]
        if not names:
            known = ", ".join((*ready, *skipped))
            raise UsageError(f"There is no runner '{pattern}' here.", f"Runners: {known}.")
        if names[0] in skipped:
            raise MissingDependency(
                f"The runner '{names[0]}' cannot start: {skipped[names[0]]}.",
                "Install what it needs, or leave it out of --runners.",
            )
        picked.update(names)
    here = {name: contender for name, contender in ready.items() if name in picked}
    return here, {name: reason for name, reason in skipped.items() if name in picked}


def resized(contender: Contender, size: ImageSize, folder: Path) -> Contender:
    """Return a contender whose ONNX file, in ``folder``, is declared for another image size.

    After the rewrites nothing in a VAN's graph depends on the size of its input but the input's
    own declaration. PyTorch takes any size, and an engine refuses what is outside its profile.
    """
    source = Path(contender.file)
    if source.suffix != ".onnx":
        return contender
    model, target = onnx.load_model(source), folder / source.name
    dims = model.graph.input[0].type.tensor_type.shape.dim
    axes = (1, 2) if contender.embedded == "uint8" else (2, 3)
    for axis, side in zip(axes, height_width(size), strict=True):
        dims[axis].dim_value = side
    for value in model.graph.output:  # a backbone's maps have other sides then
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]  # shapes inferred for the old size
    save_onnx(model, target)
    return replace(contender, file=str(target))


def runner_of(contender: Contender, threads: int) -> Any:
    """Return the runner of a contender, to be opened by the process that times it."""
    file, device, mode = Path(contender.file), contender.device, contender.mode
    if contender.runtime == "onnxruntime":
        cuda = CudaOptions(**contender.options)
        return OnnxRuntimeRunner(file, threads=threads, name=mode, device=device, cuda=cuda)
    if contender.runtime == "openvino":
        precision = "bf16" if contender.precision == "bf16" else "f32"
        return OpenVinoRunner(file, threads=threads, precision=precision)
    if contender.runtime == "tensorrt":
        return TensorRtRunner(file, device=device, cuda_graph=mode == CUDA_GRAPH)
    import torch  # by a process that needs it, and no other

    from van_deploy.runners.pytorch import InductorRunner, TorchRunner

    if contender.runtime == "inductor":
        return InductorRunner(file, device=device, threads=threads)
    torch.set_num_threads(threads)
    precision = "fp32" if mode == "autocast" else contender.precision
    return TorchRunner(original_network(Bundle.open(file)).model, mode, device, precision)
