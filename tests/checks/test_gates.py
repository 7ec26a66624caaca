"""Limits and their origins, outcomes, and the rules for logits and losses."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.each import each
from van_deploy.checks import gates
from van_deploy.checks.gates import (
    AllowOptions,
    Finding,
    GateReport,
    Limit,
    Loss,
    Outcome,
    allowed_loss,
    check_loss,
    check_near_lossless,
    outcome_of,
    paired_loss,
    pass_or_fail,
    skipped_finding,
    sqnr_floor,
)
from van_deploy.config import GateProfile
from van_deploy.metrics import Task, find_flips

PASS, FAIL, INCONCLUSIVE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE
SINGLE, BINARY, MULTI = Task.SINGLE_LABEL, Task.BINARY, Task.MULTI_LABEL
INT8, FP16 = allowed_loss("int8"), allowed_loss("fp16")
LOGITS = np.random.default_rng(0).normal(size=(40, 10))


def noisy(expected: np.ndarray, sqnr_db: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(size=expected.shape)
    noise *= np.sqrt(np.square(expected).sum() / np.square(noise).sum())
    return expected + noise * 10 ** (-sqnr_db / 20)


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
    limit = sqnr_floor(numeric, noise)
    assert (round(limit.value, 6), limit.origin) == (floor, origin)
    recipe = GateProfile(sqnr_db=60.0, top1_loss=2.0)
    assert sqnr_floor(numeric, noise, recipe) == Limit(60.0, f"recipe [gates.{numeric}]")
    assert allowed_loss(numeric, recipe) == Limit(2.0, f"recipe [gates.{numeric}]")
    precision = numeric.replace("tf32", "fp32")
    assert gates.numeric_class(precision, tf32=numeric == "tf32") == numeric


def test_the_worst_outcome_decides() -> None:
    undecided = [Finding("a", PASS), Finding("b", INCONCLUSIVE)]
    assert outcome_of(undecided) is INCONCLUSIVE
    assert outcome_of([*undecided, pass_or_fail("c", "wrong")]) is FAIL
    assert outcome_of([Finding("a", PASS), skipped_finding("b", "")]) is PASS
    assert outcome_of([]) is Outcome.SKIPPED


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
        (skipped_finding("b", "no GPU", "engines"), AllowOptions(("engines",))),
        (skipped_finding("b", "no TensorRT", "runtimes"), AllowOptions(("runtimes",))),
        (pass_or_fail("b", "wrong"), None),
        (skipped_finding("b", "it gives no logits"), None),
    ],
)
def test_skips_and_undecided_findings_need_their_own_option(
    finding: Finding, needs: AllowOptions | None
) -> None:
    shown, alone = Finding("a", PASS), finding.outcome is INCONCLUSIVE
    for allowed in (AllowOptions(), AllowOptions(("accuracy", "speed"))):
        assert Report(allowed, shown, finding).failed == ["b"]
        assert not Report(allowed, shown, finding)
    everything = AllowOptions(("engines", "runtimes", "accuracy", "speed"), True)
    assert Report(everything, shown, finding).passed is (needs is not None)
    if needs is not None:
        assert Report(needs, shown, finding)
        assert Report(needs, finding).passed is alone, "a skip alone is no PASS"


@each(
    ("numeric", "actual", "recorded", "rules", "message"),
    [
        ("fp16", noisy(LOGITS, 44.0), None, ["SQNR"], "44.0 dB is below 45.0 dB (floor for "),
        ("int8", noisy(LOGITS, 35.0), 38.9, ["SQNR"], "(38.9 dB recorded at creation, minus 3)"),
        ("int8", noisy(LOGITS, 19.0), 21.0, ["SQNR"], "(floor for int8)"),
        ("int8", noisy(LOGITS, 38.0), 38.9, [], ""),
        ("fp16", with_row(17, noisy(LOGITS, 32.0)[17]), None, ["worst image"], ""),
        ("int8", with_row(3, np.nan), None, ["SQNR", "worst image", "label flips"], ""),
        ("int8", with_row(3, np.inf), None, ["SQNR", "worst image", "label flips"], ""),
        ("int8", LOGITS[:, :9], None, ["shape"], "(40, 9), PyTorch's output has (40, 10)"),
    ],
)
def test_logits_that_fail_name_the_limit(
    numeric: str, actual: np.ndarray, recorded: float | None, rules: list[str], message: str
) -> None:
    findings, flips = gates.check_logits(LOGITS, actual, sqnr_floor(numeric, 130.0), recorded)
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


def test_shifted_rows_fail_batch_invariance() -> None:
    floor = sqnr_floor("int8", 130.0)
    assert gates.check_batch_invariance(LOGITS, LOGITS, floor, 8).outcome is PASS
    shifted = gates.check_batch_invariance(LOGITS, np.roll(LOGITS, 1, axis=0), floor, 8)
    assert shifted.outcome is FAIL
    assert shifted.message.endswith(" dB is below 26.0 dB (floor for any class)")


@each(
    ("loss", "allowed", "outcome", "message"),
    [
        (paired_loss(5, 0, 5), 1, FAIL, "+13.10 to +100.00 pp of top-1 lost on 5 images, 1 allow"),
        (paired_loss(4, 0, 5), 1, FAIL, "(allowed for int8)"),  # McNemar's p is 0.06
        (paired_loss(20, 0, 2000), 0.5, FAIL, "+0.65 to +1.54 pp of top-1 lost on 2000 images"),
        (paired_loss(0, 0, 381), 1, PASS, ""),
        (paired_loss(0, 0, 380), 1, INCONCLUSIVE, "about 381 images would decide"),
        (paired_loss(0, 0, 765), 0.5, PASS, ""),
        (paired_loss(0, 0, 764), 0.5, INCONCLUSIVE, "about 765 images would decide"),
        (paired_loss(10, 0, 1000), 1, INCONCLUSIVE, "no number of images would decide"),
        (Loss(9, 0.0, (-1.0, 1.0)), 1, PASS, ""),
        (Loss(9, 0.0, (1.0, 2.0)), 1, INCONCLUSIVE, ""),
    ],
)
def test_losses_pass_fail_or_report_how_many_images_would_decide(
    loss: Loss, allowed: float, outcome: Outcome, message: str
) -> None:
    finding = check_loss(loss, Limit(allowed, "allowed for int8"))
    assert finding.outcome is outcome
    assert message in finding.message
    near_lossless = check_loss(loss, Limit(allowed, ""), lossy=False)
    assert near_lossless.outcome is (FAIL if outcome is FAIL else PASS)


def test_number_of_images_that_decide() -> None:
    needed = gates.images_to_decide(paired_loss(6, 3, 400), 1.0)
    assert needed is not None
    more = paired_loss(round(6 * needed / 400), round(3 * needed / 400), needed)
    assert check_loss(more, INT8).outcome is PASS


@settings(deadline=None)
@given(st.sampled_from([5, 50, 500, 2000]), st.data())
def test_a_loss_over_the_limit_never_passes(images: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, images))
    loss = paired_loss(lost, data.draw(st.integers(0, images - lost)), images)
    for allowed in (allowed_loss("bf16"), INT8):
        wrong = PASS if loss.loss > allowed.value else FAIL
        assert check_loss(loss, allowed).outcome is not wrong


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
    loss = check_loss(paired_loss(lost, 0, images), FP16, lossy=False)
    findings = [*check_near_lossless(sqnr, floor, flips), loss]
    assert outcome_of(findings) is outcome
