"""Which artefacts of a bundle can be run here, and how each takes a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from van_deploy.bundle import Bundle
from van_deploy.errors import UsageError
from van_deploy.runners.network import embedding_of

__all__ = ["NotRun", "chosen_artefacts", "not_run_here", "plain_onnx"]


@dataclass(frozen=True)
class NotRun:
    """An artefact that this machine does not run.

    Attributes:
        artefact: its name.
        reason: one phrase.
    """

    artefact: str
    reason: str


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


def not_run_here(bundle: Bundle, name: str) -> NotRun | None:
    """Return why ``name`` cannot be compared on this machine, or None if it can."""
    artefact = bundle.artefact(name)
    if artefact.kind == "engine":
        return NotRun(name, "engine not executed: no GPU")
    outputs = artefact.facts.get("outputs")
    if outputs is not None and "logits" not in outputs:
        return NotRun(name, f"it gives {', '.join(outputs)} and no logits")
    return None
