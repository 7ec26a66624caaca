"""Timing on a device, references of ratios, profiles, and the roofline model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.each import each
from van_deploy.bench import gpu
from van_deploy.bench.document import Ceilings, Contender, GpuState, Row
from van_deploy.bench.gpu import Timer, add_ratios, gpu_monitor, int8_warnings, time_resident
from van_deploy.bench.interleaved import InterleavedBenchmark, TimedProcess
from van_deploy.bench.profile import profile_contender, profile_modules
from van_deploy.bench.roofline import measure_limits, minimum_time
from van_deploy.bench.worker import WorkerError
from van_deploy.config import BenchSettings, Budget
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.errors import UsageError
from van_deploy.model.checkpoint import load_van
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.variants import VARIANTS
from van_deploy.stopwatch import no_progress


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

    class FakeProcess(TimedProcess):
        def request(self, method: str, **arguments: Any) -> Any:
            requests.append((method, arguments))
            if arguments["batch"] == 2:
                raise WorkerError("out of memory")
            return {"queued_ms": 2.0, "images_per_s": 500.0}

    settings = BenchSettings(device="cuda:0", budget=Budget(seconds=0.5, calls=7))
    contender = Contender("x", "tensorrt", "fp16", max_batch=4)
    process = FakeProcess(contender, Path("none.npy"), 224, settings)
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


def row(contender: str, ms: float | None, batch: int = 8) -> Row:
    return Row(contender, batch, 224, queued_ms=ms)


def test_reference_is_the_fastest_pytorch_mode_at_the_same_batch() -> None:
    names = ("pytorch", "pytorch-compile-fp16", "tensorrt/fp16")
    rows = [row(name, ms) for name, ms in zip(names, (20.0, 6.0, 3.0), strict=True)]
    rows += [row(name, ms, 1) for name, ms in zip(names, (4.0, None, 2.0), strict=True)]
    words, rows = add_ratios(rows, CONTENDERS, "pytorch")
    assert words == "the fastest of PyTorch's modes"
    assert [r.ratio and r.ratio.median for r in rows] == [0.3, 1.0, 2.0, 1.0, None, 2.0]
    words, rows = add_ratios(rows, CONTENDERS, "tensorrt/fp16")
    assert (words, rows[0].ratio and rows[0].ratio.median) == ("tensorrt/fp16", 0.15)


TIMES = [
    ({"fp16": 3.0, "int8": 3.5}, True),
    ({"fp16": 3.0, "int8": 2.0}, False),
    ({"int8": 2.0}, False),
]


@each("times, has_warning", TIMES)
def test_warning_about_slow_int8(times: dict[str, float], has_warning: bool) -> None:
    rows = [row(f"tensorrt/{kind}", ms) for kind, ms in times.items()]
    words = "INT8 is not faster than FP16 here at batch 8 (3.500 ms against 3.000 ms): "
    assert int8_warnings(rows, CONTENDERS) == [f"{words}deploy FP16 on this GPU"] * has_warning


def test_profile_of_an_eager_network_sums_by_kind_of_layer() -> None:
    model = load_van(EMBEDDED_NAME).model
    lines = profile_modules(model, torch.zeros(1, 3, 64, 64))
    assert not any("forward" in vars(layer) for layer in model.modules())  # not changed
    kinds = {line.kind: line for line in lines}
    assert {"dw 3x3", "dw 5x5", "dw 7x7 d3", "1x1", "GELU", "LayerNorm"} <= set(kinds)
    assert sum(line.percent for line in lines) == pytest.approx(100)
    assert lines == sorted(lines, key=lambda line: -line.ms)


def test_onnxruntime_on_a_gpu_is_not_profiled() -> None:
    """Its node times are those of the launches on the host."""
    contender = Contender("ort-cuda/fp16", "onnxruntime", "fp16", device="cuda:0")
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
    ({"fp32": 1e12}, 1e15, "bf16", None, ""),
    ({"fp32": 1e12}, 1e15, "int8", None, ""),
]


@each("rates, bytes_per_s, precision, ms, bound", RATES)
def test_minimum_time_is_the_maximum_of_compute_and_memory_time(
    rates: dict[str, float], bytes_per_s: float, precision: str, ms: float | None, bound: str
) -> None:
    config, ceilings = VARIANTS["van_b0"].config, Ceilings(rates, bytes_per_s, "")
    minimum = minimum_time(config, ceilings, ("x", precision, 10, 224))
    assert (minimum.bound if minimum else "") == bound
    if minimum:
        assert minimum.least_ms == pytest.approx(ms, rel=0.002)
        assert minimum.operations == 20 * config.mac_count(224)
        rows = [Row("x", 10, 224, images_per_s=1e4 / (2 * minimum.least_ms))]
        contenders = {"x": Contender("x", "onnxruntime", precision)}
        (reached,) = measure_limits(config, contenders, rows, ceilings)
        assert reached.percent_of_limit == pytest.approx(50)
