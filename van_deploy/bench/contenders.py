"""List the contenders of a benchmark: every artifact of a bundle in every available runtime."""

import fnmatch
import importlib.util
from collections.abc import Sequence
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
from van_deploy.runners.network import Network, original_network
from van_deploy.runners.onnxruntime import CUDA, OnnxRuntimeRunner, OpenVinoRunner
from van_deploy.runners.tensorrt import TensorRtRunner

# Reference of the ratios on a CPU: the original network in eager PyTorch, with malloc trimming
# disabled, as for every contender. On a GPU the reference is PyTorch's fastest mode.
REFERENCE = "pytorch"

# Mode of an engine that is captured and launched as a CUDA graph.
CUDA_GRAPH = "cuda-graph"

# Mode and precision of PyTorch contenders by name.
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

# ONNX Runtime with NCHW, NHWC, and NCHW in a CUDA graph: on an H200 NCHW was the faster layout
# for van_b0 in FP32, TF32 and FP16 at batch 128 (docs/gpu-results.md).
ORT_CUDA_VARIANTS: dict[str, Any] = {
    "ort-cuda": {},
    "ort-cuda-nhwc": {"prefer_nhwc": True},
    "ort-cuda-graph": {"cuda_graph": True},
}

# Ways to run an artifact, by the prefix of the contender's name: fields of the contender.
CPU_RUNTIMES: dict[str, Any] = {
    "ort-cpu": {"runtime": "onnxruntime", "mode": "ort-cpu"},
    "openvino": {"runtime": "openvino"},
    "openvino-bf16": {"runtime": "openvino", "precision": "bf16"},  # non-quantised precision
    "ort-cuda": {},
}
COMPILED_RUNTIMES: dict[str, Any] = {
    "engine": {
        "tensorrt": {"runtime": "tensorrt"},
        "tensorrt-graph": {"runtime": "tensorrt", "mode": CUDA_GRAPH},
    },
    "package": {"inductor": {"runtime": "inductor"}},
}

GPU_PRECISIONS = {
    "fp16": "FP16 is for GPUs: CPUs cast it to FP32 and back",
    "bf16": "ONNX Runtime has no BF16 convolution for CPUs: the file is for GPUs",
}
NO_BF16 = "this processor has no bfloat16 instructions"

# Contenders by name, and the reasons of those that cannot start by name.
Entries = tuple[dict[str, Contender], dict[str, str]]


def list_contenders(bundle: Bundle, settings: BenchSettings) -> Entries:
    """Return every contender of a bundle on a device, and why others cannot start.

    Args:
        bundle: whose files are verified.
        settings: the device, and the options of ONNX Runtime's CUDA provider.

    Raises:
        BundleError: the bundle has no artifact, or a file differs from the manifest.
    """
    if not bundle.artifacts:
        raise BundleError(
            f"The bundle '{bundle.path}' has no artifact to time.",
            "Create one with `van-deploy export`.",
        )
    contenders, skipped, device = dict[str, Contender](), dict[str, str](), settings.device or "cpu"
    folder, digest = str(bundle.path), bundle.manifest.weights.sha256
    for name, (mode, precision) in (PYTORCH if device == "cpu" else PYTORCH_ON_GPU).items():
        arguments = (name, "pytorch", precision, folder, mode)
        contenders[name] = Contender(*arguments, sha256=digest, device=device)
        if mode == "autocast" and not cpu().has_bfloat16:
            skipped[name] = NO_BF16
    runtimes = CPU_RUNTIMES
    cuda = CudaOptions(False, settings.tf32, settings.conv_search, settings.fuse_conv_bias)
    if device != "cpu":
        variants = {name: replace(cuda, **own) for name, own in ORT_CUDA_VARIANTS.items()}
        runtimes = {
            name: {"mode": "ort-cuda", "options": asdict(o)} for name, o in variants.items()
        }
    for artifact in bundle.artifacts.values():
        profiles = Network(bundle, artifact.name).profiles
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
        for prefix, changes in COMPILED_RUNTIMES.get(artifact.kind, runtimes).items():
            name = f"{prefix}/{artifact.name}"
            contenders[name] = replace(plain, name=name, **changes)
            if reason := _skip_reason(prefix, artifact, device):
                skipped[name] = reason
    return {name: one for name, one in contenders.items() if name not in skipped}, skipped


