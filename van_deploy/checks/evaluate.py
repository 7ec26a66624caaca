"""The evaluation itself: every labelled image through every network, on one machine or on Ray."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.checks.accuracy import Labels, accuracy_of, judge_artefact
from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.gates import Allowed, numeric_class
from van_deploy.checks.opened import ON_CPU, Execution, NotRun, chosen_artefacts, open_artefact
from van_deploy.checks.predictions import Answered, Table, answered
from van_deploy.checks.reference import samples_for
from van_deploy.config import EvaluateSettings, GateSettings
from van_deploy.data import (
    Batch,
    ImageSet,
    dataset_digest,
    decoded_batches,
    image_set,
    label_sets,
    labelled_images,
)
from van_deploy.errors import ConversionError, ImageError
from van_deploy.files import content_key
from van_deploy.metrics import Task
from van_deploy.ray_tasks import RayTask, run_on_ray
from van_deploy.runners.base import Logits
from van_deploy.runners.network import PYTORCH, Network, require_classes, task_of

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

__all__ = ["BATCH", "Networks", "Settings", "evaluate_bundle", "evaluate_images"]

BATCH = 32
BATCHES_A_TASK = 4  # so that decoding runs ahead of the networks inside a task of the cluster

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        artefacts: which artifacts; empty for all.
        execution: what runs the artifacts.
        batch: images a batch.
        workers: threads that decode; 0 for as many as there are cores.
        on_ray: spread the batches over a Ray cluster.
        ray_address: of the cluster; None joins the one this machine is in, or starts one here.
        weights: where the original weights are now, for the machines of the cluster.
        allowed: what the user lets pass.
    """

    artefacts: tuple[str, ...] = ()
    execution: Execution = ON_CPU
    batch: int = BATCH
    workers: int = 0
    on_ray: bool = False
    ray_address: str | None = None
    weights: str | None = None
    allowed: Allowed = field(default_factory=Allowed)

    @property
    def decoders(self) -> int:
        """Threads that decode."""
        return self.workers or len(os.sched_getaffinity(0))


class Networks(contextlib.ExitStack):
    """PyTorch and some artifacts, opened together with ``with``."""

    def __init__(
        self, bundle: Bundle, loaded: LoadedVan, names: Sequence[str], execution: Execution
    ) -> None:
        from van_deploy.runners.pytorch import TorchRunner

        super().__init__()
        self.bundle, self.loaded = bundle, loaded
        self._torch = TorchRunner(loaded.model)
        self._artefacts: dict[str, Network] = {}
        self.skipped: list[NotRun] = []
        for name in names:
            # Idle threads must not spin: the next image is being decoded on that core.
            opened = open_artefact(bundle, name, execution, spin=False)
            if isinstance(opened, NotRun):
                self.skipped.append(opened)
            elif "logits" not in {output.name for output in opened.outputs}:
                reason = "it gives no logits"
                self.skipped.append(NotRun(name, opened.runner, reason, ""))
            else:
                self._artefacts[name] = opened
        self.runners = {PYTORCH: PYTORCH, **{n: a.runner for n, a in self._artefacts.items()}}

    def __enter__(self) -> Networks:
        """Load every network."""
        super().__enter__()
        for opened in self._artefacts.values():
            self.enter_context(opened)
        return self

    def classes(self) -> dict[str, str]:
        """Return the numeric class of each artifact, while it is open."""
        return {
            name: numeric_class(self.bundle.artefact(name).precision, tf32=opened.tf32)
            for name, opened in self._artefacts.items()
        }

    def logits(self, batch: Batch) -> dict[str, Logits]:
        """Return each network's logits ``(n, K)``, PyTorch's first."""
        if not len(batch.indices):
            return {}
        found = {PYTORCH: self._torch.run(batch.inputs)}
        for name, opened in self._artefacts.items():
            given = batch.inputs if batch.pixels is None else batch.pixels
            if opened.embedding == "none":
                given = batch.inputs  # normalised once for all of them
            found[name] = opened.logits(given)
        return found


def evaluate_bundle(
    bundle: Bundle,
    loaded: LoadedVan,
    images: ImageSet,
    labels: Labels,
    settings: Settings | None = None,
    *,
    noise_db: float,
    gates: GateSettings | None = None,
    progress: Progress | None = None,
) -> EvaluateReport:
    """Return the accuracy of PyTorch and of each artifact of ``bundle`` on labelled images.

    Args:
        bundle: the bundle.
        loaded: its original network.
        images: the evaluation set.
        labels: of the images: classes ``(N,)``, or ``(N, K)`` of 0 and 1 for many labels.
        settings: how.
        noise_db: SQNR of PyTorch's float32 against its float64, of the golden samples.
        gates: limits a recipe sets otherwise.
        progress: told how many images of how many are answered.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
        ImageError: not one image can be read.
        MissingDependency: Ray was asked for and is not here.
        ConversionError: a machine of the cluster failed.
    """
    settings = settings or Settings()
    names = chosen_artefacts(bundle, settings.artefacts)
    networks = Networks(bundle, loaded, names, settings.execution)
    task = task_of(bundle)
    table = Table(len(images), list(networks.runners), loaded.config.num_classes, task)
    tell, started = progress or (lambda done, of: None), time.perf_counter()
    tell(0, len(images))
    with networks:
        numeric = networks.classes()
        for done in _answered(networks, images, task, settings):
            table.enter(done)
            tell(int(table.readable.sum()) + len(table.unreadable), len(images))
    unreadable = sorted(table.unreadable.items())
    if not table.readable.any():
        raise ImageError(
            f"Not one of the {len(images)} images could be read; the first: {unreadable[0][1]}",
            "Give images that can be read.",
        )
    known, profiles = labels[table.readable], gates or GateSettings()
    return EvaluateReport(
        images=images.description,
        dataset_sha256=content_key({"set": dataset_digest(images), "labels": labels.tolist()}),
        task=task,
        unreadable=tuple((images.items[index].name, reason) for index, reason in unreadable),
        accuracy={
            name: accuracy_of(table.answers(name), known, table.classes, task)
            for name in table.names
        },
        losses={
            name: judge_artefact(table, known, name, kind, noise_db, profiles.of(kind))
            for name, kind in numeric.items()
        },
        skipped=tuple(networks.skipped),
        runners=dict(networks.runners),
        class_names=loaded.class_names,
        seconds=time.perf_counter() - started,
        allowed=settings.allowed,
    )


