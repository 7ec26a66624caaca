"""ONNX files: in ONNX Runtime on the CPU and, through its CUDA provider, on GPUs; in OpenVINO."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, parser

from van_deploy.environment.packages import import_without_telemetry, pip_command
from van_deploy.errors import (
    ConversionError,
    InputError,
    MissingDependency,
    UsageError,
    VanDeployError,
    require_extra,
)
from van_deploy.graph.bfloat16 import emulate_bf16, has_bf16
from van_deploy.runners.base import CudaOptions, Images, Outputs, Runner, gpu_index
from van_deploy.runners.cuda import DeviceBatch, out_of_memory, require_cuda

CUDA = "CUDAExecutionProvider"
PROVIDERS: Mapping[str, str] = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": CUDA}
"""The execution provider of each runner. It runs the whole graph, or the graph is refused."""

DTYPES: Mapping[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")
"""What the CUDA provider links, each after those it needs itself."""

OUT_OF_MEMORY = "out of memory|Failed to allocate memory|CUDNN_STATUS_ALLOC_FAILED"


def require_onnxruntime(provider: str = "") -> Any:
    """Return the ``onnxruntime`` module.

    Args:
        provider: that it has to be built with.

    Raises:
        MissingDependency: it is not installed, or has no such provider.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependency(
            f"ONNX Runtime is not installed, and nothing leaves this program unchecked: {error}.",
            "Install it with `pip install 'van-deploy[cpu]'`, or [gpu] with an NVIDIA GPU.",
        ) from error
    available, pip = ort.get_available_providers(), pip_command()
    if provider and provider not in available:
        raise MissingDependency(
            f"ONNX Runtime {ort.__version__} here has no {provider}, only {', '.join(available)}.",
            f"Install the one for GPUs: `{pip} uninstall --yes onnxruntime && "
            f"{pip} install 'onnxruntime-gpu[cuda,cudnn]'`.",
        )
    return ort