def _skip_reason(name: str, artifact: Artifact, device: str) -> str:
    """Return why an artifact does not run in a runtime on a device; "" if it does."""
    targets = artifact.engine.targets if artifact.engine else ()
    for_gpu = name.startswith(("ort-cuda", "tensorrt")) or any(t.startswith("sm_") for t in targets)
    target = artifact.made_with.get("settings", {}).get("target", "cpu")
    if device != "cpu" and not for_gpu:
        return "compiled for a CPU: time it with --device cpu"
    if device != "cpu" and name.startswith("ort-cuda"):
        if CUDA not in execution_providers():
            return f"no {CUDA} in ONNX Runtime"
        if artifact.precision == "int8" and target == "cpu":
            return f"quantised for CPUs: {CUDA} lacks some of its operators"
        if artifact.precision == "int8" and name == "ort-cuda-nhwc":
            return "INT8 fails in NHWC memory"
    if device != "cpu":
        return ""
    if for_gpu:
        driver, remedy = nvidia_driver(), "it runs on a GPU: time it with --device cuda:0"
        return remedy if driver and driver.gpus else "no NVIDIA GPU was found"
    if artifact.kind in COMPILED_RUNTIMES:
        return ""
    if artifact.precision == "int8" and target != "cpu":
        return f"quantised for {target}; for a CPU use `van-deploy quantize --target cpu`"
    if name.startswith("openvino") and importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: `pip install 'van-deploy[openvino]'`"
    no_bf16 = name == "openvino-bf16" and not cpu().has_bfloat16
    return GPU_PRECISIONS.get(artifact.precision, NO_BF16 if no_bf16 else "")


def select_contenders(entries: Entries, patterns: Sequence[str]) -> Entries:
    """Return the entries whose names match one of the patterns, in the order of the entries.

    A pattern is a name, the part of a name before ``/``, or has ``*`` as a wildcard. Without a
    pattern all are selected.

    Raises:
        UsageError: a pattern matches no name.
        MissingDependency: no contender that a pattern matches can start.
    """
    ready, skipped = entries
    selected = set[str]() if patterns else {*ready, *skipped}
    for pattern in patterns:
        names = [n for n in (*ready, *skipped) if fnmatch.filter((n, n.split("/")[0]), pattern)]
        if not names:
            known = ", ".join((*ready, *skipped))
            raise UsageError(f"There is no runner '{pattern}'.", f"Choose one of: {known}.")
        if names[0] in skipped:
            raise MissingDependency(
                f"The runner '{names[0]}' cannot start: {skipped[names[0]]}.",
                "Install what it needs, or remove it from --runners.",
            )
        selected.update(names)
    contenders = {name: contender for name, contender in ready.items() if name in selected}
    return contenders, {name: reason for name, reason in skipped.items() if name in selected}


def resize(contender: Contender, size: ImageSize, folder: Path) -> Contender:
    """Return a contender whose ONNX file, a copy in ``folder``, has another image size.

    After the rewrites only the declaration of the input in a VAN's graph depends on the image
    size. PyTorch accepts any size, and an engine rejects sizes outside its profile.
    """
    source = Path(contender.file)
    if source.suffix != ".onnx":
        return contender
    model, target = onnx.load_model(source), folder / source.name
    dims = model.graph.input[0].type.tensor_type.shape.dim
    axes = (1, 2) if contender.embedded == "uint8" else (2, 3)
    for axis, side in zip(axes, height_width(size), strict=True):
        dims[axis].dim_value = side
    for value in model.graph.output:  # the sizes of a backbone's feature maps change, too
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]  # inferred for the previous size
    save_onnx(model, target)
    return replace(contender, file=str(target))


def create_runner(contender: Contender, threads: int) -> Any:
    """Return the runner of a contender; the process that times it opens it."""
    file, device, mode = Path(contender.file), contender.device, contender.mode
    if contender.runtime == "onnxruntime":
        cuda = CudaOptions(**contender.options)
        return OnnxRuntimeRunner(file, threads=threads, name=mode, device=device, cuda=cuda)
    if contender.runtime == "openvino":
        precision = "bf16" if contender.precision == "bf16" else "f32"
        return OpenVinoRunner(file, threads=threads, precision=precision)
    if contender.runtime == "tensorrt":
        return TensorRtRunner(file, device=device, cuda_graph=mode == CUDA_GRAPH)
    # PyTorch is imported only in a process that needs it.
    from van_deploy.runners.pytorch import InductorRunner, TorchRunner

    if contender.runtime == "inductor":
        return InductorRunner(file, device=device, threads=threads)
    precision = "fp32" if mode == "autocast" else contender.precision
    model = original_network(Bundle.open(file)).model
    return TorchRunner(model, mode, device, precision, threads=threads)
