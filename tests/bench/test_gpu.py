"""Timing on a device, what ratios are against, and the least possible time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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


class Device:
    """A device with a queue, and its clock: launches take ``ms`` each, alone ``gap`` more."""

    stream = 7

    def __init__(self, ms: float, gap: float = 0.5, cold: float = 100.0) -> None:
        self.alone, self.queued, self.cold = ms + gap, ms, cold
        self.now, self.waits = 0.0, True
        self.clock = Timer(lambda: self.now, self.wait, lambda start, end: end - start)

    def upload(self) -> None:
        self.now += 3.0

    def launch(self) -> None:
        self.now += self.cold + (self.alone if self.waits else self.queued)
        self.cold, self.waits = 0.0, False

    def download(self) -> None:
        self.now += 0.25

    def wait(self, mark: float) -> None:
        self.waits = True


def clocks(*mhz: int) -> Callable[[], GpuState]:
    """Return a GPU whose clock takes these values, the last one from then on; it is throttled."""
    values = itertools.chain(mhz, itertools.repeat(mhz[-1]))
    return lambda: GpuState(sm_mhz=next(values), throttled=("power cap",))


def test_latency_throughput_and_transfers_are_columns_of_their_own() -> None:
    device: Any = Device(ms=2.0)
    seen = time_resident(device, 8, device.clock, gpu_monitor("cpu"), 0.02)
    assert seen["latency"].p50_ms == seen["latency"].p99_ms == 2.5, "no transfer, no first call"
    assert 2.0 < seen["queued_ms"] < 2.1, "the gap is paid once a group"
    assert seen["images_per_s"] == pytest.approx(8e3 / seen["queued_ms"])
    assert (seen["upload_ms"], seen["download_ms"]) == (3.0, 0.25)
    assert seen["latency"].calls >= 20
    assert seen["first_call_ms"] > 0
    assert seen["throttled"] == ()
    assert Row("x", 8, 224, **seen).queued_ms == seen["queued_ms"]


def test_on_a_gpu_a_batch_is_one_request_and_a_failure_one_row(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Scripted(TimedProcess):
        def request(self, method: str, **arguments: Any) -> Any:
            asked.append((method, arguments))
            if arguments["batch"] == 2:
                raise WorkerError("out of memory")
            return {"queued_ms": 2.0, "images_per_s": 500.0}

    settings = BenchSettings(device="cuda:0", budget=Budget(seconds=0.5, calls=7))
    contender = Contender("x", "tensorrt", "fp16", max_batch=4)
    lane = Scripted(contender, tmp_path / "none.npy", 224, settings)
    lane.load_s = 1.0
    race = InterleavedBenchmark([lane], settings, no_progress)
    rows = [row for batch in (1, 2, 4, 8) for row in race.run_batch(batch, [lane])]
    assert [row.queued_ms for row in rows] == [2.0, None, 2.0, None]
    assert [row.error[:13] for row in rows] == ["", "out of memory", "", "batch 8 is ou"]
    given = {"images": tmp_path / "none.npy", "batch": 1, "seconds": 0.5, "calls": 7}
    assert asked[0] == ("time_resident", given)
    assert len(asked) == 3


@each(
    ("mhz", "reasons"),
    [
        ((345, 900, 1500, 1900, 1980), ("power cap",)),
        ((345, 1980) * 200, ("power cap", "clock not steady")),
    ],
)
def test_samples_wait_for_a_steady_clock_and_throttling_is_told(
    mhz: tuple[int, ...], reasons: tuple[str, ...]
) -> None:
    device: Any = Device(ms=2.0)
    seen = time_resident(device, 1, device.clock, clocks(*mhz), 0.01)
    assert seen["throttled"] == reasons
    assert seen["gpu"].sm_mhz in mhz[-2:]


def test_the_gpu_that_is_watched_is_cudas_and_not_nvmls(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(Gpu(name, (9, 0), None, uuid=name) for name in ("first", "second"))
    monkeypatch.setattr(gpu, "nvidia_driver", lambda: Driver("580.65.06", (13, 0), gpus))
    answers = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByUUID": "handle",
        "nvmlDeviceGetPowerUsage": 350_000,
        "nvmlDeviceGetCurrentClocksEventReasons": 0x24,
    }
    nvml = {name: Mock(return_value=answer) for name, answer in answers.items()}
    for name, function in nvml.items():
        monkeypatch.setattr(f"pynvml.{name}", function)
    state = gpu_monitor("cuda:1")()
    nvml["nvmlDeviceGetHandleByUUID"].assert_called_once_with("second")
    nvml["nvmlDeviceGetPowerUsage"].assert_called_once_with("handle")
    assert state == GpuState(power_w=350.0, throttled=("power cap", "temperature (software)"))


CONTENDERS = [
    Contender("pytorch", "pytorch", "fp32"),
    Contender("pytorch-compile-fp16", "pytorch", "fp16"),
    Contender("tensorrt/fp16", "tensorrt", "fp16"),
    Contender("tensorrt/int8", "tensorrt", "int8"),
]


def row(contender: str, ms: float | None, batch: int = 8) -> Row:
    return Row(contender, batch, 224, queued_ms=ms)


def test_ratios_are_against_the_fastest_of_pytorchs_modes_at_the_same_batch() -> None:
    names = ("pytorch", "pytorch-compile-fp16", "tensorrt/fp16")
    rows = [row(name, ms) for name, ms in zip(names, (20.0, 6.0, 3.0), strict=True)]
    rows += [row(name, ms, 1) for name, ms in zip(names, (4.0, None, 2.0), strict=True)]
    words, rows = add_ratios(rows, CONTENDERS, "pytorch")
    assert words == "the fastest of PyTorch's modes"
    assert [r.ratio and r.ratio.median for r in rows] == [0.3, 1.0, 2.0, 1.0, None, 2.0]
    words, rows = add_ratios(rows, CONTENDERS, "tensorrt/fp16")
    assert (words, rows[0].ratio and rows[0].ratio.median) == ("tensorrt/fp16", 0.15)


@each(
    ("times", "warned"),
    [
        ({"fp16": 3.0, "int8": 3.5}, True),
        ({"fp16": 3.0, "int8": 2.0}, False),
        ({"int8": 2.0}, False),
    ],
)
def test_int8_is_recommended_only_where_it_measured_faster(
    times: dict[str, float], warned: bool
) -> None:
    rows = [row(f"tensorrt/{kind}", ms) for kind, ms in times.items()]
    words = "INT8 is not faster than FP16 here at batch 8 (3.500 ms against 3.000 ms): "
    assert int8_warnings(rows, CONTENDERS) == [f"{words}deploy FP16 on this GPU"] * warned


def test_an_eager_profile_sums_to_the_kinds_of_layers() -> None:
    model = load_van(EMBEDDED_NAME).model
    lines = profile_modules(model, torch.zeros(1, 3, 64, 64))
    assert not any("forward" in vars(layer) for layer in model.modules()), "it is left as it was"
    kinds = {line.kind: line for line in lines}
    assert {"dw 3x3", "dw 5x5", "dw 7x7 d3", "1x1", "GELU", "LayerNorm"} <= set(kinds)
    assert sum(line.percent for line in lines) == pytest.approx(100)
    assert lines == sorted(lines, key=lambda line: -line.ms)


def test_onnx_runtimes_profile_of_a_gpu_is_not_shown() -> None:
    """Its node times there are those of the launches on the host."""
    contender = Contender("ort-cuda/fp16", "onnxruntime", "fp16", device="cuda:0")
    with pytest.raises(UsageError, match="cannot be profiled"):
        profile_contender(contender, None, None)


@each(
    ("rates", "bytes_per_s", "precision", "ms", "bound"),
    [
        # van_b0 at 224, batch 10: 17.28 GFLOP; 82.5 % 1x1, 9.9 % depth-wise; 4.105 M weights
        ({"fp32": 1e12}, 1e15, "fp32", 17.2845, "compute"),
        ({"fp32": 1e12, "vector": 1e11}, 1e15, "fp32", 17.2845 * (0.9006 + 0.994), "compute"),
        ({"fp32": 1e12, "int8": 4e12}, 1e15, "int8", 17.2845 * (0.1753 + 0.8247 / 4), "compute"),
        ({"fp16": 1e12, "int8": 1e12}, 1e15, "int8", 17.2845, "compute"),
        ({"tf32": 2e12}, 1e15, "fp32", 17.2845 / 2, "compute"),
        ({"fp16": 1e18}, 1e9, "fp16", 2 * 4.105 + 4 * 1.515, "memory"),
        ({"fp32": 1e12}, 1e15, "bf16", None, ""),
        ({"fp32": 1e12}, 1e15, "int8", None, ""),
    ],
)
def test_the_least_time_is_the_slower_of_arithmetic_and_memory(
    rates: dict[str, float], bytes_per_s: float, precision: str, ms: float | None, bound: str
) -> None:
    config, ceilings = VARIANTS["van_b0"].config, Ceilings(rates, bytes_per_s, "")
    least = minimum_time(config, ceilings, ("x", precision, 10, 224))
    assert (least.bound if least else "") == bound
    if least:
        assert least.least_ms == pytest.approx(ms, rel=0.002)
        assert least.operations == 20 * config.mac_count(224)
        rows = [Row("x", 10, 224, images_per_s=1e4 / (2 * least.least_ms))]
        contenders = {"x": Contender("x", "onnxruntime", precision)}
        (reached,) = measure_limits(config, contenders, rows, ceilings)
        assert reached.percent_of_limit == pytest.approx(50)
