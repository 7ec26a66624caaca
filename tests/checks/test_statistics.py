"""Intervals, tests and calibration error against scipy and their plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from van_deploy.checks.accuracy import accuracy_of, paired_drift
from van_deploy.checks.contestants import Answers
from van_deploy.checks.statistics import (
    ECE_BINS,
    bootstrap,
    expected_calibration_error,
)


def plain_ece(confidence: list[float], correct: list[bool], bins: int) -> float:
    """Return Guo et al.'s definition, bin by bin."""
    total = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (index == c == 0)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.booleans()), min_size=1, max_size=80))
def test_the_calibration_error_is_its_definition(answers: list[tuple[int, bool]]) -> None:
    # Not on the edge of a bin, where the last digit of a float decides.
    confidence = [min((share + 0.5) / 10_001, 1.0) for share, _ in answers]
    correct = [right for _, right in answers]
    expected = plain_ece(confidence, correct, ECE_BINS)
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)


def test_a_calibrated_network_has_no_error_and_a_boastful_one_all_of_it() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.1, 1.0, 200_000)
    assert expected_calibration_error(confidence, rng.uniform(size=200_000) < confidence) < 0.005
    assert expected_calibration_error([1.0, 1.0], [False, False]) == 1.0


def test_the_bootstrap_finds_a_means_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=400)
    means = bootstrap(400, lambda rows: float(values[rows].mean()), 2000)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.06)
    again = bootstrap(400, lambda rows: float(values[rows].mean()), 2000)
    assert np.array_equal(means, again)


def answers(classes: list[int], confidence: float = 0.9) -> Answers:
    rows = np.full((len(classes), 5), -1, np.int32)
    rows[:, 0] = classes
    return Answers(rows, np.full(len(classes), confidence, np.float32))


def test_accuracy_and_drift_of_answers_counted_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    before, after = answers([0, 0, 1, 1, 2, 0, 3, 0]), answers([0, 1, 1, 1, 2, 2, 0, 0])
    accuracy = accuracy_of(before, labels)
    assert (accuracy.images, accuracy.top1) == (8, 0.75)
    assert accuracy.ece == pytest.approx(0.15, abs=1e-6)
    drift = paired_drift(before, after, labels, 0.5)
    assert (drift.lost, drift.won, drift.change) == (2, 1, -0.125)
    assert drift.top1_drop == 12.5
    assert drift.p_value == binomtest(2, 3, 0.5).pvalue
    assert drift.passed  # one in eight, and chance explains it
    assert drift.note.startswith("not proved: with 8 images up to")
    assert drift.agreement == 0.625
    assert set(drift.confusions) == {(0, 1, 1), (0, 2, 1), (3, 0, 1)}
    assert {(c.label, c.images, c.before, c.after) for c in drift.classes} == {
        (0, 2, 2, 1),
        (2, 2, 1, 2),
        (3, 2, 1, 0),
    }


@pytest.mark.parametrize(("lost", "passed"), [(5, True), (6, False)])
def test_the_gate_wants_a_loss_and_significance(lost: int, passed: bool) -> None:
    labels = np.zeros(100, np.int64)
    after = answers([1] * lost + [0] * (100 - lost))
    drift = paired_drift(answers([0] * 100), after, labels, 1.0)
    assert drift.passed is passed
    assert paired_drift(answers([0] * 100), after, labels, 10.0).passed


def test_a_nan_is_no_answer() -> None:
    logits = np.array([[3.0, 1.0, 2.0], [np.nan, 1.0, 2.0]], np.float32)
    found = Answers.of(logits)
    assert found.classes[:, :3].tolist() == [[0, 2, 1], [-1, -1, -1]]
    assert found.confidence[1] == 0
    assert accuracy_of(found, np.array([0, 0])).top1 == 0.5
