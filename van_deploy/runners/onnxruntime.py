"""ONNX Runtime on the CPU and, through its CUDA provider, on GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
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
from van_deploy.runners.base import CudaOptions, Images, Logits, gpu_index
from van_deploy.runners.cuda import Cuda, DeviceBatch, out_of_memory, require_cuda

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "CPU",
    "CUDA",
    "PROVIDERS",
    "OnnxRuntimeRunner",
    "cuda_libraries",
    "onnxruntime_logits",
    "provider_starts",
    "require_onnxruntime",
    "require_provider",
]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS: Mapping[str, str] = {"ort-cpu": CPU, "ort-cuda": CUDA}
"""The execution provider of each runner. It runs the whole graph, or the graph is refused."""

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


def require_onnxruntime() -> Any:
    """Return the ``onnxruntime`` module.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            f"ONNX Runtime is not installed, and nothing leaves this program unchecked: {error}.",
            "Install it with `pip install 'van-deploy[cpu]'` "
            "(or 'van-deploy[gpu]' on a machine with an NVIDIA GPU).",
        ) from error
    return onnxruntime


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
    inside = f"cu{major}" if major.isdecimal() and int(major) >= 13 else "*"
    return [
        path
        for name in LIBRARIES
        for folder in folders
        for path in sorted(
            folder.glob(f"{'cudnn' if name == 'cudnn' else inside}/lib/lib{name}.so.*")
        )
        if not path.name.endswith(".alt.so")
    ]


def _preload(ort: Any) -> None:
    """Load what the CUDA provider links, as far as NVIDIA's wheels have it."""
    if not sys.platform.startswith("linux"):
        return
    for path in cuda_libraries(str(getattr(ort, "cuda_version", "") or "")):
        try:
            ctypes.CDLL(str(path))
        except OSError:  # noqa: PERF203 - the session says which one it cannot do without
            continue


