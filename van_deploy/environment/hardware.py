"""Hardware of this machine: CPU, memory, NVIDIA driver and GPUs.

The sources are psutil, the driver's management library (NVML, through ``nvidia-ml-py``) and CUDA.
No CUDA context is created, and unknown values are None.
"""

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

# Instruction sets that determine the speed of FP32, BF16 and INT8, as in /proc/cpuinfo.
CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16"),
)
# Targets of TensorRT for RTX 1.7: the members of its ``ComputeCapability``. On an H200 (sm_90) it
# built a plan without a target, but could not load it (docs/gpu-results.md).
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


@dataclass(frozen=True)
class Cpu:
    """The CPU, as far as this process may use it.

    Attributes:
        name: model name.
        cores: logical cores of the machine.
        cores_allowed: cores this process may use (affinity and container quota).
        features: instruction sets that determine the speed of inference.
    """

    name: str
    cores: int
    cores_allowed: int
    features: tuple[str, ...]

    @property
    def has_bfloat16(self) -> bool:
        """Whether it has instructions for bfloat16, which is many times slower without them."""
        return any(feature.endswith("bf16") for feature in self.features)


@dataclass(frozen=True)
class Memory:
    """Main memory.

    Attributes:
        total_bytes: memory of the machine, or the container's limit.
        available_bytes: memory available now.
    """

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: name from the driver.
        compute_capability: such as ``(8, 9)``, or None if the driver does not report it.
        memory_bytes: device memory.
        bus: PCI bus address, such as ``0000:3b:00.0``.
        uuid: NVML's identifier, such as ``GPU-1b2c...``.
    """

    name: str
    compute_capability: tuple[int, int] | None
    memory_bytes: int | None
    bus: str = ""
    uuid: str = ""

    @property
    def target(self) -> str | None:
        """The compute capability as a target, such as ``sm_89``."""
        return "sm_{}{}".format(*self.compute_capability) if self.compute_capability else None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        version: such as ``580.65.06``.
        cuda_version: newest supported CUDA version, such as ``(13, 0)``.
        gpus: the GPUs visible to CUDA, ``cuda:0`` first.
        hidden: number of GPUs hidden by ``CUDA_VISIBLE_DEVICES``.
    """

    version: str
    cuda_version: tuple[int, int]
    gpus: tuple[Gpu, ...]
    hidden: int = 0


def cpu() -> Cpu:
    """Return the CPU, its instruction sets and the cores this process may use."""
    info = _read_text("/proc/cpuinfo")  # psutil has neither name nor features
    name = re.search(r"(?m)^model name\s*:\s*(.*)", info)
    flags = re.search(r"(?m)^(?:flags|Features)\s*:\s*(.*)", info)
    cores = psutil.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _read_text("/sys/fs/cgroup/cpu.max").split()
    granted = int(quota[0]) // int(quota[1]) if quota and quota[0].isdigit() else affinity
    features = tuple(f for f in CPU_FEATURES if flags and f in flags[1].split())
    model = name[1].strip() if name else platform.processor() or platform.machine()
    return Cpu(model, cores, max(1, min(affinity, granted)), features)


def memory() -> Memory:
    """Return the memory of the machine, or the container's limit (cgroup v2) if it is smaller."""
    machine = psutil.virtual_memory()
    limit = _read_text("/sys/fs/cgroup/memory.max").strip()
    if not limit.isdigit() or int(limit) >= machine.total:
        return Memory(machine.total, machine.available)
    free = max(0, int(limit) - int(_read_text("/sys/fs/cgroup/memory.current") or 0))
    return Memory(int(limit), min(machine.available, free))


def nvidia_driver() -> Driver | None:
    """Return the NVIDIA driver and its GPUs in CUDA's order, or None without a driver.

    NVML lists all GPUs of the machine; only CUDA defines which of them is ``cuda:0``. No CUDA
    context is created.
    """
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())  # 1000 * major + 10 * minor
            count = pynvml.nvmlDeviceGetCount()
            gpus = [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
            visible = _visible_to_cuda(gpus)
            version = str(pynvml.nvmlSystemGetDriverVersion())
            cuda = (number // 1000, number % 1000 // 10)
            return Driver(version, cuda, visible, len(gpus) - len(visible))
        finally:
            pynvml.nvmlShutdown()
    return None


def query_nvml(gpu: Any, function: str, *arguments: Any) -> Any:
    """Return a value from NVML, or None if it is not supported, as with MIG and virtual GPUs."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError, AttributeError):
        return getattr(pynvml, function)(gpu, *arguments)
    return None


def _gpu(nvml: Any, handle: Any) -> Gpu:
    capability = query_nvml(handle, "nvmlDeviceGetCudaComputeCapability")
    installed = query_nvml(handle, "nvmlDeviceGetMemoryInfo")
    pci = query_nvml(handle, "nvmlDeviceGetPciInfo")
    return Gpu(
        str(nvml.nvmlDeviceGetName(handle)),
        tuple(capability) if capability else None,
        int(installed.total) if installed else None,
        _pci_address(pci.busId) if pci else "",
        str(query_nvml(handle, "nvmlDeviceGetUUID") or ""),
    )


def _pci_address(identifier: Any) -> str:
    r"""Return an address such as ``0000:3b:00.0`` from the formats of NVML and CUDA.

    >>> _pci_address("00000000:3B:00.0"), _pci_address(b"0000:3B:00.0\0   ")  # from cuda-bindings
    ('0000:3b:00.0', '0000:3b:00.0')
    """
    text = identifier.decode() if isinstance(identifier, bytes) else str(identifier)
    return text.partition("\0")[0].lower()[-12:]


def _visible_to_cuda(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs that are visible to CUDA, ``cuda:0`` first; all if CUDA does not start."""
    gpu_at = {gpu.bus: gpu for gpu in gpus}
    with contextlib.suppress(ImportError, RuntimeError, KeyError):  # KeyError: MIG, permissions
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
        if int(status) not in (0, int(driver.CUresult.CUDA_ERROR_NO_DEVICE)):
            return tuple(gpus)  # CUDA does not start, and the probe of ``doctor`` reports why
        _, count = driver.cuDeviceGetCount()
        addresses = [driver.cuDeviceGetPCIBusId(16, index)[1] for index in range(count or 0)]
        return tuple(gpu_at[_pci_address(address)] for address in addresses)
    return tuple(gpus)


def _read_text(file: str) -> str:
    """Return the text of a file of the Linux kernel, or "" if it does not exist."""
    return Path(file).read_text(errors="replace") if Path(file).exists() else ""


def peak_memory_bytes() -> int:
    """Return the peak main memory of this process.

    The source is ``VmHWM`` on Linux, where ``ru_maxrss`` is kept across ``exec`` and would include
    the program that started this one.
    """
    if peak := re.search(r"VmHWM:\s+(\d+)", _read_text("/proc/self/status")):
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
