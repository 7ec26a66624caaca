"""ONNX graphs in ONNX Runtime (on the CPU, or on a GPU with its CUDA provider) and in OpenVINO."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, parser

from van_deploy import errors
from van_deploy.environment.packages import import_without_telemetry, pip_command
from van_deploy.errors import ConversionError, InputError, MissingDependency, UsageError
from van_deploy.graph.bfloat16 import emulate_bf16, has_bf16
from van_deploy.runners.base import CudaOptions, Images, Outputs, Runner, check_input, gpu_index
from van_deploy.runners.cuda import DeviceBatch, out_of_memory, require_cuda

CUDA = "CUDAExecutionProvider"
# The execution provider of each runner. It runs the whole graph, or the graph is refused.
PROVIDERS: Mapping[str, str] = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": CUDA}
DTYPES: Mapping[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
# Libraries that the CUDA provider links, each after those it depends on.
LIBRARIES = ("cudart", "nvrtc", "cublasLt", "cublas", "curand", "cufft", "cudnn")


def require_onnxruntime(provider: str = "") -> Any:
    """Return the ``onnxruntime`` module.

    Args:
        provider: an execution provider that it must include.

    Raises:
        MissingDependency: it is not installed, or does not include the provider.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependency(
            f"ONNX Runtime is not installed; every exported file is checked with it: {error}.",
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

    BF16 is emulated where the provider has no BF16 operators (see
    :mod:`van_deploy.graph.bfloat16`). ONNX Runtime's own optimisations are then disabled, so
    that the emulation runs as written.

    Args:
        model: a file, or a graph in memory (below 2 GB).
        options: session options.
        providers: execution providers in order of preference, with or without options.

    Raises:
        Exception: ONNX Runtime's own exception where it rejects the graph.
    """
    ort = require_onnxruntime()
    # By default ONNX Runtime continues on the CPU where another provider fails.
    arguments: dict[str, Any] = {"providers": list(providers), "enable_fallback": 0}
    try:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(source, options, **arguments), False
    except Exception:
        graph = onnx.load(model) if isinstance(model, Path) else model
        if not has_bf16(graph):
            raise
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = emulate_bf16(graph).SerializeToString()
    return ort.InferenceSession(source, options, **arguments), True


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX graph in ONNX Runtime.

    Args:
        model: a file, or a graph in memory (below 2 GB).
        threads: intra-op threads; None lets ONNX Runtime choose.
        spin: let idle threads spin for the next operator. That is fastest for a single
            process; a server has other work for the processor.
        arena: keep freed memory for the next run. Without it the peak of a single large batch
            is lower.
        name: a key of :data:`PROVIDERS`. A graph that the GPU's provider would leave to the CPU,
            whole or in part, is refused.
        device: GPU for ``ort-cuda``.
        cuda: options of the CUDA provider.

    Attributes:
        profile_folder: folder for ONNX Runtime's own profile, written when the runner closes.
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
            MissingDependency: ONNX Runtime is not installed, does not include the requested
                provider or cannot start it; there is no GPU.
            ConversionError: ONNX Runtime rejects the graph, or would run part of it on the CPU.
            UsageError: the CUDA provider fails, or computes wrong results, with these options.
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
            check_cuda_options(self.model, self.options)
            self._cuda = require_cuda(gpu_index(self.device) or 0)
            self._stream = self._cuda.create_stream(stack)
            preload_cuda_libraries()
            options.log_severity_level = 4  # errors are also raised as exceptions
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            cuda = asdict(self.options) | {"cudnn_conv_use_max_workspace": True}
            cuda |= {"device_id": self._cuda.device, "user_compute_stream": self._stream}
            cuda["enable_cuda_graph"] = cuda.pop("cuda_graph")
            texts = {k: str(int(v) if isinstance(v, bool) else v) for k, v in cuda.items()}
            providers = [(CUDA, texts)]
        try:
            with suppress_logging(ort) if self.on_gpu else contextlib.nullcontext():
                self._session, self.emulates_bf16 = create_session(self.model, options, providers)
        except Exception as error:
            if self.on_gpu and not (errors.is_out_of_memory(error) or is_cuda_usable(ort)):
                raise MissingDependency(
                    f"ONNX Runtime {ort.__version__} has {CUDA} but could not start it.",
                    f"It needs CUDA {getattr(ort, 'cuda_version', '')} and cuDNN 9: "
                    f"`{pip_command()} install 'onnxruntime-gpu[cuda,cudnn]'`.",
                ) from error
            name = f"'{self.model}'" if isinstance(self.model, Path) else "the graph"
            raise _project_error(f"cannot load {name}", error) from error
        # Before the stream is destroyed: the session, and the batches that refer to it.
        stack.callback(self.__dict__.update, _session=None, _batches={})
        if self.profile_folder is not None:
            stack.callback(self._session.end_profiling)
        self._graph_count, self._batches = 0, dict[int, DeviceBatch]()
        self._batch_stack = stack.enter_context(ExitStack())  # closed first

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, for a batch in the graph's own input type.

        With CUDA graphs, the buffers and the graph of each batch size are kept.
        """
        rows = len(batch)
        if self.on_gpu and self.options.cuda_graph:
            check_input(batch, *_row_spec(self._session.get_inputs()[0]))
            if rows not in self._batches:
                self._batches[rows] = self._allocate(rows)
                self._batch_stack.callback(self._batches[rows].close)
            return self._batches[rows].infer(batch)
        with convert_errors(f"a batch of {rows}"):
            name = self._session.get_inputs()[0].name
            names = [output.name for output in self._session.get_outputs()]
            return dict(zip(names, self._session.run(names, {name: batch}), strict=True))

    def resident_batch(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return a batch in GPU memory; see :meth:`Runner.resident_batch`."""
        if not self.on_gpu:
            super().resident_batch(images)
        check_input(images, *_row_spec(self._session.get_inputs()[0]))
        batch = self._allocate(len(images))
        batch.fill(images)
        return batch

    def _allocate(self, rows: int) -> DeviceBatch:
        """Return buffers for a batch of ``rows`` images, bound to the session."""
        session = self._session
        binding, options = session.io_binding(), self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.options.cuda_graph:  # one graph for each batch: it is captured with its addresses
            self._graph_count += 1
            options.add_run_config_entry("gpu_graph_id", str(self._graph_count))

        def enqueue(_: DeviceBatch) -> None:
            with convert_errors(f"a batch of {rows}"):
                session.run_with_iobinding(binding, options)

        inputs = {tensor.name: _row_spec(tensor) for tensor in session.get_inputs()}
        outputs = {tensor.name: _row_spec(tensor) for tensor in session.get_outputs()}
        batch = DeviceBatch(self._cuda, self._stream, inputs, outputs, rows, enqueue)
        for bind, specs in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, (shape, dtype) in specs.items():
                kind, address = np.dtype(dtype).type, batch.addresses[name]
                bind(name, "cuda", self._cuda.device, kind, (rows, *shape), address)
        return batch


def _row_spec(tensor: Any) -> tuple[tuple[int, ...], npt.DTypeLike]:
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
def convert_errors(operation: str) -> Iterator[None]:
    """Convert ONNX Runtime's exceptions into this project's.

    They derive directly from Exception, and some GPU failures are raised as RuntimeError.
    """
    try:
        yield
    except Exception as error:
        if not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
            raise
        kind = InputError if type(error).__name__ == "InvalidArgument" else ConversionError
        raise _project_error(f"failed on {operation}", error, kind) from error


def _project_error(
    failure: str, error: Exception, kind: type[errors.VanDeployError] = ConversionError
) -> errors.VanDeployError:
    """Return this project's error for a failure of ONNX Runtime."""
    if errors.is_out_of_memory(error) or "CUDNN_STATUS_ALLOC_FAILED" in str(error):
        return out_of_memory(f"ONNX Runtime {failure}")
    if "fallback to CPU EP has been explicitly disabled" in str(error):
        return ConversionError(
            f"ONNX Runtime {failure}: it would run part of it on the CPU: {CUDA} lacks operators.",
            "Quantise it with --target tensorrt, or run it with --runner ort-cpu.",
        )
    remedy = "Compare file and images with `van-deploy inspect`, or export at a lower --opset."
    return kind(f"ONNX Runtime {failure}: {error}", remedy)


def is_cuda_usable(ort: Any, *, quiet: bool = True) -> bool:
    """Return whether a session with one operator runs on the CUDA provider.

    ONNX Runtime silently omits a provider whose libraries do not load from the session, with a
    warning only; ``quiet`` suppresses it.
    """
    preload_cuda_libraries()
    graph = "one (float[1] x) => (float[1] y) { y = Relu(x) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    options = ort.SessionOptions()
    options.log_severity_level = 4 if quiet else 2
    with suppress_logging(ort) if quiet else contextlib.nullcontext():
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[CUDA])
    if CUDA not in session.get_providers():
        return False
    session.run(None, {"x": np.zeros(1, np.float32)})
    return True


def check_cuda_options(model: Path | ModelProto, options: CudaOptions) -> None:
    """Check that the CUDA provider runs a graph correctly with these options.

    Both faults were seen on an H200 with ONNX Runtime 1.31. A quantised graph in NHWC memory loads,
    and its first run fails: "Input channels C is not equal to kernel channels". With a CUDA graph
    an FP16 graph in NHWC memory gave wrong logits (0.02 dB), then "illegal memory access"; either
    option alone is correct.

    Raises:
        UsageError: the provider would fail or compute wrong results.
    """
    if not options.prefer_nhwc:
        return
    graph = onnx.load(model, load_external_data=False) if isinstance(model, Path) else model
    quantised = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    if options.cuda_graph or quantised:
        problem = "a CUDA graph computes wrong results" if options.cuda_graph else "INT8 fails"
        raise UsageError(
            f"With prefer_nhwc in ONNX Runtime's CUDA provider {problem}.",
            "Leave prefer_nhwc off.",
        )


def preload_cuda_libraries() -> None:
    """Load the libraries that the CUDA provider links, from NVIDIA's wheels or the system.

    ONNX Runtime's wheel has no RUNPATH, and ``onnxruntime.preload_dlls()`` searches only next to
    ONNX Runtime, so without PyTorch in the process the provider does not load.
    """
    with contextlib.suppress(ImportError):
        from cuda import pathfinder

        for name in LIBRARIES:
            with contextlib.suppress(RuntimeError, OSError):  # the session reports what is missing
                pathfinder.load_nvidia_dynamic_lib(name)


@contextlib.contextmanager
def suppress_logging(ort: Any) -> Iterator[None]:
    """Suppress ONNX Runtime's log output about providers, which also arrives as an exception."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


class OpenVinoRunner(Runner):
    """Runs an ONNX graph in OpenVINO on the CPU.

    OpenVINO computes in bfloat16 by default on processors that support it, independent of the
    file's types. Here ``precision`` sets the arithmetic.

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
            ConversionError: OpenVINO rejects the graph.
        """
        with errors.require_extra("OpenVINO", "openvino"):
            ov: Any = import_without_telemetry("openvino")
        try:
            compiled = ov.Core().compile_model(str(self.model), "CPU", self.settings)
        except RuntimeError as error:
            raise ConversionError(
                f"OpenVINO {ov.__version__} cannot compile the graph: {str(error).strip()[-300:]}",
                "Check the file with `van-deploy inspect`, or use ONNX Runtime.",
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
