"""Time on the device itself: inputs and outputs stay there, CUDA events mark the time.

What is timed is a resident batch (:class:`~van_deploy.runners.base.ResidentBatch`). Three numbers
come out, and none of them holds another: the latency of one batch alone, the time of a batch
when the next ones are queued behind it (throughput), and the transfers through pinned memory.
Meanwhile NVML is asked for the GPU's clocks, power, temperature and memory. No rounds as on a
CPU: CUDA events see nothing of what disturbs the host.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from van_deploy.bench.document import Contender, GpuState, Latency, Ratio, Row
from van_deploy.config.sizes import ImageSize
from van_deploy.environment.hardware import nvidia_driver, nvml_answer
from van_deploy.runners.base import ResidentBatch, gpu_index

# The clock is steady when this many looks in a row lie within this many percent.
STEADY_LOOKS, STEADY_PERCENT = 3, 2.0

# Seconds of unmeasured launches: at least, at most, and between two looks at the clock.
WARM_LEAST_S, WARM_MOST_S, WARM_LOOK_S = 0.3, 3.0, 0.05

# One group of queued launches lasts about this long, and holds no more than this many.
QUEUE_S, QUEUE_MOST = 0.05, 512

# Copies each way of which the median counts.
TRANSFERS = 20

# Bits of NVML's clock event reasons (``nvml.h``, ``nvmlClocksEventReason*``) that slow a GPU
# down. The others say that it is idle, or that somebody has set its clocks.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


Call = Callable[[], object]
Watch = Callable[[], GpuState]  # reads the state of a GPU


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

    def span_ms(self, launch: Call, times: int = 1, meanwhile: Call = lambda: None) -> float:
        """Launch something some times, and return the milliseconds until it was done."""
        start = self.mark()
        for _ in range(times):
            launch()
        end = self.mark()
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


def clock_of(resident: ResidentBatch, device: str) -> Clock:
    """Return the clock of a network on a GPU: PyTorch's where PyTorch is imported already."""
    clock = torch_clock if "torch" in sys.modules else cuda_clock
    return clock(resident.stream, gpu_index(device) or 0)


def gpu_watch(device: str) -> Watch:
    """Return what reads the state of one GPU; without NVML every state is empty.

    NVML numbers the GPUs by itself: the one that CUDA uses is found by its identifier.

    Args:
        device: CUDA's name of the GPU, such as ``cuda:0``; of ``cpu`` nothing is read.
    """
    index, driver = gpu_index(device), nvidia_driver()
    if index is None or driver is None or index >= len(driver.gpus):
        return GpuState
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(driver.gpus[index].uuid)
    except nvml.NVMLError:
        return GpuState
    ask = functools.partial(nvml_answer, gpu)

    def state() -> GpuState:
        power, memory = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetMemoryInfo")
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
        return GpuState(
            sm_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1e3,
            temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(words for bit, words in THROTTLING.items() if reasons & bit),
            memory_used_bytes=None if memory is None else int(memory.used),
        )

    return state


def timed(
    resident: ResidentBatch, batch: int, clock: Clock, watch: Watch, seconds: float, calls: int = 20
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
    unsteady = ["clock not steady"] * _wanders(looks)
    alone = repeated(seconds / 2, calls, lambda: clock.span_ms(resident.launch))
    count = max(2, min(QUEUE_MOST, round(QUEUE_S / max(median(alone) / 1e3, 1e-6))))

    def group() -> float:
        return clock.span_ms(resident.launch, count, lambda: looks.append(watch())) / count

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


def _warm(resident: ResidentBatch, clock: Clock, watch: Watch) -> list[GpuState]:
    """Launch until the SM clock is steady, or for long enough; return the looks at it."""
    start, states = time.perf_counter(), list[GpuState]()
    while True:
        look = time.perf_counter()
        while time.perf_counter() - look < WARM_LOOK_S:
            resident.launch()
            clock.wait(clock.mark())
        states.append(watch())
        if time.perf_counter() - start >= (WARM_MOST_S if _wanders(states) else WARM_LEAST_S):
            return states


def _wanders(states: Sequence[GpuState]) -> bool:
    """Return whether the last looks at a clock differ, or are too few; not where one saw nothing.

    >>> _wanders([GpuState(1980), GpuState(1965), GpuState(1980)]), _wanders([GpuState()])
    (False, False)
    >>> _wanders([GpuState(1980), GpuState(1980)])  # too few
    True
    """
    clocks = [state.sm_mhz or 0 for state in states[-STEADY_LOOKS:]]
    steady = max(clocks) - min(clocks) <= STEADY_PERCENT / 100 * max(clocks)
    return all(clocks) and not (steady and len(clocks) == STEADY_LOOKS)


def repeated(seconds: float, least: int, measure: Callable[[], float]) -> list[float]:
    """Return what was measured until the seconds are over, ``least`` times at least."""
    samples: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(samples) < least:
        samples.append(measure())
    return samples


def with_ratios(
    rows: Sequence[Row], contenders: Iterable[Contender], reference: str
) -> tuple[str | None, list[Row]]:
    """Return what ratios are against, in words, and the rows with their ratios.

    Args:
        rows: of one or several batches and image sizes.
        contenders: of the rows.
        reference: a contender; one of PyTorch's modes stands for the fastest of them.
    """
    modes = {c.name for c in contenders if c.runtime == "pytorch"}
    best = _fastest(rows, modes if reference in modes else {reference})
    result = []
    for row in rows:
        times = best.get((row.batch, row.image_size), 0.0) / (row.queued_ms or math.inf)
        result.append(replace(row, ratio=Ratio(times, times, times, 1) if times else None))
    words = "the fastest of PyTorch's modes" if reference in modes else reference
    return words if best else None, result


def int8_not_worth_it(rows: Sequence[Row], contenders: Iterable[Contender]) -> list[str]:
    """Return a warning for each batch at which no INT8 file is faster than FP16 on this GPU."""
    files = [contender for contender in contenders if contender.runtime != "pytorch"]
    fp16, int8 = (
        _fastest(rows, {file.name for file in files if file.precision == precision})
        for precision in ("fp16", "int8")
    )
    return [
        f"INT8 is not faster than FP16 here at batch {place[0]} ({ms:.3f} ms against "
        f"{fp16[place]:.3f} ms): deploy FP16 on this GPU"
        for place, ms in int8.items()
        if fp16.get(place, math.inf) <= ms
    ]


def _fastest(rows: Sequence[Row], names: Container[str]) -> dict[tuple[int, ImageSize], float]:
    """Return the least queued ms of some contenders by batch and image size."""
    best: dict[tuple[int, ImageSize], float] = {}
    for row in rows:
        if row.queued_ms and row.contender in names:
            place = row.batch, row.image_size
            best[place] = min(best.get(place, math.inf), row.queued_ms)
    return best
