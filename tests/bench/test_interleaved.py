"""The interleaved benchmark: worker processes, order of a round, ratios, and stopping criteria."""

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

SHORT = Budget(seconds=0.05, calls=2, limit_s=0.3, rounds=2, warmup_s=0.0)
SIX_ROUNDS = Budget(seconds=0.6, calls=1, limit_s=0.6, rounds=6, warmup_s=0.0)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Return a file of eight inputs for van_digits."""
    np.save(tmp_path / "none.npy", np.ones((8, 3, 64, 64), np.float32))
    return tmp_path / "none.npy"


@pytest.fixture
def graph(digits_bundle: Bundle) -> Contender:
    file = str(digits_bundle.verified_path("fp32"))
    return Contender("fp32", "onnxruntime", "fp32", file, mode="ort-cpu")


def is_suspended(process: psutil.Process) -> bool:
    """Return whether a process is suspended within two seconds."""
    for _ in range(100):
        if process.status() == psutil.STATUS_STOPPED:
            return True
        time.sleep(0.02)
    return False


def test_worker_is_suspended_between_requests_and_disables_malloc_trimming_by_default(
    graph: Contender, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9")
    with WorkerProcess(1) as worker:
        process = psutil.Process(worker.process.pid)
        worker.request("load", contender=graph, threads=1, streams=1)
        assert is_suspended(process)
        assert min(worker.request("warm_up", images=inputs, batch=2, warmup_s=0.0)) > 0
        assert is_suspended(process)
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


def test_others_continue_after_a_failure(graph: Contender, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    narrow = replace(graph, name="narrow", min_batch=2, max_batch=2)
    broken = replace(graph, name="broken", file=str(tmp_path / "model.onnx"))
    settings = BenchSettings(device="cpu", threads=2, streams=2, reference="narrow", budget=SHORT)
    processes = [TimedProcess(one, inputs, 64, settings) for one in (graph, narrow, broken)]
    with InterleavedBenchmark(processes, settings, no_progress) as benchmark:
        os.kill(processes[0].process.pid, signal.SIGKILL)
        first, second = (
            {row.contender: row for row in benchmark.run_batch(n, processes)} for n in (1, 2)
        )
    assert "SIGKILL" in first["fp32"].error
    assert first["narrow"].error == "batch 1 is outside the engine's profile (2 to 2)"
    assert all("cannot load" in rows["broken"].error for rows in (first, second))
    assert second["narrow"].latency
    assert second["fp32"].ratio, "the process is restarted at the next batch size"
    assert second["fp32"].latency
    assert second["fp32"].latency.calls >= 2 * SHORT.rounds


class FakeProcess(TimedProcess):
    """A contender with given latencies.

    Attributes:
        ms: latency of a call.
        fails_at: number of the slice that fails.
        noise: factor of the latency in every other slice.
        slowdown: factor of the latency while the machine is disturbed.
    """

    ms: float
    benchmark: FakeBenchmark
    fails_at, noise, slowdown, slices = -1, 1.0, 1.0, 0

    def __init__(self, name: str, ms: float, **behaviour: float) -> None:
        super().__init__(Contender(name, "onnxruntime", "fp32"), Path(), 64, BenchSettings())
        vars(self).update(behaviour, ms=ms)

    def request(self, method: str, **arguments: Any) -> Any:
        if method == "warm_up":
            return self.ms, self.ms
        self.slices += 1
        self.benchmark.slices += 1
        if self.slices == self.fails_at:
            raise WorkerError("killed by SIGKILL")
        ms = self.ms * self.benchmark.drift**self.benchmark.slices
        ms *= self.noise ** (self.slices % 2)
        ms *= self.slowdown if self.benchmark.is_disturbed else 1.0
        return [ms], arguments["seconds"], 0


class FakeBenchmark(InterleavedBenchmark):
    """A benchmark of fake contenders, the first of which is the reference.

    Attributes:
        drift: factor of all latencies from one slice to the next.
        disturbed: probes during which the machine is disturbed.
    """

    drift, disturbed, slices = 1.0, range(0), 0

    def __init__(self, *processes: FakeProcess, budget: Budget = SIX_ROUNDS, **more: Any) -> None:
        settings = BenchSettings(device="cpu", reference=processes[0].name, budget=budget)
        super().__init__([*processes], settings, no_progress)
        vars(self).update(more)
        for process in processes:
            process.benchmark = self

    @property
    def is_disturbed(self) -> bool:
        return len(self.probe_times) in self.disturbed

    def time_probe(self) -> float:
        self.probe_times.append(1.3 if self.is_disturbed else 1.0)
        return self.probe_times[-1]

    def rows(self) -> dict[str, Row]:
        return {row.contender: row for row in self.run_batch(1, self.processes)}


def ratio_of(row: Row) -> float | None:
    return row.ratio.median if row.ratio else None


def test_constant_drift_cancels_in_the_ratios() -> None:
    processes = [FakeProcess(str(n), 4.0 / n) for n in (1, 2, 4, 8)]
    rows = FakeBenchmark(*processes, drift=1.1).rows()  # 10 % slower from each slice to the next
    ratios = {name: ratio_of(row) for name, row in rows.items()}
    assert ratios == {str(n): pytest.approx(n) for n in (1, 2, 4, 8)}


def test_round_order_has_the_reference_first_last_and_in_between() -> None:
    reference, others = FakeProcess("r", 1.0), [FakeProcess(str(i), 1.0) for i in range(7)]
    names = [process.name for process in round_order(others, reference)]
    assert names == ["r", "0", "1", "2", "r", "3", "4", "5", "r", "6", "r"]
    assert round_order([], reference) == [reference]


def test_failed_contender_has_no_latency_and_failed_reference_leaves_no_ratios() -> None:
    reference, other = FakeProcess("r", 4.0), FakeProcess("a", 2.0)
    fails = FakeProcess("fails", 2.0, fails_at=3)
    rows = FakeBenchmark(reference, fails, other, drift=1.1).rows()
    assert ("SIGKILL" in rows["fails"].error, rows["fails"].latency) == (True, None)
    assert ratio_of(rows["a"]) == pytest.approx(2.0)
    rows = FakeBenchmark(FakeProcess("r", 4.0, fails_at=3), other).rows()
    assert [row.ratio for row in rows.values()] == [None, None]
    assert rows["a"].latency
    assert rows["a"].rounds == SIX_ROUNDS.rounds


def test_rounds_continue_until_ratios_settle_or_the_limit_is_reached() -> None:
    budget = SIX_ROUNDS.with_changes(limit_s=2.0)
    steady, noisy = FakeProcess("steady", 2.0), FakeProcess("noisy", 2.0, noise=1.5)
    rows = FakeBenchmark(FakeProcess("r", 4.0), steady, noisy, budget=budget).rows()
    assert (steady.slices, rows["steady"].settled) == (6, True)
    assert (noisy.slices, rows["noisy"].settled) == (20, False), "slices of 0.1 s, 2 s at most"
    assert rows["r"].settled is None, "the reference's own ratio is 1"


def test_slices_last_at_least_one_call_of_the_reference() -> None:
    fast = FakeProcess("fast", 1.0)
    FakeBenchmark(FakeProcess("slow", 500.0), fast).rows()
    assert fast.timed_s == pytest.approx(6 * 0.5)


def test_disturbed_rounds_are_excluded_unless_too_few_rounds_remain() -> None:
    def run(disturbed: range, budget: Budget) -> tuple[FakeBenchmark, dict[str, Row]]:
        reference = FakeProcess("r", 4.0, slowdown=1.1)
        other = FakeProcess("a", 2.0, slowdown=1.6)
        fake = FakeBenchmark(reference, other, disturbed=disturbed, budget=budget)
        return fake, fake.rows()

    row = run(range(10, 23), SIX_ROUNDS.with_changes(seconds=1.0, limit_s=4.0, rounds=10))[1]["a"]
    assert row.ratio
    assert row.ratio.median == pytest.approx(2.0)
    assert row.ratio.rounds == row.quiet_rounds < row.rounds
    assert row.settled is True
    fake, rows = run(range(3, 1000), SIX_ROUNDS)
    assert rows["a"].ratio
    assert (rows["a"].ratio.rounds, rows["a"].settled) == (6, False)
    machine = Machine(cpu(), (), None, other_load_cores=0.5, under_load=True)
    warnings = " ".join(warnings_for([*rows.values()], fake.settings, machine))
    assert "1 of 1 ratios did not settle" in warnings
    assert "other processes used 0.5 of" in warnings


@each("count", [1, 5, 99, 100, 101])
def test_percentiles_are_measured_latencies(count: int) -> None:
    values = list(np.random.default_rng(count).lognormal(size=count))
    latency, ordered = Latency.of(values), sorted(values)
    assert (latency.calls, latency.min_ms) == (count, ordered[0])
    assert latency.p90_ms == ordered[-(-90 * count // 100) - 1]
    assert latency.p99_ms == ordered[-(-99 * count // 100) - 1]
    assert latency.cv_percent == pytest.approx(100 * np.std(values) / np.mean(values))


def test_ratio_interval_is_narrow_with_many_rounds_and_robust_to_an_outlier() -> None:
    ratio = Ratio.of([*(2.0 + 0.001 * i for i in range(29)), 9.0])
    assert ratio is not None
    assert (ratio.low, ratio.high, ratio.rounds) == (2.009, 2.02, 30)
    assert ratio.uncertainty_percent < 1.0
    assert Ratio.of([]) is None
