"""What else the machine is doing while something is timed: other load, clocks, heat, energy."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from van_deploy.environment.hardware import cpu, memory, nvidia_driver

__all__ = ["Moment", "Watch", "busy_cores", "machine_facts", "moment"]

OTHER_LOAD_LIMIT = 0.1
"""Share of the cores this process may use that others may keep busy before it is said."""

LOOK_S = 0.5
RAPL = Path("/sys/class/powercap")
THROTTLES = "/sys/devices/system/cpu/cpu{}/thermal_throttle/core_throttle_count"


@dataclass(frozen=True)
class Moment:
    """The machine's counters at one time.

    Attributes:
        wall_s: a clock.
        busy_s: seconds that cores were busy since the machine started, all added up,
            with what a hypervisor took away; None where the system does not say.
        throttles: how often a core was slowed for heat; None where it does not say.
        energy_j: what the processor packages have used; None where it may not be read.
        mhz: mean clock of the cores; None where the system does not say.
    """

    wall_s: float
    busy_s: float | None
    throttles: int | None
    energy_j: float | None
    mhz: float | None


class Watch:
    """Tells, of the time since it was made, what others used of the processor.

    Args:
        cores: cores this process may use.
    """

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._start = moment()
        self._own_s = _own_s()

    def report(self) -> dict[str, Any]:
        """Return load, clock, throttling and energy since the start.

        What this process and the children it has waited for used is not "others".
        """
        end, own_cpu_s = moment(), _own_s() - self._own_s
        wall = end.wall_s - self._start.wall_s
        other = None
        if end.busy_s is not None and self._start.busy_s is not None and wall > 0:
            other = max(0.0, (end.busy_s - self._start.busy_s - own_cpu_s) / wall)
        return {
            "other_load_cores": other,
            "under_load": other is not None and other > OTHER_LOAD_LIMIT * self.cores,
            "throttled": _difference(self._start.throttles, end.throttles),
            "energy_j": _difference(self._start.energy_j, end.energy_j),
            "mhz_before": self._start.mhz,
            "mhz_after": end.mhz,
        }


def moment() -> Moment:
    """Return the machine's counters now."""
    return Moment(time.perf_counter(), _busy_s(), _throttles(), _energy_j(), _mhz())


def busy_cores(seconds: float = LOOK_S) -> float | None:
    """Return how many cores are busy with anything, watching for ``seconds`` asleep."""
    before, start = _busy_s(), time.perf_counter()
    time.sleep(seconds)
    after = _busy_s()
    if before is None or after is None:
        return None
    return (after - before) / (time.perf_counter() - start)


def machine_facts() -> dict[str, Any]:
    """Return what a timing depends on: processor, memory, GPUs, and their driver."""
    driver = nvidia_driver()
    gpus = [] if driver is None else [{**asdict(g), "sm": g.sm} for g in driver.gpus]
    return {
        "cpu": asdict(cpu()),
        "memory_bytes": memory().total_bytes,
        "gpus": gpus,
        "driver": driver.version if driver else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
    }


def _busy_s() -> float | None:
    """Return busy core seconds since boot, from ``/proc/stat``'s first line."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    fields = [int(x) for x in path.read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Return processor seconds of this process and the children it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _throttles() -> int | None:
    found = [Path(THROTTLES.format(i)) for i in range(os.cpu_count() or 1)]
    counts = [int(text) for path in found if (text := _text(path)) is not None]
    return sum(counts) if counts else None


def _energy_j() -> float | None:
    """Return the energy counter of the packages (RAPL), which often only root may read."""
    counters = [_text(zone / "energy_uj") for zone in RAPL.glob("*-rapl:[0-9]")]
    known = [int(text) for text in counters if text is not None]
    return sum(known) / 1e6 if known else None


def _mhz() -> float | None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    lines = [line for line in path.read_text().splitlines() if line.startswith("cpu MHz")]
    clocks = [float(line.partition(":")[2]) for line in lines]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
