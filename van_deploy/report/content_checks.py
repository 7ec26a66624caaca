"""The parts of a report about checks: verdicts, accuracy, drift, and what was not done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from van_deploy.bench.document import BenchReport
from van_deploy.bundle import Manifest
from van_deploy.report.document import Block, Figure, Grid, Section, Text
from van_deploy.report.svg import Axis, Point, Series, interval_chart, line_chart

__all__ = [
    "Check",
    "accuracy_section",
    "checks_of",
    "drift_section",
    "skipped_section",
    "verdicts_section",
]

COMMANDS = {
    "verify": "every artefact against PyTorch at every batch size: `van-deploy verify`",
    "evaluate": "accuracy on labelled images: `van-deploy evaluate`",
    "drift": "where in the network an artefact drifts: `van-deploy drift`",
    "bench": "speed: `van-deploy bench`",
}
WORDS = {
    True: "PASS",
    False: "FAIL",
    "passed": "PASS",
    "failed": "FAIL",
    "skipped": "SKIPPED",
    "pass": "PASS",
    "fail": "FAIL",
    "inconclusive": "INCONCLUSIVE",
}
LOUDEST_DB = 200.0
"""Where a plot ends: past it two results are equal to the last bit that float64 holds."""


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        verdict: ``PASS``, ``FAIL``, ``INCONCLUSIVE`` or ``SKIPPED``.
        name: what was checked.
        detail: what was measured, or why it was skipped.
    """

    verdict: str
    name: str
    detail: str


def checks_of(manifest: Manifest, problems: Sequence[str]) -> list[Check]:
    """Return every verdict of the manifest.

    Args:
        manifest: the bundle's.
        problems: what is wrong with the bundle's files now; empty is good.
    """
    checks = manifest.checks
    files = sum(len(entry.files) for entry in manifest.artefacts.values())
    found = [Check("FAIL", "files", problem) for problem in problems] or [
        Check("PASS", "files", f"all {files} have the manifest's SHA-256")
    ]
    for name, entry in checks.items():
        if isinstance(entry, Mapping) and name != "bench":
            found += READERS.get(name, _unknown)(name, entry)
    return found


def verdicts_section(checks: Sequence[Check]) -> Section:
    """Return every verdict, failures first."""
    order = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2, "SKIPPED": 3}
    rows = tuple(
        (c.verdict, c.name, c.detail) for c in sorted(checks, key=lambda c: order[c.verdict])
    )
    return Section("Verdicts", (Grid(("verdict", "check", "measured"), rows),))


def accuracy_section(checks: Mapping[str, Any]) -> Section | None:
    """Return accuracy with its intervals, and what was lost against PyTorch."""
    entry = checks.get("evaluate")
    if not entry:
        return None
    metric = next(iter(entry["accuracies"].values()))["metric"]
    columns = ("network", "runner", "images", f"{metric} %", "95 %", "top-5 %", "95 %", "ECE")
    rows = tuple(
        (
            name,
            entry["runners"][name],
            f"{a['images']:,}",
            f"{100 * a['top1']:.2f}",
            _interval(a["top1_interval"], 100),
            "-" if a["top5"] is None else f"{100 * a['top5']:.2f}",
            "-" if a["top5_interval"] is None else _interval(a["top5_interval"], 100),
            "-" if a["ece"] is None else f"{a['ece']:.3f}",
        )
        for name, a in entry["accuracies"].items()
    )
    blocks: list[Block] = [Grid(columns, rows, frozenset(range(2, 8)))]
    losses = entry.get("losses", {})
    if losses:
        points = [
            Point(
                name,
                entry["loss"]["loss"],
                0.0,
                1 if entry["outcome"] == "pass" else 6,
                entry["loss"]["interval"][0],
                entry["loss"]["interval"][1],
            )
            for name, entry in losses.items()
        ]
        blocks.append(_loss_grid(losses))
        svg = interval_chart(points, Axis(f"{metric} lost against PyTorch (points)"), 960)
        blocks.append(Figure(svg, f"{metric} lost, with its 95 % interval.", wide=True))
    blocks.append(Text(f"Images: {entry['images']}."))
    return Section("Accuracy", tuple(blocks))


def drift_section(checks: Mapping[str, Any]) -> Section | None:
    """Return the plot of SQNR along the network, and the parts that add most error."""
    entry = checks.get("drift")
    if not entry:
        return None
    series, rows = [], []
    for index, (name, drift) in enumerate(entry["artefacts"].items(), start=1):
        placed = [r for r in drift["rows"] if r["sqnr_db"] is not None]
        points = [(i + 1.0, _decibels(r["sqnr_db"])) for i, r in enumerate(placed)]
        if points:
            series.append(Series(name, points, index))
        named = {row["name"]: row for row in drift["rows"]}
        rows += [
            (name, part, _db(named[part]["isolated_db"]), _db(named[part]["sqnr_db"]))
            for part in drift["worst_names"][:5]
            if part in named
        ]
    blocks: list[Block] = []
    if series:
        longest = max(len(s.points) for s in series)
        axis = Axis(f"{entry['level']} in the order of the network", zero=longest > 10)
        svg = line_chart(series, axis, Axis("SQNR against float64 (dB)"), 960, 320)
        words = f"Signal over error after each {entry['level']}, on {entry['images']}."
        blocks.append(Figure(svg, words, wide=True))
    columns = ("artefact", f"worst {entry['level']}", "isolated SQNR (dB, ↑)", "SQNR there (dB, ↑)")
    blocks.append(Grid(columns, tuple(rows), frozenset({2, 3})))
    chain = tuple((s["name"], _db(s["sqnr_db"]), s["reason"]) for s in entry.get("chain", ()))
    if chain:
        caption = "From PyTorch to the last artefact: SQNR of the logits"
        blocks.append(Grid(("step", "SQNR (dB)", ""), chain, frozenset({1}), caption))
    return Section("Drift", tuple(blocks))


