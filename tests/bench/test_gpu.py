"""Timing on a device: what is in a sample, what is not, and what ratios are against."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.each import each
from van_deploy.bench.contender import Contender
from van_deploy.bench.gpu import Clock, GpuWatch, timed
from van_deploy.bench.on_gpu import int8_not_worth_it, with_ratios
from van_deploy.bench.profile import by_module, profile_of
from van_deploy.bench.timing import GpuState, Row, latency_of
from van_deploy.errors import UsageError
from van_deploy.model.checkpoint import load_van
from van_deploy.model.embedded import EMBEDDED_NAME


class Device:
    """A device with a queue, and its clock: launches take ``ms`` each, alone ``gap`` more."""

    stream = 7

    def __init__(self, ms: float, gap: float = 0.5, cold: float = 100.0) -> None:
        self.alone, self.queued, self.cold = ms + gap, ms, cold
        self.now, self.waits = 0.0, True

    def upload(self) -> None:
        self.now += 3.0

    def launch(self) -> None:
        self.now += self.cold + (self.alone if self.waits else self.queued)
        self.cold, self.waits = 0.0, False

    def download(self) -> None:
        self.now += 0.25

    def mark(self) -> float:
        return self.now

    def wait(self, mark: float) -> None:
        self.waits = True

    def ms(self, start: float, end: float) -> float:
        return end - start


class Clocks(GpuWatch):
    """A GPU whose clock rises to its boost for the first looks."""

    def __init__(self, *mhz: int, throttled: tuple[str, ...] = ()) -> None:
        super().__init__("cpu")
        self.mhz, self.throttled = list(mhz), throttled

    def state(self) -> GpuState:
        clock = self.mhz.pop(0) if len(self.mhz) > 1 else self.mhz[0]
        return GpuState(sm_mhz=clock, throttled=self.throttled)


def test_latency_throughput_and_transfers_are_columns_of_their_own() -> None:
    device: Any = Device(ms=2.0)
    seen = timed(
        device, 8, Clock(device.mark, device.wait, device.ms), GpuWatch("cpu"), seconds=0.02
    )
    assert seen["latency"].p50_ms == seen["latency"].p99_ms == 2.5, "no transfer, no first call"
    assert 2.0 < seen["queued_ms"] < 2.1, "the gap is paid once a group"
    assert seen["images_per_s"] == pytest.approx(8e3 / seen["queued_ms"])
    assert (seen["upload_ms"], seen["download_ms"]) == (3.0, 0.25)
    assert seen["latency"].calls >= 20
    assert seen["steady"] is None


def test_samples_wait_for_a_steady_clock_and_throttling_is_told() -> None:
    device: Any = Device(ms=2.0)
    watch = Clocks(345, 900, 1500, 1900, 1980, throttled=("power cap",))
    seen = timed(device, 1, Clock(device.mark, device.wait, device.ms), watch, seconds=0.01)
    assert seen["steady"] is True
    assert seen["gpu"].sm_mhz == 1980
    assert seen["throttled"] == ("power cap",)


def row(contender: str, ms: float | None, batch: int = 8) -> Row:
    if ms is None:
        return Row(contender, batch, 224, 1, error="out of memory", error_kind="memory")
    return Row(contender, batch, 224, 1, latency=latency_of([ms]), queued_ms=ms)


CONTENDERS = [
    Contender("pytorch", "pytorch", "fp32"),
    Contender("pytorch-compile-fp16", "pytorch", "fp16"),
    Contender("tensorrt/fp16", "tensorrt", "fp16"),
    Contender("tensorrt/int8", "tensorrt", "int8"),
]


def test_ratios_are_against_the_fastest_of_pytorchs_modes_at_the_same_batch() -> None:
    rows = [row("pytorch", 20.0), row("pytorch-compile-fp16", 6.0), row("tensorrt/fp16", 3.0)]
    rows += [
        row("pytorch", 4.0, 1),
        row("pytorch-compile-fp16", None, 1),
        row("tensorrt/fp16", 2.0, 1),
    ]
    words, rows = with_ratios(rows, CONTENDERS, "pytorch")
    assert words == "the fastest of PyTorch's modes"
    assert [r.ratio and r.ratio.median for r in rows] == [0.3, 1.0, 2.0, 1.0, None, 2.0]
    words, rows = with_ratios(rows, CONTENDERS, "tensorrt/fp16")
    assert words == "tensorrt/fp16"
    assert rows[0].ratio is not None
    assert rows[0].ratio.median == pytest.approx(0.15)


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
    assert int8_not_worth_it(rows, CONTENDERS) == [f"{words}deploy FP16 on this GPU"] * warned


def test_an_eager_profile_sums_to_the_kinds_of_layers() -> None:
    lines = by_module(load_van(EMBEDDED_NAME).model, torch.zeros(1, 3, 64, 64), runs=1)
    kinds = {line.kind: line for line in lines}
    assert {"dw 3x3", "dw 5x5", "dw 7x7 d3", "1x1", "GELU", "LayerNorm"} <= set(kinds)
    assert sum(line.percent for line in lines) == pytest.approx(100)
    assert lines == sorted(lines, key=lambda line: -line.ms)


def test_onnx_runtimes_profile_of_a_gpu_is_not_shown() -> None:
    """Its node times there are those of the launches on the host."""
    contender = Contender("ort-cuda/fp16", "onnxruntime", "fp16", device="cuda:0")
    with pytest.raises(UsageError, match="'ort-cuda/fp16' does not say where its time goes"):
        profile_of(contender, None, None)
