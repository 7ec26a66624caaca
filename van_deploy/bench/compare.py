"""Two benchmark files side by side; refused where they cannot be compared."""

from __future__ import annotations

import math

from van_deploy.bench.document import BenchReport, Change, Ratio
from van_deploy.errors import UsageError

AGREE_WITHIN_PERCENT = 5.0
"""Two runs of the same files agree on a ratio that changed by no more."""


def compared(old: BenchReport, new: BenchReport) -> BenchReport:
    """Return ``new`` with what changed since ``old``, row by row.

    Raises:
        UsageError: they come from different devices, TensorRT majors or numbers of
            threads or streams, have different references, or no row in common.
    """
    now = _comparable(new)
    for what, before in _comparable(old).items():
        if before != (after := now[what]):
            raise UsageError(
                f"The two benchmarks cannot be compared: {what} was {before}, now it is {after}.",
                "Measure both on the same machine, with the same settings.",
            )
    rows = {(row.contender, row.batch, row.image_size): row for row in old.rows if row.latency}
    changes = []
    for row in new.rows:
        before = rows.get((row.contender, row.batch, row.image_size))
        if before and before.latency and row.latency:
            percent, left_open = _ratio_change(before.ratio, row.ratio)
            moved = abs(percent or 0.0) > max(AGREE_WITHIN_PERCENT, left_open or 0.0)
            files = {report.contenders[row.contender].sha256 for report in (old, new)}
            place = (row.contender, row.batch, row.image_size)
            times = (before.latency.p50_ms, row.latency.p50_ms)
            changes.append(Change(*place, *times, percent, left_open, moved, len(files) == 1))
    if not changes:
        raise UsageError(
            "The two benchmarks have no row in common.",
            "Measure the same runners at the same batch sizes.",
        )
    return new.model_copy(update={"changes": tuple(changes)})


def _comparable(report: BenchReport) -> dict[str, object]:
    """Return what two benchmarks must have in common, by what it is called."""
    cpu, settings = report.machine.cpu, report.settings
    gpus = "".join(f", {gpu.name}" for gpu in report.machine.gpus)
    return {
        "the device": f"{settings.device} of {cpu.name}, {cpu.cores_allowed} cores{gpus}",
        "TensorRT's major version": report.versions.get("tensorrt", "none").partition(".")[0],
        "the number of threads": settings.threads,
        "the number of streams": settings.streams,
        "the reference": report.reference,
    }


def _ratio_change(old: Ratio | None, new: Ratio | None) -> tuple[float | None, float | None]:
    """Return a ratio's change in percent, and how much of it the two intervals leave open.

    The ends that face each other count, added as independent errors are.
    """
    if old is None or new is None:
        return None, None
    change = math.log(new.median / old.median)
    ends = (old.high, new.low) if change > 0 else (old.low, new.high)
    spans = (abs(math.log(end / r.median)) for end, r in zip(ends, (old, new), strict=True))
    return 100 * math.expm1(change), 100 * math.expm1(math.hypot(*spans))
