"""What else the machine is doing while something is timed: other load, clocks, heat, energy."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from van_deploy.environment.hardware import Cpu, Gpu, cpu, memory, nvidia_driver

__all__ = ["During", "Machine", "Moment", "Watch", "busy_cores", "machine_here", "moment"]

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


@dataclass(frozen=True)
class Machine:
    """What a timing depends on.

    Attributes:
        cpu: the processor.
        memory_bytes: installed; None where the system does not say.
        gpus: that answer.
        driver: NVIDIA's, or None.
        load_average: of 1, 5 and 15 minutes; None where the system does not say.
        governor: of the first core's clock; None likewise.
    """

    cpu: Cpu
    memory_bytes: int | None
    gpus: tuple[Gpu, ...]
    driver: str | None
    load_average: tuple[float, ...] | None
    governor: str | None


@dataclass(frozen=True)
class During:
    """What else a machine did for some time. None is where it does not say.

    Attributes:
        other_load_cores: cores that others kept busy.
        under_load: whether that was more than a tenth of the cores.
        throttled: how often a core was slowed for heat.
        energy_j: what the processor packages used.
        mhz_before: mean clock at the start.
        mhz_after: and at the end.
    """

    other_load_cores: float | None
    under_load: bool
    throttled: float | None
    energy_j: float | None
    mhz_before: float | None
    mhz_after: float | None


class Watch:
    """Tells, of the time since it was made, what others used of the processor.

    Args:
        cores: cores this process may use.
    """

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._start = moment()
        self._own_s = _own_s()

    def report(self) -> During:
        """Return load, clock, throttling and energy since the start.

        What this process and the children it has waited for used is not "others".
        """
        end, own_cpu_s = moment(), _own_s() - self._own_s
        wall = end.wall_s - self._start.wall_s
        other = None
        if end.busy_s is not None and self._start.busy_s is not None and wall > 0:
            other = max(0.0, (end.busy_s - self._start.busy_s - own_cpu_s) / wall)
        return During(
            other_load_cores=other,
            under_load=other is not None and other > OTHER_LOAD_LIMIT * self.cores,
            throttled=_difference(self._start.throttles, end.throttles),
            energy_j=_difference(self._start.energy_j, end.energy_j),
            mhz_before=self._start.mhz,
            mhz_after=end.mhz,
        )


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


def machine_here() -> Machine:
    """Return what a timing on this machine depends on."""
    driver = nvidia_driver()
    return Machine(
        cpu=cpu(),
        memory_bytes=memory().total_bytes,
        gpus=driver.gpus if driver else (),
        driver=driver.version if driver else None,
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
    )


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
