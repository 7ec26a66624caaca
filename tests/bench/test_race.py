"""The order of a round, what a ratio is taken against, and when a race ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from van_deploy.bench.contender import Contender
from van_deploy.bench.lane import Lane
from van_deploy.bench.machine import During, warnings_of
from van_deploy.bench.process import WorkerError
from van_deploy.bench.race import Race, with_reference
from van_deploy.bench.timing import Loading, Row
from van_deploy.config import BenchSettings, Budget

SIX = Budget(seconds=0.6, calls=1, limit_s=0.6, rounds=6, warmup_s=0.0)


class Scripted(Lane):
    """A contender whose slices take what it is told, on a machine that gets slower by ``drift``."""

    def __init__(
        self, name: str, ms: float, *, fails_at: int = -1, noise: float = 1.0, hurt: float = 1.0
    ) -> None:
        super().__init__(Contender(name, "onnxruntime", "fp32"), loaded=Loading(0.0, 0.0, 0, 0, 1))
        self.ms, self.fails_at, self.noise, self.hurt, self.slices = ms, fails_at, noise, hurt, 0
        self.race = Machine(self)

    def feed(self, images: Path, batch: int, warmup_s: float) -> None:
        self.failure, self.call_ms = None, self.ms

    def time_slice(self, seconds: float) -> float:
        self.slices += 1
        self.race.clock += 1
        if self.slices == self.fails_at:
            self.failure = WorkerError("killed by SIGKILL", kind="killed")
            return 0.0
        took = self.ms * self.race.drift**self.race.clock * self.noise ** (self.slices % 2)
        took *= self.hurt if self.race.disturbed else 1.0
        self.latencies.append(took)
        self.timed_s += seconds
        return took


class Machine(Race):
    """A race of scripted contenders, with a neighbour from one look at the machine to another."""

    def __init__(self, *lanes: Scripted, drift: float = 1.0, hurt: range = range(0)) -> None:
        super().__init__([], threads=1)
        self.lanes, self.clock, self.drift, self.hurt = list(lanes), 0, drift, hurt
        for lane in lanes:
            lane.race = self

    @property
    def disturbed(self) -> bool:
        return len(self.looks) in self.hurt

    def look(self) -> float:
        self.looks.append(1.3 if self.disturbed else 1.0)
        return self.looks[-1]

    def rows(self, budget: Budget) -> dict[str, Row]:
        rows = self.run(Path("none"), 1, 64, budget, self.lanes[0].contender.name)
        return {row.contender: row for row in rows}

    def ratios(self, budget: Budget = SIX) -> dict[str, float | None]:
        rows = self.rows(budget).items()
        return {name: row.ratio.median if row.ratio else None for name, row in rows}


def test_steady_drift_cancels_between_the_reference_before_and_after() -> None:
    lanes = [Scripted(str(n), 4.0 / n) for n in (1, 2, 4, 8)]
    ratios = Machine(*lanes, drift=1.1).ratios()  # 10 % slower from each slice to the next
    assert ratios == {str(n): pytest.approx(n) for n in (1, 2, 4, 8)}


def test_the_reference_comes_first_last_and_after_every_few() -> None:
    base, others = Scripted("r", 1.0), [Scripted(str(i), 1.0) for i in range(7)]
    names = [lane.contender.name for lane in with_reference(others, base)]
    assert names == ["r", "0", "1", "2", "r", "3", "4", "5", "r", "6", "r"]
    assert with_reference([], base) == [base]


def test_one_that_fails_is_a_row_and_the_others_keep_their_ratios() -> None:
    dies = Scripted("dies", 2.0, fails_at=3)
    race = Machine(Scripted("r", 4.0), dies, Scripted("lives", 2.0), drift=1.1)
    rows = race.rows(SIX)
    assert (rows["dies"].error_kind, rows["dies"].latency) == ("killed", None)
    ratio = rows["lives"].ratio
    assert ratio
    assert ratio.median == pytest.approx(2.0)


def test_a_reference_that_fails_leaves_no_ratios_but_figures() -> None:
    other = Scripted("a", 2.0)
    rows = Machine(Scripted("r", 4.0, fails_at=3), other).rows(SIX)
    assert [row.ratio for row in rows.values()] == [None, None]
    assert rows["a"].latency
    assert other.slices >= SIX.rounds


def test_a_race_goes_on_until_the_ratios_settle_or_the_limit_is_reached() -> None:
    budget = Budget(seconds=0.6, calls=1, limit_s=2.0, rounds=6, warmup_s=0.0)
    steady, noisy = Scripted("steady", 2.0), Scripted("noisy", 2.0, noise=1.5)
    rows = Machine(Scripted("r", 4.0), steady, noisy).rows(budget)
    assert (steady.slices, rows["steady"].settled) == (6, True)
    assert (noisy.slices, rows["noisy"].settled) == (20, False), "slices of 0.1 s, 2 s at most"
    assert rows["r"].settled is None, "the reference is 1 by definition"


def test_slices_are_as_long_as_one_call_of_a_slow_reference() -> None:
    fast = Scripted("fast", 1.0)
    Machine(Scripted("slow", 500.0), fast).ratios()
    assert fast.timed_s == pytest.approx(6 * 0.5)


def test_disturbed_rounds_do_not_count_for_a_ratio() -> None:
    budget = Budget(seconds=1.0, calls=1, limit_s=4.0, rounds=10, warmup_s=0.0)
    lanes = (Scripted("r", 4.0, hurt=1.1), Scripted("a", 2.0, hurt=1.6))
    row = Machine(*lanes, hurt=range(10, 23)).rows(budget)["a"]
    assert row.ratio
    assert row.ratio.median == pytest.approx(2.0)
    assert row.ratio.rounds == sum(row.round_quiet) < len(row.round_ms)
    assert len(row.round_quiet) == len(row.round_ms) == len(row.round_ratios)
    assert min(row.round_ratios) < 1.5, "what the disturbed rounds say"
    assert row.settled is True


def test_where_nothing_was_quiet_all_rounds_count_and_that_is_said() -> None:
    lanes = (Scripted("r", 4.0, hurt=1.1), Scripted("a", 2.0, hurt=1.6))
    rows = Machine(*lanes, hurt=range(3, 1000)).rows(SIX)
    assert rows["a"].ratio
    assert (rows["a"].ratio.rounds, rows["a"].settled) == (6, False)
    given = ([*rows.values()], BenchSettings(device="cpu"), 1.0, 2, During(0.5, True))
    said = " ".join(warnings_of(*given))
    assert "disturbed in nearly every round of 2 of 2 rows" in said
    assert "1 of 1 ratios did not settle" in said
    assert "1.0 of 2 cores busy" in said
    assert "other work kept 0.5 cores busy" in said
