"""A benchmark on a GPU: one contender after the other, timed on the device itself.

No rounds: CUDA events see nothing of what disturbs the host. What ratios are against is the
fastest of PyTorch's own modes at the same batch, not eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import Contender
from van_deploy.bench.gpu_state import GpuState
from van_deploy.bench.lane import Lane, Row
from van_deploy.bench.process import WorkerProcess
from van_deploy.bench.timing import Latency, Ratio
from van_deploy.config import BenchSettings, Budget
from van_deploy.config.sizes import ImageSize

__all__ = ["gpu_rows", "int8_not_worth_it", "with_ratios"]


@contextmanager
def gpu_rows(
    contender: Contender,
    images: Path,
    batches: Sequence[int],
    image_size: ImageSize,
    settings: BenchSettings,
    preprocessing: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> Iterator[tuple[Lane, list[Row]]]:
    """Give what one contender took at every batch size, and its process while the block lasts.

    Under a latency limit larger batches are not tried once one is too slow.
    """
    lane, rows = Lane(contender), []
    say(f"Loading {contender.name}")
    with WorkerProcess(1) as process:
        lane.load(process, 1)
        loaded = lane.failure
        for batch in batches:
            say(f"Batch {batch}: {contender.name}")
            lane.failure = loaded
            row = _row(lane, images, batch, image_size, settings.budget, preprocessing)
            rows.append(row)
            if settings.p99_ms and row.latency and row.latency.p99_ms > settings.p99_ms:
                break
        yield lane, rows


def _row(
    lane: Lane,
    images: Path,
    batch: int,
    image_size: ImageSize,
    budget: Budget,
    preprocessing: Mapping[str, Any] | None,
) -> Row:
    row = Row(lane.contender.name, batch, image_size, 1)
    if refusal := lane.contender.refuses(batch):
        return replace(row, error=refusal, error_kind="batch")
    given = {"images": str(images), "batch": batch, "preprocessing": preprocessing}
    lane.ask("feed", **given, calls=False)
    seen = lane.ask("resident", batch=batch, seconds=budget.seconds, calls=budget.calls)
    if lane.failure is not None:
        return replace(row, error=lane.failure.message, error_kind=lane.failure.kind)
    names = ("images_per_s", "first_call_ms", "queued_ms", "upload_ms", "download_ms", "steady")
    return replace(
        row,
        latency=Latency(**seen["latency"]),
        gpu=GpuState(**{**seen["state"], "throttled": tuple(seen["state"]["throttled"])}),
        throttled=tuple(seen["throttled"]),
        **{name: seen[name] for name in names},
    )


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
    result = []
    for row in rows:
        same = [
            other.queued_ms
            for other in rows
            if (other.batch, other.image_size) == (row.batch, row.image_size)
            and other.contender in named
            and other.queued_ms
        ]
        if same and row.queued_ms:
            times = min(same) / row.queued_ms
            row = replace(row, ratio=Ratio(times, times, times, times, times, 1))
        result.append(row)
    words = "the fastest of PyTorch's modes" if named == rivals else reference
    return words if any(row.ratio for row in result) else None, result


def int8_not_worth_it(rows: Sequence[Row], contenders: Sequence[Contender]) -> list[str]:
    """Return a warning for each batch at which no INT8 file is faster than FP16 on this GPU."""
    precisions = {c.name: c.precision for c in contenders if c.runtime != "pytorch"}
    warnings = []
    for batch in sorted({row.batch for row in rows}):
        best = {
            kind: min(
                (
                    row.queued_ms
                    for row in rows
                    if row.batch == batch
                    and row.queued_ms
                    and precisions.get(row.contender) == kind
                ),
                default=None,
            )
            for kind in ("fp16", "int8")
        }
        if best["fp16"] and best["int8"] and best["int8"] >= best["fp16"]:
            warnings.append(
                f"INT8 is not faster than FP16 here at batch {batch} ({best['int8']:.3f} ms "
                f"against {best['fp16']:.3f} ms): deploy FP16 on this GPU"
            )
    return warnings
