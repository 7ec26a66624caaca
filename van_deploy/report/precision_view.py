"""What a quantisation cost and brought, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from van_deploy.intervals import wilson_interval
from van_deploy.report.tables import Column, bytes_text, facts_table, notes, rows_table, stack
from van_deploy.report.tables import verdict as verdict_text

if TYPE_CHECKING:
    from van_deploy.precision.pipeline import QuantizeResult

__all__ = [
    "precision_facts",
    "precision_notes",
    "precision_table",
    "precision_view",
    "quantized_view",
]


def quantized_view(result: QuantizeResult) -> RenderableType:
    """Return one quantisation: what it cost, and where it was written."""
    file = result.bundle.path / result.bundle.artefact(result.artefact).file
    took = f" in {sum(result.seconds.values()):.1f} s" if result.seconds else ""
    word = "Reused" if result.reused else "Wrote"
    return stack(precision_view(result.facts), Text(f"{word} {file}{took}."))


def precision_view(facts: Mapping[str, Any]) -> RenderableType:
    """Return everything worth reading about one FP16, BF16 or INT8 artefact."""
    return stack(
        _techniques_table(facts.get("techniques")),
        _search_table(facts.get("search")),
        precision_table(facts["comparison"]),
        precision_facts(facts),
        precision_notes(facts),
    )


def precision_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return the precisions side by side: one line each, in 100 columns."""
    labelled = any(row["correct"] is not None for row in rows)
    timed = any(row["ms_per_image"] is not None for row in rows)
    columns: list[Column | str] = [
        "precision",
        Column("size", "right"),
        Column("SQNR dB", "right"),
        Column("cosine", "right"),
        Column("KL nats", "right"),
        Column("agree %", "right"),
    ]
    columns += [Column("top-1 % (95 %)", "right")] if labelled else []
    columns += [Column("ms/image", "right")] if timed else []
    return rows_table([*columns, "gate"], (_line(row, labelled, timed) for row in rows))


def _line(row: Mapping[str, Any], labelled: bool, timed: bool) -> list[object]:
    reference = row["passed"] is None
    cells: list[object] = [
        row["name"].upper(),
        bytes_text(row["size_bytes"]),
        None if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
        None if reference else f"{row['cosine']:.5f}",
        None if reference or row["kl"] is None else f"{row['kl']:.1e}",
        None if reference or row["agreement"] is None else f"{100 * row['agreement']:.2f}",
    ]
    if labelled:
        cells.append(_accuracy(row))
    if timed:
        cells.append(None if row["ms_per_image"] is None else f"{row['ms_per_image']:.2f}")
    return [*cells, None if reference else verdict_text(row["passed"])]


def _accuracy(row: Mapping[str, Any]) -> str | None:
    if row["correct"] is None:
        return None
    low, high = wilson_interval(row["correct"], row["images"])
    share = row["correct"] / row["images"]
    return f"{100 * share:.2f} ({100 * low:.1f}-{100 * high:.1f})"


def precision_facts(facts: Mapping[str, Any]) -> RenderableType:
    """Return what the figures were measured on, and the recommendation."""
    judged, calibration = facts["judged_on"], facts["calibration"]
    said = {
        "judged on": f"{judged['images']} images: {judged['description']}",
        "ranges from": f"{calibration['images']} images: {calibration['description']}",
    }
    if "int8_share" in facts:
        share = f"{100 * facts['int8_share']:.1f} % of the multiply-adds"
        said["in INT8"] = f"{facts['quantized']} layers, {share}"
        said["scales"] = str(facts["method"])
    best = facts["recommended"]
    said["recommended"] = f"{best.upper()}: {facts['why']}" if best else str(facts["why"])
    return facts_table(said)


def precision_notes(facts: Mapping[str, Any]) -> RenderableType | None:
    """Return what the user should know: noise, unreadable images, what FP16 could not hold."""
    lines = []
    calibration = facts["calibration"]
    if calibration["noise"]:
        lines.append("calibrated on NOISE: the ranges fit no real image")
    unreadable = calibration["unreadable"]
    if unreadable:
        lines.append(f"{len(unreadable)} image(s) could not be read: {'; '.join(unreadable[:3])}")
    search = facts.get("search", {})
    if not search.get("passed", True):
        tried = len(search["trials"])
        lines.append(f"no plan held {search['max_drop']:g} points in {tried} evaluations")
    for row in facts["comparison"]:
        lines += [
            f"{row['name'].upper()} is undecided: {doubt}"
            for doubt in row["doubts"]
            if row["passed"]
        ]
    audit = facts.get("audit", {})
    lines += [f"kept {node} in FP32: {why}" for node, why in audit.get("kept", {}).items()]
    lines += [audit["advice"]] if audit.get("advice") else []
    return notes(lines) if lines else None


def _techniques_table(techniques: Sequence[Mapping[str, Any]] | None) -> RenderableType | None:
    if not techniques:
        return None
    rows = (
        (
            gain["name"].replace("_", " "),
            None if gain["before_db"] is None else f"{gain['before_db']:.2f}",
            f"{gain['after_db']:.2f}",
            "kept" if gain["kept"] else "left out",
        )
        for gain in techniques
    )
    columns: list[Column | str] = [
        "technique",
        Column("SQNR before (dB, ↑)", "right"),
        Column("after", "right"),
        "",
    ]
    return rows_table(columns, rows, "What each technique brings on held-out images")


def _search_table(search: Mapping[str, Any] | None) -> RenderableType | None:
    if search is None:
        return None
    rows = search["kept"].items()
    columns: list[Column | str] = ["kept out of INT8", Column("why", wrap=True)]
    title = (
        f"At most {search['max_drop']:g} points of {search['of']} lost, searched on "
        f"{search['images']} images"
    )
    return rows_table(columns, rows, title)
