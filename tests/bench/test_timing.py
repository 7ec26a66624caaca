"""Timing in interleaved rounds on a CPU and on a GPU, profiles, and the roofline model."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.each import each
from van_deploy.bench import gpu
from van_deploy.bench.benchmark import warnings_for
from van_deploy.bench.contenders import CUDA_GRAPH
from van_deploy.bench.document import Ceilings, Contender, GpuState, Latency, Machine, Ratio, Row
from van_deploy.bench.gpu import Timer, add_ratios, gpu_monitor, int8_warnings, time_resident
from van_deploy.bench.interleaved import InterleavedBenchmark, TimedProcess, round_order
from van_deploy.bench.profile import profile_contender, profile_modules
from van_deploy.bench.roofline import measure_limits, minimum_time
from van_deploy.bench.worker import MALLOC_SETTINGS, Worker, WorkerError, WorkerProcess
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings, Budget
from van_deploy.environment.hardware import Driver, Gpu, cpu
from van_deploy.errors import UsageError
from van_deploy.model import van
from van_deploy.model.checkpoint import load_van
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.variants import VARIANTS
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
    assert first["narrow"].error == "batch 1 is outside the batches of the file (2 to 2)"
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
    assert Ratio.of([]) is None
    reference, other = FakeProcess("r", 4.0), FakeProcess("a", 2.0)
    fails = FakeProcess("fails", 2.0, fails_at=3)
    rows = FakeBenchmark(reference, fails, other, drift=1.1).rows()
    assert ("SIGKILL" in rows["fails"].error, rows["fails"].latency) == (True, None)
    machine = Machine(cpu(), (), None, other_load_cores=0.0, under_load=False)
    warnings = warnings_for([*rows.values()], BenchSettings(device="cpu"), machine)
    assert next(warnings) == "1 of 3 rows failed: each FAIL has the reason"
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


# --- on a GPU --------------------------------------------------------------------------------


class FakeDevice:
    """A device with a queue: a launch takes 2.0 ms, a single one 2.5 ms, the first 100 ms more."""

    def __init__(self) -> None:
        self.now, self.is_idle, self.first_ms = 0.0, True, 100.0
        self.timer = Timer(lambda: self.now, self.wait, lambda start, end: end - start)

    def upload(self) -> None:
        self.now += 3.0

    def launch(self) -> None:
        self.now += self.first_ms + (2.5 if self.is_idle else 2.0)
        self.first_ms, self.is_idle = 0.0, False

    def download(self) -> None:
        self.now += 0.25

    def wait(self, mark: float) -> None:
        self.is_idle = True


def clocks(*mhz: int) -> Callable[[], GpuState]:
    """Return a monitor with these SM clocks, the last one repeated, and a power cap."""
    values = itertools.chain(mhz, itertools.repeat(mhz[-1]))
    return lambda: GpuState(sm_mhz=next(values), throttled=("power cap",))


def test_latency_throughput_and_transfers_are_measured_separately() -> None:
    device: Any = FakeDevice()
    fields = time_resident(device, 8, device.timer, gpu_monitor("cpu"), 0.02, 20)
    latency = fields["latency"]
    assert latency.p50_ms == latency.p99_ms == 2.5, "without transfers and the first call"
    assert 2.0 < fields["queued_ms"] < 2.1, "one gap per group"
    assert fields["images_per_s"] == pytest.approx(8e3 / fields["queued_ms"])
    assert (fields["upload_ms"], fields["download_ms"]) == (3.0, 0.25)
    assert latency.calls >= 20
    row = Row("x", 8, 224, **fields)
    assert (row.throttled, bool(row.first_call_ms)) == ((), True)


def test_each_gpu_batch_is_one_request_and_a_failure_is_a_row() -> None:
    requests: list[Any] = []

    class FakeGpuProcess(TimedProcess):
        def request(self, method: str, **arguments: Any) -> Any:
            requests.append((method, arguments))
            if arguments["batch"] == 2:
                raise WorkerError("out of memory")
            return {"queued_ms": 2.0, "images_per_s": 500.0}

    settings = BenchSettings(device="cuda:0", budget=Budget(seconds=0.5, calls=7))
    contender = Contender("x", "tensorrt", "fp16", max_batch=4)
    process = FakeGpuProcess(contender, Path("none.npy"), 224, settings)
    process.load_s = 1.0
    benchmark = InterleavedBenchmark([process], settings, no_progress)
    rows = [row for batch in (1, 2, 4, 8) for row in benchmark.run_batch(batch, [process])]
    assert [row.queued_ms for row in rows] == [2.0, None, 2.0, None]
    assert [row.error[:13] for row in rows] == ["", "out of memory", "", "batch 8 is ou"]
    given = {"images": Path("none.npy"), "batch": 1, "seconds": 0.5, "calls": 7}
    assert requests == [("time_resident", {**given, "batch": batch}) for batch in (1, 2, 4)]


@each("mhz", [(345, 900, 1500, 1900, 1980), (345, 1980) * 200])
def test_timing_waits_for_a_steady_clock_and_reports_throttling(mhz: tuple[int, ...]) -> None:
    device: Any = FakeDevice()
    fields = time_resident(device, 1, device.timer, clocks(*mhz), 0.01, 20)
    assert fields["throttled"] == ("power cap", *["clock not steady"] * (len(mhz) > 5))
    assert fields["gpu"].sm_mhz in mhz[-2:]


def test_gpu_monitor_uses_the_gpu_order_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(Gpu(name, (9, 0), None, uuid=name) for name in ("first", "second"))
    monkeypatch.setattr(gpu, "nvidia_driver", lambda: Driver("580.65.06", (13, 0), gpus))
    power_mw, reasons = {"second": 350_000}, {"second": 0x24}
    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": str,
        "nvmlDeviceGetPowerUsage": power_mw.get,
        "nvmlDeviceGetCurrentClocksEventReasons": reasons.get,
    }.items():
        monkeypatch.setattr(f"pynvml.{name}", function)
    state = GpuState(power_w=350.0, throttled=("power cap", "temperature (software)"))
    assert gpu_monitor("cuda:1")() == state


CONTENDERS = [
    Contender("pytorch", "pytorch", "fp32"),
    Contender("pytorch-compile-fp16", "pytorch", "fp16"),
    Contender("tensorrt/fp16", "tensorrt", "fp16"),
    Contender("tensorrt/int8", "tensorrt", "int8"),
]


def gpu_row(contender: str, ms: float | None, batch: int = 8) -> Row:
    return Row(contender, batch, 224, queued_ms=ms)


def test_reference_is_the_fastest_pytorch_mode_at_the_same_batch() -> None:
    names = ("pytorch", "pytorch-compile-fp16", "tensorrt/fp16")
    rows = [gpu_row(name, ms) for name, ms in zip(names, (20.0, 6.0, 3.0), strict=True)]
    rows += [gpu_row(name, ms, 1) for name, ms in zip(names, (4.0, None, 2.0), strict=True)]
    words, rows = add_ratios(rows, CONTENDERS, "pytorch")
    assert words == "the fastest of PyTorch's modes"
    assert [r.ratio and r.ratio.median for r in rows] == [0.3, 1.0, 2.0, 1.0, None, 2.0]
    words, rows = add_ratios(rows, CONTENDERS, "tensorrt/fp16")
    assert (words, rows[0].ratio and rows[0].ratio.median) == ("tensorrt/fp16", 0.15)


def test_warning_about_slow_int8() -> None:
    slow, fast = gpu_row("tensorrt/int8", 3.5), gpu_row("tensorrt/int8", 2.0)
    fp16 = gpu_row("tensorrt/fp16", 3.0)
    words = "INT8 is not faster than FP16 here at batch 8 (3.500 ms against 3.000 ms): "
    assert int8_warnings([fp16, slow], CONTENDERS) == [f"{words}deploy FP16 on this GPU"]
    assert int8_warnings([fp16, fast], CONTENDERS) == int8_warnings([fast], CONTENDERS) == []


def test_profile_of_an_eager_network_sums_by_kind_of_layer() -> None:
    model = load_van(EMBEDDED_NAME).model
    lines = profile_modules(model, torch.zeros(1, 3, 64, 64))
    assert not any("forward" in vars(layer) for layer in model.modules())  # not changed
    kinds = {line.kind: line for line in lines}
    assert {"dw 3x3", "dw 5x5", "dw 7x7 d3", "1x1", "GELU", "LayerNorm"} <= set(kinds)
    assert sum(line.percent for line in lines) == pytest.approx(100)
    assert lines == sorted(lines, key=lambda line: -line.ms)


@each("runtime, mode", [("onnxruntime", "ort-cuda"), ("tensorrt", CUDA_GRAPH)])
def test_onnxruntime_and_cuda_graphs_are_not_profiled_on_a_gpu(runtime: str, mode: str) -> None:
    """ONNX Runtime's node times are those of the launches on the host; a graph has no layers."""
    contender = Contender("x/fp16", runtime, "fp16", mode=mode, device="cuda:0")
    with pytest.raises(UsageError, match="cannot be profiled"):
        profile_contender(contender, None, None)


