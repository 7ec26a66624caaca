"""What PASS means: limits and their origins, outcomes, and the rules on logits and losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.each import each
from van_deploy.checks.gates import (
    Allowed,
    Finding,
    Limit,
    Outcome,
    allowed_loss,
    chance_changes,
    failed,
    flip_margin,
    numeric_class,
    outcome_of,
    skipped,
    sqnr_floor,
)
from van_deploy.checks.rules import (
    images_to_decide,
    judge_invariance,
    judge_logits,
    judge_loss,
    judge_numbers,
    paired_loss,
)
from van_deploy.config import GateProfile
from van_deploy.errors import UsageError
from van_deploy.metrics import Task, find_flips

PASS, FAIL, INCONCLUSIVE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE
INT8, FP16 = allowed_loss("int8"), allowed_loss("fp16")


def logits(rows: int = 40, classes: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, classes))


def noisy(expected: np.ndarray, sqnr_db: float, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=expected.shape)
    noise *= np.sqrt(np.square(expected).sum() / np.square(noise).sum())
    return expected + noise * 10 ** (-sqnr_db / 20)


class TestLimits:
    @each(
        ("numeric", "floor", "origin"),
        [
            ("fp32", 114.8, "PyTorch's own float32 noise, 134.8 dB, minus 20"),
            ("tf32", 50, "floor for tf32"),
            ("fp16", 45, "floor for fp16"),
            ("bf16", 30, "floor for bf16"),
            ("int8", 20, "floor for int8"),
        ],
    )
    def test_each_class_has_its_floor_and_says_where_from(
        self, numeric: str, floor: float, origin: str
    ) -> None:
        found = sqnr_floor(numeric, 134.8)
        assert found.value == pytest.approx(floor)
        assert found.origin == origin

    def test_noise_moves_the_floor_of_fp32_alone_and_never_below_broken(self) -> None:
        """Derived from float32 noise, INT8's limit was -0.1 dB and zeroes passed."""
        assert sqnr_floor("fp32", 121.0).value == 101.0
        assert sqnr_floor("fp32", 30.0).value == 20.0
        assert sqnr_floor("fp32", math.inf).value == pytest.approx(124.5)
        assert {sqnr_floor("int8", noise).value for noise in (20.0, 121.0, 140.0)} == {20.0}

    def test_a_recipe_sets_them_and_is_named(self) -> None:
        profile = GateProfile(sqnr_db=60.0, top1_loss=2.0)
        assert sqnr_floor("fp32", 134.8, profile) == Limit(60.0, "recipe [gates.fp32]")
        assert allowed_loss("int8", profile) == Limit(2.0, "recipe [gates.int8]")
        assert allowed_loss("bf16") == Limit(0.5, "allowed for bf16")

    def test_tf32_is_a_class_of_its_own(self) -> None:
        assert numeric_class("fp32", tf32=True) == "tf32"
        assert numeric_class("fp16", tf32=True) == "fp16"
        with pytest.raises(UsageError, match="no gates for the precision 'fp8'"):
            numeric_class("fp8")


class TestOutcomes:
    def test_the_worst_decides_and_nothing_is_no_pass(self) -> None:
        passed = Finding("a", PASS)
        assert outcome_of([passed, Finding("b", INCONCLUSIVE)]) is INCONCLUSIVE
        assert outcome_of([passed, Finding("b", INCONCLUSIVE), failed("c", "")]) is FAIL
        assert outcome_of([passed, skipped("b", "")]) is PASS
        assert outcome_of([]) is Outcome.SKIPPED

    @each(
        ("finding", "needs"),
        [
            (Finding("b", INCONCLUSIVE), Allowed(inconclusive=True)),
            (skipped("b", "no GPU", "engines"), Allowed(("engines",))),
            (skipped("b", "no TensorRT", "runtimes"), Allowed(("runtimes",))),
        ],
    )
    def test_what_was_not_shown_needs_leave_of_its_own_kind(
        self, finding: Finding, needs: Allowed
    ) -> None:
        found = [Finding("a", PASS), finding]
        others = Allowed(("accuracy", "speed"))
        assert not Allowed().passes(found)
        assert not others.passes(found)
        assert needs.passes(found)
        assert needs.passes([finding]) is (finding.outcome is INCONCLUSIVE), "a skip shows nothing"

    def test_nothing_forgives_a_failure_or_a_skip_without_a_kind(self) -> None:
        everything = Allowed(("engines", "runtimes", "accuracy", "speed"), True)
        assert not everything.passes([Finding("a", PASS), failed("b", "")])
        assert not everything.passes([Finding("a", PASS), skipped("b", "it gives no logits")])

    def test_an_unknown_kind_is_a_mistake(self) -> None:
        with pytest.raises(UsageError) as error:
            Allowed(("engine",))
        assert error.value.message == "There is no kind of skip 'engine'."
        assert error.value.remedy == "Known: engines, runtimes, accuracy, speed."


