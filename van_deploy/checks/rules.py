"""The rules of a gate applied: to logits, to a batch, to what was lost. Pure functions.

The limits themselves are in :mod:`van_deploy.checks.gates`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from van_deploy.checks import gates
from van_deploy.checks.gates import Finding, Limit, Outcome, held
from van_deploy.intervals import Interval, mcnemar_exact, tango_interval
from van_deploy.metrics import Array, Flip, Task, find_flips, sqnr_db, worst_row_sqnr_db

MOST_IMAGES = 10**8  # beyond this a number of images is no advice

# --- logits --------------------------------------------------------------------------------


def judge_logits(
    expected: Array,
    found: Array,
    floor: Limit,
    *,
    recorded_db: float | None = None,
    task: Task = Task.SINGLE_LABEL,
    where: str = "",
) -> tuple[list[Finding], list[Flip]]:
    """Return the findings on logits ``(N, K)``, and every label flip, the widest margin first.

    Args:
        expected: PyTorch's, float64.
        found: the artifact's for the same images.
        floor: from :func:`sqnr_floor`.
        recorded_db: SQNR of the same artifact on the same samples in the same runtime, provider
            and numeric class when it was made; None where there is no such record.
        task: how logits become labels.
        where: put before the messages, such as ``batch 8: ``.
    """
    if found.shape != expected.shape:
        message = f"the output has shape {found.shape} where PyTorch's has {expected.shape}"
        return [held("shape", where + message)], []
    margin = gates.flip_margin(floor.value, task)
    flips = find_flips(expected, found, task, margin)
    findings = [
        at_least("SQNR", sqnr_db(expected, found), floor, where=where),
        at_least(
            "worst image",
            worst_row_sqnr_db(expected, found),
            Limit(
                floor.value - gates.WORST_ROW_DB,
                f"{gates.WORST_ROW_DB:g} dB below the SQNR's limit",
            ),
            where=where,
        ),
        _explained(flips, Limit(margin, f"noise at {floor.value:.1f} dB"), where),
    ]
    if recorded_db is not None:
        origin = f"{recorded_db:.1f} dB recorded when it was made, minus {gates.BELOW_RECORD_DB:g}"
        limit = Limit(min(recorded_db, gates.ROUNDOFF_DB) - gates.BELOW_RECORD_DB, origin)
        findings.insert(1, at_least("SQNR, record", sqnr_db(expected, found), limit, where=where))
    return findings, flips


def at_least(rule: str, value: float, limit: Limit, unit: str = "dB", where: str = "") -> Finding:
    """Return whether ``value`` is at least the limit; NaN is not."""
    said = f"{where}{rule} {value:.1f} {unit} is below {limit.value:.1f} {unit} ({limit.origin})"
    return held(rule, "" if value >= limit.value else said, value, limit, unit)


def _explained(flips: Sequence[Flip], limit: Limit, where: str = "") -> Finding:
    """Return whether noise explains every label flip, the widest margin first."""
    faults = [flip for flip in flips if flip.fault]
    told = faults or flips
    count, widest = len(told), told[0].margin if told else 0.0
    said = f"{where}{count} label flip{'s' * (count != 1)}"
    fault = (
        f"{said} where PyTorch's margin is up to {widest:.2g} RMS logits; {limit.origin} "
        f"explains {limit.value:.2g}"
    )
    shown = f"{said}, within what the allowed noise explains" * bool(flips)
    return held("label flips", fault * bool(faults), widest, limit, "RMS logits", shown)


def judge_invariance(alone: Array, together: Array, floor: Limit, batch: int) -> Finding:
    """Return whether each image comes out of a batch as it does alone, both ``(N, K)``.

    The limit is the class's floor, or :data:`BATCH_INVARIANCE_DB` where that asks for more.
    """
    limit = max(
        floor, Limit(gates.BATCH_INVARIANCE_DB, "floor for any class"), key=lambda each: each.value
    )
    value = worst_row_sqnr_db(alone, together)
    return at_least("batch invariance", value, limit, where=f"batch {batch}: ")


# --- accuracy ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What an artifact lost against PyTorch on the same images, in points (percent).

    Attributes:
        images: both answered.
        loss: of top-1 or of another share; negative where the artifact is better.
        interval: its 95 % interval.
        lost: images only PyTorch gets right; None where that is not what is counted.
        won: images only the artifact gets right; likewise.
        p_value: McNemar's exact test; reported, and no gate.
    """

    images: int
    loss: float
    interval: Interval
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None


