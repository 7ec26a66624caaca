"""The machine that something is timed on, what else it does meanwhile, and what that is worth."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from van_deploy.bench.timing import Row
from van_deploy.config import BenchSettings
from van_deploy.config.commands import LEAST_ROUNDS
from van_deploy.environment.hardware import Cpu, Gpu, cpu, memory, nvidia_driver

OTHER_LOAD_LIMIT = 0.1
"""Share of the cores this process may use that others may keep busy before it is said."""

LOOK_S = 0.5
CV_LIMIT_PERCENT = 2.5
"""Coefficient of variation above which trtexec, too, calls its timings unstable."""


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
        psutil.cpu_percent()  # from here on it says what was used since it was last asked
        self._start = self._now()

    def report(self) -> During:
        """Return the load since the start.

        What this process and the children it has waited for used is not "others".
        """
        wall, own = (end - start for start, end in zip(self._start, self._now(), strict=True))
        other = max(0.0, _cores_of(psutil.cpu_percent()) - own / wall)
        return During(other, other > OTHER_LOAD_LIMIT * self.cores)

    def _now(self) -> tuple[float, float]:
        """Return the wall time and this process's seconds of processor time, its children's too."""
        return time.perf_counter(), sum(os.times()[:4])


def busy_cores(seconds: float = LOOK_S) -> float:
    """Return how many cores are busy with anything, watching for ``seconds`` asleep."""
    return _cores_of(psutil.cpu_percent(seconds))


def _cores_of(percent: float) -> float:
    return percent / 100 * (psutil.cpu_count() or 1)


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


def warnings_of(
    rows: Sequence[Row], settings: BenchSettings, busy: float, cores: int, during: During
) -> Iterator[str]:
    """Yield what to keep in mind: load, heat, variation, unsettled ratios."""
    if busy > OTHER_LOAD_LIMIT * cores:
        yield (
            f"the machine was under load before anything ran: {busy:.1f} of "
            f"{cores} cores busy; do not compare these figures with others"
        )
    if settings.device != "cpu":
        yield from _of_the_gpu(rows)
        return
    if during.under_load:
        yield (
            f"other work kept {during.other_load_cores:.1f} cores busy while this ran; "
            "latencies are too long, ratios less so"
        )
    spread = [(row.latency.cv_percent, _named(row)) for row in rows if row.latency]
    if wild := [one for one in spread if one[0] > CV_LIMIT_PERCENT]:
        most, worst = max(wild)
        yield (
            f"{len(wild)} of {len(rows)} rows vary by more than {CV_LIMIT_PERCENT} % from call "
            f"to call (most: {worst}, {most:.0f} %)"
        )
    few = [
        row
        for row in rows
        if row.ratio and sum(row.round_quiet) < min(LEAST_ROUNDS, len(row.round_quiet))
    ]
    if few:
        yield (
            f"the machine was disturbed in nearly every round of {len(few)} of {len(rows)} rows, "
            "by others on its processor or by heat: their ratios are over all rounds, and may "
            "be others tomorrow"
        )
    ratios = [(row, row.ratio) for row in rows if row.ratio and row.settled is False]
    if loose := [(ratio.uncertainty_percent, _named(row)) for row, ratio in ratios]:
        most, worst = max(loose)
        yield (
            f"{len(loose)} of {sum(row.settled is not None for row in rows)} ratios did not settle "
            f"within {settings.budget.tolerance_percent:g} % before their time was up (least: "
            f"{worst}, {most:.1f} %); a longer --limit gives them more"
        )


def _of_the_gpu(rows: Sequence[Row]) -> Iterator[str]:
    if slowed := [row.throttled for row in rows if row.throttled]:
        reasons = ", ".join(sorted({reason for why in slowed for reason in why}))
        yield f"the GPU was slowed down in {len(slowed)} of {len(rows)} rows: {reasons}"
    if unsteady := sum(row.steady is False for row in rows):
        yield f"the GPU's clock was not steady in {unsteady} of {len(rows)} rows"


def _named(row: Row) -> str:
    return f"{row.contender} at batch {row.batch}"
