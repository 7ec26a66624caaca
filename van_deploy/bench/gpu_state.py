"""A GPU's clocks, power, temperature and memory while something runs on it, by NVML.

NVML numbers the GPUs by itself: the one that CUDA uses is found by its identifier.
"""

from __future__ import annotations

import contextlib
from typing import Any

from van_deploy.bench.timing import GpuState
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.runners.base import gpu_index

THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons (``nvml.h``, ``nvmlClocksEventReason*``) that slow a GPU
down. The others say that it is idle, or that somebody has set its clocks."""


class GpuWatch:
    """Reads the state of one GPU. Without NVML every state is empty.

    Args:
        device: CUDA's name of the GPU, such as ``cuda:0``; ``cpu`` watches nothing.

    Attributes:
        reason: why there is no NVML; "" where there is.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self.reason, index = "", gpu_index(device)
        driver = nvidia_driver()
        if index is None or driver is None or index >= len(driver.gpus):
            self.reason = f"no NVIDIA driver answers for '{device}'"
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(driver.gpus[index].uuid)
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"
            return
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

    def described(self) -> dict[str, Any]:
        """Return what does not change: name, driver, limits of clock and power."""
        nvml = self._nvml
        if nvml is None:
            return {"nvml": self.reason}
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return {
            "name": self._ask("nvmlDeviceGetName"),
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "memory_bytes": None if memory is None else int(memory.total),
            "max_sm_mhz": self._ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            "max_memory_mhz": self._ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
            "power_limit_w": None if limit is None else limit / 1e3,
        }

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Return NVML's answer, or None where this GPU or this version has none."""
        with contextlib.suppress(self._nvml.NVMLError, AttributeError):
            return getattr(self._nvml, function)(self._gpu, *arguments)
        return None
