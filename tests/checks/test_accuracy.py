"""Accuracy and loss of single-label, binary and multi-label predictions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tests.each import each
from van_deploy.checks.evaluate import (
    ECE_BINS,
    GroundTruth,
    Predictions,
    compare_predictions,
    expected_calibration_error,
    measure_accuracy,
)
from van_deploy.checks.gates import Outcome
from van_deploy.checks.regression import ROUNDS, WARMUP_ROUNDS, paired_ratio
from van_deploy.metrics import Task, probabilities

SINGLE, BINARY, MULTI = Task.SINGLE_LABEL, Task.BINARY, Task.MULTI_LABEL


def predictions(classes: list[int], confidence: float = 0.9) -> Predictions:
    """Return predictions for ten classes with these top-1 classes and this confidence."""
    logits = np.full((len(classes), 10), math.log((1 - confidence) / 9))
    logits[range(len(classes)), classes] = math.log(confidence)
    return Predictions.of(logits.astype(np.float32))


def test_single_label_accuracy_and_loss() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    before, after = (predictions(c) for c in ([0, 0, 1, 1, 2, 0, 3, 3], [0, 1, 1, 1, 2, 2, 0, 0]))
    accuracy = measure_accuracy(before, GroundTruth(labels, 10, SINGLE))
    assert (accuracy.images, accuracy.metric, accuracy.top1) == (8, "top-1", 0.875)
    assert accuracy.ece == pytest.approx(0.025, abs=1e-6)
    found = compare_predictions(before, after, GroundTruth(labels, 10, SINGLE), "int8")
    assert (found.loss.lost, found.loss.won, found.loss.loss) == (3, 1, 25.0)
    assert found.loss.p_value == binomtest(3, 4, 0.5).pvalue
    changed = [tuple(change.values()) for change in found.classes]
    assert changed == [(3, 2, 2, 0), (0, 2, 2, 1), (2, 2, 1, 2)]
    assert found.confusions == ((3, 0, 2), (0, 1, 1), (0, 2, 1))


def test_no_top5_accuracy_of_five_classes() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    labels = np.zeros(20, np.int64)
    few = measure_accuracy(Predictions.of(logits), GroundTruth(labels, 5, SINGLE))
    assert (few.top5, few.top5_interval) == (None, None)
    assert (
        measure_accuracy(Predictions.of(np.tile(logits, 2)), GroundTruth(labels, 10, SINGLE)).top5
        is not None
    )


def test_nan_logits_are_wrong_predictions() -> None:
    reference = np.array([[3.0, 1.0, 2.0]] * 2, np.float32)
    logits = np.array([[3.0, 1.0, 2.0], [np.nan, 1.0, 2.0]], np.float32)
    found, truth = (
        Predictions.of(logits, SINGLE, reference),
        GroundTruth(np.array([0, 0]), 3, SINGLE),
    )
    assert found.classes.tolist() == [[0, 2, 1], [-1, -1, -1]]
    assert found.confidence[1] == 0
    assert measure_accuracy(found, truth).top1 == 0.5
    result = compare_predictions(Predictions.of(reference), found, truth, "fp16")
    assert (result.sqnr_db, result.outcome) == (-math.inf, Outcome.FAIL)
    assert result.confusions == ((0, -1, 1),)


def test_sqnr_and_flips_of_the_whole_set() -> None:
    rng = np.random.default_rng(3)
    expected = rng.normal(size=(10, 4)).astype(np.float32)
    found = expected + 0.3 * rng.normal(size=(10, 4)).astype(np.float32)
    before, after = Predictions.of(expected), Predictions.of(found, SINGLE, expected)
    result = compare_predictions(before, after, GroundTruth(np.zeros(10, int), 4, SINGLE), "fp16")
    noise = np.square(found.astype(np.float64) - expected).sum()
    signal = np.square(expected.astype(np.float64)).sum()
    assert result.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
    changed = np.flatnonzero(expected.argmax(1) != found.argmax(1))
    assert result.flips == len(changed) > 0
    (flips,) = (f for f in result.findings if f.rule == "label flips")
    ordered = np.sort(expected[changed])
    widest = (ordered[:, -1] - ordered[:, -2]).max() / math.sqrt(signal / expected.size)
    assert flips.value == pytest.approx(widest, rel=1e-5)


def test_binary_accuracy_and_loss() -> None:
    expected = np.array([[2.0], [-1.0], [0.5], [-3.0]], np.float32)
    found = np.array([[2.0], [1.0], [-0.5], [-3.0]], np.float32)
    labels = np.array([1, 0, 1, 0])
    before, after = Predictions.of(expected, BINARY), Predictions.of(found, BINARY, expected)
    assert before.classes[:, 0].tolist() == [1, 0, 1, 0]
    sure = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-3))]
    assert after.confidence[[0, 3]].tolist() == pytest.approx(sure)
    accuracy = measure_accuracy(after, GroundTruth(labels, 1, BINARY))
    assert (accuracy.top1, accuracy.top5) == (0.5, None)
    result = compare_predictions(before, after, GroundTruth(labels, 1, BINARY), "fp16")
    assert (result.loss.lost, result.loss.won, result.loss.loss) == (2, 0, 50.0)
    assert result.confusions == ((0, 1, 1), (1, 0, 1))
    extreme = probabilities(np.array([[-1000.0], [0.0], [1000.0]]), BINARY)
    assert extreme.tolist() == [[0.0], [0.5], [1.0]]


LOGITS = np.array([[2.0, -1.0, 3.0], [-2.0, 1.0, -1.0]], np.float32)
LABELS = np.array([[1, 0, 1], [0, 1, 1]])


def test_multi_label_f1_and_loss() -> None:
    worse = LOGITS.copy()
    worse[0, 0] = -2.0
    before, after = Predictions.of(LOGITS, MULTI), Predictions.of(worse, MULTI)
    accuracy = measure_accuracy(before, GroundTruth(LABELS, 3, MULTI))
    assert (accuracy.metric, accuracy.top5, accuracy.ece) == ("F1 (micro)", None, None)
    assert accuracy.top1 == pytest.approx(2 * 3 / (3 + 4))
    loss = compare_predictions(before, after, GroundTruth(LABELS, 3, MULTI), "int8").loss
    assert loss.loss == pytest.approx(100 * (6 / 7 - 4 / 6))
    assert (loss.lost, loss.won, loss.p_value) == (None, None, None)
    assert loss.interval[0] <= loss.loss <= loss.interval[1]


def test_f1_interval_resamples_images_and_not_labels() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, (30, 1))
    logits = np.where(rng.random((30, 1)) < 0.2, 1 - 2 * one, 2 * one - 1)
    found = Predictions.of(np.repeat(logits, 200, axis=1).astype(np.float32), MULTI)
    labels = np.repeat(one, 200, axis=1)
    low, high = measure_accuracy(found, GroundTruth(labels, 200, MULTI)).top1_interval
    assert high - low > 0.15


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.booleans()), min_size=1, max_size=80))
def test_calibration_error_by_its_definition(results: list[tuple[int, bool]]) -> None:
    # Not on the edge of a bin, where the last digit of a float decides.
    confidence = np.array([min((share + 0.5) / 10_001, 1.0) for share, _ in results])
    correct, bins = np.array([right for _, right in results]), np.arange(ECE_BINS) / ECE_BINS
    inside = [(low < confidence) & (confidence <= low + 1 / ECE_BINS) for low in bins]
    total = sum(abs((correct[rows] - confidence[rows]).sum()) for rows in inside) / len(results)
    assert expected_calibration_error(confidence, correct) == pytest.approx(total, abs=1e-12)


@each("slow", [[6.0], [4.0, 6.0, 9.0]])
def test_varying_times_get_more_rounds(monkeypatch: pytest.MonkeyPatch, slow: list[float]) -> None:
    now, times, rounds = [0.0], itertools.cycle(slow), [-WARMUP_ROUNDS]

    def takes(seconds: float, round_: int) -> None:
        now[0] += seconds
        rounds[0] += round_

    monkeypatch.setattr("van_deploy.checks.regression.time.perf_counter", lambda: now[0])
    ratio = paired_ratio(lambda: takes(next(times), 1), lambda: takes(2.0, 0))
    assert ratio.interval
    assert ratio.interval[0] <= ratio.value == 3.0 <= ratio.interval[1]
    assert (rounds[0] == ROUNDS[0]) is (len(slow) == 1)
