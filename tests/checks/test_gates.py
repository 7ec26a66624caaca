"""Limits and their origins, outcomes, rules for logits and losses, and accuracy of predictions."""

import itertools
import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score

from tests.each import each
from van_deploy.checks import evaluate, gates
from van_deploy.checks.evaluate import ECE_BINS, GroundTruth, Predictions
from van_deploy.checks.gates import AllowOptions, Finding, GateReport, Limit, Loss, Outcome
from van_deploy.checks.regression import ROUNDS, WARMUP_ROUNDS, paired_ratio
from van_deploy.config import GateProfile
from van_deploy.metrics import Task, compare, decisions, find_flips, probabilities

PASS, FAIL, INCONCLUSIVE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE
SINGLE, BINARY, MULTI = Task.SINGLE_LABEL, Task.BINARY, Task.MULTI_LABEL
INT8, FP16 = gates.allowed_loss("int8"), gates.allowed_loss("fp16")
LOGITS = np.random.default_rng(0).normal(size=(40, 10))


def noisy(sqnr_db: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(size=LOGITS.shape)
    noise *= np.sqrt(np.square(LOGITS).sum() / np.square(noise).sum())
    return LOGITS + noise * 10 ** (-sqnr_db / 20)


def with_row(row: int, values: float | np.ndarray) -> np.ndarray:
    logits = LOGITS.copy()
    logits[row] = values
    return logits


@each(
    ("numeric", "noise", "floor", "origin"),
    [
        ("fp32", 134.8, 114.8, "PyTorch's own float32 noise, 134.8 dB, minus 20"),
        ("fp32", 30.0, 20.0, "PyTorch's own float32 noise, 30.0 dB, minus 20"),
        ("fp32", math.inf, 124.5, "PyTorch's own float32 noise, 144.5 dB, minus 20"),
        ("tf32", 134.8, 50, "floor for tf32"),
        ("fp16", 134.8, 45, "floor for fp16"),
        ("bf16", 134.8, 30, "floor for bf16"),
        ("int8", 20.0, 20, "floor for int8"),  # the noise does not lower the floor
    ],
)
def test_limits_and_their_origins(numeric: str, noise: float, floor: float, origin: str) -> None:
    limit = gates.sqnr_floor(numeric, noise)
    assert (round(limit.value, 6), limit.origin) == (floor, origin)
    recipe = GateProfile(sqnr_db=60.0, top1_loss=2.0)
    assert gates.sqnr_floor(numeric, noise, recipe) == Limit(60.0, f"recipe [gates.{numeric}]")
    assert gates.allowed_loss(numeric, recipe) == Limit(2.0, f"recipe [gates.{numeric}]")
    precision = numeric.replace("tf32", "fp32")
    assert gates.numeric_class(precision, tf32=numeric == "tf32") == numeric


def test_the_worst_outcome_decides() -> None:
    undecided = [Finding("a", PASS), Finding("b", INCONCLUSIVE)]
    assert gates.outcome_of(undecided) is INCONCLUSIVE
    assert gates.outcome_of([*undecided, gates.pass_or_fail("c", "wrong")]) is FAIL
    assert gates.outcome_of([Finding("a", PASS), gates.skipped_finding("b", "")]) is PASS
    assert gates.outcome_of([]) is Outcome.SKIPPED


class Report(GateReport):
    """A report with these findings."""

    def __init__(self, allowed: AllowOptions, *findings: Finding) -> None:
        self.allowed, self.findings = allowed, findings

    def named_findings(self) -> list[tuple[str, Finding]]:
        return [(finding.rule, finding) for finding in self.findings]


@each(
    ("finding", "needs"),
    [
        (Finding("b", INCONCLUSIVE), AllowOptions(inconclusive=True)),
        (gates.skipped_finding("b", "no GPU", "engines"), AllowOptions(("engines",))),
        (gates.skipped_finding("b", "no TensorRT", "runtimes"), AllowOptions(("runtimes",))),
        (gates.pass_or_fail("b", "wrong"), None),
        (gates.skipped_finding("b", "it gives no logits"), None),
    ],
)
def test_skips_and_undecided_findings_need_their_own_option(
    finding: Finding, needs: AllowOptions | None
) -> None:
    shown, alone = Finding("a", PASS), finding.outcome is INCONCLUSIVE
    images = Finding("preprocessing/0.png", PASS)
    for allowed in (AllowOptions(), AllowOptions(("accuracy", "speed"))):
        assert Report(allowed, shown, finding).rejected == [("b", finding)]
        assert not Report(allowed, shown, finding)
    everything = AllowOptions(("engines", "runtimes", "accuracy", "speed"), True)
    assert Report(everything, shown, finding).passed is (needs is not None)
    if needs is not None:
        assert Report(needs, shown, finding)
        assert Report(needs, images, finding).passed is alone, "a skip alone is no PASS"
        assert Report(needs, images, finding).accepts(finding) is alone


@each(
    ("numeric", "actual", "recorded", "rules", "message"),
    [
        ("fp16", noisy(44.0), None, ["SQNR"], "44.0 dB is below 45.0 dB (floor for "),
        ("fp16", noisy(44.98), None, ["SQNR"], "44.98 dB is below 45.00 dB (floor for "),
        ("int8", noisy(35.0), 38.9, ["SQNR"], "(38.9 dB recorded at creation, minus 3)"),
        ("int8", noisy(19.0), 21.0, ["SQNR"], "(floor for int8)"),
        ("int8", noisy(38.0), 38.9, [], ""),
        ("fp16", with_row(17, noisy(32.0)[17]), None, ["worst image"], ""),
        ("int8", with_row(3, np.nan), None, ["SQNR", "worst image", "label flips"], ""),
        ("int8", with_row(3, np.inf), None, ["SQNR", "worst image", "label flips"], ""),
        ("int8", LOGITS[:, :9], None, ["shape"], "(40, 9), PyTorch's output has (40, 10)"),
    ],
)
def test_logits_that_fail_name_the_limit(
    numeric: str, actual: np.ndarray, recorded: float | None, rules: list[str], message: str
) -> None:
    findings, flips = gates.check_logits(LOGITS, actual, gates.sqnr_floor(numeric, 130.0), recorded)
    assert [f.rule for f in findings if f.outcome is FAIL] == rules
    assert message in findings[0].message
    if not np.isfinite(actual).all():
        assert (flips[0].image, flips[0].actual, flips[0].fault) == (3, -1, True)


@each(
    ("task", "expected", "actual", "flips"),
    [
        # A narrow margin may flip; a wide one may not, for any noise of the artifact.
        (SINGLE, [[10, 9.99], [10, 5]], [[9.99, 10], [5, 10]], [(1, 0, True), (0, 0, False)]),
        # One logit is decided at 0, not by argmax.
        (BINARY, [[2], [-1], [0.001]], [[2], [1], [-0.001]], [(1, 0, True), (2, 0, False)]),
        # Multi-label: each label is a decision.
        (MULTI, [[3.0, -3.0, 0.01]], [[3.0, 3.0, -0.01]], [(0, 1, True), (0, 2, False)]),
        (BINARY, [[2.0], [-1.0]], [[2.001], [-1.001]], []),
        (SINGLE, [[10, 9.99, 0]], [[np.nan, 10, 0]], [(0, 0, True)]),
        (Task.REGRESSION, [[2.0], [-1.0]], [[-2.0], [1.0]], []),
    ],
)
def test_only_the_allowed_noise_explains_flips(
    task: Task, expected: object, actual: object, flips: list[tuple[int, int, bool]]
) -> None:
    pair, floor = (np.array(expected), np.array(actual)), Limit(45.0, "x")
    findings, changed = gates.check_logits(*pair, floor, task=task)
    assert [(f.image, f.label, f.fault) for f in changed] == flips
    failed = {f.rule for f in findings if f.outcome is FAIL}
    assert ("label flips" in failed) is any(fault for _, _, fault in flips)


@each(
    ("pairs", "allowed", "outcome", "message"),
    [
        ((5, 0, 5), 1, FAIL, "+13.10 to +100.00 pp of top-1 lost on 5 images, 1 allowed"),
        ((4, 0, 5), 1, FAIL, "(allowed for int8)"),  # McNemar's p is 0.06
        ((20, 0, 2000), 0.5, FAIL, "+0.65 to +1.54 pp of top-1 lost on 2000 images"),
        ((0, 0, 381), 1, PASS, ""),
        ((0, 0, 380), 1, INCONCLUSIVE, "about 381 images would decide"),
        ((0, 0, 765), 0.5, PASS, ""),
        ((0, 0, 764), 0.5, INCONCLUSIVE, "about 765 images would decide"),
        ((10, 0, 1000), 1, INCONCLUSIVE, "no number of images would decide"),
    ],
)
def test_losses_fail_or_report_how_many_images_would_decide(
    pairs: tuple[int, int, int], allowed: float, outcome: Outcome, message: str
) -> None:
    loss, limit = gates.paired_loss(*pairs), Limit(allowed, "allowed for int8")
    finding = gates.check_loss(loss, limit)
    assert finding.outcome is outcome
    assert message in finding.message
    near_lossless = gates.check_loss(loss, limit, lossy=False)
    assert near_lossless.outcome is (FAIL if outcome is FAIL else PASS)


def test_an_interval_that_touches_the_limit_and_the_number_that_decides() -> None:
    for interval, outcome in (((-1.0, 1.0), PASS), ((1.0, 2.0), INCONCLUSIVE)):
        assert gates.check_loss(Loss(9, 0.0, interval), INT8).outcome is outcome
    needed = gates.images_to_decide(gates.paired_loss(6, 3, 400), 1.0)
    assert needed is not None
    more = gates.paired_loss(round(6 * needed / 400), round(3 * needed / 400), needed)
    assert gates.check_loss(more, INT8).outcome is PASS


@each(
    ("task", "classes", "shift"), [(SINGLE, 10, 3), (SINGLE, 2, 1), (BINARY, 1, 1), (MULTI, 4, 1)]
)
def test_a_loss_with_wrong_labels_is_undecided(task: Task, classes: int, shift: int) -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(900, classes))
    right = decisions(logits, task)
    other = np.roll(right, shift, axis=1) if task is MULTI else (right + shift) % max(classes, 2)
    advice = "above chance: check labels" + ", --class-order" * (task is not MULTI)
    for truth, outcome in ((right, PASS), (other, INCONCLUSIVE)):
        labels = truth if task is MULTI else truth[:, 0]
        _, result = measure(task, labels, logits, logits, "int8")
        assert result.outcome is outcome
        assert result.reason.endswith(advice) is (outcome is not PASS)
        assert measure(task, labels, logits, logits, "fp16")[1].outcome is PASS, "by its logits"