def create_session(
    model: Path | ModelProto, options: Any, providers: Sequence[Any]
) -> tuple[Any, bool]:
    """Return an ONNX Runtime session, and whether BF16 is emulated in it.

    It is where the provider has no BF16 operators (see :mod:`van_deploy.graph.bfloat16`). Then
    nothing else is rewritten: what stands in the emulation is what runs.

    Args:
        model: a file, or a graph in memory (below 2 GB).
        options: of the session.
        providers: of ONNX Runtime, with or without options, in the order in which they are offered
            the graph.

    Raises:
        Exception: ONNX Runtime's own, where it refuses the graph.
    """
    ort = require_onnxruntime()
    # Left to itself ONNX Runtime goes on with the CPU where another provider fails.
    how: dict[str, Any] = {"providers": list(providers), "enable_fallback": 0}
    try:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(source, options, **how), False
    except Exception:
        graph = onnx.load(model) if isinstance(model, Path) else model
        if not has_bf16(graph):
            raise
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = emulate_bf16(graph).SerializeToString()
    return ort.InferenceSession(source, options, **how), True


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX graph.

    Args:
        model: a file, or a graph in memory (below 2 GB).
        threads: threads inside one operator; None lets ONNX Runtime choose.
        spin: let idle threads spin for the next operator. That is fastest alone; a
            server has other work for the processor.
        arena: keep freed memory for the next run. Without it a single large batch
            needs less at its peak.
        name: one of :data:`PROVIDERS`: which processor runs it. A graph that a GPU's provider
            would leave to the CPU, whole or in part, is refused.
        device: which GPU, for ``ort-cuda``.
        cuda: how the CUDA provider runs it.

    Attributes:
        profile_folder: folder for ONNX Runtime's own profile, written when the runner is closed.
    """

    profile_folder: Path | None = None

    def __init__(
        self,
        model: Path | ModelProto,
        *,
        threads: int | None = None,
        spin: bool = True,
        arena: bool = True,
        name: str = "ort-cpu",
        device: str = "cuda:0",
        cuda: CudaOptions | None = None,
    ) -> None:
        self.model, self.threads, self.spin, self.arena = model, threads, spin, arena
        self.provider, self.device, self.options = PROVIDERS[name], device, cuda or CudaOptions()
        self.on_gpu = self.provider == CUDA
        self.tf32 = self.on_gpu and self.options.use_tf32

    def _load(self, stack: ExitStack) -> None:
        """Load the graph.

        Raises:
            MissingDependency: ONNX Runtime is not installed, lacks the provider asked for, or
                cannot start it; there is no GPU.
            ConversionError: it refuses the graph, or would run part of it on the CPU.
            UsageError: its CUDA provider fails, or answers wrongly, with these options.
        """
        self._ort = ort = require_onnxruntime(self.provider)
        options, providers = ort.SessionOptions(), list[Any]([self.provider])
        options.log_severity_level = 3  # errors only
        options.enable_cpu_mem_arena = self.arena
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.profile_folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile_folder / "ort")
        if not self.spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.on_gpu:
            refuse_options(self.model, self.options)
            self._cuda = require_cuda(gpu_index(self.device) or 0)
            self._stream = self._cuda.stream(stack)
            preload(ort)
            options.log_severity_level = 4  # its errors come as exceptions, too
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            asked = asdict(self.options)
            asked["enable_cuda_graph"] = asked.pop("cuda_graph")
            asked |= {"device_id": self._cuda.device, "user_compute_stream": self._stream}
            asked["cudnn_conv_use_max_workspace"] = True
            texts = {k: str(int(v) if isinstance(v, bool) else v) for k, v in asked.items()}
            providers = [(CUDA, texts)]
        try:
            with silent(ort) if self.on_gpu else contextlib.nullcontext():
                self._session, self.emulated = create_session(self.model, options, providers)
        except Exception as error:
            if self.on_gpu and not is_provider_usable(ort, CUDA):
                raise MissingDependency(
                    f"ONNX Runtime {ort.__version__} has {CUDA} but could not start it.",
                    f"It needs CUDA {getattr(ort, 'cuda_version', '')} and cuDNN 9: "
                    f"`{pip_command()} install 'onnxruntime-gpu[cuda,cudnn]'`.",
                ) from error
            what = f"'{self.model}'" if isinstance(self.model, Path) else "the graph"
            raise _failed(f"cannot load {what}", error) from error
        stack.callback(self._forget)  # before the stream goes
        self._graphs, self._kept = 0, dict[int, DeviceBatch]()
        self._late = stack.enter_context(ExitStack())  # what is kept is closed first

    def _forget(self) -> None:
        if self.profile_folder is not None:
            self._session.end_profiling()
        del self._session

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, for a batch in the graph's own input type.

        With CUDA graphs through buffers and a graph that are kept for each batch size.
        """
        rows = len(batch)
        if self.on_gpu and self.options.cuda_graph:
            if rows not in self._kept:
                self._kept[rows] = self._room(rows)
                self._late.callback(self._kept[rows].close)
            return self._kept[rows].answers(batch)
        with failures(f"a batch of {rows}"):
            name = self._session.get_inputs()[0].name
            names = [output.name for output in self._session.get_outputs()]
            return dict(zip(names, self._session.run(names, {name: batch}), strict=True))

    def resident_batch(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return a batch that stays on the GPU; see :meth:`Runner.resident_batch`."""
        if not self.on_gpu:
            super().resident_batch(images)
        batch = self._room(len(images))
        batch.fill(images)
        return batch

    def _room(self, rows: int) -> DeviceBatch:
        """Return buffers for a batch of that many images, bound to the session."""
        session = self._session
        binding, options = session.io_binding(), self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.options.cuda_graph:  # one graph each: it is recorded with these addresses
            self._graphs += 1
            options.add_run_config_entry("gpu_graph_id", str(self._graphs))

        def enqueue(_: DeviceBatch) -> None:
            with failures(f"a batch of {rows}"):
                session.run_with_iobinding(binding, options)

        given = {tensor.name: _spec(tensor) for tensor in session.get_inputs()}
        answers = {tensor.name: _spec(tensor) for tensor in session.get_outputs()}
        batch = DeviceBatch(self._cuda, self._stream, given, answers, rows, enqueue)
        for bind, specs in ((binding.bind_input, given), (binding.bind_output, answers)):
            for name, (shape, dtype) in specs.items():
                kind, address = np.dtype(dtype).type, batch.addresses[name]
                bind(name, "cuda", self._cuda.device, kind, (rows, *shape), address)
        return batch


def _spec(tensor: Any) -> tuple[tuple[int, ...], npt.DTypeLike]:
    """Return the shape of one row of an input or output, and its type."""
    row = tuple(tensor.shape[1:])
    if tensor.type not in DTYPES or not all(isinstance(size, int) for size in row):
        raise InputError(
            f"'{tensor.name}' is {tensor.type} {tensor.shape}: only the batch may be dynamic.",
            "Export it with a fixed image size.",
        )
    return row, DTYPES[tensor.type]


def onnxruntime_outputs(model: ModelProto, images: Images) -> Outputs:
    """Return the outputs by name of a graph in memory for ``images (N, C, H, W)``."""
    with OnnxRuntimeRunner(model) as runner:
        return runner.run_all(images)


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into the project's.

    They derive from Exception alone, and some failures of a GPU come as RuntimeError.
    """
    try:
        yield
    except Exception as error:
        if not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
            raise
        kind = InputError if type(error).__name__ == "InvalidArgument" else ConversionError
        raise _failed(f"failed on {what}", error, kind) from error


def _failed(
    what: str, error: Exception, kind: type[VanDeployError] = ConversionError
) -> VanDeployError:
    """Return the project's error for one of ONNX Runtime's; ``what`` it did is said behind it."""
    if re.search(OUT_OF_MEMORY, str(error)):
        return out_of_memory(f"ONNX Runtime {what}")
    if "fallback to CPU EP has been explicitly disabled" in str(error):
        return ConversionError(
            f"ONNX Runtime {what}: it would run part of it on the CPU: {CUDA} lacks operators.",
            "Quantise it with --target gpu, or run it with --runner ort-cpu.",
        )
    remedy = "Compare file and images with `van-deploy inspect`, or export at a lower --opset."
    return kind(f"ONNX Runtime {what}: {error}", remedy)


def is_provider_usable(ort: Any, provider: str, *, quiet: bool = True) -> bool:
    """Return whether a session of one operator runs on the provider.

    A listed provider whose libraries do not load is left out of a session with a warning only,
    which ``quiet`` keeps from the user.
    """
    if provider == CUDA:
        preload(ort)
    graph = "one (float[1] x) => (float[1] y) { y = Relu(x) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
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
    if not options.prefer_nhwc:
        return
    graph = onnx.load(model, load_external_data=False) if isinstance(model, Path) else model
    quantised = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    if options.cuda_graph or quantised:
        why = "answers wrongly from a CUDA graph" if options.cuda_graph else "runs no INT8 graph"
        raise UsageError(
            f"With prefer_nhwc ONNX Runtime's CUDA provider {why}.", "Leave prefer_nhwc off."
        )


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


@contextlib.contextmanager
def silent(ort: Any) -> Iterator[None]:
    """Keep what ONNX Runtime logs about providers from the user: it comes as an error."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


class OpenVinoRunner(Runner):
    """Runs an ONNX graph on the CPU.

    OpenVINO computes in bfloat16 by default on processors that have it, whatever
    the file says. Here the arithmetic is what ``precision`` says.

    Args:
        model: an ONNX file.
        threads: threads for one inference; None lets OpenVINO choose.
        precision: ``f32`` or ``bf16``; quantised parts run as INT8 with either.
    """

    def __init__(self, model: Path, *, threads: int | None = None, precision: str = "f32") -> None:
        self.model = model
        self.settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
        }
        if threads is not None:
            self.settings["INFERENCE_NUM_THREADS"] = threads

    def _load(self, stack: ExitStack) -> None:
        """Compile the graph.

        Raises:
            MissingDependency: OpenVINO is not installed.
            ConversionError: it refuses the graph.
        """
        with require_extra("OpenVINO", "openvino"):
            ov: Any = import_without_telemetry("openvino")
        try:
            compiled = ov.Core().compile_model(str(self.model), "CPU", self.settings)
        except RuntimeError as error:
            raise ConversionError(
                f"OpenVINO {ov.__version__} cannot compile the graph: {str(error).strip()[-300:]}",
                "Look at the file with `van-deploy inspect`, or use ONNX Runtime.",
            ) from error
        self._request = compiled.create_infer_request()
        stack.callback(self.__dict__.pop, "_request")

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, for a batch in the graph's own input type."""
        results = self._request.infer({0: batch}, share_inputs=True)
        return {
            port.get_any_name() if port.get_names() else f"output.{index}": value.copy()
            for index, (port, value) in enumerate(results.to_dict().items())
        }
