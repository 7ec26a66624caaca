"""Whether the figures of a benchmark can be believed: load, heat, variation, unsettled ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from van_deploy.bench.lane import Row
from van_deploy.bench.machine import During
from van_deploy.bench.timing import CV_LIMIT_PERCENT
from van_deploy.config import BenchSettings
from van_deploy.config.bench import LEAST_ROUNDS

__all__ = ["warnings_of"]


def warnings_of(
    rows: Sequence[Row], settings: BenchSettings, busy: float, cores: int, during: During
) -> Iterator[str]:
    """Yield what to keep in mind: load, heat, variation, unsettled ratios."""
    if busy > 0.1 * cores:
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
    spread = {_named(row): row.times.cv_percent for row in rows if row.latency}
    wild = {name: cv for name, cv in spread.items() if cv > CV_LIMIT_PERCENT}
    if wild:
        worst = max(wild, key=lambda name: wild[name])
        yield (
            f"{len(wild)} of {len(rows)} rows vary by more than {CV_LIMIT_PERCENT} % from call "
            f"to call (most: {worst}, {wild[worst]:.0f} %)"
        )
    few = [row for row in rows if row.ratio and row.round_quiet and not _has_quiet(row)]
    if few:
        yield (
            f"the machine was disturbed in nearly every round of {len(few)} of {len(rows)} rows, "
            "by others on its processor or by heat: their ratios are over all rounds, and may "
            "be others tomorrow"
        )
    loose = {_named(r): r.ratio.uncertainty_percent for r in rows if r.ratio and r.settled is False}
    if loose:
        worst = max(loose, key=lambda name: loose[name])
        yield (
            f"{len(loose)} of {sum(row.settled is not None for row in rows)} ratios did not settle "
            f"within {settings.budget.tolerance_percent:g} % before their time was up (least: "
            f"{worst}, {loose[worst]:.1f} %); a longer --limit gives them more"
        )


def _of_the_gpu(rows: Sequence[Row]) -> Iterator[str]:
    slowed = [row for row in rows if row.throttled]
    if slowed:
        reasons = sorted({reason for row in slowed for reason in row.throttled})
        yield f"the GPU was slowed down in {len(slowed)} of {len(rows)} rows: {', '.join(reasons)}"
    unsteady = [row for row in rows if row.steady is False]
    if unsteady:
        yield f"the GPU's clock was not steady in {len(unsteady)} of {len(rows)} rows"


def _named(row: Row) -> str:
    return f"{row.contender} at batch {row.batch}"


def _has_quiet(row: Row) -> bool:
    return sum(row.round_quiet) >= min(LEAST_ROUNDS, len(row.round_quiet))
