"""The GPU and the driver of this machine, as far as engines care."""

from __future__ import annotations

from dataclasses import dataclass

from van_deploy.environment.hardware import Driver, nvidia_driver


@dataclass(frozen=True)
class Host:
    """What decides whether a plan runs here.

    Attributes:
        gpu: the GPU's name, or None where there is none.
        target: its compute capability, such as ``sm_89``, or None.
        gpu_memory_bytes: its memory, or None if unknown.
        driver: the driver's version, or None.
        cuda: the newest CUDA the driver runs, or None.
    """

    gpu: str | None = None
    target: str | None = None
    gpu_memory_bytes: int | None = None
    driver: str | None = None
    cuda: tuple[int, int] | None = None


def host_here(driver: Driver | None = None, device: int = 0) -> Host:
    """Return this machine as engines see it, with one of its GPUs.

    Args:
        driver: what was found out before; None asks the driver now.
        device: CUDA's number of the GPU. One that is not there leaves the host without a GPU.
    """
    driver = driver or nvidia_driver()
    if driver is None:
        return Host()
    if device >= len(driver.gpus):
        return Host(driver=driver.version, cuda=driver.cuda_version)
    gpu = driver.gpus[device]
    target = "sm_{}{}".format(*gpu.compute_capability) if gpu.compute_capability else None
    return Host(gpu.name, target, gpu.memory_bytes, driver.version, driver.cuda_version)


def device_number(device: str | None) -> int:
    """Return CUDA's number of a device such as ``cuda:1``; 0 for everything without one.

    >>> device_number("cuda:1"), device_number("cpu"), device_number(None)
    (1, 0, 0)
    """
    return int((device or "").partition(":")[2] or 0)
