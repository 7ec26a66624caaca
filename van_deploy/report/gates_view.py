"""What verify, evaluate, drift and check found, as a person reads it in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from van_deploy.report.tables import Column, checks_table, notes, rows_table, stack, verdict

if TYPE_CHECKING:
    from van_deploy.checks.drift import ArtefactDrift, DriftReport
    from van_deploy.checks.evaluate_report import EvaluateReport
    from van_deploy.checks.regression import CheckReport
    from van_deploy.checks.verdicts import ArtefactVerdict, VerifyReport

__all__ = [
    "bar",
    "check_failure",
    "check_tables",
    "class_label",
    "drift_tables",
    "evaluate_failure",
    "evaluate_tables",
    "number",
    "verify_failure",
    "verify_tables",
]

BAR = 30  # characters
BAR_TOP_DB = 150.0  # an empty bar
MOST_FLIPS, MOST_FAILURES = 10, 12


def verify_tables(report: VerifyReport, names: Sequence[str] | None = None) -> RenderableType:
    """Return the verdict on every artefact, its batches, flips and failures.

    Args:
        report: what was found.
        names: class names for the flips, or None.
    """
    noise = report.noise.comparison
    text = (
        f"PyTorch's own float32 noise on {len(report.names)} images: {noise.sqnr_db:.1f} dB "
        f"(relative error {noise.relative:.1e}). {report.images}."
    )
    ran = [entry for entry in report.artefacts if entry.comparison is not None]
    return stack(
        Text(text),
        _verdicts([entry for entry in report.artefacts if entry.outcome != "skipped"]),
        _skipped(report.artefacts),
        _errors(ran),
        _batches(ran),
        _flips(report, ran, names),
        *(Text(_worst_module(entry)) for entry in ran if entry.modules),
        _failures(report.artefacts),
    )


def _worst_module(entry: ArtefactVerdict) -> str:
    worst, asked = entry.modules[0], entry.limits.module_db if entry.limits else 0.0
    return (
        f"{entry.artefact}, each of {len(entry.modules)} modules by itself: the worst is "
        f"{worst.name} with {worst.added_db:.1f} dB, at least {asked:g} are asked."
    )


def _verdicts(verdicts: Sequence[ArtefactVerdict]) -> RenderableType | None:
    columns: tuple[Column | str, ...] = (
        *("verdict", Column("artefact", wrap=True), "runner"),
        *(Column(header, "right") for header in ("SQNR dB", "asked", "left")),
        *(Column(header, "right") for header in ("top-1", "top-5", "faults")),
    )
    return rows_table(columns, [_verdict_row(entry) for entry in verdicts]) if verdicts else None


def _skipped(verdicts: Sequence[ArtefactVerdict]) -> RenderableType | None:
    """Return what did not run here, each reason once."""
    reasons: dict[str, list[str]] = {}
    for entry in verdicts:
        if entry.outcome == "skipped":
            reasons.setdefault(f"{entry.runner}, {entry.reason}", []).append(entry.artefact)
    lines = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return notes(lines, "SKIPPED") if lines else None


def _verdict_row(entry: ArtefactVerdict) -> list[object]:
    head: list[object] = [verdict(entry.outcome), entry.artefact, entry.runner]
    figures, limits = entry.comparison, entry.limits
    if figures is None or limits is None:
        return [*head, *[None] * 6]
    faults = sum(flip.fault for flip in entry.flips)
    return [
        *head,
        f"{figures.sqnr_db:.1f}",
        f"{limits.sqnr_db:.1f}",
        f"{entry.margin_db:+.1f}",
        f"{100 * figures.top1_agreement:.1f} %",
        f"{100 * figures.top5_agreement:.1f} %",
        f"{faults} of {len(entry.flips)}",
    ]


def _errors(verdicts: Sequence[ArtefactVerdict]) -> RenderableType | None:
    rows = [_error_row(entry) for entry in verdicts]
    right = ("max error", "mean error", "relative", "asked", "cosine", "KL")
    columns = (Column("artefact"), *(Column(head, "right") for head in right))
    return rows_table(columns, rows) if rows else None


def _error_row(entry: ArtefactVerdict) -> list[object]:
    figures, limits = entry.comparison, entry.limits
    if figures is None or limits is None:
        return [entry.artefact, *[None] * 6]
    return [
        entry.artefact,
        f"{figures.max_abs:.1e}",
        f"{figures.mean_abs:.1e}",
        f"{figures.relative:.1e}",
        f"{limits.relative:.1e}",
        f"{figures.cosine:.7f}",
        f"{figures.kl:.1e}",
    ]


def _batches(verdicts: Sequence[ArtefactVerdict]) -> RenderableType | None:
    rows = [
        (
            verdict(not batch.failures),
            entry.artefact,
            batch.batch,
            None if batch.comparison is None else f"{batch.comparison.sqnr_db:.1f}",
            None if batch.comparison is None else f"{batch.comparison.relative:.1e}",
            None if batch.row_relative is None else f"{batch.row_relative:.0e}",
        )
        for entry in verdicts
        for batch in entry.batches
    ]
    right = (Column(header, "right") for header in ("batch", "SQNR dB", "relative", "row alone"))
    return rows_table(("verdict", "artefact", *right), rows) if rows else None


def _flips(
    report: VerifyReport, verdicts: Sequence[ArtefactVerdict], names: Sequence[str] | None
) -> RenderableType | None:
    rows = [
        (
            verdict("FAIL") if flip.fault else Text("noise"),
            entry.artefact,
            report.names[flip.image],
            class_label(flip.expected, names),
            class_label(flip.found, names),
            f"{flip.margin:.1e}",
        )
        for entry in verdicts
        for flip in entry.flips[:MOST_FLIPS]
    ]
    columns = ("flip", "artefact", Column("image", wrap=True), "PyTorch", "artefact's")
    margin = Column("margin (RMS logits)", "right")
    return rows_table((*columns, margin), rows, "Changed predictions") if rows else None


def _failures(verdicts: Sequence[ArtefactVerdict]) -> RenderableType | None:
    lines = []
    for entry in verdicts:
        lines += [f"{entry.artefact}: {text}" for text in entry.failures[:MOST_FAILURES]]
        if len(entry.failures) > MOST_FAILURES:
            lines.append(f"{entry.artefact}: and {len(entry.failures) - MOST_FAILURES} more")
    return notes(lines, "FAIL") if lines else None


def evaluate_tables(report: EvaluateReport) -> RenderableType:
    """Return accuracy, drift, what flipped into what, and the images left out."""
    images = report.accuracies["pytorch"].images
    speed = f", {images / report.seconds:.0f} images a second" if not report.resumed else ""
    lines = [Text(f"{report.images} ({report.seconds:.1f} s{speed}).")]
    if report.resumed:
        lines.append(Text(f"{report.resumed} answers were in the journal already."))
    return stack(
        *lines,
        _accuracy(report),
        _drift(report),
        _not_evaluated(report),
        _confusions(report),
        _classes(report),
        _left_out(report),
    )


def _accuracy(report: EvaluateReport) -> RenderableType:
    columns = ("network", "runner")
    right = ("top-1", "95 % interval", "top-5", "95 % interval", "ECE")
    rows = [
        (
            name,
            report.runners[name],
            f"{100 * a.top1:.2f} %",
            _interval(a.top1_interval),
            f"{100 * a.top5:.2f} %",
            _interval(a.top5_interval),
            f"{100 * a.ece:.2f} %",
        )
        for name, a in report.accuracies.items()
    ]
    return rows_table((*columns, *(Column(header, "right") for header in right)), rows)


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


def _drift(report: EvaluateReport) -> RenderableType:
    right = ("top-1 points", "95 % interval", "lost", "won", "McNemar p", "same top-1", "allowed")
    rows: list[tuple[object, ...]] = [
        (
            verdict(drift.passed),
            name,
            f"{100 * drift.change:+.2f}",
            _interval(drift.interval),
            drift.lost,
            drift.won,
            f"{drift.p_value:.2g}",
            f"{100 * drift.agreement:.2f} %",
            f"-{drift.top1_drop_allowed:g}",
        )
        for name, drift in report.drifts.items()
    ]
    columns = (Column("verdict"), Column("artefact"), *(Column(head, "right") for head in right))
    unsettled = [f"{name}: {drift.note}" for name, drift in report.drifts.items() if drift.note]
    return stack(
        rows_table(columns, rows, "Against PyTorch"),
        notes(unsettled, "NOTE") if unsettled else None,
    )


def _not_evaluated(report: EvaluateReport) -> RenderableType | None:
    lines = [f"{entry.artefact}: {entry.reason}" for entry in report.skipped]
    return notes(lines, "SKIPPED") if lines else None


def _confusions(report: EvaluateReport) -> RenderableType | None:
    rows = [
        (name, class_label(old, report.class_names), class_label(new, report.class_names), count)
        for name, drift in report.drifts.items()
        for old, new, count in drift.confusions[:MOST_FLIPS]
    ]
    columns = ("artefact", "PyTorch said", "artefact says", Column("images", "right"))
    return rows_table(columns, rows, "What flipped into what") if rows else None


def _classes(report: EvaluateReport) -> RenderableType | None:
    rows = [
        (name, class_label(c.label, report.class_names), c.images, c.before, c.after)
        for name, drift in report.drifts.items()
        for c in drift.classes[:MOST_FLIPS]
    ]
    right = (Column(header, "right") for header in ("images", "right before", "right after"))
    return rows_table(("artefact", "class", *right), rows, "Classes that changed") if rows else None


def _left_out(report: EvaluateReport) -> RenderableType | None:
    if not report.unreadable:
        return None
    lines = [reason for _, reason in report.unreadable[:MOST_FAILURES]]
    more = len(report.unreadable) - len(lines)
    head = f"{len(report.unreadable)} images could not be read and were left out."
    return notes([head, *lines, *([f"and {more} more"] if more else [])])


def drift_tables(report: DriftReport, top: int) -> RenderableType:
    """Return the chain, and for each artefact the parts that add most error, with bars.

    Args:
        report: what was measured.
        top: parts shown of each artefact; 0 for all, in the network's order.
    """
    chain = [
        {
            "name": step.name,
            "outcome": None if step.sqnr_db is None else "measured",
            "detail": _chain_text(step.sqnr_db, step.reason),
        }
        for step in report.chain
    ]
    from van_deploy.checks.drift import FUSION_NOTE

    tables = [_parts(entry, report.level, top) for entry in report.artefacts]
    text = f"{report.count} images: {report.images}."
    title = "The chain: logits against the original network in float64"
    return stack(Text(text), checks_table(chain, title), *tables, notes([FUSION_NOTE], "NOTE"))


def _chain_text(sqnr_db: float | None, reason: str) -> str:
    if sqnr_db is None:
        return reason
    return f"{sqnr_db:.1f} dB" + (f" ({reason})" if reason else "")


def _parts(entry: ArtefactDrift, level: str, top: int) -> RenderableType:
    rows = entry.worst[:top] if top else list(entry.rows)
    columns = (
        level,
        Column("added error", "right"),
        Column("adds dB", "right"),
        "",
        Column("so far dB", "right"),
        Column("note", wrap=True),
    )
    cells = [
        (
            row.name,
            None if row.added_relative is None else f"{row.added_relative:.1e}",
            None if row.added_db is None else f"{row.added_db:.1f}",
            bar(row.added_db),
            None if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            "; ".join(filter(None, (row.fault, row.note))),
        )
        for row in rows
    ]
    which = f"the {len(rows)} that add most error" if top else "in order"
    return rows_table(columns, cells, f"{entry.artefact}: {level}s, {which}")


def bar(added_db: float | None) -> str:
    """Return a bar that is longer the more error is added: 0 dB fills it.

    >>> len(bar(0.0)), len(bar(75.0)), bar(None)
    (30, 15, '')
    """
    if added_db is None:
        return ""
    share = 1.0 if added_db == -math.inf else (BAR_TOP_DB - added_db) / BAR_TOP_DB
    return "█" * round(BAR * min(max(share, 0.0), 1.0))


def check_tables(report: CheckReport) -> RenderableType:
    """Return the gates, what failed, what was skipped, and the counts."""
    rows = list(_check_rows(report))
    columns = (
        "verdict",
        "row",
        Column("baseline", "right"),
        Column("now", "right"),
        Column("message", wrap=True),
    )
    counts = {o: len(report.having(o)) for o in ("passed", "failed", "skipped", "new")}
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return stack(rows_table(columns, rows), Text(f"{len(report.rows)} rows: {text}."))


def _check_rows(report: CheckReport) -> Iterator[list[object]]:
    for row in report.rows:
        if row.outcome in {"failed", "skipped"} or row.name.startswith("gate/"):
            yield [
                verdict(row.outcome),
                row.name,
                number(row.baseline),
                number(row.now),
                row.message,
            ]


def number(value: float | None) -> str | None:
    """Return a figure as rows show it."""
    return None if value is None else f"{value:.4g}"


def class_label(index: int, names: Sequence[str] | None) -> str:
    """Return a class as people call it.

    >>> class_label(3, None), class_label(0, ["tench, Tinca tinca"]), class_label(-1, None)
    ('3', 'tench', 'NaN')
    """
    if index < 0:
        return "NaN"
    return names[index].split(",")[0] if names and index < len(names) else str(index)


def verify_failure(report: VerifyReport) -> str:
    """Return why a verification did not pass, a sentence."""
    if not report.failed:
        return "No artefact could be run on this machine, so nothing was verified."
    names = ", ".join(f"'{verdict.artefact}'" for verdict in report.failed)
    return f"{len(report.failed)} of {len(report.artefacts)} artefacts failed: {names}."


def evaluate_failure(report: EvaluateReport) -> str:
    """Return why an evaluation did not pass, a sentence."""
    if not report.failed:
        return "No artefact could be run on this machine, so nothing was evaluated."
    names = ", ".join(f"'{name}'" for name in report.failed)
    return f"More accuracy was lost than allowed: {names}."


def check_failure(report: CheckReport) -> str:
    """Return why a check did not pass, a sentence."""
    failed, skipped = report.having("failed"), report.having("skipped")
    if failed:
        noun = "row" if len(failed) == 1 else "rows"
        shown = ", ".join(row.name for row in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        return f"{len(failed)} {noun} failed: {shown}{more}."
    if skipped:
        noun = "row" if len(skipped) == 1 else "rows"
        return (
            f"{len(skipped)} {noun} could not be checked on this machine "
            f"({skipped[0].name}: {skipped[0].message}); --allow-skip would let that pass."
        )
    return "Nothing was checked."
