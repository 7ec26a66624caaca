"""An artefact of a bundle as something that answers pictures, whatever it takes and gives.

A plain graph takes normalised floats, an embedded one bytes; one gives logits,
another the first classes. :class:`Network` is one face for all of them: pixels
in, outputs by name, and the most probable classes from whatever outputs there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artefact, Bundle
from van_deploy.errors import MissingDependency, UsageError
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import INPUT_NAME, OUTPUT_NAME
from van_deploy.metrics import softmax
from van_deploy.model.pixels import Pixels, normalised
from van_deploy.model.preprocess import Preprocessing
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

__all__ = [
    "PYTORCH",
    "Network",
    "Outputs",
    "TensorSpec",
    "TopClasses",
    "embedding_of",
    "network_input",
    "runnable_artefacts",
]

PYTORCH = "pytorch"
"""The name under which the original network can be asked for, beside the artefacts."""

Outputs = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: of the tensor.
        dtype: NumPy's name of its type.
        shape: without the batch, which is always first and free.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TopClasses:
    """The most probable classes of a batch, most probable first.

    Attributes:
        classes: indices ``(N, k)`` int64.
        probabilities: ``(N, k)`` float32, 0 to 1.
    """

    classes: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]


def embedding_of(artefact: Artefact) -> str:
    """Return what preprocessing an artefact has inside: ``none``, ``normalize`` or ``uint8``."""
    return str(artefact.facts.get("embedded", "none"))


def runnable_artefacts(bundle: Bundle) -> list[str]:
    """Return the names of the artefacts that ONNX Runtime can run, in the bundle's order."""
    return [name for name, item in bundle.artefacts.items() if item.file.endswith(".onnx")]


class Network:
    """One artefact, or the original network, ready to answer. Open it with ``with``.

    Args:
        bundle: where it is; every digest is checked on opening.
        artefact: its name in the bundle, or :data:`PYTORCH`.
        threads: threads inside one operator; None lets the run time choose.
        spin: see :class:`~van_deploy.runners.onnxruntime.OnnxRuntimeRunner`.

    Attributes:
        input: what :meth:`run` takes.
        outputs: what :meth:`run` gives.
        max_batch: pictures a batch, at most.
        runner: what runs it, for reports.

    Raises:
        BundleError: there is no such artefact.
    """

    def __init__(
        self,
        bundle: Bundle,
        artefact: str = "fp32",
        *,
        threads: int | None = None,
        spin: bool = True,
    ) -> None:
        self.bundle = bundle
        self.name = artefact
        self.threads = threads
        self.preprocessing = Preprocessing.from_dict(bundle.manifest["preprocessing"])
        self.max_batch = int(bundle.manifest["batch"]["max"])
        self.runner = "pytorch" if artefact == PYTORCH else "onnxruntime-cpu"
        self._spin = spin
        self._opened: Any = None
        if artefact == PYTORCH:
            self.embedding = "none"
            self.input, self.outputs = self._plain_specs()
        else:
            described = bundle.artefact(artefact)
            self.embedding = embedding_of(described)
            self.input, self.outputs = self._specs(described)

    def _plain_specs(self) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
        size, channels = self.preprocessing.image_size, self.preprocessing.channels
        classes = int(self.bundle.manifest["architecture"]["num_classes"])
        given = TensorSpec(INPUT_NAME, "float32", (channels, size, size))
        return given, (TensorSpec(OUTPUT_NAME, "float32", (classes,)),)

    def _specs(self, artefact: Artefact) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
        if artefact.name not in runnable_artefacts(self.bundle):
            raise MissingDependency(
                f"'{artefact.name}' is a TensorRT engine; only a machine with its GPU runs it.",
                f"Choose one of: {', '.join(runnable_artefacts(self.bundle))}; "
                "engines are served by Triton (`van-deploy package triton`).",
            )
        given, taken = artefact.facts.get("inputs"), artefact.facts.get("outputs")
        if not given or not taken:
            return self._plain_specs()
        inputs, outputs = (
            tuple(
                TensorSpec(name, str(v["dtype"]), tuple(v["shape"][1:])) for name, v in item.items()
            )
            for item in (given, taken)
        )
        return inputs[0], outputs

    def __enter__(self) -> Network:
        """Load the artefact.

        Raises:
            BundleError: a file is missing or was changed.
            MissingDependency: its run time is not here.
            ConversionError: the run time refuses it.
        """
        if self.name == PYTORCH:
            from van_deploy.model.original import original_network
            from van_deploy.runners.pytorch import TorchRunner

            self._opened = TorchRunner(original_network(self.bundle).model)
            return self
        path = self.bundle.verified(self.name)
        runner = OnnxRuntimeRunner(path, threads=self.threads, spin=self._spin)
        self._opened = runner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release it."""
        if self._opened is not None:
            self._opened.__exit__(kind, error, trace)
        self._opened = None

    def prepare(self, pixels: Pixels) -> npt.NDArray[Any]:
        """Return resized pictures ``(N, S, S, C)`` uint8 as this artefact takes them."""
        return network_input(pixels, self.embedding, self.preprocessing)

    def run(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name for ``batch``, which is what :attr:`input` says."""
        if self.name == PYTORCH:
            return {OUTPUT_NAME: self._opened.run(batch)}
        outputs: Outputs = self._opened.run_all(batch)
        return outputs

    def top(self, outputs: Mapping[str, npt.NDArray[Any]], count: int) -> TopClasses:
        """Return the ``count`` most probable classes of each row, or as many as there are.

        Raises:
            UsageError: the artefact gives only its first five and more are asked for.
        """
        if OUTPUT_NAME in outputs or "probabilities" in outputs:
            return _ranked(outputs, count)
        classes, probabilities = outputs[TOP_CLASSES], outputs[TOP_PROBABILITIES]
        if count > classes.shape[1]:
            raise UsageError(
                f"'{self.name}' gives its first {classes.shape[1]} classes only, not {count}.",
                f"Ask for {classes.shape[1]}, or take another artefact.",
            )
        return TopClasses(classes[:, :count], probabilities[:, :count])


def network_input(pixels: Pixels, embedding: str, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Return resized pictures ``(N, S, S, C)`` uint8 as a graph with ``embedding`` takes them."""
    if embedding == "uint8":
        return np.ascontiguousarray(pixels)
    if embedding == "normalize":
        values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        return values / np.float32(255)
    return normalised(pixels, preprocessing)


def _ranked(outputs: Mapping[str, npt.NDArray[Any]], count: int) -> TopClasses:
    """Return the first classes by logit where there are logits, else by probability."""
    logits = outputs.get(OUTPUT_NAME)
    scores = outputs["probabilities"] if logits is None else logits.astype(np.float32)
    probabilities = scores if logits is None else softmax(scores)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int64)
    return TopClasses(order, np.take_along_axis(probabilities, order, axis=1).astype(np.float32))
