"""ONNX Runtime on the CPU and, through its CUDA provider, on GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from van_deploy.environment.packages import pip_command
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.graph.bfloat16 import emulated_bf16, holds_bf16
from van_deploy.runners.base import CudaOptions, Images, Logits, gpu_index
from van_deploy.runners.cuda import DeviceBatch, out_of_memory, require_cuda
from van_deploy.runners.onnxruntime_cuda import (
    CUDA,
    OUT_OF_MEMORY,
    GpuBatches,
    cuda_does_not_start,
    failures,
    preload,
    provider_options,
    provider_starts,
    refuse_nhwc,
    silent,
)

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "CPU",
    "CUDA",
    "PROVIDERS",
    "OnnxRuntimeRunner",
    "inference_session",
    "onnxruntime_logits",
    "onnxruntime_outputs",
    "require_onnxruntime",
    "require_provider",
]

CPU = "CPUExecutionProvider"
PROVIDERS: Mapping[str, str] = {"ort-cpu": CPU, "ort-cuda": CUDA}
"""The execution provider of each runner. It runs the whole graph, or the graph is refused."""


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
        profile: folder for ONNX Runtime's own profile, written when the runner is closed.

    Attributes:
        emulated: whether BF16 is emulated; known once it is open.
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
        profile: Path | None = None,
    ) -> None:
        self.profile = profile
        self.model = model
        self.threads = threads
        self.provider = PROVIDERS[name]
        self.optimize = optimize
        self.spin = spin
        self.arena = arena
        self.name = name
        self.device = device
        self.options = cuda or CudaOptions()
        self.emulated = False
        self._session: Any = None
        self._gpu: GpuBatches | None = None
        self._stack = ExitStack()

    def __enter__(self) -> OnnxRuntimeRunner:
        """Load the graph.

        Raises:
            MissingDependency: ONNX Runtime is not installed, lacks the provider asked for, or
                cannot start it; there is no GPU.
            ConversionError: it refuses the graph, or would run part of it on the CPU.
            UsageError: NHWC is asked for a quantised graph.
        """
        ort = require_provider(self.provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = self.arena
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile / "ort")
        if not self.spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not self.optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with ExitStack() as stack:
            provider: Any = self.provider
            if self.provider == CUDA:
                if self.options.prefer_nhwc:
                    refuse_nhwc(self.model)
                cuda = require_cuda(gpu_index(self.device) or 0)
                preload(ort)
                options.log_severity_level = 4  # its errors come as exceptions, too
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
                stream = cuda.stream(stack)
                provider = (CUDA, provider_options(self.options, cuda.device, stream))
            self._session, self.emulated = self._opened(ort, options, provider)
            stack.callback(self._forget)  # before the stream goes
            if self.provider == CUDA:
                self._gpu = GpuBatches(ort, self._session, cuda, stream, self.options, stack)
            self._stack = stack.pop_all()
        return self

    def _opened(self, ort: Any, options: Any, provider: Any) -> tuple[Any, bool]:
        try:
            with silent(ort) if self.provider == CUDA else nullcontext():
                return inference_session(self.model, options, [provider])
        except Exception as error:
            what = f"'{self.model}'" if isinstance(self.model, Path) else "the graph"
            if self.provider == CUDA and not provider_starts(ort, CUDA):
                raise cuda_does_not_start(ort) from error
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

    def __exit__(self, *_: object) -> None:
        """Release the session."""
        stack, self._stack = self._stack, ExitStack()
        stack.close()

    def _forget(self) -> None:
        if self.profile is not None:
            self._session.end_profiling()
        self._session = None
        self._gpu = None

    @property
    def tf32(self) -> bool:
        """Whether FP32 operators may compute in TF32: CUDA's ``use_tf32``, on by default."""
        return self.provider == CUDA and self.options.use_tf32

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, H, W)``, or the first feature map.

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
        with failures(f"a batch of {len(batch)}"):
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


def onnxruntime_logits(model: ModelProto, images: Images) -> Logits:
    """Return the logits ``(N, K)`` of a graph in memory for ``images (N, C, H, W)``."""
    return next(iter(onnxruntime_outputs(model, images).values()))


def onnxruntime_outputs(model: ModelProto, images: Images) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs by name of a graph in memory for ``images (N, C, H, W)``."""
    with OnnxRuntimeRunner(model) as runner:
        return runner.run_all(images)


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
