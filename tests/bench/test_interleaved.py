"""A race: its workers, the order of a round, what a ratio is taken against, and when it ends."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.each import each
from van_deploy.bench.benchmark import warnings_for
from van_deploy.bench.document import Contender, Latency, Machine, Ratio, Row
from van_deploy.bench.interleaved import InterleavedBenchmark, TimedProcess, round_order
from van_deploy.bench.worker import MALLOC_SETTINGS, Worker, WorkerError, WorkerProcess
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings, Budget
from van_deploy.environment.hardware import cpu
from van_deploy.stopwatch import no_progress

QUICK = Budget(seconds=0.05, calls=2, limit_s=0.3, rounds=2, warmup_s=0.0)
SIX = Budget(seconds=0.6, calls=1, limit_s=0.6, rounds=6, warmup_s=0.0)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Return a file of eight inputs for van_digits, noise of natural size."""
    values = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    np.save(tmp_path / "none.npy", values)
    return tmp_path / "none.npy"


@pytest.fixture
def graph(digits_bundle: Bundle) -> Contender:
    file = str(digits_bundle.verified_path("fp32"))
    return Contender("fp32", "onnxruntime", "fp32", file, mode="ort-cpu")


def sleeps(process: psutil.Process) -> bool:
    """Return whether a process is stopped within two seconds."""
    for _ in range(100):
        if process.status() == psutil.STATUS_STOPPED:
            return True
        time.sleep(0.02)
    return False