@settings(deadline=None)
@given(st.sampled_from([5, 50, 500, 2000]), st.data())
def test_a_loss_over_the_limit_never_passes(images: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, images))
    loss = gates.paired_loss(lost, data.draw(st.integers(0, images - lost)), images)
    for allowed in (gates.allowed_loss("bf16"), INT8):
        wrong = PASS if loss.loss > allowed.value else FAIL
        assert gates.check_loss(loss, allowed).outcome is not wrong


@each(
    ("lost", "images", "sqnr", "margin", "outcome"),
    [
        (0, 5, 130.0, 0.0, PASS),  # 0 flips of 500 images leave 0.76 points
        (0, 500, 46.0, 0.0, PASS),
        (0, 500, 44.9, 0.0, FAIL),
        (1, 200, 73.0, 0.01, PASS),  # a near-tie
        (1, 200, 73.0, 0.05, FAIL),  # a clear flip: noise at 45 dB explains 0.032
        (30, 2000, 50.0, 0.01, FAIL),  # a loss is shown, though every flip is a near-tie
    ],
)
def test_near_lossless_artifacts(
    lost: int, images: int, sqnr: float, margin: float, outcome: Outcome
) -> None:
    before, after = np.array([[1.0, 1.0 - margin, 0.0]]), np.array([[0.0, 1.0, 0.0]])
    explained = gates.flip_margin(45.0)
    flips = find_flips(before, after, SINGLE, explained) if lost else []
    floor = Limit(45.0, "floor for fp16")
    loss = gates.check_loss(gates.paired_loss(lost, 0, images), FP16, lossy=False)
    findings = [*gates.check_near_lossless(sqnr, floor, flips), loss]
    assert gates.outcome_of(findings) is outcome


