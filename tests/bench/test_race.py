"""The order of a round, what a ratio is taken against, and when a race ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import Scripted
from tests.each import each
from van_deploy.bench.race import Race, with_reference
from van_deploy.config import Budget
from van_deploy.errors import UsageError


def raced(*lanes: Scripted, budget: Budget) -> dict[str, float | None]:
    """Return each one's ratio to the first."""
    Scripted.clock = 0
    race = Race([], threads=1)
    race._lanes = list(lanes)
    rows = race.run(Path("none"), 1, 64, budget, lanes[0].contender.name)
    return {row.contender: row.ratio.median if row.ratio else None for row in rows}


SIX = Budget(seconds=0.6, calls=1, limit_s=0.6, rounds=6, warmup_s=0.0)


def test_steady_drift_cancels_between_the_reference_before_and_after() -> None:
    others = [Scripted(f"{n} times as fast", 4.0 / n) for n in (1, 2, 4)]
    ratios = raced(Scripted("reference", 4.0), *others, budget=SIX)
    assert ratios["reference"] == 1.0
    for n in (1, 2, 4):
        assert ratios[f"{n} times as fast"] == pytest.approx(n)


def test_the_reference_comes_first_last_and_after_every_few() -> None:
    base = Scripted("r", 1.0)
    others = [Scripted(str(i), 1.0) for i in range(7)]
    names = [lane.contender.name for lane in with_reference(others, base)]
    assert names == ["r", "0", "1", "2", "r", "3", "4", "5", "r", "6", "r"]
    assert with_reference([], base) == [base]


def test_one_that_fails_is_a_row_and_the_others_keep_their_ratios() -> None:
    ratios = raced(
        Scripted("r", 4.0), Scripted("dies", 2.0, fails_at=3), Scripted("lives", 2.0), budget=SIX
    )
    assert ratios["dies"] is None
    assert ratios["lives"] == pytest.approx(2.0)


def test_a_reference_that_fails_leaves_no_ratios_but_figures() -> None:
    lanes = (Scripted("r", 4.0, fails_at=3), Scripted("a", 2.0))
    assert raced(*lanes, budget=SIX) == {"r": None, "a": None}
    assert lanes[1].slices >= SIX.rounds


class Noisy(Scripted):
    """One whose slices differ from round to round by more than any tolerance."""

    def time_slice(self, seconds: float) -> float | None:
        took = super().time_slice(seconds)
        return took and took * (1.0 if self.slices % 2 else 1.5)


def test_a_race_goes_on_until_the_ratios_settle_or_the_limit_is_reached() -> None:
    Scripted.clock = 0
    budget = Budget(seconds=0.6, calls=1, limit_s=2.0, rounds=6, warmup_s=0.0)
    steady, noisy = Scripted("steady", 2.0), Noisy("noisy", 2.0)
    race = Race([], threads=1)
    race._lanes = [Scripted("r", 4.0), steady, noisy]
    rows = {row.contender: row for row in race.run(Path("none"), 1, 64, budget, "r")}
    assert steady.slices == 6
    assert rows["steady"].settled is True
    assert noisy.slices == 20, "slices of 0.1 s, two seconds at most"
    assert rows["noisy"].settled is False
    assert rows["r"].settled is None, "the reference is 1 by definition"


def test_slices_are_as_long_as_one_call_of_a_slow_reference() -> None:
    slow, fast = Scripted("slow", 500.0), Scripted("fast", 1.0)
    raced(slow, fast, budget=Budget(seconds=0.6, calls=1, limit_s=0.6, rounds=6, warmup_s=0.0))
    assert fast.timed_s == pytest.approx(6 * 0.5)


@each(
    ("change", "words"),
    [
        ({"rounds": 0}, "'rounds=' is 0: it should be greater than or equal to 1."),
        ({"seconds": 0.0}, "'seconds=' is 0.0: it should be greater than 0."),
        ({"tolerance_percent": 0.0}, "'tolerance_percent=' is 0.0: it should be greater than 0."),
    ],
)
def test_a_budget_that_measures_nothing_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget(**change)
    assert caught.value.message == words
