"""What verify, evaluate, drift and check found, as a person reads it in a terminal.

Failures and one row an artefact; the full grid is in the JSON document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from van_deploy.report.tables import Column, checks_table, notes, rows_table, stack, verdict

if TYPE_CHECKING:
    from van_deploy.checks.drift import ArtefactDrift, DriftReport
    from van_deploy.checks.evaluate_report import EvaluateReport
    from van_deploy.checks.gates import Allowed, Finding
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


# --- verify ------------------------------------------------------------------------------------


def verify_tables(report: VerifyReport, names: Sequence[str] | None = None) -> RenderableType:
    """Return the verdict on every artefact, where its limit came from, flips and failures.

    Args:
        report: what was found.
        names: class names for the flips, or None.
    """
    text = (
        f"{report.images}. Compared with {report.against}; PyTorch's own float32 noise is "
        f"{report.noise_db:.1f} dB."
    )
    ran = [entry for entry in report.artefacts.values() if entry.outcome.value != "skipped"]
    columns: tuple[Column | str, ...] = (
        *("verdict", Column("artefact", wrap=True), "runner", "class"),
        *(Column(header, "right") for header in ("SQNR dB ↑", "limit", "margin")),
        *(Column(header, "right") for header in ("flips", "batch invariance dB ↑")),
    )
    limits = [
        f"{entry.artefact}: {entry.limit.value:.1f} dB, {entry.limit.origin}"
        for entry in ran
        if entry.limit is not None
    ]
    return stack(
        Text(text),
        rows_table(columns, [_verdict_row(entry) for entry in ran]) if ran else None,
        notes(limits, "limit") if limits else None,
        _skips((v.artefact, f) for v in report.artefacts.values() for f in v.findings),
        _flips(report, ran, names),
        *(Text(_worst_module(entry)) for entry in ran if entry.modules),
        _messages([("images", f) for f in report.findings], "fail"),
        _messages(((v.artefact, f) for v in report.artefacts.values() for f in v.findings), "fail"),
    )


def _verdict_row(entry: ArtefactVerdict) -> list[object]:
    head = [verdict(entry.outcome.value), entry.artefact, entry.runner, entry.numeric]
    figures, limit, margin = entry.comparison, entry.limit, entry.margin_db
    if figures is None or limit is None or margin is None:
        return [*head, *[None] * 5]
    same = [row.invariance_db for row in entry.batches if row.invariance_db is not None]
    return [
        *head,
        f"{figures.sqnr_db:.1f}",
        f"{limit.value:.1f}",
        f"{margin:+.1f}",
        f"{len(entry.flips)}",
        f"{min(same):.1f}" if same else None,
    ]


def _worst_module(entry: ArtefactVerdict) -> str:
    worst = entry.modules[0]
    limit = next((f.limit for f in entry.findings if f.rule == "modules" and f.limit), None)
    asked = f", limit {limit.value:g} ({limit.origin})" if limit else ""
    return (
        f"{entry.artefact}, each of {len(entry.modules)} modules by itself: the worst is "
        f"{worst.name} with {worst.isolated_db:.1f} dB{asked}."
    )


def _flips(
    report: VerifyReport, verdicts: Sequence[ArtefactVerdict], names: Sequence[str] | None
) -> RenderableType | None:
    rows = [
        (
            verdict("FAIL") if flip.fault else Text("explained"),
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
    return rows_table((*columns, margin), rows, "Label flips") if rows else None


# --- findings ----------------------------------------------------------------------------------


def _skips(found: Iterable[tuple[str, Finding]]) -> RenderableType | None:
    """Return what was not run, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, finding in found:
        if finding.outcome.value == "skipped":
            reasons.setdefault(f"{finding.message}{_remedy(finding)}", []).append(name)
    lines = [f"{', '.join(dict.fromkeys(who))}: {reason}" for reason, who in reasons.items()]
    return notes(lines, "SKIPPED") if lines else None


def _remedy(finding: Finding) -> str:
    return f" (--allow-skip {finding.skip} lets that pass)" if finding.skip else ""


def _messages(found: Iterable[tuple[str, Finding]], outcome: str) -> RenderableType | None:
    """Return the messages of the findings with that outcome, grouped by what they are about."""
    by_name: dict[str, list[str]] = {}
    for name, finding in found:
        if finding.outcome.value == outcome:
            by_name.setdefault(name, []).append(finding.message)
    lines = []
    for name, messages in by_name.items():
        lines += [f"{name}: {text}" for text in messages[:MOST_FAILURES]]
        if len(messages) > MOST_FAILURES:
            lines.append(f"{name}: and {len(messages) - MOST_FAILURES} more")
    return notes(lines, outcome) if lines else None


