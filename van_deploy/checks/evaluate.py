"""Accuracy of PyTorch and each artifact on labelled images, and the loss between them.

Every image goes through every network, on this machine or on Ray. A few dozen bytes per image are
kept, for any number of classes (:class:`Predictions`). Metrics without a meaning are None: top-5
with five classes or fewer, the calibration error of multi-label networks.
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
from van_deploy.documents import plain
from van_deploy.errors import ConversionError, ImageError, UsageError
from van_deploy.files import content_key
from van_deploy.intervals import Interval, bootstrap_interval, wilson_interval
from van_deploy.metrics import Array, Task
from van_deploy.ray_tasks import RayTask, run_on_ray
from van_deploy.runners.network import PYTORCH, original_network, require_classifier, task_of
from van_deploy.stopwatch import Progress

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

BATCHES_PER_TASK = 4  # so that decoding runs ahead of the networks inside a Ray task

# Equal-width bins of confidence, as in Guo et al., "On Calibration of Modern Neural Networks",
# ICML 2017.
ECE_BINS = 15
TOP = 5
MAX_ROWS = 20  # confusions, and classes that changed


class GroundTruth(NamedTuple):
    """Labels of an evaluation set, and what the limits depend on.

    Attributes:
        labels: ``(N,)`` int64 classes, or ``(N, K)`` of 0 and 1 for multi-label networks.
        classes: number of logits.
        task: how logits become labels.
        noise_db: SQNR of PyTorch's float32 against its float64.
        rules: limits of the recipe, which take precedence.
    """

    labels: npt.NDArray[Any]
    classes: int
    task: Task
    noise_db: float = gates.ROUNDOFF_DB
    rules: GateSettings = GateSettings()


class Predictions(NamedTuple):
    """Predictions of one network.

    Attributes:
        classes: ``(n, k)`` int32. Single-label: the top ``min(K, 5)`` classes. Binary and
            multi-label: 0 or 1 for each label. -1 for a NaN.
        confidence: ``(n,)`` float32, probability of the top-1 class or of the binary decision;
            0 for a NaN and for multi-label networks.
        margins: decision margins in logits (:func:`~van_deploy.metrics.decision_margins`) of the
            reference; ``(n, 0)`` for other networks.
        power: ``(n,)`` float64, mean square of the logits.
        noise: ``(n,)`` float64, mean square of the difference to the reference's logits.
    """

    classes: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    margins: npt.NDArray[np.float64]
    power: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, logits: Array, task: Task = Task.SINGLE_LABEL, reference: Array | None = None
    ) -> Predictions:
        """Return the predictions from ``logits (n, K)``; without ``reference`` they are its own."""
        values = np.asarray(logits, np.float64)
        exact = values if reference is None else np.asarray(reference, np.float64)
        finite = np.isfinite(values).all(axis=1).reshape(-1, 1)
        safe, single = np.where(finite, values, 0.0), task is Task.SINGLE_LABEL
        classes = metrics.top_classes(safe, TOP) if single else metrics.decisions(safe, task)
        shares = metrics.probabilities(safe, task)
        confidence = shares.max(axis=1) if single else np.maximum(shares, 1 - shares)[:, 0]
        valid, margins = finite[:, 0], metrics.decision_margins(exact, task)
        return cls(
            np.where(finite, classes, -1).astype(np.int32),
            np.where(valid & (task is not Task.MULTI_LABEL), confidence, 0.0).astype(np.float32),
            margins if reference is None else margins[:, :0],
            np.square(values).mean(axis=1),
            np.square(values - exact).mean(axis=1),
        )


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one network.

    Attributes:
        images: number of images.
        metric: ``top-1``, or ``F1 (micro)`` for multi-label networks.
        top1: top-1 accuracy or F1, 0 to 1.
        top1_interval: 95 % interval: Wilson's, or a bootstrap interval for F1.
        top5: top-5 accuracy, 0 to 1, or None.
        top5_interval: Wilson's 95 % interval, or None.
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
    """Accuracy loss of an artifact against PyTorch on the same images, and the gate's findings.

    Attributes:
        numeric: numeric class of the artifact.
        loss: the loss with its interval, in points.
        findings: findings of the gate.
        sqnr_db: SQNR of its logits on these images.
        flips: number of label flips.
        confusions: ``(PyTorch's class, artifact's class, count)`` of flipped labels.
        classes: the classes whose accuracy changed most: ``label``, number of ``images``, and
            how many of them PyTorch (``before``) and the artifact (``after``) classify correctly.
    """

    numeric: str
    loss: gates.Loss
    findings: tuple[gates.Finding, ...]
    sqnr_db: float
    flips: int
    confusions: tuple[tuple[int, int, int], ...]
    classes: tuple[Mapping[str, int], ...]


def measure_accuracy(predictions: Predictions, truth: GroundTruth) -> Accuracy:
    """Return the accuracy of ``predictions``."""
    labels, total = truth.labels, len(truth.labels)
    if truth.task is Task.MULTI_LABEL:
        counts = _label_counts(predictions, labels)
        low, high = bootstrap_interval(lambda rows: _f1(counts[rows]), total)
        return Accuracy(total, "F1 (micro)", _f1(counts), (max(low, 0.0), min(high, 1.0)))
    correct = predictions.classes[:, 0] == labels
    top1, ece = int(correct.sum()), expected_calibration_error(predictions.confidence, correct)
    accuracy = Accuracy(total, "top-1", top1 / total, wilson_interval(top1, total), ece=ece)
    if truth.task is not Task.SINGLE_LABEL or truth.classes <= TOP:
        return accuracy
    top5 = int((predictions.classes == labels[:, None]).any(axis=1).sum())
    return replace(accuracy, top5=top5 / total, top5_interval=wilson_interval(top5, total))


def compare_predictions(
    before: Predictions, after: Predictions, truth: GroundTruth, numeric: str
) -> ArtifactLoss:
    """Return an artifact's accuracy loss against PyTorch, and the findings of its gate.

    Args:
        before: PyTorch's predictions.
        after: the artifact's predictions for the same images.
        truth: labels of the images.
        numeric: numeric class of the artifact.
    """
    profile = truth.rules.of(numeric)
    floor = gates.sqnr_floor(numeric, truth.noise_db, profile)
    allowed, task = gates.allowed_loss(numeric, profile), truth.task
    labels, total = truth.labels, len(truth.labels)
    changes, at_chance = tuple[Mapping[str, int], ...](), False
    if task is Task.MULTI_LABEL:
        reference, actual = (_label_counts(each, labels) for each in (before, after))

        def f1_loss(rows: npt.NDArray[np.int64]) -> float:
            return 100 * (_f1(reference[rows]) - _f1(actual[rows]))

        interval = bootstrap_interval(f1_loss, total, 100.0)
        loss = gates.Loss(total, f1_loss(np.arange(total)), interval)
        # Hits beyond those of predictions that do not depend on the image.
        surplus = ((before.classes == 1) * (labels - labels.mean(axis=0))).sum(axis=1)
        at_chance = bootstrap_interval(lambda rows: float(surplus[rows].mean()), total, 0.0)[0] <= 0
    else:
        correct, still_correct = (each.classes[:, 0] == labels for each in (before, after))
        won = int((~correct & still_correct).sum())
        loss = gates.paired_loss(int((correct & ~still_correct).sum()), won, total)
        changes = _changed_classes(labels, correct, still_correct)
        at_chance = gates.is_at_chance(int(correct.sum()), total, truth.classes)
    signal = float(before.power.mean())
    sqnr = metrics.decibels(signal, float(after.noise.mean()))
    margins = before.margins / (math.sqrt(signal) or 1.0)  # in RMS logits
    explained = gates.flip_margin(floor.value, task)
    flips = metrics.flips_between(before.classes, after.classes, margins, explained)
    lossy, metric = gates.CLASSES[numeric].lossy, "F1" if task is Task.MULTI_LABEL else "top-1"
    findings = [] if lossy else gates.check_near_lossless(sqnr, floor, flips, task)
    findings.append(gates.check_loss(loss, allowed, metric, lossy, at_chance=at_chance))
    pairs = Counter((flip.expected, flip.actual) for flip in flips)
    most_common = sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))[:MAX_ROWS]
    confusions = tuple((*pair, count) for pair, count in most_common)
    return ArtifactLoss(numeric, loss, tuple(findings), sqnr, len(flips), confusions, changes)


def _label_counts(predictions: Predictions, labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return each image's numbers of predicted labels, true labels, and hits, ``(N, 3)``."""
    predicted, expected = predictions.classes == 1, labels.astype(bool)
    return np.stack([predicted.sum(1), expected.sum(1), (predicted & expected).sum(1)], axis=1)


