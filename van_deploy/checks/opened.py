"""Every artifact of a bundle ready to be judged, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.config import CheckSettings, RunnerSettings, RunSettings
from van_deploy.errors import UsageError
from van_deploy.model.pixels import Pixels
from van_deploy.runners.base import Images
from van_deploy.runners.network import Network, Outputs

ON_CPU = RunnerSettings()


@dataclass(frozen=True)
class NotRun:
    """An artifact that this machine does not run.

    Attributes:
        artefact: its name.
        runner: what would have run it.
        reason: one phrase.
        kind: of skip (:class:`~van_deploy.checks.gates.Finding`), or "".
    """

    artefact: str
    runner: str
    reason: str
    kind: str


def common(asked: CheckSettings | RunSettings) -> dict[str, Any]:
    """Return what runs the artifacts and what may pass, for other settings."""
    names = ("runner", "device", "trust_engine", "allow_skip", "allow_inconclusive")
    return {name: getattr(asked, name) for name in names}


def plain_onnx(bundle: Bundle) -> list[str]:
    """Return the ONNX artifacts that take normalised images and give logits."""
    return [
        name
        for name, artefact in bundle.artefacts.items()
        if artefact.kind == "onnx" and artefact.embedded == "none"
    ]


def chosen_artefacts(bundle: Bundle, names: Sequence[str]) -> list[str]:
    """Return the artifacts called ``names``, or all of them.

    Raises:
        BundleError: one of the names is not in the bundle.
        UsageError: the bundle holds nothing.
    """
    for name in names:
        bundle.artefact(name)
    chosen = list(names) or list(bundle.artefacts)
    if not chosen:
        raise UsageError(
            f"The bundle '{bundle.path}' holds no artifact.", "Make one with `van-deploy export`."
        )
    return chosen


def open_artefact(
    bundle: Bundle,
    name: str,
    asked: RunnerSettings = ON_CPU,
    *,
    threads: int | None = None,
    spin: bool = True,
) -> Network | NotRun:
    """Return the artifact called ``name`` to be opened with ``with``, or why it does not run here.

    Args:
        bundle: the bundle.
        name: of the artifact.
        asked: what runs it.
        threads: inside one operator; None lets the runtime choose.
        spin: whether threads that wait keep their cores busy.

    Raises:
        BundleError: there is no such artifact, or its files are not the manifest's.
        MissingDependency: ONNX Runtime is not installed.
    """
    network = Network(bundle, name, asked, threads=threads, spin=spin)
    bundle.verified(name, only_file=network.is_engine and asked.trust_engine)
    obstacle = network.obstacle()
    if obstacle is not None:
        return NotRun(name, network.runner, obstacle.reason, obstacle.kind)
    return network


def given_to(network: Network, inputs: Images, pixels: Pixels | None) -> npt.NDArray[Any]:
    """Return the images as an artifact takes them.

    Args:
        network: the artifact.
        inputs: ``(N, C, S, S)`` float32, normalised.
        pixels: the same ``(N, S, S, C)`` uint8; None where there are none.

    Raises:
        UsageError: the artifact takes pixels and there are none.
    """
    if network.embedding == "none":
        return inputs
    if pixels is None:
        raise UsageError(
            f"'{network.name}' takes pixels, and the images at hand are network input.",
            "Give images as files, or as uint8 arrays.",
        )
    return network.prepare(pixels)


def in_batches(
    run: Callable[[npt.NDArray[Any]], Outputs], given: npt.NDArray[Any], batch: int
) -> Outputs:
    """Return every output for all images, one row an image, ``batch`` at a time.

    Every batch is full: the last one is filled up with other images, and a batch of more images
    than there are repeats them in another order.

    Args:
        run: the network.
        given: ``(N, ...)`` as it takes them.
        batch: images a batch.
    """
    count, pieces = len(given), []
    for start in range(0, count, batch):
        rows = np.arange(start, start + batch)
        pieces.append(run(given[(rows + rows // count) % count]))
    return {name: np.concatenate([p[name] for p in pieces])[:count] for name in pieces[0]}