def _blocking(found: Sequence[tuple[str, Finding]], allowed: Allowed, nothing: str) -> str:
    """Return why findings do not pass, a sentence.

    Args:
        found: what each is about, and the finding.
        allowed: what the user lets pass.
        nothing: what to say where nothing was shown at all.
    """
    failed = list(dict.fromkeys(name for name, f in found if f.outcome.value == "fail"))
    if failed:
        shown = ", ".join(f"'{name}'" for name in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        return f"Failed: {shown}{more}."
    rest = [(name, f) for name, f in found if not allowed.holds(f)]
    undecided = list(dict.fromkeys(n for n, f in rest if f.outcome.value == "inconclusive"))
    if undecided:
        shown = ", ".join(f"'{name}'" for name in undecided)
        return f"The data cannot decide: {shown}; --allow-inconclusive would let that pass."
    if rest and any(f.outcome.value == "pass" for _, f in found):
        name, finding = rest[0]
        more = f", and {len(rest) - 1} more," if len(rest) > 1 else ""
        remedy = f"; --allow-skip {finding.skip} would let that pass" if finding.skip else ""
        return f"'{name}'{more} was not checked ({finding.message}){remedy}."
    return nothing


def verify_failure(report: VerifyReport) -> str:
    """Return why a verification did not pass, a sentence."""
    found = [("images", finding) for finding in report.findings]
    found += [(v.artefact, f) for v in report.artefacts.values() for f in v.findings]
    return _blocking(
        found,
        report.allowed,
        "No artefact could be run on this machine, so nothing was verified.",
    )


def evaluate_failure(report: EvaluateReport) -> str:
    """Return why an evaluation did not pass, a sentence."""
    return _blocking(
        _evaluated(report),
        report.allowed,
        "No artefact could be run on this machine, so nothing was evaluated.",
    )


def check_failure(report: CheckReport) -> str:
    """Return why a check did not pass, a sentence."""
    found = [(row.name, row.finding) for row in report.rows]
    return _blocking(found, report.allowed, "Nothing was checked.")


def _evaluated(report: EvaluateReport) -> list[tuple[str, Finding]]:
    from van_deploy.checks.gates import skipped

    found = [(name, f) for name, loss in report.losses.items() for f in loss.findings]
    return found + [(e.artefact, skipped("runs", e.reason, e.kind)) for e in report.skipped]


# --- evaluate ----------------------------------------------------------------------------------


def evaluate_tables(report: EvaluateReport) -> RenderableType:
    """Return accuracy, what was lost, what flipped into what, and the images left out."""
    rate = report.count / report.seconds if report.seconds else math.nan
    text = f"{report.images} ({report.seconds:.1f} s, {rate:.0f} images a second)."
    found = _evaluated(report)
    return stack(
        Text(text),
        _accuracy(report),
        _losses(report),
        _skips(found),
        _messages(found, "inconclusive"),
        _messages(found, "fail"),
        _confusions(report),
        _classes(report),
        _left_out(report),
    )


def _accuracy(report: EvaluateReport) -> RenderableType:
    metric = report.accuracies["pytorch"].metric
    right = (f"{metric} %", "95 %", "top-5 %", "95 %", "ECE %")
    rows = [
        (
            name,
            report.runners[name],
            f"{100 * a.top1:.2f}",
            _interval(a.top1_interval),
            None if a.top5 is None else f"{100 * a.top5:.2f}",
            None if a.top5_interval is None else _interval(a.top5_interval),
            None if a.ece is None else f"{100 * a.ece:.2f}",
        )
        for name, a in report.accuracies.items()
    ]
    columns: tuple[Column | str, ...] = (
        "network",
        "runner",
        *(Column(header, "right") for header in right),
    )
    return rows_table(columns, rows)


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


def _losses(report: EvaluateReport) -> RenderableType:
    right = ("lost pp (95 %)", "allowed", "lost/won", "p", "flips", "SQNR dB ↑")
    rows = []
    for name, entry in report.losses.items():
        loss, last = entry.loss, entry.findings[-1]
        rows.append(
            (
                verdict(entry.outcome.value),
                name,
                f"{loss.loss:+.2f} ({loss.interval[0]:+.2f} to {loss.interval[1]:+.2f})",
                None if last.limit is None else f"{last.limit.value:g}",
                None if loss.lost is None else f"{loss.lost}/{loss.won}",
                None if loss.p_value is None else f"{loss.p_value:.2g}",
                entry.flips,
                f"{entry.sqnr_db:.1f}",
            )
        )
    numbers = (Column(head, "right") for head in right)
    columns: tuple[Column | str, ...] = ("verdict", "artefact", *numbers)
    return rows_table(columns, rows, "Against PyTorch (p is McNemar's, and no gate)")


def _confusions(report: EvaluateReport) -> RenderableType | None:
    rows = [
        (name, class_label(old, report.class_names), class_label(new, report.class_names), count)
        for name, loss in report.losses.items()
        for old, new, count in loss.confusions[:MOST_FLIPS]
    ]
    columns = ("artefact", "PyTorch said", "artefact says", Column("images", "right"))
    return rows_table(columns, rows, "What flipped into what") if rows else None


def _classes(report: EvaluateReport) -> RenderableType | None:
    rows = [
        (name, class_label(c.label, report.class_names), c.images, c.before, c.after)
        for name, loss in report.losses.items()
        for c in loss.classes[:MOST_FLIPS]
    ]
    right = (Column(header, "right") for header in ("images", "right before", "right after"))
    return rows_table(("artefact", "class", *right), rows, "Classes that changed") if rows else None


def _left_out(report: EvaluateReport) -> RenderableType | None:
    if not report.unreadable:
        return None
    lines = [reason for _, reason in report.unreadable[:MOST_FAILURES]]
    more = len(report.unreadable) - len(lines)
    noun = "image" if len(report.unreadable) == 1 else "images"
    head = f"{len(report.unreadable)} {noun} could not be read and were left out."
    return notes([head, *lines, *([f"and {more} more"] if more else [])])


# --- drift -------------------------------------------------------------------------------------


def drift_tables(report: DriftReport, top: int) -> RenderableType:
    """Return the chain, and for each artefact the parts that add most error, with bars.

    Args:
        report: what was measured.
        top: parts shown of each artefact; 0 for all, in the network's order.
    """
    from van_deploy.checks.drift import FUSION_NOTE

    chain = [
        {
            "name": link.name,
            "outcome": None if link.sqnr_db is None else "measured",
            "detail": _chain_text(link.sqnr_db, link.reason),
        }
        for link in report.chain
    ]
    tables = [_parts(entry, report.level, top) for entry in report.artefacts.values()]
    text = f"{report.images}. Parts are compared with {report.reference}."
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
        Column("isolated SQNR dB ↑", "right"),
        "",
        Column("SQNR so far dB ↑", "right"),
        Column("note", wrap=True),
    )
    cells = [
        (
            row.name,
            None if row.isolated_db is None else f"{row.isolated_db:.1f}",
            bar(row.isolated_db),
            None if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            "; ".join(filter(None, (row.fault, row.note))),
        )
        for row in rows
    ]
    which = f"the {len(rows)} that add most error" if top else "in order"
    return rows_table(columns, cells, f"{entry.artefact}: {level}s, {which}")