class OnnxRuntimeRunner:
    """Runs an ONNX graph.

    Args:
        model: a file, or a graph in memory (below 2 GB).
        threads: threads inside one operator; None lets ONNX Runtime choose.
        optimize: let ONNX Runtime rewrite the graph before running it.
        spin: let idle threads spin for the next operator. That is fastest alone; a
            server has other work for the processor.
        arena: keep freed memory for the next run. Without it a single large batch
            needs less at its peak.
        name: one of :data:`PROVIDERS`: which processor runs it. A graph that a GPU's provider
            would leave to the CPU, whole or in part, is refused.
        device: which GPU, for ``ort-cuda``.
        cuda: how the CUDA provider runs it.
    """

    def __init__(
        self,
        model: Path | ModelProto,
        *,
        threads: int | None = None,
        optimize: bool = True,
        spin: bool = True,
        arena: bool = True,
        name: str = "ort-cpu",
        device: str = "cuda:0",
        cuda: CudaOptions | None = None,
    ) -> None:
        self.model = model
        self.threads = threads
        self.provider = PROVIDERS[name]
        self.optimize = optimize
        self.spin = spin
        self.arena = arena
        self.name = name
        self.device = device
        self.options = cuda or CudaOptions()
        self._session: Any = None
        self._gpu: _OnGpu | None = None
        self._stack = ExitStack()

    def __enter__(self) -> OnnxRuntimeRunner:
        """Load the graph.

        Raises:
            MissingDependency: ONNX Runtime is not installed, lacks the provider asked for, or
                cannot start it; there is no GPU.
            ConversionError: it refuses the graph, or would run part of it on the CPU.
        """
        ort = require_provider(self.provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = self.arena
        if not self.spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not self.optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with ExitStack() as stack:
            provider: Any = self.provider
            if self.provider == CUDA:
                cuda = require_cuda(gpu_index(self.device) or 0)
                _preload(ort)
                options.log_severity_level = 4  # its errors come as exceptions, too
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
                stream = cuda.stream(stack)
                provider = (CUDA, _provider_options(self.options, cuda.device, stream))
            self._session = self._opened(ort, options, provider)
            stack.callback(self._forget)  # before the stream goes
            if self.provider == CUDA:
                self._gpu = _OnGpu(ort, self._session, cuda, stream, self.options, stack)
            self._stack = stack.pop_all()
        return self

    def _opened(self, ort: Any, options: Any, provider: Any) -> Any:
        source = str(self.model) if isinstance(self.model, Path) else self.model.SerializeToString()
        try:
            return ort.InferenceSession(source, options, providers=[provider])
        except Exception as error:
            what = f"'{self.model}'" if isinstance(self.model, Path) else "the graph"
            if self.provider == CUDA and not provider_starts(ort, CUDA):
                raise _does_not_start(ort) from error
            if any(sign in str(error) for sign in OUT_OF_MEMORY):
                raise out_of_memory(f"loading {what}") from error
            if "fallback to CPU EP has been explicitly disabled" in str(error):
                raise ConversionError(
                    f"ONNX Runtime {ort.__version__} would run part of {what} on the CPU: {CUDA} "
                    "does not have all of its operators.",
                    "Take an artefact made for GPUs (--target gpu when quantising), or run it "
                    "with --runner ort-cpu.",
                ) from error
            raise ConversionError(
                f"ONNX Runtime {ort.__version__} cannot load {what}: {error}",
                "Look at the file with `van-deploy inspect`, or export at a lower --opset.",
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the session."""
        stack, self._stack = self._stack, ExitStack()
        stack.close()

    def _forget(self) -> None:
        self._session = None
        self._gpu = None

    @property
    def tf32(self) -> bool:
        """Whether FP32 operators may compute in TF32: CUDA's ``use_tf32``, on by default."""
        return self.provider == CUDA and self.options.use_tf32

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, S, S)``.

        Raises:
            MissingDependency: the GPU is out of memory.
            ConversionError: ONNX Runtime fails.
        """
        return next(iter(self.run_all(images).values()))

    def run_all(self, batch: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output by name, for a batch in the graph's own input type.

        Raises:
            InputError: the batch is not what the graph takes.
            MissingDependency: the GPU is out of memory.
            ConversionError: ONNX Runtime fails.
        """
        with _failures(f"a batch of {len(batch)}"):
            if self._gpu is not None and self.options.cuda_graph:
                return self._gpu.recorded(batch)
            name = self._session.get_inputs()[0].name
            names = [output.name for output in self._session.get_outputs()]
            return dict(zip(names, self._session.run(names, {name: batch}), strict=True))

    def resident(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return a batch that stays on the GPU; see :class:`~.base.ResidentRunner`.

        Raises:
            UsageError: this is not ``ort-cuda``.
            MissingDependency: the GPU is out of memory.
        """
        if self._gpu is None:
            raise UsageError(f"'{self.name}' runs on no GPU.", "Open it as ort-cuda.")
        batch = self._gpu.batch(len(images))
        batch.fill(images)
        return batch


class _OnGpu:
    """What a CUDA session needs to run batches that stay on the GPU."""

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
        self._options, self._stack, self._graphs = options, stack, 0
        self._kept: dict[int, DeviceBatch] = {}
        given, answers = ({t.name: _spec(t) for t in ts} for ts in _tensors(session))
        self._given, self._answers = given, answers

    def batch(self, rows: int) -> DeviceBatch:
        """Return room for a batch of that many images."""
        runs: dict[str, Any] = {}

        def enqueue(batch: DeviceBatch) -> None:
            if not runs:
                runs["binding"], runs["options"] = self._bound(batch), self._run_options()
            with _failures(f"a batch of {rows}"):
                self._session.run_with_iobinding(runs["binding"], runs["options"])

        return DeviceBatch(self._cuda, self._stream, self._given, self._answers, rows, enqueue)

    def recorded(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output, through buffers and a CUDA graph kept for this batch size."""
        rows = len(images)
        if rows not in self._kept:
            self._kept[rows] = self.batch(rows)
            self._stack.callback(self._kept[rows].close)
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


def _provider_options(options: CudaOptions, device: int, stream: int) -> dict[str, str]:
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
def _failures(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions, which derive from Exception alone, into the project's."""
    try:
        yield
    except VanDeployError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        if any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise out_of_memory(f"ONNX Runtime, {what}") from error
        kind = InputError if type(error).__name__ == "InvalidArgument" else ConversionError
        raise kind(
            f"ONNX Runtime failed on {what}: {error}",
            "Compare the images with the inputs that `van-deploy inspect` shows.",
        ) from error


def onnxruntime_logits(model: ModelProto, images: Images) -> Logits:
    """Return the logits ``(N, K)`` of a graph in memory for ``images (N, C, S, S)``."""
    with OnnxRuntimeRunner(model) as runner:
        return runner.run(images)


def require_provider(provider: str) -> Any:
    """Return the ``onnxruntime`` module if it was built with the provider.

    Raises:
        MissingDependency: it was not, or is not installed.
    """
    ort = require_onnxruntime()
    available = ort.get_available_providers()
    if provider not in available:
        pip = pip_command()
        raise MissingDependency(
            f"This ONNX Runtime ({ort.__version__}) has no {provider}; it has "
            f"{', '.join(available)}.",
            f"Install the one for GPUs: `{pip} uninstall --yes onnxruntime && "
            f"{pip} install 'onnxruntime-gpu[cuda,cudnn]'`.",
        )
    return ort


def provider_starts(ort: Any, provider: str) -> bool:
    """Return whether a session of one operator runs on the provider.

    A listed provider whose libraries do not load is left out of a session with a warning only.
    """
    from onnx import TensorProto, helper

    if provider == CUDA:
        _preload(ort)
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if provider not in session.get_providers():
        return False
    session.run(None, {"x": np.zeros(1, np.float32)})
    return True


def _does_not_start(ort: Any) -> MissingDependency:
    return MissingDependency(
        f"ONNX Runtime {ort.__version__} has {CUDA} but could not start it, and would have run on "
        "the CPU without a word.",
        f"It needs CUDA {getattr(ort, 'cuda_version', '') or 'and cuDNN'} and cuDNN 9: "
        f"`{pip_command()} install 'onnxruntime-gpu[cuda,cudnn]'`; see `van-deploy doctor`.",
    )
