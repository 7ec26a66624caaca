"""The original network and the artefacts of a bundle, answering the same pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.checks.opened import ON_CPU, Execution, NotRun, open_artefact
from van_deploy.data import Batch
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import softmax, top_classes
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.pixels import Pixels
from van_deploy.runners.base import Images, Logits
from van_deploy.runners.network import PYTORCH, Network
from van_deploy.runners.pytorch import TorchRunner

__all__ = ["TOP", "Answers", "Contestants"]

TOP = 5


@dataclass(frozen=True)
class Answers:
    """What one network says of some pictures.

    Attributes:
        classes: ``(n, 5)`` int32, the first classes, most probable first; -1 where
            the network has fewer, or gave a NaN.
        confidence: ``(n,)`` float32, probability of the first class; 0 for a NaN.
    """

    classes: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]

    @classmethod
    def of(cls, logits: Logits) -> Answers:
        """Return the answers in ``logits (n, K)``."""
        classes = np.full((len(logits), TOP), -1, np.int32)
        confidence = np.zeros(len(logits), np.float32)
        finite = np.array([bool(np.isfinite(row).all()) for row in logits], bool)
        if finite.any():
            good = logits[finite].astype(np.float64)
            first = top_classes(good, TOP)
            classes[np.flatnonzero(finite)[:, None], np.arange(first.shape[1])] = first
            confidence[finite] = softmax(good).max(axis=1)
        return cls(classes, confidence)

    def as_lists(self) -> dict[str, Any]:
        """Return the answers as JSON holds them."""
        return {"classes": self.classes.tolist(), "confidence": self.confidence.tolist()}


class Contestants:
    """PyTorch and some artefacts, opened together with ``with``.

    Args:
        bundle: the bundle.
        loaded: its original network.
        artefacts: names of artefacts.
        execution: what runs them.
        threads: threads of each network; None lets it choose.

    Attributes:
        loaded: the original network.
        runners: what runs each, by name.
        skipped: the artefacts that do not run here.
    """

    def __init__(
        self,
        bundle: Bundle,
        loaded: LoadedVan,
        artefacts: Sequence[str],
        execution: Execution = ON_CPU,
        threads: int | None = None,
    ) -> None:
        self.loaded = loaded
        self._torch = TorchRunner(loaded.model)
        self._open: dict[str, Network] = {}
        self._stack = contextlib.ExitStack()
        self.skipped: list[NotRun] = []
        for name in artefacts:
            # Idle threads must not spin: the next picture is being decoded on that core.
            opened = open_artefact(bundle, name, execution, threads=threads, spin=False)
            if isinstance(opened, NotRun):
                self.skipped.append(opened)
            else:
                self._open[name] = opened
        self.runners = {PYTORCH: PYTORCH, **{n: item.runner for n, item in self._open.items()}}

    def __enter__(self) -> Contestants:
        """Load every network."""
        with contextlib.ExitStack() as stack:
            for opened in self._open.values():
                stack.enter_context(opened)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release every network."""
        self._stack.__exit__(kind, error, trace)

    def answer(self, batch: Batch) -> dict[str, Answers]:
        """Return what each network says of some images, PyTorch first."""
        logits = self.logits(batch.inputs, batch.values)
        return {name: Answers.of(found) for name, found in logits.items()}

    def logits(self, images: Images, pixels: Pixels | Images) -> dict[str, Logits]:
        """Return each network's logits ``(n, K)``, PyTorch's first.

        Args:
            images: ``(n, C, S, S)`` normalised.
            pixels: the same ``(n, S, S, C)`` uint8, for graphs with preprocessing inside.
        """
        found = {PYTORCH: self._torch.run(images)}
        for name, opened in self._open.items():
            plain = opened.embedding == "none" and not opened.is_engine
            found[name] = opened.run(images)[OUTPUT_NAME] if plain else opened.logits(pixels)
        return found
