"""Accuracy and what was lost, of one class among K, of one logit, and of many labels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from van_deploy.checks.accuracy import (
    ECE_BINS,
    accuracy_of,
    class_changes,
    confusions,
    expected_calibration_error,
    loss_of,
)
from van_deploy.checks.predictions import Answers, Table, answered
from van_deploy.metrics import Task, probabilities

SINGLE, BINARY, MULTI = Task.SINGLE_LABEL, Task.BINARY, Task.MULTI_LABEL


def answers(classes: list[int], confidence: float = 0.9) -> Answers:
    rows = np.full((len(classes), 5), -1, np.int32)
    rows[:, 0] = classes
    return Answers(rows, np.full(len(classes), confidence, np.float32))


def table_of(
    expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32], task: Task, batch: int = 3
) -> Table:
    """Return the answers of ``pytorch`` and ``x``, entered in batches and out of order."""
    table = Table(len(expected), ["pytorch", "x"], expected.shape[1], task)
    starts = list(range(0, len(expected), batch))
    for start in reversed(starts):
        rows = range(start, min(start + batch, len(expected)))
        logits = {"pytorch": expected[list(rows)], "x": found[list(rows)]}
        table.enter(answered(list(rows), (), logits, "pytorch", task))
    return table


class TestOneClassOfMany:
    def test_counted_by_hand(self) -> None:
        labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
        before, after = answers([0, 0, 1, 1, 2, 0, 3, 0]), answers([0, 1, 1, 1, 2, 2, 0, 0])
        accuracy = accuracy_of(before, labels, 10, SINGLE)
        assert (accuracy.images, accuracy.metric, accuracy.top1) == (8, "top-1", 0.75)
        assert accuracy.ece == pytest.approx(0.15, abs=1e-6)
        loss = loss_of(before, after, labels, SINGLE)
        assert (loss.lost, loss.won, loss.loss) == (2, 1, 12.5)
        assert loss.p_value == binomtest(2, 3, 0.5).pvalue
        assert {
            (c.label, c.images, c.before, c.after) for c in class_changes(before, after, labels)
        } == {
            (0, 2, 2, 1),
            (2, 2, 1, 2),
            (3, 2, 1, 0),
        }

    def test_top5_of_five_classes_is_no_figure(self) -> None:
        """It is 100 % whatever the network says."""
        logits = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
        labels = np.zeros(20, np.int64)
        few = accuracy_of(Answers.of(logits), labels, 5, SINGLE)
        assert (few.top5, few.top5_interval) == (None, None)
        many = accuracy_of(Answers.of(np.tile(logits, 2)), labels, 10, SINGLE)
        assert many.top5 is not None

    def test_a_nan_is_no_answer(self) -> None:
        logits = np.array([[3.0, 1.0, 2.0], [np.nan, 1.0, 2.0]], np.float32)
        found = Answers.of(logits)
        assert found.classes.tolist() == [[0, 2, 1], [-1, -1, -1]]
        assert found.confidence[1] == 0
        assert accuracy_of(found, np.array([0, 0]), 3, SINGLE).top1 == 0.5

    def test_noise_and_flips_over_the_whole_set(self) -> None:
        rng = np.random.default_rng(3)
        expected = rng.normal(size=(10, 4)).astype(np.float32)
        found = expected + 0.3 * rng.normal(size=(10, 4)).astype(np.float32)
        table = table_of(expected, found, SINGLE)
        noise = np.square(found.astype(np.float64) - expected).sum()
        signal = np.square(expected.astype(np.float64)).sum()
        assert table.sqnr_db("x") == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
        changed = np.flatnonzero(expected.argmax(1) != found.argmax(1))
        flips = table.flips("x", explained=0.1)
        assert sorted(f.image for f in flips) == changed.tolist()
        scale = math.sqrt(signal / expected.size)
        for flip in flips:
            first, second = np.sort(expected[flip.image])[::-1][:2]
            assert flip.margin == pytest.approx((first - second) / scale, rel=1e-5)
            assert flip.fault == (flip.margin > 0.1)
        assert sum(count for _, _, count in confusions(flips)) == len(flips)

    def test_an_unreadable_image_is_left_out(self) -> None:
        table = Table(3, ["pytorch", "x"], 4, SINGLE)
        logits = np.eye(4, dtype=np.float32)[:2]
        names = {"pytorch": logits, "x": logits}
        table.enter(answered([0, 2], [(1, "torn")], names, "pytorch", SINGLE))
        assert table.answers("x").classes[:, 0].tolist() == [0, 1]
        assert table.unreadable == {1: "torn"}


class TestOneLogit:
    def test_decisions_at_half_and_no_argmax(self) -> None:
        expected = np.array([[2.0], [-1.0], [0.5], [-3.0]], np.float32)
        found = np.array([[2.0], [1.0], [-0.5], [-3.0]], np.float32)
        labels = np.array([1, 0, 1, 0])
        table = table_of(expected, found, BINARY)
        before, after = table.answers("pytorch"), table.answers("x")
        assert before.classes[:, 0].tolist() == [1, 0, 1, 0]
        assert after.confidence[0] == pytest.approx(1 / (1 + math.exp(-2)))
        assert after.confidence[3] == pytest.approx(1 / (1 + math.exp(-3)))
        accuracy = accuracy_of(after, labels, 1, BINARY)
        assert (accuracy.top1, accuracy.top5) == (0.5, None)
        loss = loss_of(before, after, labels, BINARY)
        assert (loss.lost, loss.won, loss.loss) == (2, 0, 50.0)
        assert [(f.image, f.expected, f.found) for f in table.flips("x", 0.0)] == [
            (1, 0, 1),
            (2, 1, 0),
        ]


class TestManyLabels:
    LOGITS = np.array([[2.0, -1.0, 3.0], [-2.0, 1.0, -1.0]], np.float32)
    LABELS = np.array([[1, 0, 1], [0, 1, 1]])

    def test_f1_counted_by_hand(self) -> None:
        accuracy = accuracy_of(Answers.of(self.LOGITS, MULTI), self.LABELS, 3, MULTI)
        assert accuracy.metric == "F1 (micro)"
        assert accuracy.top1 == pytest.approx(2 * 3 / (3 + 4))
        assert (accuracy.top5, accuracy.ece) == (None, None)

    def test_the_interval_resamples_images_and_not_decisions(self) -> None:
        """A thousand labels of one image are no thousand observations."""
        rng = np.random.default_rng(0)
        one = rng.integers(0, 2, (30, 1))
        labels = np.repeat(one, 200, axis=1)
        logits = np.where(rng.random((30, 1)) < 0.2, 1 - 2 * one, 2 * one - 1)
        found = Answers.of(np.repeat(logits, 200, axis=1).astype(np.float32), MULTI)
        low, high = accuracy_of(found, labels, 200, MULTI).top1_interval
        assert high - low > 0.15

    def test_the_loss_is_in_points_of_f1(self) -> None:
        worse = self.LOGITS.copy()
        worse[0, 0] = -2.0
        before, after = Answers.of(self.LOGITS, MULTI), Answers.of(worse, MULTI)
        loss = loss_of(before, after, self.LABELS, MULTI)
        assert loss.loss == pytest.approx(100 * (6 / 7 - 4 / 6))
        assert (loss.lost, loss.won, loss.p_value) == (None, None, None)
        assert loss.interval[0] <= loss.loss <= loss.interval[1]


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
def test_the_calibration_error_is_its_definition(found: list[tuple[int, bool]]) -> None:
    # Not on the edge of a bin, where the last digit of a float decides.
    confidence = [min((share + 0.5) / 10_001, 1.0) for share, _ in found]
    correct = [right for _, right in found]
    expected = plain_ece(confidence, correct, ECE_BINS)
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)


def test_sigmoids_do_not_overflow() -> None:
    found = probabilities(np.array([[-1000.0], [0.0], [1000.0]]), BINARY)
    assert found.tolist() == [[0.0], [0.5], [1.0]]
