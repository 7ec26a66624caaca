"""GPU timing with resident buffers: inputs and outputs stay on the device, CUDA events mark time.

The network is a resident batch (:class:`~van_deploy.runners.base.ResidentBatch`). Three times are
measured separately: the latency of a single batch, the time of a batch while further batches are
queued behind it (throughput), and the transfers through pinned memory. Meanwhile NVML reports the
GPU's clocks, power, temperature and memory. Rounds are interleaved only on a CPU: other load on
the host does not affect CUDA events.
"""

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
from van_deploy.environment.hardware import nvidia_driver, query_nvml
from van_deploy.runners.base import ResidentBatch, gpu_index

# The clock is steady when this many samples in a row are within this many percent.
STEADY_SAMPLES, STEADY_PERCENT = 3, 2.0

# Seconds of unmeasured launches: minimum, maximum, and between two samples of the clock.
WARMUP_MIN_S, WARMUP_MAX_S, WARMUP_INTERVAL_S = 0.3, 3.0, 0.05

# Duration of a group of queued launches, and the maximum number of launches in it.
QUEUE_S, QUEUE_MAX_LAUNCHES = 0.05, 512

# Copies in each direction, of which the median is reported.
TRANSFERS = 20

# Bits of NVML's clock event reasons (``nvml.h``, ``nvmlClocksEventReason*``) that slow a GPU
# down. The other bits mean that it is idle, or that its clocks are set by the user.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


Call = Callable[[], object]
Monitor = Callable[[], GpuState]  # reads the state of a GPU


@dataclass(frozen=True)
class Timer:
    """Events on a stream of the device, and the time between two of them.

    The default is the host's clock, for a CPU, where a launch returns when it is done.

    Attributes:
        record: records an event on the stream and returns it.
        synchronize: waits until the device has reached an event.
        elapsed_ms: returns the milliseconds between two events that were reached.
    """

    record: Callable[[], Any] = time.perf_counter
    synchronize: Callable[[Any], object] = lambda _: None
    elapsed_ms: Callable[[Any, Any], float] = lambda start, end: 1e3 * (end - start)

    def time_ms(self, launch: Call, times: int = 1, meanwhile: Call = lambda: None) -> float:
        """Return the milliseconds until ``times`` launches are done."""
        start = self.record()
        for _ in range(times):
            launch()
        end = self.record()
        meanwhile()
        self.synchronize(end)
        return self.elapsed_ms(start, end)


def torch_timer(stream: int = 0, device: int = 0) -> Timer:
    """Return a timer that uses PyTorch's CUDA events.

    Args:
        stream: handle of the CUDA stream; 0 is the default stream.
        device: CUDA index of the GPU.
    """
    import torch

    cuda_stream: Any = torch.cuda.default_stream(device)
    if stream:
        cuda_stream = torch.cuda.ExternalStream(stream, device=device)

    def record() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(cuda_stream)
        return event

    return Timer(record, lambda event: event.synchronize(), lambda a, b: float(a.elapsed_time(b)))


def cuda_timer(stream: int = 0, device: int = 0) -> Timer:
    """Return a timer that uses cuda-python's events, for a process without PyTorch."""
    from van_deploy.runners.cuda import require_cuda

    cuda = require_cuda(device)
    free: list[Any] = []

    def record() -> Any:
        event = free.pop() if free else cuda.call("cudaEventCreate")
        cuda.call("cudaEventRecord", event, stream)
        return event

    def elapsed_ms(start: Any, end: Any) -> float:
        free.extend((start, end))
        return float(cuda.call("cudaEventElapsedTime", start, end))

    return Timer(record, lambda event: cuda.call("cudaEventSynchronize", event), elapsed_ms)


def timer_for(resident: ResidentBatch, device: str) -> Timer:
    """Return the timer for a network on a GPU: PyTorch's events if PyTorch is imported."""
    create = torch_timer if "torch" in sys.modules else cuda_timer
    return create(resident.stream, gpu_index(device) or 0)


