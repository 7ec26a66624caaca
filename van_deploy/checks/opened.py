"""Every artefact of a bundle behind one face, pixels to logits, or the reason why not.

A plain graph takes normalised floats, an embedded one bytes, an engine a GPU.
What this machine cannot run is a :class:`NotRun` with the reason, never a pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import MissingDependency, UsageError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.model.pixels import Pixels, normalised
from van_deploy.model.preprocess import Preprocessing
from van_deploy.runners.base import Logits
from van_deploy.runners.network import Network, embedding_of, network_input
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner, require_onnxruntime

__all__ = [
    "RUNNERS",
    "NotRun",
    "Opened",
    "chosen_artefacts",
    "open_artefact",
    "plain_onnx",
]

CPU, CUDA, TENSORRT_PROVIDER = "onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt"
RUNNERS = (CPU, CUDA, TENSORRT_PROVIDER)
"""What can run an ONNX artefact. An engine is always run by TensorRT."""

_PROVIDERS = {CUDA: "CUDAExecutionProvider", TENSORRT_PROVIDER: "TensorrtExecutionProvider"}


@dataclass(frozen=True)
class NotRun:
    """An artefact that this machine does not run.

    Attributes:
        artefact: its name.
        runner: what would have run it.
        reason: one phrase.
    """

    artefact: str
    runner: str
    reason: str


class Opened:
    """One artefact, ready to map pixels to logits. Open it with ``with``.

    Args:
        bundle: where it is; its digests are checked on opening.
        name: of the artefact.
        runner: what runs it.
        inner: the run time's own runner, which takes what the artefact takes.
    """

    def __init__(self, bundle: Bundle, name: str, runner: str, inner: Any) -> None:
        self.bundle, self.artefact, self.runner = bundle, name, runner
        self._embedding = embedding_of(bundle.artefact(name))
        self._preprocessing = Preprocessing.from_dict(bundle.manifest["preprocessing"])
        self._inner = inner
        self._running: Any = None

    def __enter__(self) -> Opened:
        """Load the artefact."""
        self._running = self._inner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release it."""
        self._inner.__exit__(kind, error, trace)
        self._running = None

    def run(self, pixels: Pixels) -> Logits:
        """Return the logits ``(N, K)`` float32 of ``pixels (N, S, S, C)`` uint8."""
        if isinstance(self._running, Network):
            outputs = self._running.run(self._running.prepare(pixels))
            return outputs[OUTPUT_NAME].astype(np.float32)
        if self._embedding == "none":
            batch: Any = normalised(pixels, self._preprocessing)
        else:
            batch = network_input(pixels, self._embedding, self._preprocessing)
        logits: Logits = np.asarray(self._running.run(batch), np.float32)
        return logits


def plain_onnx(bundle: Bundle) -> list[str]:
    """Return the ONNX artefacts that take normalised images and give logits."""
    return [
        name
        for name, artefact in bundle.artefacts.items()
        if artefact.kind == "onnx" and embedding_of(artefact) == "none"
    ]


def chosen_artefacts(bundle: Bundle, names: Sequence[str]) -> list[str]:
    """Return the artefacts called ``names``, or all of them.

    Raises:
        BundleError: one of the names is not in the bundle.
        UsageError: the bundle holds nothing.
    """
    for name in names:
        bundle.artefact(name)
    chosen = list(names) or list(bundle.artefacts)
    if not chosen:
        raise UsageError(
            f"The bundle '{bundle.path}' holds no artefact.", "Make one with `van-deploy export`."
        )
    return chosen


def open_artefact(
    bundle: Bundle,
    name: str,
    runner: str = CPU,
    *,
    threads: int | None = None,
    spin: bool = True,
) -> Opened | NotRun:
    """Return the artefact called ``name`` to be opened with ``with``, or why it does not run here.

    ``threads`` and ``spin`` are those of
    :class:`~van_deploy.runners.onnxruntime.OnnxRuntimeRunner`.

    Raises:
        BundleError: there is no such artefact, or its files are not the manifest's.
        UsageError: there is no such runner.
        MissingDependency: ONNX Runtime is not installed.
    """
    if runner not in RUNNERS:
        raise UsageError(f"There is no runner '{runner}'.", f"Known: {', '.join(RUNNERS)}.")
    artefact = bundle.artefact(name)
    path = bundle.verified(name)
    if artefact.kind == "engine":
        return _engine(bundle, name)
    if not artefact.file.endswith(".onnx"):
        return NotRun(name, runner, f"nothing here runs a '{artefact.kind}'")
    outputs = artefact.facts.get("outputs")
    if outputs is not None and OUTPUT_NAME not in outputs:
        return NotRun(name, runner, f"it gives {', '.join(outputs)} and no logits")
    if runner == CPU:
        return Opened(bundle, name, CPU, Network(bundle, name, threads=threads, spin=spin))
    provider = _PROVIDERS[runner]
    if provider not in require_onnxruntime().get_available_providers():
        return NotRun(name, runner, f"no {provider} in the ONNX Runtime that is installed")
    if not _has_gpu():
        return NotRun(name, runner, "not executed: no GPU")
    inner = OnnxRuntimeRunner(
        path, threads=threads, providers=(provider, "CPUExecutionProvider"), name=runner
    )
    return Opened(bundle, name, runner, inner)


def _engine(bundle: Bundle, name: str) -> Opened | NotRun:
    if not _has_gpu():
        return NotRun(name, "tensorrt", "engine not executed: no GPU")
    try:
        module = importlib.import_module("van_deploy.runners.tensorrt")
        inner = module.TensorRtRunner(bundle.verified(name))
    except (ImportError, MissingDependency) as error:
        return NotRun(name, "tensorrt", f"engine not executed: {str(error).splitlines()[0]}")
    return Opened(bundle, name, "tensorrt", inner)


def _has_gpu() -> bool:
    driver = nvidia_driver()
    return driver is not None and bool(driver.gpus)
