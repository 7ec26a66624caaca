"""Accuracy on labelled images: PyTorch's, each artifact's, and what was lost between them.

Every image goes through every network, on one machine or on Ray. What is kept of an evaluation
set are a few dozen bytes an image, whatever the number of classes (:class:`Answers`). A metric
that has no meaning is absent: top-5 of five classes or fewer, calibration of many labels.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from van_deploy import metrics
from van_deploy.bundle import Bundle
from van_deploy.checks import gates
from van_deploy.checks.golden import samples_for
from van_deploy.checks.outputs import Networks
from van_deploy.config import EvaluationSettings, GateSettings
from van_deploy.data.images import ImageSet, decoded_batches, image_set
from van_deploy.data.labels import label_images, multi_label_targets
from van_deploy.errors import ConversionError, ImageError
from van_deploy.files import content_key
from van_deploy.intervals import Interval, bootstrap_interval, wilson_interval
from van_deploy.metrics import Task
from van_deploy.ray_tasks import RayTask, run_on_ray
from van_deploy.runners.network import PYTORCH, original_network, require_classifier, task_of
from van_deploy.stopwatch import Progress

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

BATCHES_A_TASK = 4  # so that decoding runs ahead of the networks inside a task of the cluster
ECE_BINS = 15
"""Equal-width bins of confidence, as in Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017."""
TOP = 5
MOST_SHOWN = 20  # confusions, and classes that changed

Logits = npt.NDArray[np.floating[Any]]


class GroundTruth(NamedTuple):
    """What is right on an evaluation set, and what is allowed.

    Attributes:
        labels: ``(N,)`` int64 classes, or ``(N, K)`` of 0 and 1 for many labels.
        classes: how many logits the network gives.
        task: how these become labels.
        noise_db: SQNR of PyTorch's float32 against its float64.
        rules: what a recipe sets otherwise.
    """

    labels: npt.NDArray[Any]
    classes: int
    task: Task
    noise_db: float = gates.ROUNDOFF_DB
    rules: GateSettings = GateSettings()


class Predictions(NamedTuple):
    """What one network says of some images.

    Attributes:
        classes: ``(n, k)`` int32. Of one of K classes: the first ``min(K, 5)``, most probable
            first. Of one logit or many labels: 0 or 1 for each label. -1 for a NaN.
        confidence: ``(n,)`` float32, probability of the top-1 class, or of the decision on one
            logit; 0 for a NaN and for many labels.
        margins: how far each decision is from another one, in logits
            (:func:`~van_deploy.metrics.decision_margins`); ``(n, 0)`` but of the reference.
        power: ``(n,)`` float64, mean square of the logits.
        noise: ``(n,)`` float64, mean square of the difference to the reference's.
    """

    classes: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    margins: npt.NDArray[np.float64]
    power: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, logits: Logits, task: Task = Task.SINGLE_LABEL, reference: Logits | None = None
    ) -> Predictions:
        """Return the answers in ``logits (n, K)``; without a ``reference`` they are its own."""
        values = np.asarray(logits, np.float64)
        exact = values if reference is None else np.asarray(reference, np.float64)
        finite = np.isfinite(values).all(axis=1).reshape(-1, 1)
        safe, single = np.where(finite, values, 0.0), task is Task.SINGLE_LABEL
        classes = metrics.top_classes(safe, TOP) if single else metrics.decisions(safe, task)
        shares = metrics.probabilities(safe, task)
        confidence = shares.max(axis=1) if single else np.maximum(shares, 1 - shares)[:, 0]
        known, margins = finite[:, 0], metrics.decision_margins(exact, task)
        return cls(
            np.where(finite, classes, -1).astype(np.int32),
            np.where(known & (task is not Task.MULTI_LABEL), confidence, 0.0).astype(np.float32),
            margins if reference is None else margins[:, :0],
            np.square(values).mean(axis=1),
            np.square(values - exact).mean(axis=1),
        )


@dataclass(frozen=True)
class Accuracy:
    """How often one network is right.

    Attributes:
        images: answered.
        metric: ``top-1``; for many labels ``F1 (micro)``.
        top1: share with the right top-1 class or decision, or the F1, 0 to 1.
        top1_interval: its 95 % interval: Wilson's, or of resampled images.
        top5: share with the right class among the first five, or None.
        top5_interval: likewise.
        ece: expected calibration error, 0 to 1, or None.
    """

    images: int
    metric: str
    top1: float
    top1_interval: Interval
    top5: float | None = None
    top5_interval: Interval | None = None
    ece: float | None = None


@dataclass(frozen=True)
class ArtifactLoss(gates.CheckResult):
    """What an artifact lost against PyTorch on the same images, and what the gate says.

    Attributes:
        numeric: the numeric class it was judged in.
        loss: with its interval, in points.
        findings: of the gate.
        sqnr_db: of its logits on these images.
        flips: how many labels flipped.
        confusions: ``(PyTorch's class, the artifact's, count)`` of flipped labels.
        classes: the classes whose accuracy changed most: ``label``, ``images`` of it, and how many
            PyTorch (``before``) and the artifact (``after``) get right.
    """

    numeric: str
    loss: gates.Loss
    findings: tuple[gates.Finding, ...]
    sqnr_db: float
    flips: int
    confusions: tuple[tuple[int, int, int], ...]
    classes: tuple[Mapping[str, int], ...]


def measure_accuracy(answers: Predictions, truth: GroundTruth) -> Accuracy:
    """Return how often ``answers`` are right."""
    labels, total = truth.labels, len(truth.labels)
    if truth.task is Task.MULTI_LABEL:
        counts = _label_counts(answers, labels)
        interval = bootstrap_interval(lambda rows: _f1(counts[rows]), total)
        return Accuracy(total, "F1 (micro)", _f1(counts), interval)
    right = answers.classes[:, 0] == labels
    first, ece = int(right.sum()), expected_calibration_error(answers.confidence, right)
    found = Accuracy(total, "top-1", first / total, wilson_interval(first, total), ece=ece)
    if truth.task is not Task.SINGLE_LABEL or truth.classes <= TOP:
        return found
    among = int((answers.classes == labels[:, None]).any(axis=1).sum())
    return replace(found, top5=among / total, top5_interval=wilson_interval(among, total))


def compare_predictions(
    before: Predictions, after: Predictions, truth: GroundTruth, numeric: str
) -> ArtifactLoss:
    """Return what one artifact lost against PyTorch, and what the gate of its class says.

    Args:
        before: PyTorch's answers.
        after: the artifact's, to the same images.
        truth: of the images.
        numeric: the artifact's numeric class.
    """
    profile = truth.rules.of(numeric)
    floor = gates.sqnr_floor(numeric, truth.noise_db, profile)
    allowed, task = gates.allowed_loss(numeric, profile), truth.task
    labels, total = truth.labels, len(truth.labels)
    changes: tuple[Mapping[str, int], ...] = ()
    if task is Task.MULTI_LABEL:
        one, other = (_label_counts(answers, labels) for answers in (before, after))

        def lost(rows: npt.NDArray[np.int64]) -> float:
            return 100 * (_f1(one[rows]) - _f1(other[rows]))

        loss = gates.Loss(total, lost(np.arange(total)), bootstrap_interval(lost, total))
    else:
        right, still = (answers.classes[:, 0] == labels for answers in (before, after))
        won = int((~right & still).sum())
        loss = gates.paired_loss(int((right & ~still).sum()), won, total)
        changes = _changes(labels, right, still)
    signal = float(before.power.mean())
    sqnr = metrics.decibels(signal, float(after.noise.mean()))
    margins = before.margins / (math.sqrt(signal) or 1.0)  # in RMS logits
    explained = gates.flip_margin(floor.value, task)
    flips = metrics.flips_between(before.classes, after.classes, margins, explained)
    findings = [gates.check_loss(loss, allowed, gates.accuracy_metric(task))]
    if not gates.CLASSES[numeric].lossy:
        findings = gates.check_near_lossless(loss, allowed, sqnr, floor, flips, task)
    pairs = Counter((flip.expected, flip.found) for flip in flips)
    commonest = sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_SHOWN]
    confusions = tuple((*pair, count) for pair, count in commonest)
    return ArtifactLoss(numeric, loss, tuple(findings), sqnr, len(flips), confusions, changes)


def _label_counts(answers: Predictions, labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return each image's labels that are found, wanted, and both, ``(N, 3)``."""
    found, wanted = answers.classes == 1, labels.astype(bool)
    return np.stack([found.sum(1), wanted.sum(1), (found & wanted).sum(1)], axis=1)


