"""ONNX Runtime on the CPU and, through its CUDA provider, on GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.environment.packages import pip_command
from van_deploy.errors import InputError, MissingDependency
from van_deploy.graph.bfloat16 import emulated_bf16, holds_bf16
from van_deploy.runners.base import CudaOptions, Images, Logits, Outputs, Runner, gpu_index
from van_deploy.runners.cuda import DeviceBatch, require_cuda
from van_deploy.runners.onnxruntime_cuda import CUDA as CUDA
from van_deploy.runners.onnxruntime_cuda import (
    cuda_does_not_start,
    failed,
    failures,
    preload,
    provider_options,
    provider_starts,
    refuse_options,
    silent,
)

if TYPE_CHECKING:
    from onnx import ModelProto

PROVIDERS: Mapping[str, str] = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": CUDA}
"""The execution provider of each runner. It runs the whole graph, or the graph is refused."""

DTYPES: Mapping[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


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


def inference_session(
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
    import onnx

    ort = require_onnxruntime()
    # Left to itself ONNX Runtime goes on with the CPU where another provider fails.
    how: dict[str, Any] = {"providers": list(providers), "enable_fallback": 0}
    try:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(source, options, **how), False
    except Exception:
        graph = onnx.load(model) if isinstance(model, Path) else model
        if not holds_bf16(graph):
            raise
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = emulated_bf16(graph).SerializeToString()
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
        profile: folder for ONNX Runtime's own profile, written when the runner is closed.
    """

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
        self.profile: Path | None = None

    def _load(self, stack: ExitStack) -> None:
        """Load the graph.

        Raises:
            MissingDependency: ONNX Runtime is not installed, lacks the provider asked for, or
                cannot start it; there is no GPU.
            ConversionError: it refuses the graph, or would run part of it on the CPU.
            UsageError: its CUDA provider fails, or answers wrongly, with these options.
        """
        self._ort = ort = _with_provider(self.provider)
        options, providers = ort.SessionOptions(), list[Any]([self.provider])
        options.log_severity_level = 3  # errors only
        options.enable_cpu_mem_arena = self.arena
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile / "ort")
        if not self.spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.on_gpu:
            refuse_options(self.model, self.options)
            self._cuda = require_cuda(gpu_index(self.device) or 0)
            self._stream = self._cuda.stream(stack)
            preload(ort)
            options.log_severity_level = 4  # its errors come as exceptions, too
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            how = provider_options(self.options, self._cuda.device, self._stream)
            providers = [(CUDA, how)]
        try:
            with silent(ort) if self.on_gpu else nullcontext():
                self._session, self.emulated = inference_session(self.model, options, providers)
        except Exception as error:
            if self.on_gpu and not provider_starts(ort, CUDA):
                raise cuda_does_not_start(ort) from error
            what = f"'{self.model}'" if isinstance(self.model, Path) else "the graph"
            raise failed(f"cannot load {what}", error) from error
        stack.callback(self._forget)  # before the stream goes
        self._graphs, self._kept = 0, dict[int, DeviceBatch]()
        self._late = stack.enter_context(ExitStack())  # what is kept is closed first

    def _forget(self) -> None:
        if self.profile is not None:
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

    def resident(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return a batch that stays on the GPU; see :meth:`Runner.resident`."""
        if not self.on_gpu:
            super().resident(images)
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
                bind(
                    name=name,
                    device_type="cuda",
                    device_id=self._cuda.device,
                    element_type=np.dtype(dtype).type,
                    shape=(rows, *shape),
                    buffer_ptr=batch.addresses[name],
                )
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


def onnxruntime_logits(model: ModelProto, images: Images) -> Logits:
    """Return the logits ``(N, K)`` of a graph in memory for ``images (N, C, H, W)``."""
    return next(iter(onnxruntime_outputs(model, images).values()))


def onnxruntime_outputs(model: ModelProto, images: Images) -> Outputs:
    """Return the outputs by name of a graph in memory for ``images (N, C, H, W)``."""
    with OnnxRuntimeRunner(model) as runner:
        return runner.run_all(images)


def _with_provider(provider: str) -> Any:
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
