"""What verify, evaluate, drift and check found, as blocks.

Failures and one row an artifact come first; ``full`` adds every rule that was applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from van_deploy.report.document import Block, Entry, Paragraph, Plot, inner, notices, table
from van_deploy.report.figures import state_of
from van_deploy.report.plots import Axis, Mark, Series, colours, rows_chart, xy_chart

if TYPE_CHECKING:
    from van_deploy.checks.gates import Allowed, Finding

MOST_FLIPS, MOST_FAILURES, MOST_NAMED = 10, 12, 5
BAR, BAR_TOP_DB = 24, 150.0  # characters, and the level of an empty bar
LOUDEST_DB = 200.0
"""Where a plot ends: past it two results are equal to the last bit that float64 holds."""

HEAD = "verdict = outcome state; artifact = about name; "
BATCHES = "batch = batch d; SQNR dB ↑ = sqnr_db .1f; batch invariance dB ↑ = invariance_db .1f"
"""Columns of a result a batch size."""


def verify_blocks(
    entry: Entry, names: Sequence[str] | None = None, *, full: bool = False
) -> list[Block]:
    """Return the verdict on every artifact, where its limit came from, flips and failures.

    Args:
        entry: the ``verify`` document.
        names: class names for the flips, or None.
        full: every rule and every batch size as well.
    """
    verdicts = [{**verdict, "about": name} for name, verdict in entry["artefacts"].items()]
    ran = [_verdict(verdict) for verdict in verdicts if verdict["outcome"] != "skipped"]
    found = [{"about": "images", **finding} for finding in entry["findings"]]
    found += inner(verdicts, "findings")
    flips = []
    for flip in inner(ran, "flips", MOST_FLIPS):
        state, image = "FAIL" if flip["fault"] else "explained", entry["names"][flip["image"]]
        was, now = (_class(flip[key], names) for key in ("expected", "found"))
        flips.append((state, flip["about"], image, was, now, flip["margin"]))
    limits = (
        f"{v['about']} (class {v['numeric']}): {v['limit']['value']:.1f} dB, {v['limit']['origin']}"
        for v in ran
        if v["limit"]
    )
    noise = f"PyTorch's own float32 noise is {float(entry['noise_db']):.1f} dB."
    blocks: list[Block] = [
        Paragraph(f"{entry['images']}. Compared with {entry['against']}; {noise}"),
        *table(
            ran,
            f"{HEAD}runner = runner name; SQNR dB ↑ = comparison.sqnr_db .1f; "
            "limit dB = limit.value .1f; margin dB = margin_db +.1f; label flips = flipped d; "
            "batch invariance dB ↑ = invariance .1f",
        ),
        *notices("LIMIT", limits),
        *_skips(found),
        *table(
            flips,
            "flip = 0 state; artifact = 1 name; image = 2; PyTorch = 3; artifact's = 4; "
            "margin (RMS logits) = 5 .1e",
            "Label flips",
        ),
        *table(
            inner(ran, "worst"),
            "artifact = about name; module = name; isolated SQNR dB ↑ = isolated_db .1f; "
            "limit dB = least.value .1f",
            "The module that adds most error by itself",
        ),
        *_messages(found, "fail"),
    ]
    return blocks + _every_rule(found, ran) * full


def _verdict(verdict: Entry) -> dict[str, Any]:
    """Return a verdict with its label flips counted, its least invariance and its worst module."""
    same = [float(b["invariance_db"]) for b in verdict["batches"] if b["invariance_db"] is not None]
    flipped = len(verdict["flips"]) if verdict["comparison"] else None
    held_to = [f["limit"] for f in verdict["findings"] if f["rule"] == "modules"]
    worst = [
        {**module, "about": verdict["about"], "least": next(filter(None, held_to), None)}
        for module in verdict["worst_modules"][:1]
    ]
    least = min(same, default=None)
    return {**verdict, "flipped": flipped, "invariance": least, "worst": worst}


def _every_rule(found: Sequence[Entry], ran: Sequence[Entry]) -> list[Block]:
    shown = [{**f, "said": f["message"] or (f["limit"] or {}).get("origin", "")} for f in found]
    rules = (
        "rule = rule; measured = value .4g; limit = limit.value .4g; unit = unit name; "
        "what was shown = said"
    )
    return [
        *table(shown, HEAD + rules, "Every rule", folded=True),
        *table(inner(ran, "batches"), HEAD + BATCHES, "Every batch size", folded=True),
    ]


# --- evaluate ----------------------------------------------------------------------------------


def evaluate_blocks(entry: Entry) -> list[Block]:
    """Return accuracy, what was lost, what flipped into what, and the images left out."""
    names, seconds = entry["class_names"], float(entry["seconds"])
    rate = entry["count"] / seconds if seconds else math.nan
    accuracies = [
        {"about": name, "runner": entry["runners"][name], **accuracy}
        for name, accuracy in entry["accuracy"].items()
    ]
    metric = accuracies[0]["metric"] if accuracies else "top-1"
    losses = [_loss(name, loss) for name, loss in entry["losses"].items()]
    found = inner(losses, "findings")
    flipped = [
        (loss["about"], _class(old, names), _class(new, names), count)
        for loss in losses
        for old, new, count in loss["confusions"][:MOST_FLIPS]
    ]
    changed = [
        {**c, "name": _class(c["label"], names)} for c in inner(losses, "classes", MOST_FLIPS)
    ]
    return [
        Paragraph(f"{entry['images']} ({seconds:.1f} s, {rate:.0f} images a second)."),
        *table(
            accuracies,
            f"network = about name; runner = runner name; {metric} % = top1 percent; "
            f"{metric}, 95 % = top1_interval percents; top-5 % = top5 percent; "
            "top-5, 95 % = top5_interval percents; ECE % = ece percent",
        ),
        *table(
            losses,
            f"{HEAD}lost pp = loss.loss +.2f; 95 % pp = loss.interval points; "
            "allowed pp = allowed g; lost/won = pairs number; p = loss.p_value .2g; "
            "label flips = flips d; SQNR dB ↑ = sqnr_db .1f",
            "Against PyTorch (p is McNemar's, and no gate)",
        ),
        *_losses_plot(losses, metric),
        *_skips({"about": s["artefact"], "skip": s["kind"], **s} for s in entry["skipped"]),
        *_messages(found, "inconclusive"),
        *_messages(found, "fail"),
        *table(
            flipped,
            "artifact = 0 name; PyTorch said = 1; artifact says = 2; images = 3 d",
            "What flipped into what",
            folded=True,
        ),
        *table(
            changed,
            "artifact = about name; class = name; images = images d; right before = before d; "
            "right after = after d",
            "Classes that changed",
            folded=True,
        ),
        *_left_out([reason for _, reason in entry["unreadable"]]),
    ]


def _loss(name: str, entry: Entry) -> dict[str, Any]:
    """Return a loss with the loss that is allowed and how many images changed each way."""
    loss, limit = entry["loss"], entry["findings"][-1]["limit"]
    pairs = None if loss["lost"] is None else f"{loss['lost']}/{loss['won']}"
    allowed = None if limit is None else float(limit["value"])
    return {**entry, "about": name, "allowed": allowed, "pairs": pairs}


def _losses_plot(losses: Sequence[Entry], metric: str) -> list[Block]:
    """Return every artifact's loss on its interval, and the loss that it is allowed."""
    colour = colours(loss["about"] for loss in losses)
    marks = []
    for loss in losses:
        name, lost, (low, high) = loss["about"], loss["loss"]["loss"], loss["loss"]["interval"]
        text = f"{lost:+.2f} pp  {state_of(loss['outcome'])}"
        marks.append(Mark(name, lost, 0.0, text, colour[name], low, high, loss["allowed"]))
    svg = rows_chart(marks, Axis(f"{metric} lost against PyTorch (pp)"), dots=True)
    words = "Loss with its 95 % interval; the dashed line is the loss that the artifact is allowed."
    return [Plot(svg, words)] if marks else []


