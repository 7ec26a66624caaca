"""Two benchmark files side by side; refused where they cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from van_deploy.bench.document import Agreement, BenchReport, Change
from van_deploy.bench.timing import Ratio, Row
from van_deploy.config.sizes import ImageSize
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
    rows = {_key(row): row for row in old.measured}
    changes = tuple(
        _change(rows[_key(row)], row, old, new) for row in new.measured if _key(row) in rows
    )
    if not changes:
        raise UsageError(
            "The two benchmarks have no row in common.",
            "Measure the same runners at the same batch sizes.",
        )
    return new.model_copy(update={"changes": changes, "agreement": _agreement(changes)})


def _agreement(changes: Sequence[Change]) -> Agreement:
    """Return in how many ratios two runs agree."""
    known = [
        (abs(c.ratio_change_percent), c)
        for c in changes
        if c.ratio_change_percent is not None and c.ratio_after != 1.0
    ]
    worst = max(known, key=lambda pair: pair[0])[1] if known else None
    moved = tuple(_named(change) for _, change in known if change.moved)
    within = sum(percent <= AGREE_WITHIN_PERCENT for percent, _ in known)
    return Agreement(
        within_percent=AGREE_WITHIN_PERCENT,
        ratios=len(known),
        within=within,
        open=len(known) - within - len(moved),
        moved=moved,
        worst=_named(worst) if worst else None,
        worst_percent=worst.ratio_change_percent if worst else None,
    )


def _named(change: Change) -> str:
    return f"{change.contender} at batch {change.batch}, {change.image_size} pixels"


def _comparable(report: BenchReport) -> dict[str, object]:
    """Return what two benchmarks must have in common, by what it is called."""
    cpu, version = report.machine.cpu, report.versions.get("tensorrt")
    gpus = "".join(f", {gpu.name}" for gpu in report.machine.gpus)
    where = f"{cpu.name}, {cpu.cores_allowed} cores{gpus}"
    return {
        "the device": where if report.device == "cpu" else f"{report.device} of {where}",
        "TensorRT's major version": f"TensorRT {version.split('.')[0]}" if version else "none",
        "the number of threads": report.threads,
        "the number of streams": report.settings.streams,
        "the reference": report.reference,
    }


def _key(row: Row) -> tuple[str, int, ImageSize]:
    return row.contender, row.batch, row.image_size


def _change(old: Row, new: Row, old_report: BenchReport, new_report: BenchReport) -> Change:
    before, after = (row.latency.p50_ms if row.latency else math.nan for row in (old, new))
    change, left_open = _ratio_change(old.ratio, new.ratio)
    digests = {report.contenders[new.contender].sha256 for report in (old_report, new_report)}
    return Change(
        *_key(new),
        before_ms=before,
        after_ms=after,
        speedup=before / after,
        ratio_before=old.ratio.median if old.ratio else None,
        ratio_after=new.ratio.median if new.ratio else None,
        ratio_change_percent=change,
        uncertainty_percent=left_open,
        moved=abs(change or 0.0) > max(AGREE_WITHIN_PERCENT, left_open or 0.0),
        same_file=len(digests) == 1,
    )


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
