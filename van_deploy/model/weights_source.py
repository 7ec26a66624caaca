"""Where a network's weights came from: part of every bundle's manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightsSource:
    """Where a network's weights came from.

    Attributes:
        spec: what the user asked for.
        path: the file, or "" for random weights.
        format: ``official``, ``transformers``, ``mmpretrain``, ``random`` or ``embedded``.
        sha256: of the file's bytes; for random weights, of the state dict's.
        seed: of random weights, else None.
        container: key of the file the tensors were under, or ``top level``.
        notes: everything the user should be told, one sentence each.
    """

    spec: str
    path: str
    format: str
    sha256: str
    seed: int | None
    container: str
    notes: tuple[str, ...]