def paired_loss(lost: int, won: int, images: int) -> Loss:
    """Return the loss with Tango's score interval; without images everything is possible."""
    low, high = tango_interval(lost, won, images)
    loss = 100 * (lost - won) / images if images else math.nan
    return Loss(images, loss, (100 * low, 100 * high), lost, won, mcnemar_exact(lost, won))


def judge_loss(
    loss: Loss,
    allowed: Limit,
    what: str = "top-1",
    undecided: Outcome = Outcome.INCONCLUSIVE,
) -> Finding:
    """Return whether a lossy artifact is shown to lose no more than is allowed.

    Non-inferiority: PASS if the interval's upper end is within the allowed loss, FAIL if its
    lower end is beyond, else ``undecided``.
    """
    low, high = loss.interval
    said = f"{low:+.2f} to {high:+.2f} pp of {what} lost on {loss.images} images"
    said = f"{said}, {allowed.value:g} allowed ({allowed.origin})"
    outcome = undecided
    if high <= allowed.value:
        outcome = Outcome.PASS
    elif low > allowed.value:
        outcome = Outcome.FAIL
    if outcome is Outcome.INCONCLUSIVE:
        needed = images_to_decide(loss, allowed.value)
        said += (
            f"; {f'about {needed} images' if needed else 'no number of images'} would decide at "
            "this rate of label flips: give more images, allow a larger top1_loss in the recipe, "
            "or pass --allow-inconclusive"
        )
    return Finding(f"Δ{what}", outcome, said, loss.loss, allowed, "pp")


def judge_numbers(
    loss: Loss,
    allowed: Limit,
    sqnr: float,
    floor: Limit,
    flips: Sequence[Flip],
    task: Task = Task.SINGLE_LABEL,
    what: str = "top-1",
) -> list[Finding]:
    """Return whether a near-lossless artifact's numbers hold on the evaluation set.

    The logits must hold the floor, no label may flip beyond what noise *at the floor* explains
    (any flip is explained by an artifact's own error), and the loss must not be shown to exceed
    what is allowed.

    Args:
        loss: on the evaluation set.
        allowed: from :func:`allowed_loss`.
        sqnr: of the logits on the evaluation set, in dB.
        floor: from :func:`sqnr_floor`.
        flips: of the evaluation set, from :func:`van_deploy.metrics.find_flips`.
        task: how logits become labels.
        what: the share that was lost.
    """
    margin = Limit(gates.flip_margin(floor.value, task), f"noise at {floor.value:.1f} dB")
    return [
        at_least("SQNR", sqnr, floor),
        _explained(flips, margin),
        judge_loss(loss, allowed, what, undecided=Outcome.PASS),
    ]


def images_to_decide(loss: Loss, allowed: float) -> int | None:
    """Return how many images would decide if labels went on flipping at the same rate.

    None where no number would: the loss is the allowed one, or no pairs were counted.
    """
    lost, won = loss.lost, loss.won
    if not loss.images or lost is None or won is None:
        return None

    def decides(images: int) -> bool:
        share = images / loss.images
        low, high = tango_interval(lost * share, won * share, images)
        return 100 * high <= allowed or 100 * low > allowed

    tried = range(loss.images, MOST_IMAGES)
    place = bisect_left(tried, True, key=decides)
    return tried[place] if place < len(tried) else None
