"""The evaluation itself: every labelled image through every network, on one machine or on Ray."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np

from van_deploy import data
from van_deploy.bundle import Bundle
from van_deploy.checks.accuracy import (
    Accuracy,
    Answers,
    ArtefactLoss,
    Labels,
    accuracy_of,
    judge_artefact,
)
from van_deploy.checks.gates import Allowed, Finding, Report, numeric_class, skipped
from van_deploy.checks.opened import NotRun, chosen_artefacts, open_artefact
from van_deploy.checks.reference import samples_for
from van_deploy.config import EvaluationSettings, GateSettings
from van_deploy.data import Batch, ImageSet
from van_deploy.errors import ConversionError, ImageError
from van_deploy.files import content_key
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import Task
from van_deploy.ray_tasks import RayTask, run_on_ray
from van_deploy.runners.base import Logits
from van_deploy.runners.network import PYTORCH, Network, require_classes, task_of

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan


SCHEMA: Final = "van-deploy/evaluate/2"
BATCHES_A_TASK = 4  # so that decoding runs ahead of the networks inside a task of the cluster

Unreadable = tuple[tuple[int, str], ...]
Answered = tuple[Sequence[int], Unreadable, dict[str, Answers]]
"""Which images they are, index and reason of those left out, and what each network says."""


@dataclass(frozen=True)
class EvaluateReport(Report):
    """Accuracy of PyTorch and each artifact.

    Attributes:
        images: what they were evaluated on, and how the labels were found.
        dataset_sha256: digest of the evaluation set: names, contents and labels.
        task: how logits become labels.
        unreadable: file and reason of each image left out.
        accuracy: by name, PyTorch first.
        losses: by artifact, against PyTorch.
        skipped: artifacts that did not run, with the reason.
        runners: what ran each.
        class_names: for the report, or None.
        seconds: what it took.
        allowed: what the user lets pass.
        schema: of the document.
    """

    JSON_PROPERTIES: ClassVar = ("count",)

    images: str
    dataset_sha256: str
    task: Task
    unreadable: tuple[tuple[str, str], ...]
    accuracy: Mapping[str, Accuracy]
    losses: Mapping[str, ArtefactLoss]
    skipped: tuple[NotRun, ...]
    runners: Mapping[str, str]
    class_names: tuple[str, ...] | None
    seconds: float
    allowed: Allowed
    schema: Literal["van-deploy/evaluate/2"] = SCHEMA

    @property
    def count(self) -> int:
        """How many images were answered."""
        return self.accuracy[PYTORCH].images

    def named(self) -> list[tuple[str, Finding]]:
        """Return every finding and its artifact, those of skipped artifacts included."""
        found = [(name, f) for name, loss in self.losses.items() for f in loss.findings]
        return found + [(s.artefact, skipped("runs", s.reason, s.kind)) for s in self.skipped]


class Networks(contextlib.ExitStack):
    """PyTorch and some artifacts, opened together with ``with``.

    Args:
        bundle: of the artifacts.
        loaded: the original network.
        asked: which artifacts, and what runs them.
        threads: inside one operator; None lets the runtime choose.

    Attributes:
        numeric: the numeric class of each artifact, once it is open.
        runners: what runs each network, PyTorch first.
        skipped: artifacts that do not run here.
    """

    def __init__(
        self,
        bundle: Bundle,
        loaded: LoadedVan,
        asked: EvaluationSettings,
        threads: int | None = None,
    ) -> None:
        from van_deploy.runners.pytorch import TorchRunner

        super().__init__()
        self.bundle, self.loaded, self.task = bundle, loaded, task_of(bundle)
        self._torch = TorchRunner(loaded.model)
        self._artefacts: dict[str, Network] = {}
        self.numeric: dict[str, str] = {}
        self.skipped: list[NotRun] = []
        for name in chosen_artefacts(bundle, asked.artefacts):
            # Idle threads must not spin: the next image is being decoded on that core.
            opened = open_artefact(bundle, name, asked, threads=threads, spin=False)
            if isinstance(opened, NotRun):
                self.skipped.append(opened)
            elif OUTPUT_NAME not in {output.name for output in opened.outputs}:
                self.skipped.append(NotRun(name, opened.runner, "it gives no logits", ""))
            else:
                self._artefacts[name] = opened
        self.runners = {PYTORCH: PYTORCH, **{n: a.runner for n, a in self._artefacts.items()}}

    def __enter__(self) -> Networks:
        """Load every network."""
        super().__enter__()
        for name, opened in self._artefacts.items():
            self.enter_context(opened)
            precision = self.bundle.artefact(name).precision
            self.numeric[name] = numeric_class(precision, tf32=opened.tf32)
        return self

    def logits(self, batch: Batch) -> dict[str, Logits]:
        """Return each network's logits ``(n, K)``, PyTorch's first; n is 1 or more."""
        found = {PYTORCH: self._torch.run(batch.inputs)}
        for name, opened in self._artefacts.items():
            # Normalised once for all that take it so.
            given = batch.inputs if opened.embedding == "none" else batch.values
            found[name] = opened.logits(given)
        return found

    def answers(
        self,
        images: ImageSet,
        batch: int,
        workers: int,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Answered]:
        """Yield what every network says, batch by batch; nothing where no image can be read.

        Args:
            images: the evaluation set.
            batch: images a batch.
            workers: threads that decode.
            indices: which of the images; None for all.
        """
        for found in data.decoded_batches(
            images.items, self.loaded.preprocessing, batch, indices=indices, workers=workers
        ):
            logits = self.logits(found) if found.indices else {}
            answers = {
                name: Answers.of(y, self.task, None if name == PYTORCH else logits[PYTORCH])
                for name, y in logits.items()
            }
            yield found.indices, found.unreadable, answers


def evaluate_bundle(
    bundle: Bundle,
    loaded: LoadedVan,
    asked: EvaluationSettings,
    *,
    gates: GateSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluateReport:
    """Return the accuracy of PyTorch and of each artifact of ``bundle`` on labelled images.

    Args:
        bundle: the bundle.
        loaded: its original network.
        asked: which images, and how.
        gates: limits a recipe sets otherwise.
        progress: told how many images of how many are answered.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
        ImageError: not one image can be read.
        MissingDependency: Ray was asked for and is not here.
        ConversionError: a machine of the cluster failed.
        UsageError: the network gives feature maps.
    """
    require_classes(bundle, "evaluate")
    images, labels = _labelled(asked, task_of(bundle), loaded)
    golden = bundle.manifest.golden is not None
    noise_db = samples_for(bundle, None if golden else loaded, None).noise_db
    networks, started = Networks(bundle, loaded, asked), time.perf_counter()
    rows: list[int] = []
    unreadable: list[tuple[int, str]] = []
    pieces: list[dict[str, Answers]] = []
    progress(0, len(images))
    with networks:
        for indices, bad, said in _answered(networks, images, asked):
            rows += indices
            unreadable += bad
            pieces += [said] if said else []
            progress(len(rows) + len(unreadable), len(images))
    unreadable.sort()
    if not rows:
        raise ImageError(
            f"Not one of the {len(images)} images could be read; the first: {unreadable[0][1]}",
            "Give images that can be read.",
        )
    answers = {
        name: Answers.joined([said[name] for said in pieces], np.argsort(rows))
        for name in networks.runners
    }
    known, classes, task = labels[np.sort(rows)], loaded.config.num_classes, networks.task
    same, profiles = (known, classes, task), gates or GateSettings()
    return EvaluateReport(
        images=images.description,
        dataset_sha256=content_key({"set": images.digest, "labels": labels.tolist()}),
        task=task,
        unreadable=tuple((images.items[index].name, reason) for index, reason in unreadable),
        accuracy={n: accuracy_of(found, *same) for n, found in answers.items()},
        losses={
            n: judge_artefact(answers[PYTORCH], answers[n], *same, k, noise_db, profiles.of(k))
            for n, k in networks.numeric.items()
        },
        skipped=tuple(networks.skipped),
        runners=networks.runners,
        class_names=loaded.class_names,
        seconds=time.perf_counter() - started,
        allowed=Allowed(asked.allow_skip, asked.allow_inconclusive),
    )


def _labelled(asked: EvaluationSettings, task: Task, loaded: LoadedVan) -> tuple[ImageSet, Labels]:
    """Return the evaluation set and its labels."""
    classes, names = loaded.config.num_classes, loaded.class_names
    if task is Task.MULTI_LABEL:
        every = data.image_set(asked.images)
        chosen = every.first(asked.limit or len(every))
        labels = data.label_sets(chosen, asked.labels, classes, names)
        described = f"{chosen.description}, labels from '{asked.labels}'"
        return replace(chosen, description=described), labels
    every = data.labelled_images(
        asked.images,
        classes,
        names,
        labels_file=asked.labels,
        class_order=asked.class_order,
        find_labels=asked.label_files,
    )
    chosen = every.first(asked.limit or len(every))
    return chosen, np.asarray(chosen.labels)


def _answered(
    networks: Networks, images: ImageSet, asked: EvaluationSettings
) -> Iterator[Answered]:
    """Yield what the networks say, batch by batch."""
    if asked.on == "here":
        workers = asked.workers or len(os.sched_getaffinity(0))
        yield from networks.answers(images, asked.batch, workers)
        return
    step = asked.batch * BATCHES_A_TASK
    tasks = [
        RayTask(start, (range(start, min(start + step, len(images))),), {"num_cpus": 1})
        for start in range(0, len(images), step)
    ]
    shared = (str(networks.bundle.path.absolute()), tuple(networks.runners), images, asked)
    for done in run_on_ray(_on_machine, tasks, shared=shared, address=asked.ray_address or None):
        if done.failure:
            raise ConversionError(
                f"A machine of the Ray cluster failed: {done.failure}",
                "Every machine must see the bundle, the weights and the images under the same "
                "paths. Run it again.",
            )
        yield from done.result


def _on_machine(
    shared: tuple[str, tuple[str, ...], ImageSet, EvaluationSettings], indices: Sequence[int]
) -> list[Answered]:
    """Return what the networks say of some images; a machine of the cluster loads them once."""
    path, names, images, asked = shared
    networks = _networks_here(path, asked)
    lost = set(names).difference(networks.runners)
    if lost:
        raise ConversionError(f"It does not run {', '.join(sorted(lost))}.")
    return list(networks.answers(images, asked.batch, 1, indices))


@lru_cache(maxsize=1)
def _networks_here(path: str, asked: EvaluationSettings) -> Networks:
    import torch

    from van_deploy.runners.original import original_network

    torch.set_num_threads(1)
    bundle = Bundle.open(path)
    return Networks(bundle, original_network(bundle, asked.weights), asked, threads=1).__enter__()
