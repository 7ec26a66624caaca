"""What the machine offers: processor, memory, disk, NVIDIA driver and GPUs.

Asked of psutil, of the driver's own management library (NVML, through ``nvidia-ml-py``) and of
CUDA: nothing is started on a GPU, and what cannot be found out is None.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

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
    "visible_gpus",
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
        bus: its place on the PCI bus, such as ``0000:3b:00.0``.
        uuid: NVML's name of it, such as ``GPU-1b2c...``.
    """

    name: str
    compute_capability: tuple[int, int] | None
    memory_bytes: int | None
    bus: str = ""
    uuid: str = ""

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
        gpus: the GPUs that CUDA sees, ``cuda:0`` first.
        hidden: how many others there are, which ``CUDA_VISIBLE_DEVICES`` hides.
    """

    version: str
    cuda_version: tuple[int, int]
    gpus: tuple[Gpu, ...]
    hidden: int = 0


def cpu() -> Cpu:
    """Return the processor, its instruction sets and the cores this process may use."""
    entries = _cpuinfo()
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    name = entries.get("model name") or platform.processor() or platform.machine()
    cores = psutil.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _cgroup("cpu.max").split()
    granted = int(quota[0]) // int(quota[1]) if quota and quota[0].isdigit() else affinity
    allowed = max(1, min(affinity, granted))
    return Cpu(name, cores, allowed, tuple(f for f in CPU_FEATURES if f in flags))


def memory() -> Memory:
    """Return the machine's memory, or the container's limit where that is smaller."""
    here = psutil.virtual_memory()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if not limit.isdigit() or int(limit) >= here.total:
        return Memory(here.total, here.available)
    left = max(0, int(limit) - int(used or 0))
    return Memory(int(limit), min(here.available, left))


def disk(folder: Path) -> Disk:
    """Return the free space where ``folder`` is or, if it is not there yet, would be.

    Raises:
        OSError: no folder above it can be looked at.
    """
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return Disk(folder, psutil.disk_usage(str(existing)).free)


def nvidia_driver() -> Driver | None:
    """Return the NVIDIA driver and its GPUs as CUDA numbers them, or None where none answers.

    NVML knows every GPU of the machine; which of them ``cuda:0`` is, only CUDA says. Nothing is
    started on a GPU.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, RuntimeError, _nvml_error()):
        return None
    try:
        number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())  # 1000 * major + 10 * minor
        count = pynvml.nvmlDeviceGetCount()
        gpus = [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
        visible = _in_cudas_order(gpus)
        version = str(pynvml.nvmlSystemGetDriverVersion())
        cuda = (number // 1000, number % 1000 // 10)
        return Driver(version, cuda, visible, len(gpus) - len(visible))
    except _nvml_error():
        return None
    finally:
        pynvml.nvmlShutdown()


def _nvml_error() -> type[Exception]:
    """Return what NVML raises; it can be caught without the package, too."""
    try:
        from pynvml import NVMLError
    except ImportError:
        return RuntimeError
    found: type[Exception] = NVMLError
    return found


def _gpu(nvml: Any, handle: Any) -> Gpu:
    capability = _told(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    memory_info = _told(nvml.nvmlDeviceGetMemoryInfo, handle)
    place = _told(nvml.nvmlDeviceGetPciInfo, handle)
    return Gpu(
        str(nvml.nvmlDeviceGetName(handle)),
        tuple(capability) if capability else None,
        int(memory_info.total) if memory_info else None,
        _bus(place.busId) if place else "",
        str(_told(nvml.nvmlDeviceGetUUID, handle) or ""),
    )


def _told(ask: Any, handle: Any) -> Any:
    """Return what NVML tells of a GPU, or None: MIG and virtual machines withhold some of it."""
    try:
        return ask(handle)
    except _nvml_error():
        return None


def _bus(identifier: Any) -> str:
    """Return ``0000:3b:00.0`` from what NVML and CUDA write differently."""
    text = identifier.decode() if isinstance(identifier, bytes) else str(identifier)
    return text.rstrip("\0").lower()[-12:]


def _in_cudas_order(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA sees, ``cuda:0`` first."""
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
        if int(status) == int(driver.CUresult.CUDA_ERROR_NO_DEVICE):
            return ()
        _, count = driver.cuDeviceGetCount()
        order = [_bus(driver.cuDeviceGetPCIBusId(16, i)[1]) for i in range(count or 0)]
    except (ImportError, RuntimeError):
        return visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    known = {gpu.bus: gpu for gpu in gpus}
    if not all(bus in known for bus in order):
        return visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return tuple(known[bus] for bus in order)


def visible_gpus(gpus: list[Gpu], listed: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, where CUDA cannot be asked.

    Numbers and beginnings of UUIDs; as CUDA does, it stops at the first that is neither.

    >>> two = [Gpu("a", None, None, uuid="GPU-1"), Gpu("b", None, None, uuid="GPU-2")]
    >>> [gpu.name for gpu in visible_gpus(two, "GPU-2,0,7,1")]
    ['b', 'a']
    """
    if listed is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for part in filter(None, (text.strip() for text in listed.split(","))):
        named = [gpu for gpu in gpus if part.startswith("GPU-") and gpu.uuid.startswith(part)]
        if part.isdecimal():
            named = gpus[int(part) : int(part) + 1]
        if not named:
            break
        chosen += named[:1]
    return tuple(chosen)


def _cpuinfo() -> dict[str, str]:
    """Return the first value of each line of ``/proc/cpuinfo``; psutil does not tell features."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    entries: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        entries.setdefault(name.strip(), value.strip())
    return entries


def _cgroup(name: str) -> str:
    """Return what the container (cgroup v2) is granted; "" where it sets nothing."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.exists() else ""


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
