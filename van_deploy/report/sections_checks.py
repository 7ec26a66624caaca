"""Blocks of the results of quantize, verify, evaluate, drift and check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from van_deploy.documents import limit_lines
from van_deploy.report import document as doc
from van_deploy.report.document import Block, Entry, Paragraph, notices, table
from van_deploy.report.plots import Mark, colours, rows_chart, xy_chart

if TYPE_CHECKING:
    from van_deploy.checks.gates import GateReport

MAX_FLIPS, MAX_MESSAGES, MAX_NAMES = 10, 24, 5

FAILURES = {
    "fail": "Failed: {}.",
    "inconclusive": "The data cannot decide: {}; --allow-inconclusive accepts that.",
}

# Limit of plots; results that differ less are equal in float64.
MAX_DB = 200.0

# First columns of tables with one row per artifact.
HEAD = "verdict = outcome state; artifact = about name; "


def verify_blocks(entry: Entry, names: Sequence[str] | None = None) -> list[Block]:
    """Return the verdict on every artifact, the origin of its limit, label flips and failures.

    Args:
        entry: the ``verify`` document.
        names: class names for the flips, or None.
    """
    verdicts = [{**verdict, "about": name} for name, verdict in entry["artifacts"].items()]
    findings = [{"about": "images", **finding} for finding in entry["findings"]]
    findings += doc.nested_rows(verdicts, "findings")
    ran = [verdict for verdict in verdicts if verdict["outcome"] != "skipped"]
    limits = []
    for row in ran:
        levels = (b["invariance_db"] for b in row["batches"] if b["invariance_db"] is not None)
        row["invariance"] = min(map(float, levels), default=None)
        decided = row["comparison"] and row["comparison"]["top1_agreement"] is not None
        row["flipped"] = len(row["flips"]) if decided else None
        if limit := row["limit"]:
            text = f"{limit['value']:.1f} dB, {limit['origin']}"
            limits.append(f"{row['about']} (class {row['numeric']}): {text}")
    flips = []
    for flip in doc.nested_rows(ran, "flips", MAX_FLIPS):
        state, image = "FAIL" if flip["fault"] else "explained", entry["names"][flip["image"]]
        labels = (_class_name(flip[key], names) for key in ("expected", "actual"))
        flips.append((state, flip["about"], image, *labels, flip["margin"]))
    noise = f"PyTorch's own float32 noise is {float(entry['noise_db']):.1f} dB."
    return [
        Paragraph(f"{entry['images']}. Compared with {entry['against']}; {noise}"),
        *table(
            ran,
            f"{HEAD}runner = runner name; SQNR dB ↑ = comparison.sqnr_db .1f; "
            "limit dB = limit.value .1f; margin dB = margin_db +.1f; label flips = flipped d; "
            "batch invariance dB ↑ = invariance .1f",
        ),
        *notices("LIMIT", limits),
        *table(
            flips,
            "flip = 0 state; artifact = 1 name; image = 2; PyTorch = 3; artifact's = 4; "
            "margin (RMS logits) = 5 .1e",
            "Label flips",
        ),
        *_message_blocks(findings),
    ]


def evaluate_blocks(entry: Entry) -> list[Block]:
    """Return accuracies, losses, confusions, and unreadable images."""
    names, seconds = entry["class_names"], float(entry["seconds"])
    rate = entry["count"] / max(seconds, 1e-9)
    accuracies = [(name, entry["runners"][name], one) for name, one in entry["accuracy"].items()]
    metric = accuracies[0][2]["metric"]
    losses, marks, colour = [], [], colours(entry["losses"])
    for name, one in entry["losses"].items():
        # The last finding is that on the loss.
        loss, allowed = one["loss"], float(one["findings"][-1]["limit"]["value"])
        losses.append({**one, "about": name, "allowed": allowed})
        text, ends = f"{loss['loss']:+.2f} pp  {doc.state_text(one['outcome'])}", loss["interval"]
        marks.append(Mark(name, loss["loss"], 0.0, text, colour[name], ends, allowed))
    confusions = [
        (loss["about"], _class_name(old, names), _class_name(new, names), count)
        for loss in losses
        for old, new, count in loss["confusions"][:MAX_FLIPS]
    ]
    changed = doc.nested_rows(losses, "classes", MAX_FLIPS)
    changed = [{**one, "name": _class_name(one["label"], names)} for one in changed]
    plot = doc.Plot(
        rows_chart(marks, f"{metric} lost against PyTorch (pp)"),
        "Loss with its 95 % interval; the dashed line is the allowed loss.",
    )
    findings = doc.nested_rows(losses, "findings")
    findings += ({"about": name, **finding} for name, finding in entry["skipped"].items())
    reasons = [reason for _, reason in entry["unreadable"]]
    count = [f"{len(reasons)} image(s) could not be read and were left out."] * bool(reasons)
    return [
        Paragraph(f"{entry['images']} ({seconds:.1f} s, {rate:.0f} images/s)."),
        *table(
            accuracies,
            f"network = 0 name; runner = 1 name; {metric} % = 2.top1 percent; "
            f"{metric}, 95 % = 2.top1_interval percents; top-5 % = 2.top5 percent; "
            "top-5, 95 % = 2.top5_interval percents; ECE % = 2.ece percent",
        ),
        *table(
            losses,
            f"{HEAD}lost pp = loss.loss +.2f; 95 % pp = loss.interval points; "
            "allowed pp = allowed g; lost = loss.lost d; won = loss.won d; p = loss.p_value .2g; "
            "label flips = flips d; SQNR dB ↑ = sqnr_db .1f",
            "Against PyTorch (lost, won: images that only PyTorch or only the artifact classifies "
            "correctly; p: McNemar's test, not a gate)",
        ),
        *[plot] * bool(marks),
        *_message_blocks(findings),
        *table(
            confusions,
            "artifact = 0 name; PyTorch's class = 1; artifact's class = 2; images = 3 d",
            "Label flips by class",
        ),
        *table(
            changed,
            "artifact = about name; class = name; images d; correct in PyTorch = before d; "
            "correct in artifact = after d",
            "Classes with changed accuracy",
        ),
        *notices("WARNING", [*count, *limit_lines(reasons, MAX_MESSAGES)]),
    ]


def drift_blocks(entry: Entry, top: int = 5) -> list[Block]:
    """Return the chain, and the worst parts of each artifact by isolated SQNR.

    Args:
        entry: the ``drift`` document.
        top: number of parts of each artifact; 0 for all, in the order of the network.
    """
    level, series, tables = entry["level"], dict[str, list[Mark]](), list[Block]()
    for name, colour in colours(entry["artifacts"]).items():
        drift = entry["artifacts"][name]
        parts = {row["name"]: row for row in drift["rows"]}
        for place, row in enumerate(drift["rows"], 1):
            if row["sqnr_db"] is not None:
                sqnr = max(-MAX_DB, min(float(row["sqnr_db"]), MAX_DB))
                series.setdefault(name, []).append(Mark(row["name"], place, sqnr, colour=colour))
        worst = [parts[part] for part in drift["worst_names"]][:top]
        selection = f"the worst {len(worst)}" if top else "in the order of the network"
        tables += table(
            worst if top else parts.values(),
            f"{level} = name name; isolated SQNR dB ↑ = isolated_db .1f; "
            "accumulated SQNR dB ↑ = sqnr_db .1f; fault; note",
            f"{name}: {level}s, {selection}",
        )
    svg = xy_chart(series, f"{level}, in the order of the network", "SQNR against float64 (dB)")
    return [
        Paragraph(f"{entry['images']}. Parts are compared with {entry['reference']}."),
        *table(
            entry["chain"],
            "network = name name; SQNR dB ↑ = sqnr_db .1f; note",
            "Logits against the original network in float64",
        ),
        *[doc.Plot(svg, f"Accumulated SQNR after each {level}.")] * bool(series),
        *tables,
    ]


def check_blocks(entry: Entry) -> list[Block]:
    """Return the gates, rows that did not pass, the skips grouped by reason, and the counts."""
    rows = [{"about": row["name"], **row, **row["finding"]} for row in entry["rows"]]
    ran = [row for row in rows if row["outcome"] != "skipped"]
    shown = [row for row in ran if row["outcome"] != "pass" or row["about"].startswith("gate/")]
    hidden = f"; not shown: {len(ran) - len(shown)} that passed" * (ran != shown)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in entry["counts"].items())
    new = f" Not in the baseline: {', '.join(entry['new'])}." if entry["new"] else ""
    return [
        *table(
            shown,
            "verdict = outcome state; row = about name; baseline = baseline .4g; now = value .4g; "
            "limit = limit.value .4g; message = message",
        ),
        *_message_blocks([row for row in rows if row["outcome"] == "skipped"]),
        Paragraph(f"{len(rows)} rows: {counts}{hidden}.{new}"),
    ]


# --- findings ----------------------------------------------------------------------------------


def _message_blocks(findings: Sequence[Entry]) -> list[Block]:
    """Return the messages of findings that did not pass, each once with its subjects."""
    blocks = list[Block]()
    for outcome in ("skipped", "inconclusive", "fail"):
        about: dict[str, list[str]] = {}
        for one in findings:
            if one["outcome"] == outcome:
                remedy = f" (--allow-skip {one['skip']} accepts that)" if one["skip"] else ""
                about.setdefault(f"{one['message']}{remedy}", []).append(one["about"])
        lines = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in about.items()]
        blocks += notices(doc.state_text(outcome), limit_lines(lines, MAX_MESSAGES))
    return blocks


def failure_text(report: GateReport, verb: str) -> str:
    """Return a sentence that says why a report did not pass.

    Args:
        report: the report.
        verb: past participle for the case that nothing ran, such as ``verified``.
    """
    for outcome, sentence in FAILURES.items():
        names = [
            f"'{name}'" for name, finding in report.rejected if finding.outcome.value == outcome
        ]
        if names:
            return sentence.format(", ".join(limit_lines([*dict.fromkeys(names)], MAX_NAMES)))
    if report.ran:
        (name, finding), *more = report.rejected
        others = f", and {len(more)} more," if more else ""
        remedy = f"; --allow-skip {finding.skip} accepts that" if finding.skip else ""
        return f"'{name}'{others} was not checked ({finding.message}){remedy}."
    return f"No artifact could be run on this machine, so nothing was {verb}."


def _class_name(index: int, names: Sequence[str] | None) -> str:
    """Return the first name of a class, or its index."""
    if index < 0:
        return "NaN"
    return names[index].split(",")[0] if names and index < len(names) else str(index)


# --- quantize ----------------------------------------------------------------------------------


def quantize_blocks(result: Entry) -> list[Block]:
    """Return the result of a quantisation."""
    facts, rows = result["facts"], []
    for row in facts["comparison"]:
        # Metrics of the reference against itself are left out.
        empty = dict.fromkeys(("cosine", "kl", "agreement")) if row["passed"] is None else {}
        top1 = None if row["correct"] is None else row["correct"] / row["images"]
        state = "inconclusive" if row["passed"] and row["inconclusive"] else row["passed"]
        shown = {"name": row["name"].upper(), "top1": top1, "passed": state}
        rows.append({**row, **empty, **shown})
    search = facts.get("search") or {"excluded": {}, "max_drop": 0.0, "metric": "", "images": 0}
    limit = "Search for a loss of at most {max_drop:g} points of {metric} on {images} images"
    findings = (facts.get("golden_check") or {}).get("findings", ())
    best = f"{facts['recommended'].upper()}: " if facts["recommended"] else ""
    duration = f" in {sum(result['seconds'].values()):.1f} s" if result["seconds"] else ""
    verb = "Reused" if result["reused"] else "Wrote"
    return [
        *table(
            facts.get("techniques") or (),
            "technique = name name; SQNR before dB ↑ = before_db .2f; after = after_db .2f; "
            "used name",
            "Effect of each technique on held-out images",
        ),
        *table(search["excluded"].items(), "excluded = 0 name; reason = 1", limit.format(**search)),
        *table(
            rows,
            "precision = name name; size = size_bytes bytes; SQNR dB ↑ = sqnr_db .1f; "
            "cosine .5f; KL nats = kl .1e; agree % = agreement percent; top-1 % = top1 percent; "
            "top-1, 95 % = top1_interval percents; ms/image = ms_per_image .2f; "
            "gate = passed state",
        ),
        *doc.properties(
            {**facts, "best": best + facts["recommendation_reason"]},
            "evaluated on = evaluated_on.description; ranges from = calibration.description; "
            "layers in INT8 = quantized; % of the multiply-adds = int8_share percent; "
            "scales = method; recommended = best",
        ),
        *_message_blocks([{**finding, "about": finding["rule"]} for finding in findings]),
        *notices("WARNING", _quantize_warnings(facts)),
        Paragraph(f"{verb} {result['artifact']} in {result['bundle']}{duration}."),
    ]


def _quantize_warnings(facts: Entry) -> Iterator[str]:
    """Yield the warnings on calibration images, the search, and FP16 overflows."""
    calibration, search, audit = facts["calibration"], facts.get("search"), facts.get("audit", {})
    if calibration["noise"]:
        yield "calibrated on NOISE: the ranges do not fit real images"
    if unreadable := calibration["unreadable"]:
        yield f"{len(unreadable)} image(s) could not be read: {'; '.join(unreadable[:3])}"
    if search and not search["passed"]:
        trials = f"{len(search['trials'])} evaluations"
        yield f"no plan was within {search['max_drop']:g} points of loss in {trials}"
    for row in facts["comparison"]:
        for reason in row["inconclusive"] if row["passed"] else ():
            yield f"{row['name'].upper()} is undecided: {reason}"
    yield from (f"{node} stays FP32: {why}" for node, why in audit.get("fp32_nodes", {}).items())
    if audit.get("advice"):
        yield audit["advice"]