def evaluate_images(
    bundle: Bundle,
    loaded: LoadedVan,
    images: Path,
    asked: EvaluateSettings,
    settings: Settings,
    gates: GateSettings | None = None,
    progress: Progress | None = None,
) -> EvaluateReport:
    """Return the accuracy on labelled images, as :func:`evaluate_bundle` does.

    Args:
        bundle: the bundle.
        loaded: its original network.
        images: their folder or ``.npz``.
        asked: how their labels are found, and how many are taken.
        settings: how to evaluate.
        gates: limits a recipe sets otherwise.
        progress: told how many images of how many are answered.

    Raises:
        UsageError: the network gives feature maps.
    """
    require_classes(bundle, "evaluate")
    chosen, labels = _labelled(images, asked, task_of(bundle), loaded)
    golden = bundle.manifest.golden is not None
    noise_db = samples_for(bundle, None if golden else loaded, None).noise_db
    return evaluate_bundle(
        bundle, loaded, chosen, labels, settings, noise_db=noise_db, gates=gates, progress=progress
    )


def _labelled(
    images: Path, asked: EvaluateSettings, task: Task, loaded: LoadedVan
) -> tuple[ImageSet, Labels]:
    """Return the evaluation set and its labels."""
    classes, names, limit = loaded.config.num_classes, loaded.class_names, asked.limit
    if task is Task.MULTI_LABEL:
        found = image_set(images)
        chosen = found.first(limit) if limit else found
        labels = label_sets(chosen, asked.labels, classes, names)
        described = f"{chosen.description}, labels from '{asked.labels}'"
        return replace(chosen, description=described), labels
    labelled = labelled_images(
        images,
        classes,
        names,
        labels_file=asked.labels,
        synsets_file=asked.synsets,
        class_order=asked.class_order,
        find_labels=asked.label_files,
    )
    chosen = labelled.first(limit) if limit else labelled
    return chosen, np.array([item.label for item in chosen.items], np.int64)


def _answered(
    networks: Networks, images: ImageSet, task: Task, settings: Settings
) -> Iterator[Answered]:
    """Yield what the networks say, batch by batch."""
    if not settings.on_ray:
        yield from _batches(networks, images, None, task, settings.batch, settings.decoders)
        return
    names = tuple(name for name in networks.runners if name != PYTORCH)
    path = str(networks.bundle.path.absolute())
    shared = (path, names, settings, images, task)
    step = settings.batch * BATCHES_A_TASK
    tasks = [
        RayTask(start, (list(range(start, min(start + step, len(images)))),), {"num_cpus": 1})
        for start in range(0, len(images), step)
    ]
    for done in run_on_ray(_on_machine, tasks, shared=shared, address=settings.ray_address):
        if done.failure:
            raise ConversionError(
                f"A machine of the Ray cluster failed: {done.failure}",
                "Every machine must see the bundle, the weights and the images under the same "
                "paths. Run it again.",
            )
        yield from done.result


def _batches(
    networks: Networks,
    images: ImageSet,
    indices: Sequence[int] | None,
    task: Task,
    batch: int,
    decoders: int,
) -> Iterator[Answered]:
    preprocessing = networks.loaded.preprocessing
    for found in decoded_batches(
        images.items, preprocessing, batch, indices=indices, workers=decoders
    ):
        logits = networks.logits(found)
        yield answered(found.indices, found.unreadable, logits, PYTORCH, task)


def _on_machine(
    shared: tuple[str, tuple[str, ...], Settings, ImageSet, Task], indices: list[int]
) -> list[Answered]:
    """Return what the networks say of some images; a machine of the cluster loads them once."""
    path, names, settings, images, task = shared
    networks = _networks_here(path, names, settings.execution, settings.weights)
    return list(_batches(networks, images, indices, task, settings.batch, 1))


@lru_cache(maxsize=1)
def _networks_here(
    path: str, names: tuple[str, ...], execution: Execution, weights: str | None
) -> Networks:
    import torch

    from van_deploy.runners.original import original_network

    torch.set_num_threads(1)
    bundle = Bundle.open(path)
    loaded = original_network(bundle, weights)
    one = replace(execution, threads=1)
    return Networks(bundle, loaded, names, one).__enter__()