# --- accuracy ---------------------------------------------------------------------------------


def measure(
    task: Task, labels: Any, expected: Any, actual: Any, numeric: str = "fp16"
) -> tuple[evaluate.Accuracy, evaluate.ArtifactLoss]:
    """Return the accuracy of an artifact, and its loss against PyTorch."""
    before, after = Predictions.of(expected, task), Predictions.of(actual, task, expected)
    truth = GroundTruth(np.array(labels), expected.shape[1], task)
    return evaluate.measure_accuracy(after, truth), evaluate.compare_predictions(
        before, after, truth, numeric
    )


@each(("task", "classes"), [(SINGLE, 5), (SINGLE, 7), (BINARY, 1), (MULTI, 4)])
def test_accuracy_and_loss_of_every_task(task: Task, classes: int) -> None:
    rng = np.random.default_rng(3)
    expected = rng.normal(size=(60, classes))
    actual = expected + 0.3 * rng.normal(size=expected.shape)
    before, after, margins = expected >= 0, actual >= 0, abs(expected)
    confidence = 1 / (1 + np.exp(-abs(actual[:, 0])))
    if task is SINGLE:
        before, after = expected.argmax(1), actual.argmax(1)
        margins = np.diff(np.sort(-expected))[:, 0]
        confidence = softmax(actual, axis=1).max(1)
    labels = np.where(rng.random(before.shape) < 0.2, rng.permutation(before), before).astype(int)
    accuracy, result = measure(task, labels[:, 0] if task is BINARY else labels, expected, actual)
    score = partial(f1_score, average="micro") if task is MULTI else accuracy_score
    scores = [score(labels, decided) for decided in (before, after)]
    assert accuracy.top1 == pytest.approx(scores[1])
    assert result.loss.loss == pytest.approx(100 * (scores[0] - scores[1]))
    assert result.loss.interval[0] <= result.loss.loss <= result.loss.interval[1]
    changed = before != after
    assert result.flips == changed.sum() > 0
    metrics = compare(expected, actual, task)
    assert metrics.top1_agreement == pytest.approx(1 - changed.reshape(60, -1).any(1).mean())
    known = (metrics.kl is not None, metrics.top5_agreement is not None)
    assert known == (task is SINGLE, classes == 7)
    pairs = Counter(zip(before[changed].tolist(), after[changed].tolist(), strict=True))
    assert {pair[:2]: pair[2] for pair in result.confusions} == pairs
    (flips,) = (finding for finding in result.findings if finding.rule == "label flips")
    power, noise = np.square(expected).mean(), np.square(actual - expected).mean()
    assert flips.value == pytest.approx(margins[changed].max() / math.sqrt(power))
    assert result.sqnr_db == pytest.approx(10 * math.log10(power / noise))
    if task is MULTI:
        found = (accuracy.metric, accuracy.ece, result.loss.lost, result.loss.p_value)
        assert found == ("F1 (micro)", None, None, None)
        return
    right, still_right = ((labels == decided).ravel() for decided in (before, after))
    lost, won = (right & ~still_right).sum(), (~right & still_right).sum()
    assert (result.loss.lost, result.loss.won) == (lost, won)
    assert result.loss.p_value == pytest.approx(binomtest(lost, lost + won).pvalue)
    ece = evaluate.expected_calibration_error(confidence, still_right)
    assert accuracy.ece == pytest.approx(ece, abs=1e-6)
    top5 = (np.argsort(-actual)[:, :5] == labels.reshape(-1, 1)).any(1).mean()
    assert accuracy.top5 == (top5 if classes > 5 else None)
    assert len(result.classes) > 0
    for change in result.classes:
        rows = labels.ravel() == change["label"]
        counts = [change[name] for name in ("images", "before", "after")]
        assert counts == [rows.sum(), right[rows].sum(), still_right[rows].sum()]


