"""Two benchmark files side by side; refused where they cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.bench.report import SCHEMA
from van_deploy.documents import json_from, text_from
from van_deploy.errors import InputError, UsageError

__all__ = ["AGREE_WITHIN_PERCENT", "Change", "agreement", "compare_reports", "read_report"]

AGREE_WITHIN_PERCENT = 5.0
"""Two runs of the same files agree on a ratio that changed by no more."""


@dataclass(frozen=True)
class Change:
    """One row in both files.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: side of the input.
        before_ms: median latency in the old file.
        after_ms: median latency in the new one.
        speedup: ``before_ms / after_ms``.
        ratio_before: times faster than the reference, old; None without one.
        ratio_after: the same, new.
        ratio_change_percent: from the one to the other: what two runs should agree on.
        uncertainty_percent: how much of that the two 95 % intervals leave open.
        moved: whether the ratio changed by more than that and by more than 5 %.
        same_file: whether both timed the same bytes.
    """

    contender: str
    batch: int
    image_size: int
    before_ms: float
    after_ms: float
    speedup: float
    ratio_before: float | None
    ratio_after: float | None
    ratio_change_percent: float | None
    uncertainty_percent: float | None
    moved: bool
    same_file: bool


def read_report(path: Path) -> dict[str, Any]:
    """Return a benchmark's JSON file.

    Raises:
        InputError: it cannot be read or is something else.
    """
    try:
        report: dict[str, Any] = json_from(text_from(path))
        schema = report["schema"]
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be read: {error.strerror or error}.", "Check the path."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' is not a benchmark's JSON file.",
            "Write one with `van-deploy bench BUNDLE --output FILE`.",
        ) from error
    if schema != SCHEMA:
        raise InputError(
            f"'{path}' has schema '{schema}'; this version reads '{SCHEMA}'.",
            "Measure again with this version: runners, ratios or rounds are written differently.",
        )
    return report


def compare_reports(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return what changed from ``old`` to ``new``, row by row.

    Raises:
        UsageError: they come from different devices, TensorRT majors or numbers of
            threads or streams, have different references, or no row in common.
    """
    for what, of in COMPARABLE.items():
        before, after = of(old), of(new)
        if before != after:
            raise UsageError(
                f"The two benchmarks cannot be compared: {what} was {before}, now it is {after}.",
                "Measure both on the same machine, with the same settings.",
            )
    rows = {_key(row): row for row in old["rows"] if row["latency"]}
    changes = [
        _change(rows[_key(row)], row, old, new)
        for row in new["rows"]
        if row["latency"] and _key(row) in rows
    ]
    if not changes:
        raise UsageError(
            "The two benchmarks have no row in common.",
            "Measure the same runners at the same batch sizes.",
        )
    return changes


def agreement(changes: Sequence[Change]) -> dict[str, Any]:
    """Return in how many ratios two runs agree, ready for JSON.

    ``within`` changed by 5 % or less; ``open`` by more, but by no more than their own
    uncertainty; ``moved`` by more than both. ``worst`` names the largest change.
    """
    known = [c for c in changes if c.ratio_change_percent is not None and c.ratio_after != 1.0]
    worst = max(known, key=lambda c: abs(c.ratio_change_percent or 0.0), default=None)
    moved = [c for c in known if c.moved]
    within = sum(abs(c.ratio_change_percent or 0.0) <= AGREE_WITHIN_PERCENT for c in known)
    return {
        "within_percent": AGREE_WITHIN_PERCENT,
        "ratios": len(known),
        "within": within,
        "open": len(known) - within - len(moved),
        "moved": [_named(change) for change in moved],
        "worst": _named(worst) if worst else None,
        "worst_percent": worst.ratio_change_percent if worst else None,
    }


def _named(change: Change) -> str:
    return f"{change.contender} at batch {change.batch}, {change.image_size} pixels"


def _device(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    cpu = machine["cpu"]
    return f"{cpu['name']}, {cpu['cores_allowed']} cores{f', {gpus}' if gpus else ''}"


def _tensorrt(report: Mapping[str, Any]) -> str:
    version = report["versions"].get("tensorrt")
    return f"TensorRT {version.split('.')[0]}" if version else "no TensorRT"


COMPARABLE: dict[str, Callable[[Mapping[str, Any]], object]] = {
    "the device": _device,
    "TensorRT's major version": _tensorrt,
    "the number of threads": lambda report: report["settings"]["threads"],
    "the number of streams": lambda report: report["settings"]["streams"],
    "the reference": lambda report: report["reference"],
}


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["contender"], row["batch"], row["image_size"]


def _change(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_report: Mapping[str, Any],
    new_report: Mapping[str, Any],
) -> Change:
    before, after = old["latency"]["p50_ms"], new["latency"]["p50_ms"]
    ratios = [row["ratio"]["median"] if row["ratio"] else None for row in (old, new)]
    change, open_percent = _ratio_change(old["ratio"], new["ratio"])
    digests = [
        report["contenders"][new["contender"]]["sha256"] for report in (old_report, new_report)
    ]
    return Change(
        contender=new["contender"],
        batch=new["batch"],
        image_size=new["image_size"],
        before_ms=before,
        after_ms=after,
        speedup=before / after,
        ratio_before=ratios[0],
        ratio_after=ratios[1],
        ratio_change_percent=change,
        uncertainty_percent=open_percent,
        moved=change is not None
        and open_percent is not None
        and abs(change) > max(AGREE_WITHIN_PERCENT, open_percent),
        same_file=digests[0] == digests[1],
    )


def _ratio_change(
    old: Mapping[str, Any] | None, new: Mapping[str, Any] | None
) -> tuple[float | None, float | None]:
    """Return a ratio's change in percent, and how much of it the two intervals leave open.

    The ends that face each other count, added as independent errors are.
    """
    if old is None or new is None:
        return None, None
    change = math.log(new["median"] / old["median"])
    towards = ("high", "low") if change > 0 else ("low", "high")
    ends = (abs(math.log(r[end] / r["median"])) for r, end in zip((old, new), towards, strict=True))
    return 100 * math.expm1(change), 100 * math.expm1(math.hypot(*ends))
