"""Every artefact of a bundle ready to be judged, or the reason why not.

What this machine cannot run is a :class:`NotRun` with the reason, never a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from van_deploy.bundle import Bundle
from van_deploy.errors import UsageError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.runners.network import ORT_CPU, Network, embedding_of

__all__ = [
    "ON_CPU",
    "Execution",
    "NotRun",
    "chosen_artefacts",
    "open_artefact",
    "plain_onnx",
]


@dataclass(frozen=True)
class Execution:
    """What runs the artefacts of a bundle.

    Attributes:
        runner: one of :data:`~van_deploy.runners.network.RUNNERS`, for ONNX artefacts;
            engines are run by TensorRT.
        trust_engine: run engines whose sidecar is gone.
    """

    runner: str = ORT_CPU
    trust_engine: bool = False


ON_CPU = Execution()


@dataclass(frozen=True)
class NotRun:
    """An artefact that this machine does not run.

    Attributes:
        artefact: its name.
        runner: what would have run it.
        reason: one phrase.
        answers: it runs here, but gives no logits to compare.
    """

    artefact: str
    runner: str
    reason: str
    answers: bool = False


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
    execution: Execution = ON_CPU,
    *,
    threads: int | None = None,
    spin: bool = True,
) -> Network | NotRun:
    """Return the artefact called ``name`` to be opened with ``with``, or why it does not run here.

    ``threads`` and ``spin`` are those of :class:`~van_deploy.runners.network.Network`.

    Raises:
        BundleError: there is no such artefact, or its files are not the manifest's.
        UsageError: there is no such runner.
        MissingDependency: ONNX Runtime is not installed.
    """
    network = Network(
        bundle,
        name,
        runner=execution.runner,
        threads=threads,
        spin=spin,
        trust_engine=execution.trust_engine,
    )
    bundle.verified(name, only_file=network.is_engine and execution.trust_engine)
    reason = network.obstacle()
    if reason:
        return NotRun(name, network.runner, reason)
    given = [output.name for output in network.outputs]
    if OUTPUT_NAME not in given:
        reason = f"it gives {', '.join(given)} and no logits"
        return NotRun(name, network.runner, reason, answers=True)
    return network