def test_nan_and_extreme_logits() -> None:
    reference = np.array([[3.0, 1.0, 2.0]] * 2, np.float32)
    logits = reference.copy()
    logits[1, 0] = np.nan
    found = Predictions.of(logits, SINGLE, reference)
    assert found.classes.tolist() == [[0, 2, 1], [-1, -1, -1]]
    assert found.confidence[1] == 0
    accuracy, result = measure(SINGLE, [0, 0], reference, logits)
    assert (accuracy.top1, result.sqnr_db, result.outcome) == (0.5, -math.inf, Outcome.FAIL)
    assert result.confusions == ((0, -1, 1),)
    extreme = probabilities(np.array([[-1000.0], [0.0], [1000.0]]), BINARY)
    assert extreme.tolist() == [[0.0], [0.5], [1.0]]


def test_f1_interval_resamples_images_and_few_equal_ones_are_undecided() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, (30, 1))
    logits = np.where(rng.random((30, 1)) < 0.2, 1 - 2 * one, 2 * one - 1).repeat(200, axis=1)
    low, high = measure(MULTI, one.repeat(200, axis=1), logits, logits)[0].top1_interval
    assert high - low > 0.15
    logits = np.array([[1.0, -1.0, 2.0]] * 3 + [[-1.0, 1.0, -2.0]] * 2)
    accuracy, found = measure(MULTI, logits > 0, logits, logits, "int8")
    assert (found.outcome, accuracy.top1_interval[1]) == (INCONCLUSIVE, 1.0)
    assert found.loss.interval == pytest.approx((-43.4, 43.4), abs=0.1)
    assert "about 381 images would decide" in found.reason, "as for top-1"
    many = Loss(1000, 0.4, (-0.6, 1.4))  # an interval of 2 points must become one of 1.2
    assert gates.images_to_decide(many, 1.0) == pytest.approx(1000 / 0.6**2, rel=0.01)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.booleans()), min_size=1, max_size=80))
def test_calibration_error_by_its_definition(results: list[tuple[int, bool]]) -> None:
    # Not on the edge of a bin, where the last digit of a float decides.
    confidence = np.array([min((share + 0.5) / 10_001, 1.0) for share, _ in results])
    correct, bins = np.array([right for _, right in results]), np.arange(ECE_BINS) / ECE_BINS
    inside = [(low < confidence) & (confidence <= low + 1 / ECE_BINS) for low in bins]
    total = sum(abs((correct[rows] - confidence[rows]).sum()) for rows in inside) / len(results)
    assert evaluate.expected_calibration_error(confidence, correct) == pytest.approx(
        total, abs=1e-12
    )


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
