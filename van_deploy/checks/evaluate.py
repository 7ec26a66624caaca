"""The evaluation itself: every labelled image through every network, on one machine or on Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.checks.accuracy import accuracy_of, paired_drift
from van_deploy.checks.contestants import TOP, Answers, Contestants
from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.journal import Journal
from van_deploy.checks.opened import ON_CPU, Execution
from van_deploy.config import GateSettings
from van_deploy.data import ImageItem, ImageSet, decoded_batches
from van_deploy.errors import ImageError
from van_deploy.files import content_key
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.runners.network import PYTORCH

__all__ = [
    "BATCH",
    "Settings",
    "answered_batches",
    "evaluate_bundle",
    "journal_path",
]

BATCH = 32

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        artefacts: which artefacts; empty for all.
        execution: what runs the artefacts.
        batch: images a batch.
        workers: threads that decode; 0 for as many as there are cores.
        resume: go on with an interrupted evaluation.
        journal: where answers are kept until the end; None for a file in the bundle.
        on_ray: spread the batches over a Ray cluster.
        ray_address: of the cluster; None joins the one this machine is in, or starts one here.
        weights: where the original weights are now, for the machines of the cluster.
    """

    artefacts: tuple[str, ...] = ()
    execution: Execution = ON_CPU
    batch: int = BATCH
    workers: int = 0
    resume: bool = False
    journal: Path | None = None
    on_ray: bool = False
    ray_address: str | None = None
    weights: str | None = None

    @property
    def decoders(self) -> int:
        """Threads that decode."""
        return self.workers or len(os.sched_getaffinity(0))


def journal_path(bundle: Bundle) -> Path:
    """Return where the answers of an evaluation are kept until its end."""
    return bundle.path / ".evaluate.jsonl"


def evaluate_bundle(
    bundle: Bundle,
    loaded: LoadedVan,
    labelled: ImageSet,
    settings: Settings | None = None,
    *,
    gates: GateSettings | None = None,
    progress: Progress | None = None,
) -> EvaluateReport:
    """Return the accuracy of PyTorch and of each artefact of ``bundle`` on labelled images.

    Args:
        bundle: the bundle.
        loaded: its original network.
        labelled: the images.
        settings: how.
        gates: how much may be lost.
        progress: told how many images of how many are answered.

    Raises:
        BundleError: an artefact is not there, or is not the manifest's.
        ImageError: not one image can be read.
        InputError: the journal to go on with is another evaluation's.
        MissingDependency: Ray was asked for and is not here.
    """
    settings = settings or Settings()
    names = list(settings.artefacts) or list(bundle.artefacts)
    contestants = Contestants(bundle, loaded, names, settings.execution)
    path = settings.journal or journal_path(bundle)
    started, total = time.perf_counter(), len(labelled)
    with Journal(path, _key(bundle, labelled, names, settings), settings.resume) as journal:
        answered = {i for entry in journal.entries for i in _indices(entry)}
        resumed = len(answered)
        left = [index for index in range(total) if index not in answered]
        tell = progress or (lambda done, of: None)
        tell(resumed, total)
        table = _Table(total, list(contestants.runners))
        for entry in journal.entries:
            table.enter(entry)
        journal.entries.clear()
        for entry in _entries(bundle, labelled, left, settings, contestants):
            journal.append(entry)
            table.enter(entry)
            answered.update(_indices(entry))
            tell(len(answered), total)
        report = _report(table, labelled, loaded, bundle, contestants, gates or GateSettings())
        journal.finish()
    return EvaluateReport(**report, seconds=time.perf_counter() - started, resumed=resumed)


def answered_batches(
    labelled: ImageSet,
    indices: Sequence[int],
    contestants: Contestants,
    loaded: LoadedVan,
    batch: int,
    decoders: int,
) -> Iterator[dict[str, Any]]:
    """Yield a journal entry for each batch of the images ``indices``."""
    batches = decoded_batches(
        labelled.items, loaded.preprocessing, batch, indices=indices, workers=decoders
    )
    for decoded in batches:
        answers = contestants.answer(decoded) if len(decoded.indices) else {}
        yield {
            "indices": list(decoded.indices),
            "unreadable": [list(pair) for pair in decoded.unreadable],
            "answers": {name: given.as_lists() for name, given in answers.items()},
        }


