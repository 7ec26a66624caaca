"""What ONNX Runtime's CUDA provider needs: its libraries, its options, batches on the GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.environment.packages import pip_command
from van_deploy.errors import (
    ConversionError,
    InputError,
    MissingDependency,
    UsageError,
    VanDeployError,
)
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.cuda import Cuda, DeviceBatch, out_of_memory

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "CUDA",
    "OUT_OF_MEMORY",
    "GpuBatches",
    "cuda_does_not_start",
    "cuda_libraries",
    "failures",
    "preload",
    "provider_options",
    "provider_starts",
    "refuse_nhwc",
    "silent",
]

CUDA = "CUDAExecutionProvider"

LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")
"""What the CUDA provider links, each after those it needs itself."""

DTYPES: Mapping[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "CUDNN_STATUS_ALLOC_FAILED")


def cuda_libraries(cuda_version: str) -> list[Path]:
    """Return CUDA's and cuDNN's libraries in NVIDIA's wheels, in the order to load them in.

    ONNX Runtime's wheel has no RUNPATH, and ``onnxruntime.preload_dlls()`` looks beside
    ONNX Runtime only, so without PyTorch in the process the provider does not load.

    Args:
        cuda_version: that ONNX Runtime was built for, such as ``13.0``. From CUDA 13 on all but
            cuDNN lie in one folder (``nvidia/cu13/lib``), before it in one a component.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    major = cuda_version.partition(".")[0]
    whole = f"cu{major}" if major.isdecimal() and int(major) >= 13 else ""
    found = []
    for name in LIBRARIES:
        inside = "cudnn" if name == "cudnn" else whole or "*"
        for path in sorted(p for f in folders for p in f.glob(f"{inside}/lib/lib{name}.so.*")):
            component = path.parents[1].name
            if whole or not re.fullmatch(r"cu\d+", component):
                found.append(path)
    return found


def preload(ort: Any) -> None:
    """Load what the CUDA provider links, as far as NVIDIA's wheels have it."""
    if not sys.platform.startswith("linux"):
        return
    for path in cuda_libraries(str(getattr(ort, "cuda_version", "") or "")):
        try:
            ctypes.CDLL(str(path))
        except OSError:  # noqa: PERF203 - the session says which one it cannot do without
            continue


class GpuBatches:
    """Batches of a CUDA session that stay on the GPU.

    Args:
        ort: the module.
        session: on CUDA's provider.
        cuda: the runtime.
        stream: that the session runs on.
        options: of the session.
        stack: closes what is kept.
    """

    def __init__(
        self,
        ort: Any,
        session: Any,
        cuda: Cuda,
        stream: int,
        options: CudaOptions,
        stack: ExitStack,
    ) -> None:
        self._ort, self._session, self._cuda, self._stream = ort, session, cuda, stream
        self._options, self._graphs = options, 0
        self._late = stack.enter_context(ExitStack())  # what is kept is closed first
        self._kept: dict[int, DeviceBatch] = {}
        given, answers = ({t.name: _spec(t) for t in ts} for ts in _tensors(session))
        self._given, self._answers = given, answers

    def batch(self, rows: int) -> DeviceBatch:
        """Return room for a batch of that many images."""
        runs: dict[str, Any] = {}

        def enqueue(batch: DeviceBatch) -> None:
            if not runs:
                runs["binding"], runs["options"] = self._bound(batch), self._run_options()
            with failures(f"a batch of {rows}"):
                self._session.run_with_iobinding(runs["binding"], runs["options"])

        return DeviceBatch(self._cuda, self._stream, self._given, self._answers, rows, enqueue)

    def recorded(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output, through buffers and a CUDA graph kept for this batch size."""
        rows = len(images)
        if rows not in self._kept:
            self._kept[rows] = self.batch(rows)
            self._late.callback(self._kept[rows].close)
        return self._kept[rows].answers(images)

    def _bound(self, batch: DeviceBatch) -> Any:
        binding = self._session.io_binding()
        for tensors, bind in (
            (self._given, binding.bind_input),
            (self._answers, binding.bind_output),
        ):
            for name, (shape, dtype) in tensors.items():
                bind(
                    name=name,
                    device_type="cuda",
                    device_id=self._cuda.device,
                    element_type=np.dtype(dtype).type,
                    shape=(batch.rows, *shape),
                    buffer_ptr=batch.addresses[name],
                )
        return binding

    def _run_options(self) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._options.cuda_graph:  # one graph each: it is recorded with these addresses
            self._graphs += 1
            options.add_run_config_entry("gpu_graph_id", str(self._graphs))
        return options


def _tensors(session: Any) -> tuple[Any, Any]:
    return session.get_inputs(), session.get_outputs()


def _spec(tensor: Any) -> tuple[tuple[int, ...], npt.DTypeLike]:
    rest = tuple(tensor.shape[1:])
    if tensor.type not in DTYPES or not all(isinstance(size, int) for size in rest):
        raise InputError(
            f"'{tensor.name}' is {tensor.type} {tensor.shape}: only the batch may be dynamic.",
            "Export it with a fixed image size.",
        )
    return rest, DTYPES[tensor.type]


def provider_options(options: CudaOptions, device: int, stream: int) -> dict[str, str]:
    """Return the CUDA provider's options, all of them text."""
    return {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "prefer_nhwc": str(int(options.prefer_nhwc)),
        "use_tf32": str(int(options.use_tf32)),
        "cudnn_conv_algo_search": options.cudnn_conv_algo_search,
        "cudnn_conv_use_max_workspace": "1",
        "fuse_conv_bias": str(int(options.fuse_conv_bias)),
        "enable_cuda_graph": str(int(options.cuda_graph)),
    }


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
        if any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise out_of_memory(f"ONNX Runtime, {what}") from error
        kind = InputError if type(error).__name__ == "InvalidArgument" else ConversionError
        raise kind(
            f"ONNX Runtime failed on {what}: {error}",
            "Compare the images with the inputs that `van-deploy inspect` shows.",
        ) from error


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


def refuse_nhwc(model: Path | ModelProto) -> None:
    """Return if a graph can run with ``prefer_nhwc``.

    Raises:
        UsageError: it is quantised. ONNX Runtime 1.31 loads it and fails in the first run:
            "Input channels C is not equal to kernel channels" (seen on an H200).
    """
    import onnx

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