def _left_out(reasons: Sequence[str]) -> Sequence[Block]:
    noun = "image" if len(reasons) == 1 else "images"
    lines = [f"{len(reasons)} {noun} could not be read and were left out.", *_most(reasons)]
    return notices("WARNING", lines) if reasons else []


# --- drift -------------------------------------------------------------------------------------


def drift_blocks(entry: Entry, top: int) -> list[Block]:
    """Return the chain, and for each artifact the parts that add most error.

    Args:
        entry: the ``drift`` document.
        top: parts shown of each artifact; 0 for all, in the network's order.
    """
    level = entry["level"]
    blocks: list[Block] = [
        Paragraph(f"{entry['images']}. Parts are compared with {entry['reference']}."),
        *table(
            entry["chain"],
            "link = name name; SQNR dB ↑ = sqnr_db .1f; note = note",
            "The chain: logits against the original network in float64",
        ),
        *_drift_plot(entry),
    ]
    for name, drift in entry["artefacts"].items():
        parts = {row["name"]: {**row, "bar": _bar(row["isolated_db"])} for row in drift["rows"]}
        worst = [parts[part] for part in drift["worst_names"]][:top]
        which = f"the {len(worst)} that add most error" if top else "in order"
        blocks += table(
            worst if top else parts.values(),
            f"{level} = name name; isolated SQNR dB ↑ = isolated_db .1f; error = bar name; "
            "SQNR so far dB ↑ = sqnr_db .1f; fault = fault; note = note",
            f"{name}: {level}s, {which}",
        )
    return blocks


def _bar(isolated_db: Any) -> str:
    """Return a bar that is longer the more error is added: 0 dB fills it."""
    share = 0.0 if isolated_db is None else 1 - _within_plot(isolated_db) / BAR_TOP_DB
    return "█" * round(BAR * min(max(share, 0.0), 1.0))


def _within_plot(level: Any) -> float:
    """Return a level in dB within what a plot can show."""
    value = float(level)
    return LOUDEST_DB if math.isnan(value) else max(-LOUDEST_DB, min(LOUDEST_DB, value))


