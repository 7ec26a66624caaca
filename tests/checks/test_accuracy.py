"""Accuracy and loss of single-label, binary and multi-label predictions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tests.each import each
from van_deploy.checks.evaluate import (
    ECE_BINS,
    Accuracy,
    ArtifactLoss,
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


def measure(
    task: Task, labels: Any, expected: npt.NDArray[Any], actual: npt.NDArray[Any]
) -> tuple[Accuracy, ArtifactLoss]:
    """Return the accuracy of an FP16 artifact, and its loss against PyTorch."""
    before, after = Predictions.of(expected, task), Predictions.of(actual, task, expected)
    truth = GroundTruth(np.array(labels), expected.shape[1], task)
    return measure_accuracy(after, truth), compare_predictions(before, after, truth, "fp16")


def test_single_label_accuracy_and_loss() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    logits = np.full((2, 8, 10), math.log(0.1 / 9), np.float32)
    for row, classes in enumerate(([0, 1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 2, 0, 3, 3])):
        logits[row, range(8), classes] = math.log(0.9)
    after, before = logits
    accuracy, _ = measure(SINGLE, labels, after, before)
    assert (accuracy.images, accuracy.metric, accuracy.top1) == (8, "top-1", 0.875)
    assert (accuracy.top5, accuracy.ece) == (1.0, pytest.approx(0.025, abs=1e-6))
    five, _ = measure(SINGLE, labels, after[:, :5], before[:, :5])
    assert (five.top1, five.top5, five.top5_interval) == (0.875, None, None)
    _, found = measure(SINGLE, labels, before, after)
    assert (found.loss.lost, found.loss.won, found.loss.loss) == (3, 1, 25.0)
    assert found.loss.p_value == binomtest(3, 4, 0.5).pvalue
    changed = [tuple(change.values()) for change in found.classes]
    assert changed == [(3, 2, 2, 0), (0, 2, 2, 1), (2, 2, 1, 2)]
    assert found.confusions == ((3, 0, 2), (0, 1, 1), (0, 2, 1))


def test_nan_logits_are_wrong_predictions() -> None:
    reference = np.array([[3.0, 1.0, 2.0]] * 2, np.float32)
    logits = reference.copy()
    logits[1, 0] = np.nan
    found = Predictions.of(logits, SINGLE, reference)
    assert found.classes.tolist() == [[0, 2, 1], [-1, -1, -1]]
    assert found.confidence[1] == 0
    accuracy, result = measure(SINGLE, [0, 0], reference, logits)
    assert (accuracy.top1, result.sqnr_db, result.outcome) == (0.5, -math.inf, Outcome.FAIL)
    assert result.confusions == ((0, -1, 1),)


def test_sqnr_and_flips_of_the_whole_set() -> None:
    rng = np.random.default_rng(3)
    expected = rng.normal(size=(10, 4)).astype(np.float32)
    actual = expected + 0.3 * rng.normal(size=(10, 4)).astype(np.float32)
    _, result = measure(SINGLE, [0] * 10, expected, actual)
    noise = np.square(actual.astype(np.float64) - expected).sum()
    signal = np.square(expected.astype(np.float64)).sum()
    assert result.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
    changed = np.flatnonzero(expected.argmax(1) != actual.argmax(1))
    assert result.flips == len(changed) > 0
    (flips,) = (f for f in result.findings if f.rule == "label flips")
    ordered = np.sort(expected[changed])
    widest = (ordered[:, -1] - ordered[:, -2]).max() / math.sqrt(signal / expected.size)
    assert flips.value == pytest.approx(widest, rel=1e-5)


def test_binary_accuracy_and_loss() -> None:
    expected = np.array([[2.0], [-1.0], [0.5], [-3.0]])
    actual = np.array([[2.0], [1.0], [-0.5], [-3.0]])
    confidence = Predictions.of(actual, BINARY, expected).confidence[[0, 3]].tolist()
    assert confidence == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-3))])
    accuracy, result = measure(BINARY, [1, 0, 1, 0], expected, actual)
    assert (accuracy.top1, accuracy.top5) == (0.5, None)
    assert (result.loss.lost, result.loss.won, result.loss.loss) == (2, 0, 50.0)
    assert result.confusions == ((0, 1, 1), (1, 0, 1))
    extreme = probabilities(np.array([[-1000.0], [0.0], [1000.0]]), BINARY)
    assert extreme.tolist() == [[0.0], [0.5], [1.0]]


def test_multi_label_f1_and_loss() -> None:
    labels, logits = [[1, 0, 1], [0, 1, 1]], np.array([[2.0, -1.0, 3.0], [-2.0, 1.0, -1.0]])
    worse = logits.copy()
    worse[0, 0] = -2.0
    accuracy, result = measure(MULTI, labels, logits, worse)
    assert (accuracy.metric, accuracy.top5, accuracy.ece) == ("F1 (micro)", None, None)
    assert accuracy.top1 == pytest.approx(4 / 6)
    loss = result.loss
    assert loss.loss == pytest.approx(100 * (6 / 7 - 4 / 6))
    assert (loss.lost, loss.won, loss.p_value) == (None, None, None)
    assert loss.interval[0] <= loss.loss <= loss.interval[1]


def test_f1_interval_resamples_images_and_not_labels() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, (30, 1))
    logits = np.where(rng.random((30, 1)) < 0.2, 1 - 2 * one, 2 * one - 1).repeat(200, axis=1)
    low, high = measure(MULTI, one.repeat(200, axis=1), logits, logits)[0].top1_interval
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
