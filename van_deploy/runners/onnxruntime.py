"""ONNX Runtime on the CPU and, through its providers, on GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from van_deploy.environment.packages import pip_command
from van_deploy.errors import ConversionError, MissingDependency
from van_deploy.graph.bfloat16 import emulated_bf16, holds_bf16
from van_deploy.runners.base import Images, Logits

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "PROVIDERS",
    "OnnxRuntimeRunner",
    "inference_session",
    "onnxruntime_logits",
    "onnxruntime_outputs",
    "require_onnxruntime",
    "require_provider",
]

PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "ort-cpu": ("CPUExecutionProvider",),
    "ort-cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "ort-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""Execution providers of each runner, in the order in which they are offered the graph."""


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
    model: Path | ModelProto, options: Any, providers: Sequence[str]
) -> tuple[Any, bool]:
    """Return an ONNX Runtime session, and whether BF16 is emulated in it.

    It is where the provider has no BF16 operators (see :mod:`van_deploy.graph.bfloat16`). Then
    nothing else is rewritten: what stands in the emulation is what runs.

    Args:
        model: a file, or a graph in memory (below 2 GB).
        options: of the session.
        providers: of ONNX Runtime, in the order in which they are offered the graph.

    Raises:
        Exception: ONNX Runtime's own, where it refuses the graph.
    """
    import onnx

    ort = require_onnxruntime()
    try:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(source, options, providers=list(providers)), False
    except Exception:
        graph = onnx.load(model) if isinstance(model, Path) else model
        if not holds_bf16(graph):
            raise
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = emulated_bf16(graph).SerializeToString()
    return ort.InferenceSession(source, options, providers=list(providers)), True


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
        name: one of :data:`PROVIDERS`: which processor runs it. A GPU's runner that falls
            back to the CPU is an error, not a slow run.

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
    ) -> None:
        self.model = model
        self.threads = threads
        self.providers = PROVIDERS[name]
        self.optimize = optimize
        self.spin = spin
        self.arena = arena
        self.name = name
        self.emulated = False
        self._session: Any = None

    def __enter__(self) -> OnnxRuntimeRunner:
        """Load the graph.

        Raises:
            MissingDependency: ONNX Runtime is not installed, lacks the provider
                asked for, or would have fallen back to another one.
            ConversionError: it refuses the graph.
        """
        ort = require_provider(self.providers[0])
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = self.arena
        if not self.spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not self.optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session, self.emulated = inference_session(self.model, options, self.providers)
        except Exception as error:
            what = f"'{self.model}'" if isinstance(self.model, Path) else "the graph"
            raise ConversionError(
                f"ONNX Runtime {ort.__version__} cannot load {what}: {error}",
                "Look at the file with `van-deploy inspect`, or export at a lower --opset.",
            ) from error
        used = tuple(self._session.get_providers())
        if self.providers[0] not in used:
            self._session = None
            raise _fell_back(self.providers[0], used)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the session."""
        self._session = None

    @property
    def tf32(self) -> bool:
        """Whether FP32 operators may compute in TF32: CUDA's ``use_tf32``, on by default."""
        options = self._session.get_provider_options()
        cuda = options.get("CUDAExecutionProvider")
        return cuda is not None and cuda.get("use_tf32", "1") != "0"

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, H, W)``, or the first feature map."""
        logits: Logits = next(iter(self.run_all(images).values()))
        return logits

    def run_all(self, batch: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output by name, for a batch in the graph's own input type."""
        name = self._session.get_inputs()[0].name
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, {name: batch}), strict=True))


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
            f"{pip} install onnxruntime-gpu`.",
        )
    return ort


def _fell_back(provider: str, used: tuple[str, ...]) -> MissingDependency:
    """Return the error for a session that ONNX Runtime quietly gave to another provider."""
    needs = "TensorRT's libraries, " if provider == PROVIDERS["ort-tensorrt"][0] else ""
    return MissingDependency(
        f"ONNX Runtime has {provider} but could not start it, and would have run on "
        f"{used[0]} without a word.",
        f"It needs {needs}CUDA and cuDNN of the versions it was built for, and an NVIDIA GPU: "
        "run `van-deploy doctor`.",
    )