def test_a_worker_sleeps_between_requests_and_keeps_its_memory_unless_told_otherwise(
    graph: Contender, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9")
    with WorkerProcess(1) as worker:
        process = psutil.Process(worker.process.pid)
        worker.request("load", contender=graph, threads=1, streams=1)
        assert sleeps(process)
        assert min(worker.request("warm_up", images=inputs, batch=2, warmup_s=0.0)) > 0
        assert sleeps(process)
        latencies, wall_s, peak = worker.request("time_calls", seconds=0.05)
        assert peak > 10e6
        assert wall_s >= sum(latencies) / 1e3 >= 0.05
        expected = {**MALLOC_SETTINGS, "MALLOC_MMAP_MAX_": "9", "OMP_NUM_THREADS": "1"}
        assert expected.items() <= process.environ().items()


@each("text", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried", ""])
def test_exhausted_memory_is_recognised(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError(text) if text else MemoryError

    monkeypatch.setattr(Worker, "profile", fail)
    assert Worker().handle("profile", {}).message == "out of memory"


def test_what_fails_is_a_row_and_the_rest_goes_on(
    graph: Contender, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    narrow = replace(graph, name="narrow", min_batch=2, max_batch=2)
    broken = replace(graph, name="broken", file=str(tmp_path / "model.onnx"))
    settings = BenchSettings(device="cpu", threads=2, streams=2, reference="narrow", budget=QUICK)
    lanes = [TimedProcess(one, inputs, 64, settings) for one in (graph, narrow, broken)]
    with InterleavedBenchmark(lanes, settings, no_progress) as race:
        os.kill(lanes[0].process.pid, signal.SIGKILL)
        first, second = ({row.contender: row for row in race.run_batch(n, lanes)} for n in (1, 2))
    assert "SIGKILL" in first["fp32"].error
    assert first["narrow"].error == "batch 1 is outside the engine's profile (2 to 2)"
    assert all("cannot load" in rows["broken"].error for rows in (first, second))
    assert second["narrow"].latency
    assert second["fp32"].latency, "it starts again at the next batch"
    assert second["fp32"].ratio
    assert second["fp32"].latency.calls >= 2 * QUICK.rounds


class Scripted(TimedProcess):
    """A contender whose slices take what it is told, on a machine that gets slower by ``drift``."""

    def __init__(
        self, name: str, ms: float, *, fails_at: int = -1, noise: float = 1.0, hurt: float = 1.0
    ) -> None:
        super().__init__(Contender(name, "onnxruntime", "fp32"), Path(), 64, BenchSettings())
        self.ms, self.fails_at, self.noise, self.hurt, self.slices = ms, fails_at, noise, hurt, 0
        self.race = Neighbourhood(self)

    def request(self, method: str, **arguments: Any) -> Any:
        if method == "warm_up":
            return self.ms, self.ms
        self.slices += 1
        self.race.clock += 1
        if self.slices == self.fails_at:
            raise WorkerError("killed by SIGKILL")
        took = self.ms * self.race.drift**self.race.clock * self.noise ** (self.slices % 2)
        took *= self.hurt if self.race.disturbed else 1.0
        return [took], arguments["seconds"], 0


class Neighbourhood(InterleavedBenchmark):
    """A race of scripted contenders, with a neighbour from one look at the machine to another."""

    def __init__(
        self, *lanes: Scripted, drift: float = 1.0, hurt: range = range(0), budget: Budget = SIX
    ) -> None:
        reference = lanes[0].contender.name
        settings = BenchSettings(device="cpu", reference=reference, budget=budget)
        super().__init__([*lanes], settings, no_progress)
        self.clock, self.drift, self.hurt = 0, drift, hurt
        for lane in lanes:
            lane.race = self

    @property
    def disturbed(self) -> bool:
        return len(self.probe_times) in self.hurt

    def time_probe(self) -> float:
        self.probe_times.append(1.3 if self.disturbed else 1.0)
        return self.probe_times[-1]

    def rows(self) -> dict[str, Row]:
        return {row.contender: row for row in self.run_batch(1, self.processes)}


def ratio_of(row: Row) -> float | None:
    return row.ratio.median if row.ratio else None


def test_steady_drift_cancels_between_the_reference_before_and_after() -> None:
    lanes = [Scripted(str(n), 4.0 / n) for n in (1, 2, 4, 8)]
    rows = Neighbourhood(*lanes, drift=1.1).rows()  # 10 % slower from each slice to the next
    found = {name: ratio_of(row) for name, row in rows.items()}
    assert found == {str(n): pytest.approx(n) for n in (1, 2, 4, 8)}


def test_the_reference_comes_first_last_and_after_every_few() -> None:
    base, others = Scripted("r", 1.0), [Scripted(str(i), 1.0) for i in range(7)]
    names = [lane.contender.name for lane in round_order(others, base)]
    assert names == ["r", "0", "1", "2", "r", "3", "4", "5", "r", "6", "r"]
    assert round_order([], base) == [base]


def test_one_that_fails_is_a_row_and_a_reference_that_fails_leaves_no_ratios() -> None:
    dies = Scripted("dies", 2.0, fails_at=3)
    rows = Neighbourhood(Scripted("r", 4.0), dies, Scripted("lives", 2.0), drift=1.1).rows()
    assert ("SIGKILL" in rows["dies"].error, rows["dies"].latency) == (True, None)
    assert ratio_of(rows["lives"]) == pytest.approx(2.0)
    other = Scripted("a", 2.0)
    rows = Neighbourhood(Scripted("r", 4.0, fails_at=3), other).rows()
    assert [row.ratio for row in rows.values()] == [None, None]
    assert rows["a"].latency
    assert other.slices >= SIX.rounds


def test_a_race_goes_on_until_the_ratios_settle_or_the_limit_is_reached() -> None:
    budget = SIX.with_changes(limit_s=2.0)
    steady, noisy = Scripted("steady", 2.0), Scripted("noisy", 2.0, noise=1.5)
    rows = Neighbourhood(Scripted("r", 4.0), steady, noisy, budget=budget).rows()
    assert (steady.slices, rows["steady"].settled) == (6, True)
    assert (noisy.slices, rows["noisy"].settled) == (20, False), "slices of 0.1 s, 2 s at most"
    assert rows["r"].settled is None, "the reference is 1 by definition"


def test_slices_are_as_long_as_one_call_of_a_slow_reference() -> None:
    fast = Scripted("fast", 1.0)
    Neighbourhood(Scripted("slow", 500.0), fast).rows()
    assert fast.timed_s == pytest.approx(6 * 0.5)


def test_disturbed_rounds_do_not_count_for_a_ratio() -> None:
    budget = SIX.with_changes(seconds=1.0, limit_s=4.0, rounds=10)
    lanes = (Scripted("r", 4.0, hurt=1.1), Scripted("a", 2.0, hurt=1.6))
    row = Neighbourhood(*lanes, hurt=range(10, 23), budget=budget).rows()["a"]
    assert row.ratio
    assert row.ratio.median == pytest.approx(2.0)
    assert row.ratio.rounds == row.quiet_rounds < row.rounds
    assert row.settled is True


def test_where_nothing_was_quiet_all_rounds_count_and_that_is_said() -> None:
    lanes = (Scripted("r", 4.0, hurt=1.1), Scripted("a", 2.0, hurt=1.6))
    race = Neighbourhood(*lanes, hurt=range(3, 1000))
    rows = race.rows()
    assert rows["a"].ratio
    assert (rows["a"].ratio.rounds, rows["a"].settled) == (6, False)
    machine = Machine(cpu(), (), None, other_load_cores=0.5, under_load=True)
    said = " ".join(warnings_for([*rows.values()], race.settings, machine))
    assert "1 of 1 ratios did not settle" in said
    assert "other processes used 0.5 of" in said


@each("count", [1, 5, 99, 100, 101])
def test_percentiles_are_calls_that_were_measured(count: int) -> None:
    values = list(np.random.default_rng(count).lognormal(size=count))
    latency, ordered = Latency.of(values), sorted(values)
    assert (latency.calls, latency.min_ms) == (count, ordered[0])
    assert latency.p90_ms == ordered[-(-90 * count // 100) - 1]
    assert latency.p99_ms == ordered[-(-99 * count // 100) - 1]
    assert latency.cv_percent == pytest.approx(100 * np.std(values) / np.mean(values))


def test_the_interval_narrows_with_the_rounds_and_leaves_single_outliers_out() -> None:
    ratio = Ratio.of([*(2.0 + 0.001 * i for i in range(29)), 9.0])
    assert ratio is not None
    assert (ratio.low, ratio.high, ratio.rounds) == (2.009, 2.02, 30)
    assert ratio.uncertainty_percent < 1.0
    assert Ratio.of([]) is None