def _entries(
    bundle: Bundle,
    labelled: ImageSet,
    left: Sequence[int],
    settings: Settings,
    contestants: Contestants,
) -> Iterator[dict[str, Any]]:
    if settings.on_ray:
        from van_deploy.checks.on_ray import entries_on_ray

        names = [name for name in contestants.runners if name != PYTORCH]
        yield from entries_on_ray(bundle, labelled, left, names, settings)
        return
    with contestants:
        yield from answered_batches(
            labelled,
            left,
            contestants,
            contestants.loaded,
            settings.batch,
            settings.decoders,
        )


class _Table:
    """The answers of every network for every image, in arrays of fixed size."""

    def __init__(self, images: int, names: Sequence[str]) -> None:
        self.readable = np.zeros(images, bool)
        self.unreadable: dict[int, str] = {}
        self.answers = {
            name: Answers(np.full((images, TOP), -1, np.int32), np.zeros(images, np.float32))
            for name in names
        }

    def enter(self, entry: Mapping[str, Any]) -> None:
        rows = entry["indices"]
        self.unreadable |= {int(index): str(reason) for index, reason in entry["unreadable"]}
        if rows:
            self.readable[rows] = True
            for name, given in entry["answers"].items():
                self.answers[name].classes[rows] = given["classes"]
                self.answers[name].confidence[rows] = given["confidence"]

    def of(self, name: str) -> Answers:
        whole = self.answers[name]
        return Answers(whole.classes[self.readable], whole.confidence[self.readable])


def _report(
    table: _Table,
    labelled: ImageSet,
    loaded: LoadedVan,
    bundle: Bundle,
    contestants: Contestants,
    gates: GateSettings,
) -> dict[str, Any]:
    bad = [(labelled.items[i].name, reason) for i, reason in sorted(table.unreadable.items())]
    if not table.readable.any():
        raise ImageError(
            f"Not one of the {len(labelled)} images could be read; the first: {bad[0][1]}",
            "Give a folder of images that can be read.",
        )
    labels = _labels(labelled)[table.readable]
    reference = table.of(PYTORCH)
    artefacts = [name for name in contestants.runners if name != PYTORCH]
    return {
        "images": f"{len(labels)} of {labelled.description}",
        "unreadable": tuple(bad),
        "accuracies": {n: accuracy_of(table.of(n), labels) for n in contestants.runners},
        "drifts": {
            name: paired_drift(
                reference,
                table.of(name),
                labels,
                float(gates.of(bundle.artefact(name).precision).top1_drop or 0.0),
            )
            for name in artefacts
        },
        "skipped": tuple(contestants.skipped),
        "runners": dict(contestants.runners),
        "class_names": loaded.class_names,
    }


def _indices(entry: Mapping[str, Any]) -> list[int]:
    return [*entry["indices"], *(int(index) for index, _ in entry["unreadable"])]


def _labels(labelled: ImageSet) -> npt.NDArray[np.int64]:
    if labelled.labels is None:
        raise ImageError("The images have no labels.", "Pass them through labelled_images.")
    return labelled.labels


def _size(item: ImageItem) -> int | str:
    return item.data.stat().st_size if isinstance(item.data, Path) else item.digest


def _key(bundle: Bundle, labelled: ImageSet, names: Sequence[str], settings: Settings) -> str:
    """Return the digest of everything that decides the answers."""
    return content_key(
        {
            "weights": bundle.manifest.weights.sha256,
            "preprocessing": asdict(bundle.manifest.preprocessing),
            "artefacts": {name: bundle.artefact(name).sha256 for name in names},
            "runner": settings.execution.runner,
            "batch": settings.batch,
            "images": [[item.name, _size(item)] for item in labelled.items],
            "labels": _labels(labelled).tolist(),
        }
    )
