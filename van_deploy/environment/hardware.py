"""What the machine offers: processor, memory, disk, NVIDIA driver and GPUs.

Everything is asked of the operating system or, for GPUs, of the driver's own
management library (NVML) through :mod:`ctypes`: no package has to be installed,
nothing is started on a GPU, and what cannot be found out is None.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Cpu",
    "Disk",
    "Driver",
    "Gpu",
    "Memory",
    "cpu",
    "disk",
    "memory",
    "nvidia_driver",
    "peak_memory_bytes",
]

# What decides how fast FP32, BF16 and INT8 run on a CPU; /proc/cpuinfo's names.
CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
NVML_NAMES = ("nvml.dll",) if os.name == "nt" else ("libnvidia-ml.so.1", "libnvidia-ml.so")
NVML_SUCCESS = 0


@dataclass(frozen=True)
class Cpu:
    """The processor as this process may use it.

    Attributes:
        name: the model as the processor calls itself.
        cores: logical cores in the machine.
        cores_allowed: cores this process may run on (affinity and container quota).
        features: those of its instruction sets that decide the speed of inference.
    """

    name: str
    cores: int
    cores_allowed: int
    features: tuple[str, ...]

    @property
    def has_bfloat16(self) -> bool:
        """Whether it has instructions for bfloat16; without them it is many times slower."""
        return not BF16_FEATURES.isdisjoint(self.features)


@dataclass(frozen=True)
class Memory:
    """Main memory.

    Attributes:
        total_bytes: what this process may use in all (the container's limit, if
            there is one), or None where the system does not say.
        available_bytes: what is free now, or None.
    """

    total_bytes: int | None
    available_bytes: int | None


@dataclass(frozen=True)
class Disk:
    """The file system a folder is on.

    Attributes:
        folder: the folder that was asked about.
        free_bytes: what may still be written there.
    """

    folder: Path
    free_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: as the driver calls it.
        compute_capability: such as ``(8, 9)``, or None on a driver that does not say.
        memory_bytes: device memory.
    """

    name: str
    compute_capability: tuple[int, int] | None
    memory_bytes: int | None

    @property
    def sm(self) -> str:
        """The compute capability as TensorRT spells it, such as ``SM89``."""
        return "SM{}{}".format(*self.compute_capability) if self.compute_capability else "SM?"


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        version: such as ``580.65.06``.
        cuda_version: the newest CUDA it can run, such as ``(13, 0)``.
        gpus: the GPUs it sees, in its own order; ``CUDA_VISIBLE_DEVICES`` is not applied.
    """

    version: str
    cuda_version: tuple[int, int]
    gpus: tuple[Gpu, ...]


def cpu() -> Cpu:
    """Return the processor, its instruction sets and the cores this process may use."""
    entries = _colon_file(Path("/proc/cpuinfo"))
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    name = entries.get("model name") or platform.processor() or platform.machine()
    cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _cpu_quota()
    allowed = affinity if quota is None else max(1, min(affinity, int(quota)))
    return Cpu(name, cores, allowed, tuple(f for f in CPU_FEATURES if f in flags))


def memory() -> Memory:
    """Return the machine's memory, or the container's limit where that is smaller."""
    entries = _colon_file(Path("/proc/meminfo"))
    total, available = (_kib(entries.get(key)) for key in ("MemTotal", "MemAvailable"))
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and (total is None or limit < total):
        total = limit
        if used is not None:
            left = max(0, limit - used)
            available = left if available is None else min(available, left)
    return Memory(total, available)


def disk(folder: Path) -> Disk:
    """Return the free space where ``folder`` is or, if it is not there yet, would be.

    Raises:
        OSError: no folder above it can be looked at.
    """
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return Disk(folder, shutil.disk_usage(existing).free)


def nvidia_driver(library_names: tuple[str, ...] = NVML_NAMES) -> Driver | None:
    """Return the NVIDIA driver and its GPUs, or None where there is none that answers.

    Args:
        library_names: where NVML may be, tried in this order.
    """
    nvml = _load(library_names)
    if nvml is None or nvml.nvmlInit_v2() != NVML_SUCCESS:
        return None
    try:
        return Driver(_driver_version(nvml), _cuda_version(nvml), tuple(_gpus(nvml)))
    finally:
        nvml.nvmlShutdown()


class _NvmlMemory(ctypes.Structure):
    """``nvmlMemory_t``: bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _load(names: tuple[str, ...]) -> ctypes.CDLL | None:
    """Return the first of these libraries that can be opened."""
    if not names:
        return None
    try:
        return ctypes.CDLL(names[0])
    except OSError:
        return _load(names[1:])


def _driver_version(nvml: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(96)
    found = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == NVML_SUCCESS
    return text.value.decode() if found else "unknown"


def _cuda_version(nvml: ctypes.CDLL) -> tuple[int, int]:
    number = ctypes.c_int(0)  # 1000 * major + 10 * minor
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def _gpus(nvml: ctypes.CDLL) -> Iterator[Gpu]:
    count = ctypes.c_uint(0)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        handle = ctypes.c_void_p()
        found = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        if found == NVML_SUCCESS:
            yield _gpu(nvml, handle)


def _gpu(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> Gpu:
    name = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    known = nvml.nvmlDeviceGetCudaComputeCapability(
        handle, ctypes.byref(major), ctypes.byref(minor)
    )
    space = _NvmlMemory()
    sized = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(space))
    return Gpu(
        name.value.decode(errors="replace") or "unknown",
        (major.value, minor.value) if known == NVML_SUCCESS else None,
        space.total if sized == NVML_SUCCESS else None,
    )


def _colon_file(path: Path) -> dict[str, str]:
    """Return the first value of each ``name : value`` line; nothing where there is no file."""
    entries: dict[str, str] = {}
    if sys.platform.startswith("linux") and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            entries.setdefault(name.strip(), value.strip())
    return entries


def _cpu_quota() -> float | None:
    """Return how many cores the container (cgroup v2) grants, or None if it sets no limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = path.read_text().partition(" ") if path.exists() else ("max", "", "")
    return None if quota.strip() == "max" else int(quota) / int(period)


def _number(path: Path) -> int | None:
    """Return the number a file holds; None if there is no file or it holds ``max``."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def _kib(value: str | None) -> int | None:
    """Return bytes of a ``/proc/meminfo`` value such as ``24684084 kB``."""
    return int(value.split()[0]) * 1024 if value else None


def peak_memory_bytes() -> int:
    """Return the most main memory this process has held.

    From ``VmHWM`` where there is one: ``ru_maxrss`` survives ``exec`` on Linux and
    would count the program that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