class TestLogits:
    def test_each_rule_that_does_not_hold_says_its_limit(self) -> None:
        expected = logits()
        findings, _ = judge_logits(expected, noisy(expected, 44.0), sqnr_floor("fp16", 130.0))
        assert [f.outcome for f in findings] == [FAIL, PASS, PASS]
        assert findings[0].message == "SQNR 44.0 dB is below 45.0 dB (floor for fp16)"

    def test_the_record_catches_what_the_floor_does_not(self) -> None:
        """INT8 limits of 12.5 dB, where the artifact had 38.9, passed scales times 6."""
        expected, floor = logits(), sqnr_floor("int8", 130.0)
        for sqnr, outcome in ((38.0, PASS), (35.0, FAIL)):
            findings, _ = judge_logits(expected, noisy(expected, sqnr), floor, recorded_db=38.9)
            assert outcome_of(findings) is outcome
        messages = {f.rule: f.message for f in findings}
        assert messages["SQNR, record"] == (
            "SQNR, record 35.0 dB is below 35.9 dB (38.9 dB recorded when it was made, minus 3)"
        )

    def test_one_bad_image_among_many_fails(self) -> None:
        expected = logits(200)
        found = noisy(expected, 60.0)
        found[17] = noisy(expected[17:18], 33.0)[0]
        findings, _ = judge_logits(expected, found, sqnr_floor("fp16", 130.0))
        assert {f.rule: f.outcome for f in findings} == {
            "SQNR": PASS,
            "worst image": FAIL,
            "label flips": PASS,
        }

    @each("value", [np.nan, np.inf])
    def test_what_is_no_number_fails(self, value: float) -> None:
        expected = logits()
        found = expected.copy()
        found[3, 2] = value
        findings, flips = judge_logits(expected, found, sqnr_floor("int8", 130.0))
        assert {f.outcome for f in findings} == {FAIL}
        assert (flips[0].image, flips[0].found, flips[0].fault) == (3, -1, True)

    def test_another_shape_fails(self) -> None:
        findings, _ = judge_logits(logits(4), logits(4, 9), sqnr_floor("int8", 130.0))
        assert findings[0].message == "the output has shape (4, 9) where PyTorch's has (4, 10)"

    def test_a_flip_is_explained_by_the_allowed_noise_and_not_by_its_own(self) -> None:
        """A narrow margin may flip; a wide one may not, however large the artifact's noise."""
        expected = np.zeros((2, 3))
        expected[:, 0] = [10.0, 10.0]
        expected[:, 1] = [9.99, 5.0]
        found = expected[:, [1, 0, 2]]
        limit = flip_margin(45.0)
        narrow, wide = sorted(
            find_flips(expected, found, Task.SINGLE_LABEL, limit), key=lambda f: f.image
        )
        assert (narrow.fault, wide.fault) == (False, True)
        assert 0.01 / np.sqrt(np.square(expected).mean()) < limit < wide.margin

    def test_a_row_shifted_by_one_fails_batch_invariance(self) -> None:
        alone = logits(8)
        floor = sqnr_floor("int8", 130.0)
        assert judge_invariance(alone, alone, floor, 8).outcome is PASS
        shifted = judge_invariance(alone, np.roll(alone, 1, axis=0), floor, 8)
        assert shifted.outcome is FAIL
        assert shifted.message.startswith("batch 8: batch invariance ")
        assert shifted.message.endswith(" dB is below 26.0 dB (floor for any class)")


class TestOneLogit:
    """``num_classes == 1``: no argmax anywhere (it gave 100 % agreement, whatever the logit)."""

    def test_decisions_are_at_zero_and_flips_are_seen(self) -> None:
        expected = np.array([[2.0], [-1.0], [0.001]])
        found = np.array([[2.0], [1.0], [-0.001]])
        findings, flips = judge_logits(expected, found, Limit(45.0, "x"), task=Task.BINARY)
        assert {f.rule: f.outcome for f in findings}["label flips"] is FAIL
        assert [(f.image, f.expected, f.found, f.fault) for f in flips] == [
            (1, 0, 1, True),
            (2, 1, 0, False),
        ]

    def test_the_same_logits_pass(self) -> None:
        expected = logits(20, 1)
        findings, flips = judge_logits(
            expected, noisy(expected, 60.0), Limit(45.0, "x"), task=Task.BINARY
        )
        assert outcome_of(findings) is PASS
        assert flips == []


class TestManyLabels:
    def test_each_label_is_a_decision(self) -> None:
        expected = np.array([[3.0, -3.0, 0.01]])
        found = np.array([[3.0, 3.0, -0.01]])
        _, flips = judge_logits(expected, found, Limit(45.0, "x"), task=Task.MULTI_LABEL)
        assert [(f.label, f.expected, f.found, f.fault) for f in flips] == [
            (1, 0, 1, True),
            (2, 1, 0, False),
        ]


