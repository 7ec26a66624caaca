"""Time on the device itself: inputs and outputs stay there, CUDA events mark the time.

What is timed is a resident batch (:class:`~van_deploy.runners.base.Resident`). Three numbers
come out, and none of them holds another: the latency of one batch alone, the time of a batch
when the next ones are queued behind it (throughput), and the transfers through pinned memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from van_deploy.bench.gpu_state import GpuWatch
from van_deploy.bench.timing import GpuState, Latency, latency_of
from van_deploy.runners.base import Resident, gpu_index

STEADY_LOOKS, STEADY_PERCENT = 3, 2.0
"""The clock is steady when this many looks in a row lie within this many percent."""

WARM_LEAST_S, WARM_MOST_S, WARM_LOOK_S = 0.3, 3.0, 0.05
"""Seconds of unmeasured launches: at least, at most, and between two looks at the clock."""

QUEUE_S, QUEUE_MOST = 0.05, 512
"""One group of queued launches lasts about this long, and holds no more than this many."""

TRANSFERS = 20
"""Copies each way of which the median counts."""


class TorchClock:
    """CUDA events of PyTorch: marks on a stream, and the time between two of them.

    Args:
        stream: handle of the stream to mark; 0 is the default one.
        device: CUDA's number of the GPU.
    """

    def __init__(self, stream: int, device: int = 0) -> None:
        import torch

        self._cuda = torch.cuda
        self._stream: Any = torch.cuda.default_stream(device)
        if stream:
            self._stream = torch.cuda.ExternalStream(stream, device=device)

    def mark(self) -> Any:
        """Record an event."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        """Wait for an event."""
        mark.synchronize()

    def ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two events."""
        return float(start.elapsed_time(end))


class CudaClock:
    """CUDA events of NVIDIA's cuda-python, for a process without PyTorch.

    Args:
        stream: handle of the stream to mark; 0 is the default one.
        device: CUDA's number of the GPU.
    """

    def __init__(self, stream: int, device: int = 0) -> None:
        from van_deploy.runners.cuda import require_cuda

        self._cuda, self._stream = require_cuda(device), stream
        self._free: list[Any] = []

    def mark(self) -> Any:
        """Record an event."""
        event = self._free.pop() if self._free else self._cuda.call("cudaEventCreate")
        self._cuda.call("cudaEventRecord", event, self._stream)
        return event

    def wait(self, mark: Any) -> None:
        """Wait for an event."""
        self._cuda.call("cudaEventSynchronize", mark)

    def ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two events."""
        elapsed = float(self._cuda.call("cudaEventElapsedTime", start, end))
        self._free += [start, end]
        return elapsed


class HostClock:
    """The host's clock, where launching is running: on a CPU."""

    def mark(self) -> float:
        """Return the time."""
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        """Do nothing: what was launched is done."""

    def ms(self, start: float, end: float) -> float:
        """Return the milliseconds between two times."""
        return 1e3 * (end - start)


Clock = TorchClock | CudaClock | HostClock


def clock_of(resident: Resident, device: str) -> Clock:
    """Return the clock of a network on a GPU: PyTorch's where PyTorch is imported already."""
    kind = TorchClock if "torch" in sys.modules else CudaClock
    return kind(resident.stream, gpu_index(device) or 0)


@dataclass(frozen=True)
class DeviceTiming:
    """What one network took at one batch size, measured on the device.

    Attributes:
        batch: images a launch.
        latency: of one launch with nothing queued behind it; no transfers.
        queued_ms: a launch with the next ones queued ahead, median over groups.
        images_per_s: ``batch`` over ``queued_ms``.
        upload_ms: images from pinned memory to the device; median.
        download_ms: outputs from the device to pinned memory; median.
        first_call_ms: the first launch, on the host's clock; in no sample.
        warm_s: seconds of unmeasured launches before the first sample.
        steady: whether the SM clock was steady by then; None where nobody says.
        state: the GPU's, read while the queued launches ran.
        throttled: why the GPU was slowed down at any look.
    """

    batch: int
    latency: Latency
    queued_ms: float
    images_per_s: float
    upload_ms: float
    download_ms: float
    first_call_ms: float
    warm_s: float
    steady: bool | None
    state: GpuState
    throttled: tuple[str, ...]


