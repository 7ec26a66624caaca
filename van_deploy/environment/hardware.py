"""What the machine offers: processor, memory, disk, NVIDIA driver and GPUs.

Asked of psutil, of the driver's own management library (NVML, through ``nvidia-ml-py``) and of
CUDA: nothing is started on a GPU, and what cannot be found out is None.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# What decides how fast FP32, BF16 and INT8 run on a CPU; /proc/cpuinfo's names.
CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16"),
)
# What TensorRT for RTX 1.7 can build for: the members of its ``ComputeCapability``. On an H200
# (sm_90) it built a plan without a target and did not load it (docs/gpu-results.md).
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


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
        return any(feature.endswith("bf16") for feature in self.features)


@dataclass(frozen=True)
class Memory:
    """Main memory.

    Attributes:
        total_bytes: what this process may use in all (the container's limit, if there is one).
        available_bytes: what is free now.
    """

    total_bytes: int
    available_bytes: int


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
    def target(self) -> str | None:
        """The compute capability as TensorRT's targets are written, such as ``sm_89``."""
        return "sm_{}{}".format(*self.compute_capability) if self.compute_capability else None


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
    info = _text("/proc/cpuinfo")  # psutil tells neither name nor features
    name = re.search(r"(?m)^model name\s*:\s*(.*)", info)
    flags = re.search(r"(?m)^(?:flags|Features)\s*:\s*(.*)", info)
    cores = psutil.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _text("/sys/fs/cgroup/cpu.max").split()
    granted = int(quota[0]) // int(quota[1]) if quota and quota[0].isdigit() else affinity
    features = tuple(f for f in CPU_FEATURES if flags and f in flags[1].split())
    model = name[1].strip() if name else platform.processor() or platform.machine()
    return Cpu(model, cores, max(1, min(affinity, granted)), features)


def memory() -> Memory:
    """Return the machine's memory, or the container's limit (cgroup v2) where that is smaller."""
    here = psutil.virtual_memory()
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if not limit.isdigit() or int(limit) >= here.total:
        return Memory(here.total, here.available)
    left = max(0, int(limit) - int(_text("/sys/fs/cgroup/memory.current") or 0))
    return Memory(int(limit), min(here.available, left))


def nvidia_driver() -> Driver | None:
    """Return the NVIDIA driver and its GPUs as CUDA numbers them, or None where none answers.

    NVML knows every GPU of the machine; which of them ``cuda:0`` is, only CUDA says. Nothing is
    started on a GPU.
    """
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())  # 1000 * major + 10 * minor
            count = pynvml.nvmlDeviceGetCount()
            gpus = [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
            visible = _in_cudas_order(gpus)
            version = str(pynvml.nvmlSystemGetDriverVersion())
            cuda = (number // 1000, number % 1000 // 10)
            return Driver(version, cuda, visible, len(gpus) - len(visible))
        finally:
            pynvml.nvmlShutdown()
    return None


def query_nvml(gpu: Any, function: str, *arguments: Any) -> Any:
    """Return NVML's answer about a GPU; None where it has none: MIG and virtual machines do not."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError, AttributeError):
        return getattr(pynvml, function)(gpu, *arguments)
    return None


def _gpu(nvml: Any, handle: Any) -> Gpu:
    capability = query_nvml(handle, "nvmlDeviceGetCudaComputeCapability")
    installed = query_nvml(handle, "nvmlDeviceGetMemoryInfo")
    place = query_nvml(handle, "nvmlDeviceGetPciInfo")
    return Gpu(
        str(nvml.nvmlDeviceGetName(handle)),
        tuple(capability) if capability else None,
        int(installed.total) if installed else None,
        _bus(place.busId) if place else "",
        str(query_nvml(handle, "nvmlDeviceGetUUID") or ""),
    )


def _bus(identifier: Any) -> str:
    """Return ``0000:3b:00.0`` from what NVML and CUDA write differently."""
    text = identifier.decode() if isinstance(identifier, bytes) else str(identifier)
    return text.rstrip("\0").lower()[-12:]


def _in_cudas_order(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA sees, ``cuda:0`` first."""
    known = {gpu.bus: gpu for gpu in gpus}
    with contextlib.suppress(ImportError, RuntimeError, KeyError):  # KeyError: MIG, withheld
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
        if int(status) == int(driver.CUresult.CUDA_ERROR_NO_DEVICE):
            return ()
        _, count = driver.cuDeviceGetCount()
        return tuple(known[_bus(driver.cuDeviceGetPCIBusId(16, i)[1])] for i in range(count or 0))
    return tuple(gpus)


def _text(file: str) -> str:
    """Return what one of the kernel's files says; "" where there is none."""
    return Path(file).read_text(errors="replace") if Path(file).exists() else ""


def peak_memory_bytes() -> int:
    """Return the most main memory this process has held.

    From ``VmHWM`` where there is one: ``ru_maxrss`` survives ``exec`` on Linux and
    would count the program that started this one.
    """
    if peak := re.search(r"VmHWM:\s+(\d+)", _text("/proc/self/status")):
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