def bar(isolated_db: float | None) -> str:
    """Return a bar that is longer the more error is added: 0 dB fills it.

    >>> len(bar(0.0)), len(bar(75.0)), bar(None)
    (30, 15, '')
    """
    if isolated_db is None:
        return ""
    share = 1.0 if isolated_db == -math.inf else (BAR_TOP_DB - isolated_db) / BAR_TOP_DB
    return "█" * round(BAR * min(max(share, 0.0), 1.0))


# --- check -------------------------------------------------------------------------------------


def check_tables(report: CheckReport) -> RenderableType:
    """Return the gates, what failed or is undecided, the skips grouped, and the counts."""
    columns = (
        "verdict",
        "row",
        Column("baseline", "right"),
        Column("now", "right"),
        Column("limit", "right"),
        Column("message", wrap=True),
    )
    from van_deploy.checks.gates import Outcome

    counts = ", ".join(f"{len(report.having(o))} {o.value}" for o in Outcome)
    new = f"Not in the baseline: {', '.join(report.new)}." if report.new else ""
    return stack(
        rows_table(columns, list(_check_rows(report))),
        _skips((row.name, row.finding) for row in report.rows),
        Text(f"{len(report.rows)} rows: {counts}. {new}".rstrip()),
    )


def _check_rows(report: CheckReport) -> Iterator[list[object]]:
    for row in report.rows:
        found = row.finding
        quiet = found.outcome.value == "pass" and not row.name.startswith("gate/")
        if quiet or found.outcome.value == "skipped":
            continue
        limit = None if found.limit is None else found.limit.value
        message = found.message if found.outcome.value != "pass" else ""
        yield [
            verdict(found.outcome.value),
            row.name,
            number(row.baseline),
            number(found.value),
            number(limit),
            message,
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
