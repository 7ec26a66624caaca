"""What ONNX Runtime's CUDA provider needs: its libraries, its options, its failures told."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from van_deploy.environment.packages import pip_command
from van_deploy.errors import (
    ConversionError,
    InputError,
    MissingDependency,
    UsageError,
    VanDeployError,
)
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.cuda import out_of_memory

if TYPE_CHECKING:
    from onnx import ModelProto

CUDA = "CUDAExecutionProvider"
LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")
"""What the CUDA provider links, each after those it needs itself."""

OUT_OF_MEMORY = "out of memory|Failed to allocate memory|CUDNN_STATUS_ALLOC_FAILED"


def cuda_libraries(cuda_version: str) -> list[Path]:
    """Return CUDA's and cuDNN's libraries in NVIDIA's wheels, in the order to load them in.

    ONNX Runtime's wheel has no RUNPATH, and ``onnxruntime.preload_dlls()`` looks beside
    ONNX Runtime only, so without PyTorch in the process the provider does not load.

    Args:
        cuda_version: that ONNX Runtime was built for, 13 or later, such as ``13.0``. All but cuDNN
            lie in one folder: ``nvidia/cu13/lib``.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    cuda, found = f"cu{cuda_version.partition('.')[0]}", list[Path]()
    for name in LIBRARIES:
        inside = "cudnn" if name == "cudnn" else cuda
        found += sorted(p for f in folders for p in f.glob(f"{inside}/lib/lib{name}.so.*"))
    return found


def preload(ort: Any) -> None:
    """Load what the CUDA provider links, as far as NVIDIA's wheels have it."""
    version = str(getattr(ort, "cuda_version", "") or "")
    for path in cuda_libraries(version) if sys.platform.startswith("linux") else ():
        with contextlib.suppress(OSError):  # the session says which one it cannot do without
            ctypes.CDLL(str(path))


def provider_options(options: CudaOptions, device: int, stream: int) -> dict[str, str]:
    """Return the CUDA provider's options, all of them text."""
    asked = asdict(options)
    asked["enable_cuda_graph"] = asked.pop("cuda_graph")
    asked |= {"device_id": device, "user_compute_stream": stream}
    asked["cudnn_conv_use_max_workspace"] = True
    return {k: str(int(v) if isinstance(v, bool) else v) for k, v in asked.items()}


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into the project's.

    They derive from Exception alone, and some failures of a GPU come as RuntimeError.
    """
    try:
        yield
    except VanDeployError:
        raise
    except Exception as error:
        if not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
            raise
        kind = InputError if type(error).__name__ == "InvalidArgument" else ConversionError
        raise failed(f"failed on {what}", error, kind) from error


def failed(
    what: str, error: Exception, kind: type[VanDeployError] = ConversionError
) -> VanDeployError:
    """Return the project's error for one of ONNX Runtime's; ``what`` it did is said behind it."""
    if re.search(OUT_OF_MEMORY, str(error)):
        return out_of_memory(f"ONNX Runtime {what}")
    if "fallback to CPU EP has been explicitly disabled" in str(error):
        return ConversionError(
            f"ONNX Runtime {what}: it would run part of it on the CPU, because {CUDA} does not "
            "have all of its operators.",
            "Take an artifact made for GPUs (--target gpu when quantising), or run it with "
            "--runner ort-cpu.",
        )
    return kind(
        f"ONNX Runtime {what}: {error}",
        "Compare the file and the images with what `van-deploy inspect` shows, or export at a "
        "lower --opset.",
    )


def provider_starts(ort: Any, provider: str, *, quiet: bool = True) -> bool:
    """Return whether a session of one operator runs on the provider.

    A listed provider whose libraries do not load is left out of a session with a warning only,
    which ``quiet`` keeps from the user.
    """
    from onnx import TensorProto, helper

    if provider == CUDA:
        preload(ort)
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4 if quiet else 2
    with silent(ort) if quiet else contextlib.nullcontext():
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if provider not in session.get_providers():
        return False
    session.run(None, {"x": np.zeros(1, np.float32)})
    return True


def refuse_options(model: Path | ModelProto, options: CudaOptions) -> None:
    """Return if a graph can run with these options.

    Both faults were seen on an H200 with ONNX Runtime 1.31. A quantised graph in NHWC memory loads,
    and its first run fails: "Input channels C is not equal to kernel channels". With a CUDA graph
    an FP16 graph in NHWC memory gave wrong logits (0.02 dB), then "illegal memory access"; either
    option alone is right.

    Raises:
        UsageError: the runtime would fail, or answer wrongly.
    """
    import onnx

    if not options.prefer_nhwc:
        return
    if options.cuda_graph:
        raise UsageError(
            "ONNX Runtime's CUDA provider answers wrongly with prefer_nhwc and a CUDA graph.",
            "Ask for one of them.",
        )
    graph = onnx.load(model, load_external_data=False) if isinstance(model, Path) else model
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        raise UsageError(
            "ONNX Runtime's CUDA provider cannot run a quantised graph with prefer_nhwc.",
            "Leave prefer_nhwc off for INT8 files.",
        )


@contextlib.contextmanager
def silent(ort: Any) -> Iterator[None]:
    """Keep what ONNX Runtime logs about providers from the user: it comes as an error."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def cuda_does_not_start(ort: Any) -> MissingDependency:
    """Return the error for a provider that is listed and does not start."""
    return MissingDependency(
        f"ONNX Runtime {ort.__version__} has {CUDA} but could not start it, and would have run on "
        "the CPU without a word.",
        f"It needs CUDA {getattr(ort, 'cuda_version', '') or 'and cuDNN'} and cuDNN 9: "
        f"`{pip_command()} install 'onnxruntime-gpu[cuda,cudnn]'`; see `van-deploy doctor`.",
    )
