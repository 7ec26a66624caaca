"""Whether the figures of a race can be believed: load, heat, variation, unsettled ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from van_deploy.bench.lane import Row
from van_deploy.bench.machine import During
from van_deploy.bench.timing import CV_LIMIT_PERCENT
from van_deploy.config.bench import LEAST_ROUNDS

__all__ = ["load_before", "warnings_of"]

LOAD_LIMIT = 0.1  # of the cores, before anything runs


def load_before(busy: float | None, cores: int) -> list[str]:
    """Return a warning if others kept more than a tenth of the cores busy before the race."""
    if busy is None or busy <= LOAD_LIMIT * cores:
        return []
    return [
        f"the machine was under load before anything ran: {busy:.1f} of "
        f"{cores} cores busy; do not compare these figures with others"
    ]


def warnings_of(rows: Sequence[Row], state: During, tolerance_percent: float) -> list[str]:
    """Return what to keep in mind of some rows, and of what else the machine did meanwhile."""
    found = []
    if state.under_load:
        found.append(
            f"other work kept {state.other_load_cores or 0.0:.1f} cores busy while this ran; "
            "latencies are too long, ratios less so"
        )
    if state.throttled:
        found.append(f"the processor was slowed for heat {state.throttled:.0f} times")
    return [*found, *_wild(rows), *_disturbed(rows), *_unsettled(rows, tolerance_percent)]


def _wild(rows: Sequence[Row]) -> Iterator[str]:
    spread = {
        f"{row.contender} at batch {row.batch}": row.latency.cv_percent
        for row in rows
        if row.latency and row.latency.cv_percent > CV_LIMIT_PERCENT
    }
    if spread:
        worst = max(spread, key=lambda name: spread[name])
        yield (
            f"{len(spread)} of {len(rows)} rows vary by more than {CV_LIMIT_PERCENT} % from call "
            f"to call (most: {worst}, {spread[worst]:.0f} %)"
        )


def _disturbed(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a warning where too few rounds were quiet for a ratio, so that all had to count."""
    few = [row for row in rows if row.ratio and row.round_quiet and not _has_quiet(row)]
    if few:
        yield (
            f"the machine was disturbed in nearly every round of {len(few)} of {len(rows)} rows, "
            "by others on its processor or by heat: their ratios are over all rounds, and may "
            "be others tomorrow"
        )


def _has_quiet(row: Row) -> bool:
    return sum(row.round_quiet) >= min(LEAST_ROUNDS, len(row.round_quiet))


def _unsettled(rows: Sequence[Row], tolerance_percent: float) -> Iterator[str]:
    loose = {
        f"{row.contender} at batch {row.batch}": row.ratio.uncertainty_percent
        for row in rows
        if row.ratio and row.settled is False
    }
    if loose:
        worst = max(loose, key=lambda name: loose[name])
        yield (
            f"{len(loose)} of {sum(row.settled is not None for row in rows)} ratios did not settle "
            f"within {tolerance_percent:g} % before their time was up (least: {worst}, "
            f"{loose[worst]:.1f} %); a longer --limit gives them more"
        )