class TestNonInferiority:
    def test_an_artifact_that_lost_all_of_five_images_fails(self) -> None:
        """McNemar's p is 0.06 there, which was a PASS."""
        assert judge_loss(paired_loss(5, 0, 5), INT8).outcome is FAIL
        assert judge_loss(paired_loss(4, 0, 5), INT8).outcome is FAIL

    def test_a_loss_of_twice_what_is_allowed_on_2000_images_does_not_pass(self) -> None:
        """1.00 points against 0.5 allowed passed."""
        found = judge_loss(paired_loss(20, 0, 2000), allowed_loss("bf16"))
        assert found.outcome is FAIL
        assert found.message == (
            "+0.65 to +1.54 pp of top-1 lost on 2000 images, 0.5 allowed (allowed for bf16)"
        )

    def test_too_few_images_say_how_many_would_decide(self) -> None:
        found = judge_loss(paired_loss(0, 0, 100), INT8)
        assert found.outcome is INCONCLUSIVE
        assert found.message == (
            "-3.70 to +3.70 pp of top-1 lost on 100 images, 1 allowed (allowed for int8); about "
            "381 images would decide at this rate of label flips: give more images, allow a "
            "larger top1_loss in the recipe, or pass --allow-inconclusive"
        )

    @each(("allowed", "images"), [(1.0, 381), (0.5, 765)])
    def test_the_images_that_decide_without_a_flip(self, allowed: float, images: int) -> None:
        assert images_to_decide(paired_loss(0, 0, 10), allowed) == images
        limit = Limit(allowed, "x")
        assert judge_loss(paired_loss(0, 0, images), limit).outcome is PASS
        assert judge_loss(paired_loss(0, 0, images - 1), limit).outcome is INCONCLUSIVE

    def test_a_loss_that_is_just_the_allowed_one_is_never_decided(self) -> None:
        assert images_to_decide(paired_loss(10, 0, 1000), 1.0) is None
        found = judge_loss(paired_loss(10, 0, 1000), INT8)
        assert "no number of images would decide" in found.message

    @settings(deadline=None)
    @given(st.sampled_from([5, 50, 500, 2000]), st.data())
    def test_none_that_lost_more_than_allowed_passes(
        self, images: int, data: st.DataObject
    ) -> None:
        lost = data.draw(st.integers(0, images))
        won = data.draw(st.integers(0, images - lost))
        loss = paired_loss(lost, won, images)
        for numeric in ("bf16", "int8"):
            allowed = allowed_loss(numeric)
            if loss.loss > allowed.value:
                assert judge_loss(loss, allowed).outcome is not PASS
            if loss.loss <= allowed.value:
                assert judge_loss(loss, allowed).outcome is not FAIL

    def test_more_images_decide_as_foretold(self) -> None:
        loss = paired_loss(6, 3, 400)
        needed = images_to_decide(loss, 1.0)
        assert needed is not None
        share = needed / 400
        more = paired_loss(round(6 * share), round(3 * share), needed)
        assert judge_loss(more, INT8).outcome is PASS


class TestNearLossless:
    FLOOR = Limit(45.0, "floor for fp16")

    def judged(self, lost: int, images: int, sqnr: float, margin: float = 0.0) -> Outcome:
        flips = find_flips(
            np.array([[1.0, 1.0 - margin, 0.0]]),
            np.array([[0.0, 1.0, 0.0]]),
            Task.SINGLE_LABEL,
            flip_margin(45.0),
        )
        loss = paired_loss(lost, 0, images)
        return outcome_of(judge_numbers(loss, FP16, sqnr, self.FLOOR, flips if lost else []))

    def test_few_images_do_not_leave_it_undecided(self) -> None:
        """0 flips of 500 images leave 0.76 points."""
        assert self.judged(0, 5, 130.0) is PASS
        assert self.judged(0, 500, 46.0) is PASS

    def test_logits_below_the_floor_fail(self) -> None:
        assert self.judged(0, 500, 44.9) is FAIL

    def test_one_near_tie_passes_and_one_clear_flip_fails(self) -> None:
        assert self.judged(1, 200, 73.0, margin=0.01) is PASS
        assert self.judged(1, 200, 73.0, margin=0.5) is FAIL

    def test_a_loss_that_is_shown_fails_though_every_flip_is_a_near_tie(self) -> None:
        assert self.judged(30, 2000, 50.0, margin=0.01) is FAIL


def test_chance_grows_with_the_images_and_is_never_none() -> None:
    """One near-tie in 200 images failed a check."""
    assert [chance_changes(images) for images in (1, 200, 2000, 50_000)] == [1, 1, 3, 35]