RATES = [
    # van_b0 at 224, batch 10: 17.28 GFLOP; 82.5 % 1x1, 9.9 % depth-wise; 4.105 M weights
    ({"fp32": 1e12}, 1e15, "fp32", 17.2845, "compute"),
    ({"fp32": 1e12, "vector": 1e11}, 1e15, "fp32", 17.2845 * (0.9006 + 0.994), "compute"),
    ({"fp32": 1e12, "int8": 4e12}, 1e15, "int8", 17.2845 * (0.1753 + 0.8247 / 4), "compute"),
    ({"fp16": 1e12, "int8": 1e12}, 1e15, "int8", 17.2845, "compute"),
    ({"tf32": 2e12}, 1e15, "fp32", 17.2845 / 2, "compute"),
    ({"fp16": 1e18}, 1e9, "fp16", 2 * 4.105 + 4 * 1.515, "memory"),
    ({"fp16": 1e18, "int8": 1e18}, 1e9, "int8", 2 * 4.1058 - 3.1416 + 4 * 1.5153, "memory"),
    ({"fp32": 1e12}, 1e15, "bf16", None, ""),
    ({"fp32": 1e12}, 1e15, "int8", None, ""),
]


def test_minimum_time_counts_bytes_and_stages_that_are_used() -> None:
    """For uint8 input 150,528 bytes of pixels; a backbone ends with its last output."""
    config, memory = VARIANTS["van_b0"].config, Ceilings({"fp32": 1e18}, 1e9, "")
    fp32 = Contender("x", "", "fp32")
    inputs = (fp32, replace(fp32, embedded="uint8"))
    times = [minimum_time(config, memory, contender, 1, 224) for contender in inputs]
    floats, pixels = (time.least_ms * 1e6 for time in times if time)
    assert floats - pixels == pytest.approx(3 * 150_528)
    first = minimum_time(config.backbone((0,)), memory, fp32, 1, 224)
    model = van.VAN(config.backbone((0,))).eval()
    used = [one for name, one in model.named_parameters() if name.partition(".")[0].endswith("1")]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (maps,) = model(torch.zeros(1, 3, 224, 224))
    assert first is not None
    assert first.operations == counter.get_total_flops()
    values = sum(parameter.numel() for parameter in used) + 150_528 + maps.numel()
    assert first.least_ms * 1e6 == pytest.approx(4 * values)


@each("rates, bytes_per_s, precision, ms, bound", RATES)
def test_minimum_time_is_the_maximum_of_compute_and_memory_time(
    rates: dict[str, float], bytes_per_s: float, precision: str, ms: float | None, bound: str
) -> None:
    config, ceilings = VARIANTS["van_b0"].config, Ceilings(rates, bytes_per_s, "")
    contenders = {"x": Contender("x", "onnxruntime", precision)}
    minimum = minimum_time(config, ceilings, contenders["x"], 10, 224)
    assert (minimum.bound if minimum else "") == bound
    if minimum:
        assert minimum.least_ms == pytest.approx(ms, rel=0.002)
        assert minimum.operations == 20 * config.mac_count(224)
        rows = [Row("x", 10, 224, images_per_s=1e4 / (2 * minimum.least_ms))]
        (reached,) = measure_limits(config, contenders, rows, ceilings)
        assert reached.percent_of_limit == pytest.approx(50)