def skipped_section(
    manifest: Manifest, checks: Sequence[Check], bench: BenchReport | None
) -> Section | None:
    """Return what was not done, and why."""
    rows = [(c.name, c.detail) for c in checks if c.verdict == "SKIPPED"]
    rows += [(one.name, one.reason) for one in (bench.skipped if bench else ())]
    rows += [
        (name, f"not asked for yet: {what}")
        for name, what in COMMANDS.items()
        if name not in manifest.checks
    ]
    kinds = {entry.precision for entry in manifest.artefacts.values()}
    rows += [
        (kind.upper(), f"not made: `van-deploy quantize --precision {kind}`")
        for kind in ("fp16", "int8")
        if kind not in kinds
    ]
    if not any(entry.kind == "engine" for entry in manifest.artefacts.values()):
        rows.append(("TensorRT engine", "not built: `van-deploy build`"))
    return Section("What was skipped, and why", (Grid(("what", "why"), tuple(rows)),))


def _fold(name: str, entry: Mapping[str, Any]) -> Iterable[Check]:
    yield Check(
        WORDS[bool(entry["passed"])],
        "rewriting",
        f"float64 relative error {float(entry['relative_error_float64']):.1e} (at most "
        f"{entry['tolerance']:.0e}) on {entry['images_compared']} images",
    )


def _simplify(name: str, entry: Mapping[str, Any]) -> Iterable[Check]:
    error = entry.get("relative_error")
    if error is None:
        yield Check("SKIPPED", "simplification", entry["reason"])
        return
    verdict = "PASS" if entry["changed"] else "SKIPPED"
    yield Check(verdict, "simplification", f"{entry['reason']}; relative error {float(error):.1e}")


def _agreement(name: str, entry: Mapping[str, Any]) -> Iterable[Check]:
    for batch in entry["batches"]:
        words = "" if batch["sqnr_db"] is None else f"SQNR {float(batch['sqnr_db']):.1f} dB"
        yield Check(WORDS[batch["outcome"]], f"FP32 agreement, batch {batch['batch']}", words)


def _verify(name: str, entry: Mapping[str, Any]) -> Iterable[Check]:
    for artefact, verdict in entry["artefacts"].items():
        wrong = [f["message"] for f in verdict["findings"] if f["outcome"] == verdict["outcome"]]
        words = "; ".join(filter(None, wrong[:4])) if verdict["outcome"] != "pass" else ""
        figures, limit = verdict.get("comparison"), verdict.get("limit")
        if not words and figures and limit:
            words = (
                f"SQNR {float(figures['sqnr_db']):.1f} dB (limit {float(limit['value']):.1f}: "
                f"{limit['origin']}), {len(verdict['flips'])} label flips"
            )
        yield Check(WORDS[verdict["outcome"]], f"verify {artefact}", words)


def _evaluate(name: str, entry: Mapping[str, Any]) -> Iterable[Check]:
    for artefact, loss in entry.get("losses", {}).items():
        said = [f["message"] for f in loss["findings"] if f["outcome"] == loss["outcome"]]
        yield Check(WORDS[loss["outcome"]], f"top-1 of {artefact}", "; ".join(filter(None, said)))
    for skipped in entry.get("skipped", ()):
        yield Check("SKIPPED", f"top-1 of {skipped['artefact']}", str(skipped["reason"]))


def _nothing(name: str, entry: Mapping[str, Any]) -> Iterable[Check]:
    return ()


def _unknown(name: str, entry: Mapping[str, Any]) -> Iterable[Check]:
    """Yield the verdict of a check this report knows nothing else about."""
    for key in ("passed", "outcome"):
        if entry.get(key) in WORDS:
            detail = str(entry.get("reason") or entry.get("detail") or "")
            yield Check(WORDS[entry[key]], name, detail)
            return


READERS = {
    "fold": _fold,
    "simplify": _simplify,
    "agreement": _agreement,
    "verify": _verify,
    "evaluate": _evaluate,
    "drift": _nothing,
}


def _loss_grid(losses: Mapping[str, Any]) -> Grid:
    columns = ("against PyTorch", "lost (pp)", "95 %", "allowed", "lost", "won", "p", "")
    rows = tuple(
        (
            name,
            f"{entry['loss']['loss']:+.2f}",
            _interval(entry["loss"]["interval"], 1, "+.2f"),
            f"{entry['findings'][-1]['limit']['value']:g}",
            str(entry["loss"]["lost"]),
            str(entry["loss"]["won"]),
            "-" if entry["loss"]["p_value"] is None else f"{entry['loss']['p_value']:.2g}",
            WORDS[entry["outcome"]],
        )
        for name, entry in losses.items()
    )
    return Grid(columns, rows, frozenset(range(1, 7)))


def _interval(pair: Sequence[float], factor: float, form: str = ".2f") -> str:
    return f"{factor * pair[0]:{form}} to {factor * pair[1]:{form}}"


def _decibels(value: object) -> float:
    """Return a level in dB within what a plot can show."""
    level = float(value)  # type: ignore[arg-type]
    return LOUDEST_DB if math.isnan(level) else max(-LOUDEST_DB, min(LOUDEST_DB, level))


def _db(value: object) -> str:
    if value is None:
        return "-"
    return f"{float(value):.1f}"  # type: ignore[arg-type]