def timed(
    resident: Resident,
    batch: int,
    clock: Clock,
    watch: GpuWatch,
    *,
    seconds: float = 1.0,
    calls: int = 20,
) -> DeviceTiming:
    """Return what ``resident`` takes, once it is warm and the clocks are steady.

    Args:
        resident: the network with its buffers.
        batch: images a launch.
        clock: of its stream.
        watch: of its GPU.
        seconds: of measured launches, one half alone and one half queued.
        calls: launches alone, at least.
    """
    start = time.perf_counter()
    resident.upload()
    resident.launch()
    clock.wait(clock.mark())
    first_call_ms = 1e3 * (time.perf_counter() - start)
    warm_s, steady, looks = _warm(resident, clock, watch)
    alone = _alone(resident, clock, seconds / 2, calls)
    queued_ms, during = _queued(resident, clock, watch, seconds / 2, alone)
    looks += during
    return DeviceTiming(
        batch=batch,
        latency=latency_of(alone),
        queued_ms=queued_ms,
        images_per_s=1e3 * batch / queued_ms,
        upload_ms=median(span_ms(clock, resident.upload) for _ in range(TRANSFERS)),
        download_ms=median(span_ms(clock, resident.download) for _ in range(TRANSFERS)),
        first_call_ms=first_call_ms,
        warm_s=warm_s,
        steady=steady,
        state=looks[-1],
        throttled=tuple(sorted({reason for look in looks for reason in look.throttled})),
    )


def _warm(
    resident: Resident, clock: Clock, watch: GpuWatch
) -> tuple[float, bool | None, list[GpuState]]:
    """Launch until the SM clock is steady; return the seconds, whether it is, and the looks."""
    start = look = time.perf_counter()
    states: list[GpuState] = []
    while True:
        resident.launch()
        clock.wait(clock.mark())
        now = time.perf_counter()
        if now - look < WARM_LOOK_S:
            continue
        look = now
        states.append(watch.state())
        steady = _is_steady([state.sm_mhz for state in states[-STEADY_LOOKS:]])
        if (now - start >= WARM_LEAST_S and steady is not False) or now - start >= WARM_MOST_S:
            return now - start, steady, states


def _is_steady(clocks: Sequence[int | None]) -> bool | None:
    """Return whether the last looks at a clock agree; None where one saw nothing.

    >>> _is_steady([1980, 1965, 1980]), _is_steady([345, 1980, 1980]), _is_steady([None])
    (True, False, None)
    """
    known = [clock for clock in clocks if clock is not None]
    if len(known) < len(clocks):
        return None
    if len(known) < STEADY_LOOKS:
        return False
    return max(known) - min(known) <= STEADY_PERCENT / 100 * max(known)


def span_ms(clock: Clock, launch: Callable[[], object]) -> float:
    """Launch something, wait for it, and return the milliseconds it took on the stream."""
    start = clock.mark()
    launch()
    end = clock.mark()
    clock.wait(end)
    return clock.ms(start, end)


def _alone(resident: Resident, clock: Clock, seconds: float, calls: int) -> list[float]:
    """Return the milliseconds of launches that each had the device for themselves."""
    samples: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(samples) < calls:
        samples.append(span_ms(clock, resident.launch))
    return samples


def _queued(
    resident: Resident, clock: Clock, watch: GpuWatch, seconds: float, alone: Sequence[float]
) -> tuple[float, list[GpuState]]:
    """Return the milliseconds of a launch among queued ones, and looks at the GPU meanwhile."""
    each_s = median(alone) / 1e3
    count = max(2, min(QUEUE_MOST, round(QUEUE_S / max(each_s, 1e-6))))
    groups: list[float] = []
    looks: list[GpuState] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(groups) < STEADY_LOOKS:
        start = clock.mark()
        for _ in range(count):
            resident.launch()
        end = clock.mark()
        looks.append(watch.state())
        clock.wait(end)
        groups.append(clock.ms(start, end) / count)
    return median(groups), looks