def _f1(counts: npt.NDArray[np.int64]) -> float:
    """Return the micro F1 of images' counts: twice the hits over what is found and wanted."""
    found, wanted, hits = counts.sum(axis=0).tolist()
    return 2 * hits / (found + wanted) if found + wanted else 1.0


def expected_calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> float:
    """Return how far confidence is from being right, 0 to 1: the ECE.

    The mean over images of ``|accuracy - mean confidence|`` of each image's bin, one of
    :data:`ECE_BINS` of equal width ``(k/bins, (k+1)/bins]``.

    Args:
        confidence: ``(N,)`` probability of the top-1 class, 0 to 1.
        correct: ``(N,)`` whether the top-1 class was right.
    """
    scores, right = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    index = np.clip(np.ceil(scores * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    surplus = np.bincount(index, weights=scores - right, minlength=ECE_BINS)
    return float(np.abs(surplus).sum() / len(scores))


def _changes(
    labels: npt.NDArray[Any], right: npt.NDArray[Any], still: npt.NDArray[Any]
) -> tuple[Mapping[str, int], ...]:
    """Return the classes whose accuracy changed, the largest change first.

    Args:
        labels: ``(N,)`` classes.
        right: ``(N,)`` whether PyTorch is right.
        still: whether the artifact is.
    """
    of_each = [np.bincount(labels, each, labels.max() + 1) for each in (None, right, still)]
    rows = [(label, *map(int, counts)) for label, counts in enumerate(zip(*of_each, strict=True))]
    changed = sorted((r for r in rows if r[2] != r[3]), key=lambda r: (-abs(r[3] - r[2]), r[0]))
    names = ("label", "images", "before", "after")
    return tuple(dict(zip(names, row, strict=True)) for row in changed[:MOST_SHOWN])


# --- the evaluation --------------------------------------------------------------------------

Said = tuple[Sequence[int], tuple[tuple[int, str], ...], dict[str, Predictions]]
"""Which images they are, index and reason of those left out, and what each network says."""


@dataclass(frozen=True)
class EvaluateReport(gates.GateReport):
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
    losses: Mapping[str, ArtifactLoss]
    skipped: Mapping[str, gates.Finding]
    runners: Mapping[str, str]
    class_names: tuple[str, ...] | None
    seconds: float
    allowed: gates.AllowOptions
    schema: Literal["van-deploy/evaluate/3"] = "van-deploy/evaluate/3"

    @property
    def count(self) -> int:
        """How many images were answered."""
        return self.accuracy[PYTORCH].images

    def named_findings(self) -> list[tuple[str, gates.Finding]]:
        """Return every finding and its artifact, those of skipped artifacts included."""
        found = [(name, f) for name, loss in self.losses.items() for f in loss.findings]
        return [*found, *self.skipped.items()]


def evaluate_bundle(
    bundle: Bundle, loaded: LoadedVan, asked: EvaluationSettings, rules: GateSettings, say: Progress
) -> EvaluateReport:
    """Return the accuracy of PyTorch and of each artifact of ``bundle`` on labelled images.

    Args:
        bundle: the bundle.
        loaded: its original network.
        asked: which images, and how.
        rules: what a recipe sets otherwise.
        say: told how many images of how many are answered.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
        ImageError: not one image can be read.
        MissingDependency: Ray was asked for and is not here.
        ConversionError: a machine of the cluster failed.
        UsageError: the network gives feature maps.
    """
    require_classifier(bundle, "evaluate")
    images, labels = _labelled(asked, task_of(bundle), loaded)
    rows, unreadable, pieces = list[int](), list[tuple[int, str]](), list[dict[str, Predictions]]()
    started, total = time.perf_counter(), len(images)
    with Networks(bundle, loaded, asked) as networks:
        for indices, bad, said in _answered(networks, images, asked):
            rows += indices
            unreadable += bad
            pieces += [said] if said else []
            done = len(rows) + len(unreadable)
            say(f"{done} of {total} images", done, total)
    unreadable.sort()
    if not rows:
        raise ImageError(
            f"Not one of the {total} images could be read; the first: {unreadable[0][1]}",
            "Give images that can be read.",
        )
    order, answers = np.argsort(rows), {}
    for name in networks.runners:
        columns = zip(*(said[name] for said in pieces), strict=True)
        answers[name] = Predictions(*(np.concatenate(column)[order] for column in columns))
    golden = bundle.manifest.golden is not None
    noise_db = samples_for(bundle, None if golden else loaded, None).noise_db
    classes, task = loaded.config.num_classes, task_of(bundle)
    truth = GroundTruth(labels[np.sort(rows)], classes, task, noise_db, rules)
    return EvaluateReport(
        images=images.description,
        dataset_sha256=content_key({"set": images.digest, "labels": labels.tolist()}),
        task=task,
        unreadable=tuple((images.items[index].name, reason) for index, reason in unreadable),
        accuracy={name: measure_accuracy(found, truth) for name, found in answers.items()},
        losses={
            name: compare_predictions(answers[PYTORCH], answers[name], truth, numeric)
            for name, numeric in networks.numeric.items()
        },
        skipped=networks.skipped,
        runners=networks.runners,
        class_names=loaded.class_names,
        seconds=time.perf_counter() - started,
        allowed=gates.AllowOptions(asked.allow_skip, asked.allow_inconclusive),
    )


def _labelled(
    asked: EvaluationSettings, task: Task, loaded: LoadedVan
) -> tuple[ImageSet, npt.NDArray[Any]]:
    """Return the evaluation set and its labels."""
    classes, names = loaded.config.num_classes, loaded.class_names
    if task is Task.MULTI_LABEL:
        every = image_set(asked.images)
        chosen = every.subsample(asked.limit or len(every))
        labels = multi_label_targets(chosen, asked.labels, classes, names)
        described = f"{chosen.description}, labels from '{asked.labels}'"
        return replace(chosen, description=described), labels
    how: dict[str, Any] = {"labels_file": asked.labels, "find_labels": asked.label_files}
    every = label_images(asked.images, classes, names, class_order=asked.class_order, **how)
    chosen = every.subsample(asked.limit or len(every))
    return chosen, np.asarray(chosen.labels)


def _answered(networks: Networks, images: ImageSet, asked: EvaluationSettings) -> Iterator[Said]:
    """Yield what the networks say, batch by batch."""
    if asked.on == "here":
        yield from _answers(networks, images, asked)
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
                "Every machine must see bundle, weights and images under the same paths.",
            )
        yield from done.result


def _answers(
    networks: Networks, images: ImageSet, asked: EvaluationSettings, indices: Sequence[int] = ()
) -> Iterator[Said]:
    """Yield what every network says, batch by batch; nothing where no image can be read.

    Args:
        networks: which.
        images: the evaluation set.
        asked: how many images a batch, and threads that decode.
        indices: which of the images, by one thread; without any all.
    """
    preprocessing, task = networks.loaded.preprocessing, task_of(networks.bundle)
    workers = 1 if indices else asked.workers or len(os.sched_getaffinity(0))
    how: dict[str, Any] = {"indices": indices or None, "workers": workers}
    for found in decoded_batches(images.items, preprocessing, asked.batch, **how):
        logits = networks.logits(found) if found.indices else {}
        said = {
            name: Predictions.of(y, task, None if name == PYTORCH else logits[PYTORCH])
            for name, y in logits.items()
        }
        yield found.indices, found.unreadable, said


def _on_machine(
    shared: tuple[str, tuple[str, ...], ImageSet, EvaluationSettings], indices: Sequence[int]
) -> list[Said]:
    """Return what the networks say of some images; a machine of the cluster loads them once."""
    path, names, images, asked = shared
    networks = _networks_here(path, asked)
    if lost := set(names).difference(networks.runners):
        raise ConversionError(f"It does not run {', '.join(sorted(lost))}.")
    return list(_answers(networks, images, asked, indices))


@lru_cache(maxsize=1)
def _networks_here(path: str, asked: EvaluationSettings) -> Networks:
    import torch

    torch.set_num_threads(1)
    bundle = Bundle.open(path)
    return Networks(bundle, original_network(bundle, asked.weights), asked, threads=1)
