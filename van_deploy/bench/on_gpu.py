"""A benchmark on a GPU: one contender after the other, timed on the device itself.

No rounds: CUDA events see nothing of what disturbs the host. What ratios are against is the
fastest of PyTorch's own modes at the same batch, not eager PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from van_deploy.bench.contender import Contender
from van_deploy.bench.lane import Lane
from van_deploy.bench.timing import Row, ratio_of
from van_deploy.config import Budget
from van_deploy.config.sizes import ImageSize


def gpu_row(lane: Lane, images: Path, batch: int, image_size: ImageSize, budget: Budget) -> Row:
    """Return what one loaded contender takes at one batch size. Arguments are the lane's."""
    row = Row(lane.contender.name, batch, image_size, 1)
    taken = lane.start(images, batch)
    seen = lane.ask("resident", **taken, seconds=budget.seconds, calls=budget.calls)
    return lane.failed(row) if seen is None else replace(row, **seen)


def with_ratios(
    rows: Sequence[Row], contenders: Sequence[Contender], reference: str
) -> tuple[str | None, list[Row]]:
    """Return what ratios are against, in words, and the rows with their ratios.

    Args:
        rows: of one or several batches and image sizes.
        contenders: of the rows.
        reference: a contender, or ``pytorch`` for the fastest of PyTorch's modes.
    """
    rivals = {c.name for c in contenders if c.runtime == "pytorch"} or {rows[0].contender}
    named = {reference} if reference in {c.name for c in contenders} - rivals else rivals
    best: dict[tuple[int, ImageSize], float] = {}
    for row in rows:
        place = row.batch, row.image_size
        if row.contender in named and row.queued_ms:
            best[place] = min(best.get(place, math.inf), row.queued_ms)
    result = []
    for row in rows:
        fastest = best.get((row.batch, row.image_size))
        times = [fastest / row.queued_ms] if fastest and row.queued_ms else []
        result.append(replace(row, ratio=ratio_of(times)))
    words = "the fastest of PyTorch's modes" if named == rivals else reference
    return words if best else None, result


def int8_not_worth_it(rows: Sequence[Row], contenders: Sequence[Contender]) -> list[str]:
    """Return a warning for each batch at which no INT8 file is faster than FP16 on this GPU."""
    precisions = {c.name: c.precision for c in contenders if c.runtime != "pytorch"}
    best: dict[tuple[int, str | None], float] = {}
    for row in rows:
        place = row.batch, precisions.get(row.contender)
        best[place] = min(best.get(place, math.inf), row.queued_ms or math.inf)
    warnings = []
    for batch in sorted({row.batch for row in rows}):
        fp16, int8 = (best.get((batch, kind), math.inf) for kind in ("fp16", "int8"))
        if fp16 <= int8 < math.inf:
            warnings.append(
                f"INT8 is not faster than FP16 here at batch {batch} ({int8:.3f} ms "
                f"against {fp16:.3f} ms): deploy FP16 on this GPU"
            )
    return warnings
