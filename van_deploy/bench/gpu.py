"""Time on the device itself: inputs and outputs stay there, CUDA events mark the time.

What is timed is a resident batch (:class:`~van_deploy.runners.base.Resident`). Three numbers
come out, and none of them holds another: the latency of one batch alone, the time of a batch
when the next ones are queued behind it (throughput), and the transfers through pinned memory.
Meanwhile NVML is asked for the GPU's clocks, power, temperature and memory. No rounds as on a
CPU: CUDA events see nothing of what disturbs the host.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from van_deploy.bench.document import Contender, GpuState, Latency, Ratio, Row
from van_deploy.config.sizes import ImageSize
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.runners.base import Resident, gpu_index

STEADY_LOOKS, STEADY_PERCENT = 3, 2.0
"""The clock is steady when this many looks in a row lie within this many percent."""

UNSTEADY = "clock not steady"
WARM_LEAST_S, WARM_MOST_S, WARM_LOOK_S = 0.3, 3.0, 0.05
"""Seconds of unmeasured launches: at least, at most, and between two looks at the clock."""

QUEUE_S, QUEUE_MOST = 0.05, 512
"""One group of queued launches lasts about this long, and holds no more than this many."""

TRANSFERS = 20
"""Copies each way of which the median counts."""

THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons (``nvml.h``, ``nvmlClocksEventReason*``) that slow a GPU
down. The others say that it is idle, or that somebody has set its clocks."""


@dataclass(frozen=True)
class Clock:
    """Marks on a stream of the device, and the time between two of them.

    By default the host's clock, where launching is running: on a CPU.

    Attributes:
        mark: puts a mark on the stream and returns it.
        wait: waits until the device has reached a mark.
        ms: returns the milliseconds between two marks that were reached.
    """

    mark: Callable[[], Any] = time.perf_counter
    wait: Callable[[Any], object] = lambda _: None
    ms: Callable[[Any, Any], float] = lambda start, end: 1e3 * (end - start)

    def span_ms(
        self, launch: Callable[[], object], meanwhile: Callable[[], object] | None = None
    ) -> float:
        """Launch something, wait for it, and return the milliseconds it took on the stream."""
        start = self.mark()
        launch()
        end = self.mark()
        if meanwhile is not None:
            meanwhile()
        self.wait(end)
        return self.ms(start, end)


def torch_clock(stream: int = 0, device: int = 0) -> Clock:
    """Return CUDA events of PyTorch.

    Args:
        stream: handle of the stream to mark; 0 is the default one.
        device: CUDA's number of the GPU.
    """
    import torch

    place: Any = torch.cuda.default_stream(device)
    if stream:
        place = torch.cuda.ExternalStream(stream, device=device)

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(place)
        return event

    return Clock(mark, lambda event: event.synchronize(), lambda a, b: float(a.elapsed_time(b)))


def cuda_clock(stream: int = 0, device: int = 0) -> Clock:
    """Return CUDA events of NVIDIA's cuda-python, for a process without PyTorch."""
    from van_deploy.runners.cuda import require_cuda

    cuda = require_cuda(device)
    free: list[Any] = []

    def mark() -> Any:
        event = free.pop() if free else cuda.call("cudaEventCreate")
        cuda.call("cudaEventRecord", event, stream)
        return event

    def elapsed(start: Any, end: Any) -> float:
        free.extend((start, end))
        return float(cuda.call("cudaEventElapsedTime", start, end))

    return Clock(mark, lambda event: cuda.call("cudaEventSynchronize", event), elapsed)


def clock_of(resident: Resident, device: str) -> Clock:
    """Return the clock of a network on a GPU: PyTorch's where PyTorch is imported already."""
    clock = torch_clock if "torch" in sys.modules else cuda_clock
    return clock(resident.stream, gpu_index(device) or 0)


class GpuWatch:
    """Reads the state of one GPU. Without NVML every state is empty.

    NVML numbers the GPUs by itself: the one that CUDA uses is found by its identifier.

    Args:
        device: CUDA's name of the GPU, such as ``cuda:0``; ``cpu`` watches nothing.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        index, driver = gpu_index(device), nvidia_driver()
        if index is None or driver is None or index >= len(driver.gpus):
            return
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(driver.gpus[index].uuid)
            self._nvml = pynvml

    def state(self) -> GpuState:
        """Return the state now."""
        nvml = self._nvml
        if nvml is None:
            return GpuState()
        power = self._ask("nvmlDeviceGetPowerUsage")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
        return GpuState(
            sm_mhz=self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_mhz=self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1e3,
            temperature_c=self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(words for bit, words in THROTTLING.items() if reasons & bit),
            memory_used_bytes=None if memory is None else int(memory.used),
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Return NVML's answer, or None where this GPU or this version has none."""
        with contextlib.suppress(self._nvml.NVMLError, AttributeError):
            return getattr(self._nvml, function)(self._gpu, *arguments)
        return None


