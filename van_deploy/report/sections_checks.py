"""What quantize, verify, evaluate, drift and check found, as blocks.

Failures and one row an artifact come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from van_deploy.report import document as doc
from van_deploy.report.document import (
    Block,
    Entry,
    Paragraph,
    limit_lines,
    nested_rows,
    notices,
    table,
)
from van_deploy.report.plots import Mark, colours, rows_chart, xy_chart

if TYPE_CHECKING:
    from van_deploy.checks.gates import AllowOptions, Finding

MOST_FLIPS, MOST_MESSAGES, MOST_NAMED = 10, 24, 5

FAILURES = {
    "fail": "Failed: {}.",
    "inconclusive": "The data cannot decide: {}; --allow-inconclusive would let that pass.",
}

# Where a plot ends: past it two results are equal to the last bit that float64 holds.
LOUDEST_DB = 200.0

# Columns of a result an artifact.
HEAD = "verdict = outcome state; artifact = about name; "


def verify_blocks(entry: Entry, names: Sequence[str] | None = None) -> list[Block]:
    """Return the verdict on every artifact, where its limit came from, flips and failures.

    Args:
        entry: the ``verify`` document.
        names: class names for the flips, or None.
    """
    verdicts = [{**verdict, "about": name} for name, verdict in entry["artifacts"].items()]
    found = [{"about": "images", **finding} for finding in entry["findings"]]
    found += nested_rows(verdicts, "findings")
    ran = [verdict for verdict in verdicts if verdict["outcome"] != "skipped"]
    limits = []
    for one in ran:
        same = (float(b["invariance_db"]) for b in one["batches"] if b["invariance_db"] is not None)
        one["invariance"] = min(same, default=None)
        one["flipped"] = len(one["flips"]) if one["comparison"] else None
        if limit := one["limit"]:
            held_to = f"{limit['value']:.1f} dB, {limit['origin']}"
            limits.append(f"{one['about']} (class {one['numeric']}): {held_to}")
    flips = []
    for flip in nested_rows(ran, "flips", MOST_FLIPS):
        state, image = "FAIL" if flip["fault"] else "explained", entry["names"][flip["image"]]
        was, now = (_class(flip[key], names) for key in ("expected", "found"))
        flips.append((state, flip["about"], image, was, now, flip["margin"]))
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
        *_messages(found),
    ]


def evaluate_blocks(entry: Entry) -> list[Block]:
    """Return accuracy, what was lost, what flipped into what, and the images left out."""
    names, seconds = entry["class_names"], float(entry["seconds"])
    rate = entry["count"] / max(seconds, 1e-9)
    accuracies = [(name, entry["runners"][name], one) for name, one in entry["accuracy"].items()]
    metric = accuracies[0][2]["metric"]
    losses, marks, colour = [], [], colours(entry["losses"])
    for name, one in entry["losses"].items():
        # The last finding is the one on the loss.
        loss, allowed = one["loss"], float(one["findings"][-1]["limit"]["value"])
        losses.append({**one, "about": name, "allowed": allowed})
        said, ends = f"{loss['loss']:+.2f} pp  {doc.state_text(one['outcome'])}", loss["interval"]
        marks.append(Mark(name, loss["loss"], 0.0, said, colour[name], ends, allowed))
    flipped = [
        (loss["about"], _class(old, names), _class(new, names), count)
        for loss in losses
        for old, new, count in loss["confusions"][:MOST_FLIPS]
    ]
    most_changed = nested_rows(losses, "classes", MOST_FLIPS)
    changed = [{**one, "name": _class(one["label"], names)} for one in most_changed]
    plot = doc.Plot(
        rows_chart(marks, f"{metric} lost against PyTorch (pp)"),
        "Loss with its 95 % interval; the dashed line is the loss that the artifact is allowed.",
    )
    found = nested_rows(losses, "findings")
    found += ({"about": name, **finding} for name, finding in entry["skipped"].items())
    unread = [reason for _, reason in entry["unreadable"]]
    left_out = [f"{len(unread)} image(s) could not be read and were left out."] * bool(unread)
    return [
        Paragraph(f"{entry['images']} ({seconds:.1f} s, {rate:.0f} images a second)."),
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
            "Against PyTorch (lost, won: images that one alone gets right; p: McNemar's, no gate)",
        ),
        *[plot] * bool(marks),
        *_messages(found),
        *table(
            flipped,
            "artifact = 0 name; PyTorch said = 1; artifact says = 2; images = 3 d",
            "What flipped into what",
        ),
        *table(
            changed,
            "artifact = about name; class = name; images d; right before = before d; "
            "right after = after d",
            "Classes that changed",
        ),
        *notices("WARNING", [*left_out, *limit_lines(unread, MOST_MESSAGES)]),
    ]


def drift_blocks(entry: Entry, top: int = 5) -> list[Block]:
    """Return the chain, and for each artifact the parts that add most error.

    Args:
        entry: the ``drift`` document.
        top: parts shown of each artifact; 0 for all, in the network's order.
    """
    level, series, tables = entry["level"], dict[str, list[Mark]](), list[Block]()
    for name, colour in colours(entry["artifacts"]).items():
        drift = entry["artifacts"][name]
        parts = {row["name"]: row for row in drift["rows"]}
        points = []
        for place, row in enumerate(drift["rows"], 1):
            if row["sqnr_db"] is not None:
                reached = max(-LOUDEST_DB, min(float(row["sqnr_db"]), LOUDEST_DB))
                points.append(Mark(row["name"], place, reached, colour=colour))
        series |= {name: points} if points else {}
        worst = [parts[part] for part in drift["worst_names"]][:top]
        which = f"the {len(worst)} that add most error" if top else "in order"
        tables += table(
            worst if top else parts.values(),
            f"{level} = name name; isolated SQNR dB ↑ = isolated_db .1f; "
            "SQNR so far dB ↑ = sqnr_db .1f; fault; note",
            f"{name}: {level}s, {which}",
        )
    svg = xy_chart(series, f"{level}, in the order of the network", "SQNR against float64 (dB)")
    return [
        Paragraph(f"{entry['images']}. Parts are compared with {entry['reference']}."),
        *table(
            entry["chain"],
            "link = name name; SQNR dB ↑ = sqnr_db .1f; note",
            "The chain: logits against the original network in float64",
        ),
        *[doc.Plot(svg, f"Signal over error after each {level}.")] * bool(series),
        *tables,
    ]


def check_blocks(entry: Entry) -> list[Block]:
    """Return the gates, what failed or is undecided, the skips grouped, and the counts."""
    found = [{"about": row["name"], **row, **row["finding"]} for row in entry["rows"]]
    ran = [row for row in found if row["outcome"] != "skipped"]
    shown = [row for row in ran if row["outcome"] != "pass" or row["about"].startswith("gate/")]
    left_out = f"; {len(ran) - len(shown)} within the baseline are not shown" * (ran != shown)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in entry["counts"].items())
    new = f" Not in the baseline: {', '.join(entry['new'])}." if entry["new"] else ""
    return [
        *table(
            shown,
            "verdict = outcome state; row = about name; baseline = baseline .4g; now = value .4g; "
            "limit = limit.value .4g; message = message",
        ),
        *_messages([row for row in found if row["outcome"] == "skipped"]),
        Paragraph(f"{len(found)} rows: {counts}{left_out}.{new}"),
    ]


# --- findings ----------------------------------------------------------------------------------


def _messages(found: Sequence[Entry]) -> list[Block]:
    """Return what was skipped, is undecided or failed: each message once, and whom it is about."""
    blocks = list[Block]()
    for outcome in ("skipped", "inconclusive", "fail"):
        about: dict[str, list[str]] = {}
        for one in found:
            if one["outcome"] == outcome:
                remedy = f" (--allow-skip {one['skip']} lets that pass)" if one["skip"] else ""
                about.setdefault(f"{one['message']}{remedy}", []).append(one["about"])
        lines = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in about.items()]
        blocks += notices(doc.state_text(outcome), limit_lines(lines, MOST_MESSAGES))
    return blocks


def failure_text(found: Sequence[tuple[str, Finding]], allowed: AllowOptions, done: str) -> str:
    """Return why findings do not pass, a sentence.

    Args:
        found: what each is about, and the finding.
        allowed: what the user lets pass.
        done: what did not happen where nothing was shown at all, such as ``verified``.
    """
    rest = [(name, finding) for name, finding in found if not allowed.accepts(finding)]
    for outcome, said in FAILURES.items():
        names = [f"'{name}'" for name, finding in rest if finding.outcome.value == outcome]
        if names:
            return said.format(", ".join(limit_lines([*dict.fromkeys(names)], MOST_NAMED)))
    if rest and any(f.outcome.value == "pass" for _, f in found):
        name, finding = rest[0]
        others = f", and {len(rest) - 1} more," if len(rest) > 1 else ""
        remedy = f"; --allow-skip {finding.skip} would let that pass" if finding.skip else ""
        return f"'{name}'{others} was not checked ({finding.message}){remedy}."
    return f"No artifact could be run on this machine, so nothing was {done}."


def _class(index: int, names: Sequence[str] | None) -> str:
    """Return a class as people call it: its first name, else its number."""
    if index < 0:
        return "NaN"
    return names[index].split(",")[0] if names and index < len(names) else str(index)


# --- quantize ----------------------------------------------------------------------------------


def quantize_blocks(result: Entry) -> list[Block]:
    """Return everything worth reading about one quantisation, and where it was written."""
    made, rows = result["facts"], []
    for row in made["comparison"]:
        # What compares the reference with itself is left out.
        left_out = dict.fromkeys(("cosine", "kl", "agreement")) if row["passed"] is None else {}
        right = None if row["correct"] is None else row["correct"] / row["images"]
        rows.append({**row, **left_out, "name": row["name"].upper(), "right": right})
    search = made.get("search") or {"kept": {}, "max_drop": 0.0, "of": "", "images": 0}
    lost = "At most {max_drop:g} points of {of} lost, searched on {images} images".format(**search)
    findings = (made.get("judged") or {}).get("findings", ())
    said = [(f["outcome"].upper(), f"{f['rule']}: {f['message']}") for f in findings]
    wrong = [pair for pair in said if pair[0] in {"FAIL", "INCONCLUSIVE"}]
    best = f"{made['recommended'].upper()}: " if made["recommended"] else ""
    took = f" in {sum(result['seconds'].values()):.1f} s" if result["seconds"] else ""
    word = "Reused" if result["reused"] else "Wrote"
    return [
        *table(
            made.get("techniques") or (),
            "technique = name name; SQNR before dB ↑ = before_db .2f; after = after_db .2f; "
            "kept name",
            "What each technique brings on held-out images",
        ),
        *table(search["kept"].items(), "kept out of INT8 = 0 name; why = 1", lost),
        *table(
            rows,
            "precision = name name; size = size_bytes bytes; SQNR dB ↑ = sqnr_db .1f; "
            "cosine .5f; KL nats = kl .1e; agree % = agreement percent; top-1 % = right percent; "
            "top-1, 95 % = top1_interval percents; ms/image = ms_per_image .2f; "
            "gate = passed state",
        ),
        *doc.properties(
            {**made, "best": best + made["why"]},
            "judged on = judged_on.description; ranges from = calibration.description; "
            "layers in INT8 = quantized; % of the multiply-adds = int8_share percent; "
            "scales = method; recommended = best",
        ),
        *([doc.Properties(wrong, states=True)] if wrong else []),
        *notices("WARNING", _doubts(made)),
        Paragraph(f"{word} {result['artifact']} in {result['bundle']}{took}."),
    ]


def _doubts(facts: Entry) -> Iterator[str]:
    """Yield what the user should know: noise, unreadable images, what FP16 could not hold."""
    calibration, search, audit = facts["calibration"], facts.get("search"), facts.get("audit", {})
    if calibration["noise"]:
        yield "calibrated on NOISE: the ranges fit no real image"
    if unreadable := calibration["unreadable"]:
        yield f"{len(unreadable)} image(s) could not be read: {'; '.join(unreadable[:3])}"
    if search and not search["passed"]:
        yield f"no plan held {search['max_drop']:g} points in {len(search['trials'])} evaluations"
    for row in facts["comparison"]:
        for doubt in row["doubts"] if row["passed"] else ():
            yield f"{row['name'].upper()} is undecided: {doubt}"
    yield from (f"kept {node} in FP32: {why}" for node, why in audit.get("kept", {}).items())
    if audit.get("advice"):
        yield audit["advice"]
