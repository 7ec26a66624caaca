"""The machine that something is timed on, and what else it does meanwhile."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

from van_deploy.environment.hardware import Cpu, Gpu, cpu, memory, nvidia_driver

__all__ = ["During", "Machine", "Watch", "busy_cores", "machine_here"]

OTHER_LOAD_LIMIT = 0.1
"""Share of the cores this process may use that others may keep busy before it is said."""

LOOK_S = 0.5


@dataclass(frozen=True)
class Machine:
    """What a timing depends on.

    Attributes:
        cpu: the processor.
        memory_bytes: installed; None where the system does not say.
        gpus: that answer.
        driver: NVIDIA's, or None.
        load_average: of 1, 5 and 15 minutes.
    """

    cpu: Cpu
    memory_bytes: int | None
    gpus: tuple[Gpu, ...]
    driver: str | None
    load_average: tuple[float, ...]


@dataclass(frozen=True)
class During:
    """What else a machine did for some time.

    Attributes:
        other_load_cores: cores that others kept busy.
        under_load: whether that was more than a tenth of the cores.
    """

    other_load_cores: float
    under_load: bool


class Watch:
    """Tells, of the time since it was made, what others used of the processor.

    Args:
        cores: cores this process may use.
    """

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._start = self._now()

    def report(self) -> During:
        """Return the load since the start.

        What this process and the children it has waited for used is not "others".
        """
        wall, busy, own = (end - start for start, end in zip(self._start, self._now(), strict=True))
        other = max(0.0, (busy - own) / wall) if wall > 0 else 0.0
        return During(other, other > OTHER_LOAD_LIMIT * self.cores)

    def _now(self) -> tuple[float, float, float]:
        used = os.times()
        own = used.user + used.system + used.children_user + used.children_system
        return time.perf_counter(), _busy_s(), own


def busy_cores(seconds: float = LOOK_S) -> float:
    """Return how many cores are busy with anything, watching for ``seconds`` asleep."""
    before, start = _busy_s(), time.perf_counter()
    time.sleep(seconds)
    return (_busy_s() - before) / (time.perf_counter() - start)


def machine_here() -> Machine:
    """Return what a timing on this machine depends on."""
    driver = nvidia_driver()
    return Machine(
        cpu=cpu(),
        memory_bytes=memory().total_bytes,
        gpus=driver.gpus if driver else (),
        driver=driver.version if driver else None,
        load_average=psutil.getloadavg(),
    )


def _busy_s() -> float:
    """Return busy core seconds since boot, with what a hypervisor took away."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user already
    return float(sum(times) - idle - guests)