def timed(
    resident: Resident, batch: int, clock: Clock, watch: GpuWatch, seconds: float, calls: int = 20
) -> dict[str, Any]:
    """Return what ``resident`` takes, once it is warm and the clocks are steady.

    Args:
        resident: the network with its buffers.
        batch: images a launch.
        clock: of its stream.
        watch: of its GPU.
        seconds: of measured launches, one half alone and one half queued.
        calls: launches alone, at least.

    Returns:
        Fields of :class:`~van_deploy.bench.document.Row`.
    """
    start = time.perf_counter()
    resident.upload()
    resident.launch()
    clock.wait(clock.mark())
    first_call_ms = 1e3 * (time.perf_counter() - start)
    looks = _warm(resident, clock, watch)
    unsteady = [UNSTEADY] * (_is_steady(looks) is False)
    alone = repeated(seconds / 2, calls, lambda: clock.span_ms(resident.launch))
    count = max(2, min(QUEUE_MOST, round(QUEUE_S / max(median(alone) / 1e3, 1e-6))))

    def burst() -> None:
        for _ in range(count):
            resident.launch()

    def group() -> float:
        return clock.span_ms(burst, lambda: looks.append(watch.state())) / count

    queued_ms = median(repeated(seconds / 2, STEADY_LOOKS, group))
    return {
        "latency": Latency.of(alone),
        "queued_ms": queued_ms,
        "images_per_s": 1e3 * batch / queued_ms,
        "upload_ms": median(clock.span_ms(resident.upload) for _ in range(TRANSFERS)),
        "download_ms": median(clock.span_ms(resident.download) for _ in range(TRANSFERS)),
        "first_call_ms": first_call_ms,
        "gpu": looks[-1],
        "throttled": (*sorted({why for state in looks for why in state.throttled}), *unsteady),
    }


def _warm(resident: Resident, clock: Clock, watch: GpuWatch) -> list[GpuState]:
    """Launch until the SM clock is steady, or for long enough; return the looks at it."""
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
        steady = _is_steady(states) is not False
        if (now - start >= WARM_LEAST_S and steady) or now - start >= WARM_MOST_S:
            return states


def _is_steady(states: Sequence[GpuState]) -> bool | None:
    """Return whether the last looks at a clock agree; None where one saw nothing.

    >>> _is_steady([GpuState(1980), GpuState(1965), GpuState(1980)]), _is_steady([GpuState()])
    (True, None)
    >>> _is_steady([GpuState(1980), GpuState(1980)])  # too few
    False
    """
    clocks = [state.sm_mhz for state in states[-STEADY_LOOKS:]]
    known = [clock for clock in clocks if clock is not None]
    if len(known) < len(clocks):
        return None
    if len(known) < STEADY_LOOKS:
        return False
    return max(known) - min(known) <= STEADY_PERCENT / 100 * max(known)


def repeated(seconds: float, least: int, measure: Callable[[], float]) -> list[float]:
    """Return what was measured until the seconds are over, ``least`` times at least."""
    samples: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(samples) < least:
        samples.append(measure())
    return samples


Place = tuple[int, ImageSize, str]
"""A batch, an image size, and what kind of contender."""


def with_ratios(
    rows: Sequence[Row], contenders: Sequence[Contender], reference: str
) -> tuple[str | None, list[Row]]:
    """Return what ratios are against, in words, and the rows with their ratios.

    Args:
        rows: of one or several batches and image sizes.
        contenders: of the rows.
        reference: a contender, or ``pytorch`` for the fastest of PyTorch's modes.
    """
    rivals = {c.name for c in contenders if c.runtime == "pytorch"} or {rows[0].contender}
    named = {reference} if reference in {c.name for c in contenders} - rivals else rivals
    best = _fastest(rows, dict.fromkeys(named, ""))
    result = []
    for row in rows:
        times = best.get((row.batch, row.image_size, ""), 0.0) / (row.queued_ms or math.inf)
        result.append(replace(row, ratio=Ratio(times, times, times, 1) if times else None))
    words = "the fastest of PyTorch's modes" if named == rivals else reference
    return words if best else None, result


def int8_not_worth_it(rows: Sequence[Row], contenders: Sequence[Contender]) -> list[str]:
    """Return a warning for each batch at which no INT8 file is faster than FP16 on this GPU."""
    best = _fastest(rows, {c.name: c.precision for c in contenders if c.runtime != "pytorch"})
    return [
        f"INT8 is not faster than FP16 here at batch {batch} ({int8:.3f} ms against {fp16:.3f} "
        "ms): deploy FP16 on this GPU"
        for (batch, size, kind), int8 in best.items()
        if kind == "int8" and (fp16 := best.get((batch, size, "fp16"), math.inf)) <= int8
    ]


def _fastest(rows: Sequence[Row], kinds: Mapping[str, str]) -> dict[Place, float]:
    """Return the least queued ms by batch, image size and the kind of the row's contender."""
    best: dict[Place, float] = {}
    for row in rows:
        if row.queued_ms and row.contender in kinds:
            place = row.batch, row.image_size, kinds[row.contender]
            best[place] = min(best.get(place, math.inf), row.queued_ms)
    return best
