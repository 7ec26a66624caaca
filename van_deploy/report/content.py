"""A bundle's whole story as a document: what was asked, made, checked, measured and skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from van_deploy import __version__
from van_deploy.bench.document import SCHEMA, BenchReport, read_report
from van_deploy.bundle import Bundle, Manifest
from van_deploy.documents import json_from, text_from
from van_deploy.errors import BundleError, InputError
from van_deploy.report.bench_view import ms_text
from van_deploy.report.content_checks import (
    Check,
    accuracy_section,
    checks_of,
    drift_section,
    skipped_section,
    verdicts_section,
)
from van_deploy.report.content_model import (
    graph_section,
    made_section,
    model_section,
    preprocessing_section,
    provenance_section,
)
from van_deploy.report.content_speed import (
    fastest,
    roofline_section,
    speed_section,
    tradeoff_section,
)
from van_deploy.report.document import Document, Section, Tile
from van_deploy.report.freshness import fresh_bench, fresh_checks
from van_deploy.report.tables import bytes_text, count_text

__all__ = ["document_of"]

BENCH_FILE = "bench.json"


@dataclass(frozen=True)
class _Found:
    """What the bundle holds, read once."""

    manifest: Manifest
    sizes: Mapping[str, int]
    checks: list[Check]
    bench: BenchReport | None


def document_of(bundle: Bundle) -> Document:
    """Return the report of a bundle: everything its manifest and its benchmark say.

    What no command has measured yet is named in the last section, with the
    command that would.

    Raises:
        BundleError: a file of an artefact is missing, or a check's record in the manifest
            cannot be read.
    """
    try:
        return _document(bundle)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BundleError(
            f"The manifest of '{bundle.path}' records a check or a graph in a form that this "
            f"version does not read ({type(error).__name__}: {error}).",
            "Run the checks again with this version; if it wrote the bundle, please report it.",
        ) from error


def _document(bundle: Bundle) -> Document:
    checks, stale = fresh_checks(bundle.manifest)
    manifest = bundle.manifest.model_copy(update={"checks": checks})
    kept = _bench(bundle)
    bench, outdated = fresh_bench(manifest, kept if isinstance(kept, BenchReport) else None)
    verdicts = checks_of(manifest, bundle.problems())
    verdicts += [
        Check(
            "SKIPPED", f"{name} {what}", f"measured on another file: run `van-deploy {name}` again"
        )
        for name, what in (*stale, *outdated)
    ]
    if isinstance(kept, str):
        reason = f"{BENCH_FILE} was written by another version: run `van-deploy bench` again"
        verdicts.append(Check("SKIPPED", "bench", reason))
    found = _Found(manifest, bundle.sizes(), verdicts, bench)
    counts = {word: sum(c.verdict == word for c in found.checks) for word in ("PASS", "FAIL")}
    words = "no check" if not found.checks else f"{counts['PASS']} of {len(found.checks)} checks"
    failed = f"; {counts['FAIL']} failed" if counts["FAIL"] else ""
    verdict = "FAIL" if counts["FAIL"] else "PASS" if counts["PASS"] else "SKIPPED"
    sections = (
        model_section(manifest),
        made_section(manifest, found.sizes),
        preprocessing_section(bundle),
        verdicts_section(found.checks),
        accuracy_section(manifest.checks),
        drift_section(manifest.checks),
        speed_section(found.bench),
        tradeoff_section(manifest.checks, found.bench),
        roofline_section(found.bench),
        graph_section(manifest),
        provenance_section(manifest),
        skipped_section(manifest, found.checks, found.bench),
    )
    return Document(
        title=bundle.name,
        subtitle=_subtitle(manifest),
        verdict=verdict,
        verdict_note=f"{words} passed{failed}",
        tiles=tuple(_tiles(found)),
        sections=tuple(section for section in sections if isinstance(section, Section)),
        footer=_footer(manifest),
    )


def _bench(bundle: Bundle) -> BenchReport | str | None:
    """Return the benchmark kept in the bundle, or the schema of another version's.

    None without one that can be read.
    """
    path = bundle.path / BENCH_FILE
    try:
        return read_report(path)
    except InputError:
        try:
            schema = json_from(text_from(path))["schema"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
    other = isinstance(schema, str) and schema.startswith("van-deploy/bench/")
    return schema if other and schema != SCHEMA else None


def _subtitle(manifest: Manifest) -> str:
    size = manifest.preprocessing.image_size
    precisions = sorted({entry.precision.upper() for entry in manifest.artefacts.values()})
    return (
        f"Visual Attention Network, {count_text(manifest.parameters)} parameters, "
        f"{size} x {size} pixels, {manifest.architecture.num_classes} classes, "
        f"deployed as {', '.join(precisions)}"
    )


def _tiles(found: _Found) -> list[Tile]:
    """Return the numbers people look for first, those that exist."""
    tiles = []
    best = fastest(found.bench) if found.bench else None
    if best is not None:
        times = f"{best.ratio.median:.1f} x PyTorch, " if best.ratio else ""
        loaded = found.bench is not None and found.bench.during.under_load
        tiles.append(
            Tile(
                f"Fastest at batch {best.batch}",
                f"{ms_text(best.times.p50_ms)} ms",
                f"{times}{best.contender}{', measured under load' if loaded else ''}",
                "warn" if loaded else "",
            )
        )
    evaluated = found.manifest.checks.get("evaluate", {}).get("accuracies", {})
    if evaluated:
        name, entry = list(evaluated.items())[-1]
        low, high = entry["top1_interval"]
        interval = f"95 %: {100 * low:.1f} to {100 * high:.1f}"
        tiles.append(Tile(f"{entry['metric']} of {name}", f"{100 * entry['top1']:.2f} %", interval))
    agreement = found.manifest.checks.get("agreement")
    if agreement:
        worst = min(float(entry["sqnr_db"]) for entry in agreement["batches"])
        note = f"lowest of batch {', '.join(str(e['batch']) for e in agreement['batches'])}"
        tone = "" if agreement["outcome"] == "pass" else "bad"
        tiles.append(Tile("FP32 against PyTorch", f"{worst:.1f} dB", note, tone))
    smallest = min(found.sizes, key=lambda name: found.sizes[name], default=None)
    if smallest is not None:
        size = bytes_text(found.sizes[smallest])
        note = f"{smallest}, of {len(found.sizes)}" if len(found.sizes) > 1 else smallest
        tiles.append(Tile("Smallest artefact", size, note))
    exported = found.manifest.artefacts.get("fp32")
    if exported and exported.graph:
        folded = found.manifest.checks.get("fold", {}).get("batchnorms_folded", 0)
        tiles.append(Tile("Operators", str(exported.graph.nodes), f"{folded} BatchNorms folded"))
    return tiles


def _footer(manifest: Manifest) -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    changed = f"the bundle was last changed {manifest.written}"
    return f"Written by van-deploy {__version__} on {now}; {changed}."
