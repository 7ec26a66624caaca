"""The order of a round, what a ratio is taken against, and when a race ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import Scripted, ScriptedRace
from tests.each import each
from van_deploy.bench.lane import Row
from van_deploy.bench.machine import During
from van_deploy.bench.race import with_reference
from van_deploy.bench.steadiness import warnings_of
from van_deploy.config import BenchSettings, Budget
from van_deploy.errors import UsageError


def raced(*lanes: Scripted, budget: Budget) -> dict[str, float | None]:
    """Return each one's ratio to the first."""
    Scripted.clock = 0
    rows = ScriptedRace(*lanes).run(Path("none"), 1, 64, budget, lanes[0].contender.name)
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
    race = ScriptedRace(Scripted("r", 4.0), steady, noisy)
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


class Disturbed(ScriptedRace):
    """A machine with a neighbour from one look to another, which slows one contender more."""

    def __init__(self, first: int, last: int, factor: float) -> None:
        slow, fast = Slowed("r", 4.0, self, 1.1), Slowed("a", 2.0, self, 1.6)
        super().__init__(slow, fast)
        self.first, self.last, self.factor = first, last, factor

    @property
    def now(self) -> bool:
        return self.first <= len(self.looks) <= self.last

    def product(self) -> float:
        return self.factor if self.now else 1.0

    def rows(self, budget: Budget) -> list[Row]:
        return self.run(Path("none"), 1, 64, budget, "r")


class Slowed(Scripted):
    drift = 1.0

    def __init__(self, name: str, ms: float, race: Disturbed, by: float) -> None:
        super().__init__(name, ms)
        self.race, self.by = race, by

    def time_slice(self, seconds: float) -> float | None:
        took = super().time_slice(seconds)
        return took and took * (self.by if self.race.now else 1.0)


def test_disturbed_rounds_do_not_count_for_a_ratio() -> None:
    budget = Budget(seconds=1.0, calls=1, limit_s=4.0, rounds=10, warmup_s=0.0)
    row = Disturbed(10, 22, 1.4).rows(budget)[1]
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(2.0)
    assert row.ratio.rounds == sum(row.round_quiet) < len(row.round_ms)
    assert len(row.round_quiet) == len(row.round_ms) == len(row.round_ratios)
    assert min(row.round_ratios) < 1.5, "what the disturbed rounds say"
    assert row.settled is True


def test_where_nothing_was_quiet_all_rounds_count_and_that_is_said() -> None:
    race = Disturbed(3, 10**9, 1.2)
    rows = race.rows(Budget(seconds=0.6, calls=1, limit_s=0.6, rounds=6, warmup_s=0.0))
    assert rows[1].ratio is not None
    assert rows[1].ratio.rounds == 6
    assert rows[1].settled is False
    said = " ".join(warnings_of(rows, BenchSettings(device="cpu"), 0.0, 2, During(0.0, False)))
    assert "disturbed in nearly every round of 2 of 2 rows" in said
    assert "1 of 1 ratios did not settle" in said


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
