"""Quiet moments: what counts as one, how long one is waited for, and what they decide."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.bench.conftest import Scripted
from van_deploy.bench.machine import During
from van_deploy.bench.process import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bench.quiet import LOOKS_FIRST, QUIET_LIMIT, Gauge, Product
from van_deploy.bench.race import Race
from van_deploy.bench.steadiness import warnings_of
from van_deploy.config import Budget


class Machine:
    """Work that takes 1 ms, or ``factor`` times as much for the looks that are listed."""

    def __init__(self, disturbed: range = range(0), factor: float = 1.4) -> None:
        self.looks, self.disturbed, self.factor = 0, disturbed, factor
        self.slept = 0.0

    def is_disturbed(self) -> bool:
        return self.looks in self.disturbed

    def work(self) -> float:
        self.looks += 1
        return self.factor if self.is_disturbed() else 1.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def test_a_moment_is_quiet_up_to_a_tenth_above_the_undisturbed() -> None:
    gauge = Gauge(Machine(range(5, 9)).work)
    assert gauge.limit_ms == pytest.approx(QUIET_LIMIT)
    seen = gauge.seen()
    assert seen is not None
    assert seen.looks == LOOKS_FIRST
    assert seen.quiet_share == pytest.approx(1 - 4 / LOOKS_FIRST)


def test_a_quiet_moment_is_waited_for_and_the_wait_does_not_change_the_measure() -> None:
    machine = Machine(range(LOOKS_FIRST + 1, LOOKS_FIRST + 500))
    gauge = Gauge(machine.work, machine.sleep)
    assert gauge.look() == 1.4
    assert gauge.quiet_moment(60.0) == 1.0
    assert machine.slept == pytest.approx(0.1 * 499)
    assert gauge.limit_ms == pytest.approx(QUIET_LIMIT)
    looks = machine.looks
    assert gauge.quiet_moment(60.0) == 1.0
    assert machine.looks == looks, "the last look was quiet: no other is needed"


def test_patience_ends() -> None:
    machine = Machine(range(LOOKS_FIRST + 1, 10**9))
    gauge = Gauge(machine.work, machine.sleep)
    gauge.look()
    assert gauge.quiet_moment(0.0) == 1.4
    assert machine.slept == 0.0


def test_where_nothing_watches_every_moment_is_quiet() -> None:
    gauge = Gauge(None)
    assert gauge.quiet_moment(60.0) == gauge.look() == 0.0
    assert gauge.limit_ms == float("inf")
    assert gauge.seen() is None


def test_a_race_goes_on_when_the_watcher_dies() -> None:
    def dead() -> float:
        raise WorkerError("killed", "killed by SIGKILL")

    gauge = Gauge(dead)
    assert gauge.limit_ms == float("inf")
    assert gauge.quiet_moment(60.0) == 0.0


class Slowed(Scripted):
    """A contender that a disturbance slows by more than it slows the reference."""

    drift = 1.0

    def __init__(self, name: str, ms: float, machine: Machine, by: float) -> None:
        super().__init__(name, ms)
        self.machine, self.by = machine, by

    def time_slice(self, seconds: float) -> float | None:
        took = super().time_slice(seconds)
        return took and took * (self.by if self.machine.is_disturbed() else 1.0)


def raced(machine: Machine, budget: Budget) -> tuple[Race, list]:  # type: ignore[type-arg]
    """Return a race of a reference of 4 ms and one of 2 ms that is disturbed more, and its rows."""
    race = Race([], threads=1)
    race.gauge = Gauge(machine.work, machine.sleep)
    race._lanes = [Slowed("r", 4.0, machine, 1.1), Slowed("a", 2.0, machine, 1.6)]
    return race, race.run(Path("none"), 1, 64, budget, "r")


LONG = Budget(seconds=1.0, calls=1, limit_s=4.0, rounds=10, warmup_s=0.0)


def test_disturbed_rounds_do_not_count_for_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("van_deploy.bench.race.PATIENCE_S", -1e9)  # nobody waits
    machine = Machine(range(LOOKS_FIRST + 10, LOOKS_FIRST + 40))
    row = raced(machine, LONG)[1][1]
    assert row.ratio.median == pytest.approx(2.0)
    assert row.ratio.rounds == sum(row.round_quiet) < len(row.round_ms)
    assert len(row.round_quiet) == len(row.round_ms) == len(row.round_ratios)
    assert min(row.round_ratios) == pytest.approx(2.0 * 1.1 / 1.6)
    assert row.settled is True


def test_a_race_waits_until_it_is_quiet() -> None:
    machine = Machine(range(LOOKS_FIRST + 10, LOOKS_FIRST + 40))
    row = raced(machine, LONG)[1][1]
    assert machine.slept > 1.0
    assert sum(row.round_quiet) >= len(row.round_quiet) - 1, "the one in which it began"
    assert row.ratio.median == pytest.approx(2.0)


def test_where_nothing_was_quiet_all_rounds_count_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("van_deploy.bench.race.PATIENCE_S", -1e9)
    machine = Machine(range(LOOKS_FIRST + 1, 10**9), factor=1.2)
    race, rows = raced(machine, Budget(seconds=0.6, calls=1, limit_s=0.6, rounds=6, warmup_s=0.0))
    assert rows[1].ratio.rounds == 6
    assert rows[1].settled is False
    assert not any(rows[1].round_quiet)
    quiet_state = During(None, False, None, None, None, None)
    said = " ".join(warnings_of(rows, quiet_state, 2.0))
    assert "disturbed in nearly every round of 2 of 2 rows" in said
    assert "1 of 1 ratios did not settle" in said
    assert race.gauge.seen()


def test_the_work_takes_some_time() -> None:
    assert 0 < Product().ms() < 1e3


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")
@pytest.mark.skipif(os.name == "nt", reason="processes are stopped by POSIX signals")
def test_a_process_keeps_its_memory_unless_it_is_not_to_or_the_user_says_otherwise(
    clean: pytest.MonkeyPatch,
) -> None:
    def variables(*, keeps: bool) -> set[str]:
        with WorkerProcess(1, keeps_memory=keeps) as process:
            process.ask("gauge")
            text = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
        return {entry for entry in text.split("\0") if entry.startswith("MALLOC_")}

    assert variables(keeps=True) == {f"{name}={value}" for name, value in KEEP_MEMORY.items()}
    assert variables(keeps=False) == set()
    clean.setenv("MALLOC_MMAP_MAX_", "9")
    assert "MALLOC_MMAP_MAX_=9" in variables(keeps=True)