def gpu_monitor(device: str) -> Monitor:
    """Return a function that reads the state of one GPU; without NVML every state is empty.

    NVML numbers the GPUs differently from CUDA, so the GPU is identified by its UUID.

    Args:
        device: CUDA's name of the GPU, such as ``cuda:0``; for ``cpu`` every state is empty.
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
    query = functools.partial(query_nvml, gpu)

    def read_state() -> GpuState:
        power, memory = query("nvmlDeviceGetPowerUsage"), query("nvmlDeviceGetMemoryInfo")
        reasons = query("nvmlDeviceGetCurrentClocksEventReasons") or 0
        return GpuState(
            sm_mhz=query("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_mhz=query("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1e3,
            temperature_c=query("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(reason for bit, reason in THROTTLING.items() if reasons & bit),
            memory_used_bytes=None if memory is None else int(memory.used),
        )

    return read_state


def time_resident(
    resident: ResidentBatch, batch: int, timer: Timer, monitor: Monitor, seconds: float, calls: int
) -> dict[str, Any]:
    """Time ``resident`` after a warm-up that lasts until the clocks are steady.

    Args:
        resident: the network with its buffers.
        batch: images per launch.
        timer: of its stream.
        monitor: of its GPU.
        seconds: of measured launches, half of them single and half queued.
        calls: minimum number of single launches.

    Returns:
        Fields of :class:`~van_deploy.bench.document.Row`.
    """
    start = time.perf_counter()
    resident.upload()
    resident.launch()
    timer.synchronize(timer.record())
    first_call_ms = 1e3 * (time.perf_counter() - start)
    states = _warm_up(resident, timer, monitor)
    unsteady = ["clock not steady"] * _is_unsteady(states)
    single_ms = repeat_for(seconds / 2, calls, lambda: timer.time_ms(resident.launch))
    count = max(2, min(QUEUE_MAX_LAUNCHES, round(QUEUE_S / max(median(single_ms) / 1e3, 1e-6))))

    def queued_launch_ms() -> float:
        return timer.time_ms(resident.launch, count, lambda: states.append(monitor())) / count

    queued_ms = median(repeat_for(seconds / 2, STEADY_SAMPLES, queued_launch_ms))
    return {
        "latency": Latency.of(single_ms),
        "queued_ms": queued_ms,
        "images_per_s": 1e3 * batch / queued_ms,
        "upload_ms": median(timer.time_ms(resident.upload) for _ in range(TRANSFERS)),
        "download_ms": median(timer.time_ms(resident.download) for _ in range(TRANSFERS)),
        "first_call_ms": first_call_ms,
        "gpu": states[-1],
        "throttled": (*sorted({reason for s in states for reason in s.throttled}), *unsteady),
    }


def _warm_up(resident: ResidentBatch, timer: Timer, monitor: Monitor) -> list[GpuState]:
    """Launch until the SM clock is steady or the maximum time is over; return the GPU states."""
    start, states = time.perf_counter(), list[GpuState]()
    while True:
        interval_start = time.perf_counter()
        while time.perf_counter() - interval_start < WARMUP_INTERVAL_S:
            resident.launch()
            timer.synchronize(timer.record())
        states.append(monitor())
        if time.perf_counter() - start >= (WARMUP_MAX_S if _is_unsteady(states) else WARMUP_MIN_S):
            return states


def _is_unsteady(states: Sequence[GpuState]) -> bool:
    """Return whether the last clock samples differ or are too few; False without clock samples.

    >>> _is_unsteady([GpuState(1980), GpuState(1965), GpuState(1980)]), _is_unsteady([GpuState()])
    (False, False)
    >>> _is_unsteady([GpuState(1980), GpuState(1980)])  # too few
    True
    """
    clocks = [state.sm_mhz or 0 for state in states[-STEADY_SAMPLES:]]
    steady = max(clocks) - min(clocks) <= STEADY_PERCENT / 100 * max(clocks)
    return all(clocks) and not (steady and len(clocks) == STEADY_SAMPLES)


def repeat_for(seconds: float, min_count: int, measure: Callable[[], float]) -> list[float]:
    """Return measurements taken for ``seconds``, at least ``min_count``."""
    samples: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(samples) < min_count:
        samples.append(measure())
    return samples


def add_ratios(
    rows: Sequence[Row], contenders: Iterable[Contender], reference: str
) -> tuple[str | None, list[Row]]:
    """Return a description of the reference, and the rows with their ratios to it.

    Args:
        rows: of any batch sizes and image sizes.
        contenders: of the rows.
        reference: name of a contender; a PyTorch mode stands for the fastest PyTorch mode.
    """
    modes = {c.name for c in contenders if c.runtime == "pytorch"}
    best = _fastest_ms(rows, modes if reference in modes else {reference})
    result = []
    for row in rows:
        times = best.get((row.batch, row.image_size), 0.0) / (row.queued_ms or math.inf)
        result.append(replace(row, ratio=Ratio(times, times, times, 1) if times else None))
    description = "the fastest of PyTorch's modes" if reference in modes else reference
    return description if best else None, result


def int8_warnings(rows: Sequence[Row], contenders: Iterable[Contender]) -> list[str]:
    """Return a warning for each batch size at which no INT8 file is faster than FP16."""
    files = [contender for contender in contenders if contender.runtime != "pytorch"]
    fp16, int8 = (
        _fastest_ms(rows, {file.name for file in files if file.precision == precision})
        for precision in ("fp16", "int8")
    )
    return [
        f"INT8 is not faster than FP16 here at batch {key[0]} ({ms:.3f} ms against "
        f"{fp16[key]:.3f} ms): deploy FP16 on this GPU"
        for key, ms in int8.items()
        if fp16.get(key, math.inf) <= ms
    ]


def _fastest_ms(rows: Sequence[Row], names: Container[str]) -> dict[tuple[int, ImageSize], float]:
    """Return the shortest queued time of the named contenders by batch and image size."""
    best: dict[tuple[int, ImageSize], float] = {}
    for row in rows:
        if row.queued_ms and row.contender in names:
            key = row.batch, row.image_size
            best[key] = min(best.get(key, math.inf), row.queued_ms)
    return best