def _f1(counts: npt.NDArray[np.int64]) -> float:
    """Return the micro F1 of images' counts: twice the hits over predicted plus true labels."""
    predicted, expected, hits = counts.sum(axis=0).tolist()
    return 2 * hits / (predicted + expected) if predicted + expected else 1.0


def expected_calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> float:
    """Return the expected calibration error (ECE), 0 to 1.

    The mean over images of ``|accuracy - mean confidence|`` of each image's bin, one of
    :data:`ECE_BINS` of equal width ``(k/bins, (k+1)/bins]``.

    Args:
        confidence: ``(N,)`` probability of the top-1 class, 0 to 1.
        correct: ``(N,)`` whether the top-1 class is correct.
    """
    scores, hits = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    index = np.clip(np.ceil(scores * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    surplus = np.bincount(index, weights=scores - hits, minlength=ECE_BINS)
    return float(np.abs(surplus).sum() / len(scores))


def _changed_classes(
    labels: npt.NDArray[Any], before: npt.NDArray[Any], after: npt.NDArray[Any]
) -> tuple[Mapping[str, int], ...]:
    """Return the classes whose accuracy changed, the largest change first.

    Args:
        labels: ``(N,)`` classes.
        before: ``(N,)`` whether PyTorch is correct.
        after: ``(N,)`` whether the artifact is correct.
    """
    columns = [np.bincount(labels, hits, labels.max() + 1) for hits in (None, before, after)]
    rows = [(label, *map(int, counts)) for label, counts in enumerate(zip(*columns, strict=True))]
    changed = sorted((r for r in rows if r[2] != r[3]), key=lambda r: (-abs(r[3] - r[2]), r[0]))
    names = ("label", "images", "before", "after")
    return tuple(dict(zip(names, row, strict=True)) for row in changed[:MAX_ROWS])


# --- the evaluation --------------------------------------------------------------------------

# Indices of the images, index and reason of unreadable images, predictions of each network.
BatchResult = tuple[Sequence[int], tuple[tuple[int, str], ...], dict[str, Predictions]]


@dataclass(frozen=True)
class EvaluateReport(gates.GateReport):
    """Accuracy of PyTorch and each artifact.

    Attributes:
        images: description of the evaluation set and the source of its labels.
        dataset_sha256: digest of the evaluation set: names, contents and labels.
        task: how logits become labels.
        unreadable: file and reason of each image that could not be read.
        accuracy: accuracy by network, PyTorch first.
        losses: loss against PyTorch by artifact.
        skipped: finding of each artifact that did not run.
        runners: runner of each network.
        class_names: class names for the report, or None.
        seconds: duration.
        allowed: the user's allow options.
        schema: schema of the document.
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
        """Number of images that were classified."""
        return self.accuracy[PYTORCH].images

    def named_findings(self) -> list[tuple[str, gates.Finding]]:
        """Return every finding with its artifact, including skipped artifacts."""
        findings = [(name, f) for name, loss in self.losses.items() for f in loss.findings]
        return [*findings, *self.skipped.items()]


def evaluate_bundle(
    bundle: Bundle,
    loaded: LoadedVan,
    settings: EvaluationSettings,
    rules: GateSettings,
    progress: Progress,
) -> EvaluateReport:
    """Return the accuracy of PyTorch and of each artifact of ``bundle`` on labelled images.

    Args:
        bundle: the bundle.
        loaded: its original network.
        settings: images, labels and execution.
        rules: limits of the recipe, which take precedence.
        progress: called with the number of images that are done.

    Raises:
        BundleError: an artifact is missing, or does not match the manifest.
        ImageError: no image can be read.
        MissingDependency: Ray is requested and not installed.
        ConversionError: a machine of the Ray cluster failed.
        UsageError: the network outputs feature maps, or the values of a regression.
    """
    require_classifier(bundle, "evaluate")
    task = task_of(bundle)
    if task is Task.REGRESSION:
        raise UsageError(
            f"The bundle '{bundle.path}' returns the values of a regression, and `evaluate` "
            "needs classes.",
            "`van-deploy verify` compares the values.",
        )
    images, labels = _labelled_set(settings, task, loaded)
    noise_db = samples_for(bundle, None if bundle.manifest.golden else loaded, None).noise_db
    rows, unreadable, pieces = list[int](), list[tuple[int, str]](), list[dict[str, Predictions]]()
    start, total = time.perf_counter(), len(images)
    with Networks(bundle, loaded, settings) as networks:
        for indices, failed, predicted in _predict(networks, images):
            rows += indices
            unreadable += failed
            pieces += [predicted] if predicted else []
            done = len(rows) + len(unreadable)
            progress(f"{done} of {total} images", done, total)
    unreadable.sort()
    if not rows:
        raise ImageError(
            f"None of the {total} images could be read; the first: {unreadable[0][1]}",
            "Give readable images with --images.",
        )
    order, predictions = np.argsort(rows), dict[str, Predictions]()
    for name in networks.runners:
        columns = zip(*(predicted[name] for predicted in pieces), strict=True)
        predictions[name] = Predictions(*(np.concatenate(column)[order] for column in columns))
    truth = GroundTruth(labels[np.sort(rows)], loaded.config.num_classes, task, noise_db, rules)
    return EvaluateReport(
        images=images.description,
        dataset_sha256=content_key({"set": images.digest, "labels": labels.tolist()}),
        task=task,
        unreadable=tuple((images.items[index].name, reason) for index, reason in unreadable),
        accuracy={name: measure_accuracy(own, truth) for name, own in predictions.items()},
        losses={
            name: compare_predictions(predictions[PYTORCH], predictions[name], truth, numeric)
            for name, numeric in networks.numeric.items()
        },
        skipped=networks.skipped,
        runners=networks.runners,
        class_names=loaded.class_names,
        seconds=time.perf_counter() - start,
        allowed=gates.AllowOptions(settings.allow_skip, settings.allow_inconclusive),
    )


def _labelled_set(
    settings: EvaluationSettings, task: Task, loaded: LoadedVan
) -> tuple[ImageSet, npt.NDArray[Any]]:
    """Return the evaluation set and its labels."""
    classes, names = loaded.config.num_classes, loaded.class_names
    if task is Task.MULTI_LABEL:
        images = image_set(settings.images)
        images = images.subsample(settings.limit or len(images))
        labels = multi_label_targets(images, settings.labels, classes, names)
        description = f"{images.description}, labels from '{settings.labels}'"
        return replace(images, description=description), labels
    options: dict[str, Any] = {"labels_file": settings.labels, "find_labels": settings.label_files}
    order = settings.class_order
    images = label_images(settings.images, classes, names, class_order=order, **options)
    images = images.subsample(settings.limit or len(images))
    return images, np.asarray(images.labels)


def _predict(networks: Networks, images: ImageSet) -> Iterator[BatchResult]:
    """Yield the networks' predictions, batch by batch, computed here or on Ray."""
    settings = networks.settings
    if settings.on == "here":
        yield from _predict_here(networks, images)
        return
    step = settings.batch * BATCHES_PER_TASK
    tasks = [
        RayTask(start, (range(start, min(start + step, len(images))),), {"num_cpus": 1})
        for start in range(0, len(images), step)
    ]
    bundle, names = networks.bundle, tuple(networks.runners)
    shared = (str(bundle.path.absolute()), _bundle_key(bundle), names, images, settings)
    for done in run_on_ray(_on_worker, tasks, shared=shared, address=settings.ray_address or None):
        if done.failure:
            raise ConversionError(
                f"A machine of the Ray cluster failed: {done.failure}",
                "Every machine must see bundle, weights and images under the same paths.",
            )
        yield from done.result


def _predict_here(
    networks: Networks, images: ImageSet, indices: Sequence[int] = ()
) -> Iterator[BatchResult]:
    """Yield the networks' predictions, batch by batch; none for batches without readable images.

    Args:
        networks: PyTorch and the artifacts.
        images: the evaluation set.
        indices: indices of the images, decoded by one thread; all images if empty.
    """
    preprocessing, task = networks.loaded.preprocessing, task_of(networks.bundle)
    workers = 1 if indices else networks.settings.workers or len(os.sched_getaffinity(0))
    options: dict[str, Any] = {"indices": indices or None, "workers": workers}
    for batch in decoded_batches(images.items, preprocessing, networks.settings.batch, **options):
        logits = networks.logits(batch) if batch.indices else {}
        predictions = {
            name: Predictions.of(y, task, None if name == PYTORCH else logits[PYTORCH])
            for name, y in logits.items()
        }
        yield batch.indices, batch.unreadable, predictions


def _bundle_key(bundle: Bundle) -> str:
    """Return a digest of a bundle's files, original weights and preprocessing."""
    network = bundle.manifest.weights, bundle.manifest.preprocessing
    return content_key({"files": bundle.digests, "network": plain(network)})


def _on_worker(
    shared: tuple[str, str, tuple[str, ...], ImageSet, EvaluationSettings], indices: Sequence[int]
) -> list[BatchResult]:
    """Return the predictions for some images on a Ray worker, which loads the networks once."""
    path, key, names, images, settings = shared
    networks = _worker_networks(path, key, settings)
    if missing := set(names).difference(networks.runners):
        raise ConversionError(f"It cannot run {', '.join(sorted(missing))}.")
    return list(_predict_here(networks, images, indices))


@lru_cache(maxsize=1)
def _worker_networks(path: str, key: str, settings: EvaluationSettings) -> Networks:
    """Return the networks of the bundle at ``path``; with another key they are loaded again."""
    import torch

    torch.set_num_threads(1)
    bundle = Bundle.open(path)
    if _bundle_key(bundle) != key:
        raise ConversionError(f"Its bundle '{path}' has other files.")
    return Networks(bundle, original_network(bundle, settings.weights), settings, threads=1)