def _drift_plot(entry: Entry) -> list[Block]:
    series = []
    for name, colour in colours(entry["artefacts"]).items():
        points = []
        for place, row in enumerate(entry["artefacts"][name]["rows"], 1):
            if row["sqnr_db"] is not None:
                points.append(Mark(row["name"], place, _within_plot(row["sqnr_db"])))
        series.append(Series(name, points, colour))
    axis = Axis(f"{entry['level']}, in the order of the network", zero=False)
    svg = xy_chart(series, axis, Axis("SQNR against float64 (dB)"))
    shown = any(one.points for one in series)
    return [Plot(svg, f"Signal over error after each {entry['level']}.")] * shown


def drift_marks(entry: Entry) -> list[Mark]:
    """Return the error that each part of each artifact adds, over its result, one row a part."""
    marks = []
    for name, colour in colours(entry["artefacts"]).items():
        for row in entry["artefacts"][name]["rows"]:
            if (level := row["isolated_db"]) is not None:
                share, text = 10 ** (-_within_plot(level) / 20), f"{float(level):.1f} dB"
                marks.append(Mark(f"{name} {row['name']}", share, 0.0, text, colour))
    return marks


# --- check -------------------------------------------------------------------------------------


def check_blocks(entry: Entry) -> list[Block]:
    """Return the gates, what failed or is undecided, the skips grouped, and the counts."""
    found = [{"about": row["name"], **row, **row["finding"]} for row in entry["rows"]]
    rows = [
        {**row, "message": row["message"] * (row["outcome"] != "pass")}
        for row in found
        if row["outcome"] in ("fail", "inconclusive")
        or (row["outcome"] == "pass" and row["about"].startswith("gate/"))
    ]
    new = f" Not in the baseline: {', '.join(entry['new'])}." if entry["new"] else ""
    return [
        *table(
            rows,
            "verdict = outcome state; row = about name; baseline = baseline .4g; now = value .4g; "
            "limit = limit.value .4g; message = message",
        ),
        *_skips(found),
        Paragraph(f"{len(found)} rows: {counts_text(entry)}.{new}"),
    ]


def counts_text(entry: Entry) -> str:
    """Return how many rows of a check have each outcome."""
    return ", ".join(f"{count} {outcome}" for outcome, count in entry["counts"].items())


# --- findings ----------------------------------------------------------------------------------


def _skips(found: Iterable[Entry]) -> Sequence[Block]:
    """Return what was not run, each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for finding in found:
        if finding.get("outcome", "skipped") == "skipped":
            kind, reason = finding["skip"], finding.get("message") or finding.get("reason", "")
            remedy = f" (--allow-skip {kind} lets that pass)" if kind else ""
            reasons.setdefault(f"{reason}{remedy}", {})[finding["about"]] = None
    return notices("SKIPPED", (f"{', '.join(about)}: {why}" for why, about in reasons.items()))


def _messages(found: Iterable[Entry], outcome: str) -> Sequence[Block]:
    """Return the messages of the findings with that outcome, grouped by what they are about."""
    by_name: dict[str, list[str]] = {}
    for finding in found:
        if finding["outcome"] == outcome:
            by_name.setdefault(finding["about"], []).append(finding["message"])
    lines = (f"{name}: {text}" for name, messages in by_name.items() for text in _most(messages))
    return notices(state_of(outcome), lines)


def _most(lines: Sequence[str]) -> list[str]:
    """Return the first lines, and how many more there are."""
    more = len(lines) - MOST_FAILURES
    return [*lines[:MOST_FAILURES], *[f"and {more} more"] * (more > 0)]


def failure_text(found: Sequence[tuple[str, Finding]], allowed: Allowed, done: str) -> str:
    """Return why findings do not pass, a sentence.

    Args:
        found: what each is about, and the finding.
        allowed: what the user lets pass.
        done: what did not happen where nothing was shown at all, such as ``verified``.
    """
    failed = list(dict.fromkeys(f"'{name}'" for name, f in found if f.outcome.value == "fail"))
    if failed:
        more = len(failed) - MOST_NAMED
        return f"Failed: {', '.join(failed[:MOST_NAMED])}{f' and {more} more' * (more > 0)}."
    rest = [(name, f) for name, f in found if not allowed.holds(f)]
    undecided = dict.fromkeys(f"'{n}'" for n, f in rest if f.outcome.value == "inconclusive")
    if undecided:
        named = ", ".join(undecided)
        return f"The data cannot decide: {named}; --allow-inconclusive would let that pass."
    if rest and any(f.outcome.value == "pass" for _, f in found):
        name, finding = rest[0]
        others = f", and {len(rest) - 1} more," if len(rest) > 1 else ""
        remedy = f"; --allow-skip {finding.skip} would let that pass" if finding.skip else ""
        return f"'{name}'{others} was not checked ({finding.message}){remedy}."
    return f"No artefact could be run on this machine, so nothing was {done}."


def _class(index: int, names: Sequence[str] | None) -> str:
    """Return a class as people call it: its first name, else its number."""
    if index < 0:
        return "NaN"
    return names[index].split(",")[0] if names and index < len(names) else str(index)
