"""What every run time looks like from outside: a context manager that maps images to logits."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["Images", "Logits", "Runner", "run_in_batches"]

Images = npt.NDArray[np.float32]
"""``(N, C, S, S)`` float32, normalised by the model's preprocessing."""

Logits = npt.NDArray[np.float32]
"""``(N, K)`` float32."""


@runtime_checkable
class Runner(Protocol):
    """A network ready to answer. Open it with ``with``; it holds its resources until the end.

    Attributes:
        name: what reports call it, such as ``ort-cpu``.
    """

    name: str

    def __enter__(self) -> Runner:
        """Load the network."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release everything, whatever happened."""

    def run(self, images: Images) -> Logits:
        """Return the logits of one batch. The result is the caller's to keep."""


def run_in_batches(runner: Runner, images: Images, batch: int) -> Logits:
    """Return the logits of ``images``, running at most ``batch`` at a time."""
    pieces = [runner.run(images[i : i + batch]) for i in range(0, len(images), batch)]
    return np.concatenate(pieces)
