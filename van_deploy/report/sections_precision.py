"""What a quantisation cost and brought, as blocks."""

from __future__ import annotations

from collections.abc import Iterator

from van_deploy.report.document import Block, Entry, Facts, Paragraph, notices, table

USED = {True: "kept", False: "left out"}


def quantized_blocks(result: Entry) -> list[Block]:
    """Return one quantisation: what it cost, and where it was written."""
    took = f" in {sum(result['seconds'].values()):.1f} s" if result["seconds"] else ""
    word = "Reused" if result["reused"] else "Wrote"
    said = f"{word} {result['artefact']} in {result['bundle']}{took}."
    return [*precision_blocks(result["facts"]), Paragraph(said)]


def precision_blocks(facts: Entry) -> list[Block]:
    """Return everything worth reading about one artifact of lower precision."""
    techniques = [
        {**gain, "technique": gain["name"].replace("_", " "), "used": USED[gain["kept"]]}
        for gain in facts.get("techniques") or ()
    ]
    search = facts.get("search") or {"kept": {}, "max_drop": 0.0, "of": "", "images": 0}
    title = "At most {max_drop:g} points of {of} lost, searched on {images} images"
    best, share = facts["recommended"], 100 * facts.get("int8_share", 0.0)
    said = "{images} images: {description}"
    layers = f"{facts.get('quantized')} layers, {share:.1f} % of the multiply-adds"
    findings = (facts.get("judged") or {}).get("findings", ())
    return [
        *table(
            techniques,
            "technique name; SQNR before (dB, ↑) = before_db .2f; after = after_db .2f; used name",
            "What each technique brings on held-out images",
        ),
        *table(
            search["kept"].items(), "kept out of INT8 = 0 name; why = 1", title.format(**search)
        ),
        *table(
            map(_compared, facts["comparison"]),
            "precision = name name; size = size_bytes bytes; SQNR dB ↑ = sqnr_db .1f; "
            "cosine .5f; KL nats = kl .1e; agree % = agreement percent; "
            "top-1 % (95 %) = accuracy number; ms/image = ms_per_image .2f; gate = passed state",
        ),
        Facts(
            {
                "judged on": said.format(**facts["judged_on"]),
                "ranges from": said.format(**facts["calibration"]),
                "in INT8": layers if share else None,
                "scales": facts.get("method") if share else None,
                "recommended": f"{best.upper()}: {facts['why']}" if best else facts["why"],
            }
        ),
        *notices(
            "FAIL", (f"{f['rule']}: {f['message']}" for f in findings if f["outcome"] == "fail")
        ),
        *notices("WARNING", _doubts(facts)),
    ]


def _compared(row: Entry) -> Entry:
    """Return one precision: what compares the reference with itself is left out."""
    from van_deploy.intervals import wilson_interval  # needs NumPy

    accuracy = None
    if row["correct"] is not None:
        low, high = wilson_interval(row["correct"], row["images"])
        share = row["correct"] / row["images"]
        accuracy = f"{100 * share:.2f} ({100 * low:.1f}-{100 * high:.1f})"
    left_out = dict.fromkeys(("cosine", "kl", "agreement")) if row["passed"] is None else {}
    return {**row, **left_out, "name": row["name"].upper(), "accuracy": accuracy}


def _doubts(facts: Entry) -> Iterator[str]:
    """Yield what the user should know: noise, unreadable images, what FP16 could not hold."""
    calibration, search = facts["calibration"], facts.get("search") or {}
    audit, unreadable = facts.get("audit", {}), calibration["unreadable"]
    if calibration["noise"]:
        yield "calibrated on NOISE: the ranges fit no real image"
    if unreadable:
        yield f"{len(unreadable)} image(s) could not be read: {'; '.join(unreadable[:3])}"
    if not search.get("passed", True):
        tried = len(search["trials"])
        yield f"no plan held {search['max_drop']:g} points in {tried} evaluations"
    for row in facts["comparison"]:
        for doubt in row["doubts"] if row["passed"] else ():
            yield f"{row['name'].upper()} is undecided: {doubt}"
    for node, why in audit.get("kept", {}).items():
        yield f"kept {node} in FP32: {why}"
    if audit.get("advice"):
        yield audit["advice"]
