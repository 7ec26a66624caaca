"""A bundle's whole story as a document: what it is, what was checked and measured, what was not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

from van_deploy import __version__
from van_deploy.bench.document import SCHEMA, read_report
from van_deploy.bundle import Bundle
from van_deploy.config.sizes import size_text
from van_deploy.documents import json_from, plain, text_from
from van_deploy.errors import BundleError, InputError
from van_deploy.report.document import (
    Block,
    Document,
    Entry,
    Facts,
    Section,
    Tile,
    checks_table,
    notices,
    table,
    worst,
)
from van_deploy.report.figures import bytes_text, count_text, ms_text, state_of
from van_deploy.report.sections_bench import bench_blocks, fastest, tradeoff_blocks
from van_deploy.report.sections_checks import drift_blocks, evaluate_blocks, verify_blocks
from van_deploy.report.sections_model import (
    artefacts_table,
    graph_blocks,
    model_facts,
    preprocessing_facts,
    proof_rows,
    sizes_plot,
)

__all__ = ["document_of_bundle", "portable"]

BENCH_FILE = "bench.json"
BY_ARTEFACT = ("artefacts", "accuracy", "losses", "runners")
"""Keys of a check's result under which there is one entry an artifact."""
KNOWN = ("fold", "simplify", "agreement", "verify", "evaluate", "drift", "bench")
COMMANDS = {
    "verify": "every artifact against PyTorch at every batch size: `van-deploy verify`",
    "evaluate": "accuracy on labelled images: `van-deploy evaluate`",
    "drift": "where in the network an artifact drifts: `van-deploy drift`",
    "bench": "speed: `van-deploy bench`",
}
STATES = ("FAIL", "INCONCLUSIVE", "PASS", "SKIPPED")
SHOWN_PARTS = 5  # of each artifact's drift
QUOTED_PATH = re.compile(r"'(?:[A-Za-z]:[\\/]|/)[^']*?([^'/\\]+)[/\\]?'")
BARE_PATH = re.compile(r"(?<![\w.:/'<-])/(?:[^\s'\"/,;()]+/)+([^\s'\"/,;()]+)")

Row = tuple[str, str, str]
Kind = TypeVar("Kind")


def document_of_bundle(bundle: Bundle) -> Document:
    """Return the report of a bundle: everything its manifest and its benchmark say.

    Results of files that are no longer in the bundle are left out and named at the top; what no
    command has measured yet is named in the last section. Paths lose their folders: a report is
    read elsewhere.

    Raises:
        BundleError: a file of an artifact is missing, or a check's record in the manifest
            cannot be read.
    """
    try:
        return portable(_document(bundle))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BundleError(
            f"The manifest of '{bundle.path}' records a check or a graph in a form that this "
            f"version does not read ({type(error).__name__}: {error}).",
            "Run the checks again with this version; if it wrote the bundle, please report it.",
        ) from error


def _document(bundle: Bundle) -> Document:
    manifest, sizes = plain(bundle.manifest), bundle.sizes()
    digests = {name: artefact.sha256 for name, artefact in bundle.artefacts.items()}
    checks, stale = _fresh_checks(manifest["checks"], digests)
    bench, old = _fresh_bench(bundle, digests)
    manifest["checks"] = checks
    rows = [*_files(bundle), *_verdicts(checks)]
    states = [state for state, _, _ in rows]
    words = [f"{states.count('PASS')} of {len(rows)} checks passed"]
    for state, word in zip(STATES, ("failed", "undecided", "", "skipped"), strict=True):
        words += [f"{states.count(state)} {word}"] if word and state in states else []
    words += [f"{len(stale) + len(old)} stale"] if stale or old else []
    state = "INCONCLUSIVE" if worst(states) == "PASS" and (stale or old) else worst(states)
    named = (
        f"{what}: measured on another file; run `van-deploy {command}` again"
        for command, what in (*stale, *old)
    )
    precisions = dict.fromkeys(e["precision"].upper() for e in manifest["artefacts"].values())
    size, network = size_text(manifest["preprocessing"]["image_size"]), manifest["architecture"]
    classes = f"{network['num_classes']} classes"
    gives = classes if not network["out_indices"] else "feature maps"
    return Document(
        title=bundle.name,
        subtitle=f"Visual Attention Network, {count_text(manifest['parameters'])} parameters, "
        f"{size} pixels, {gives}, deployed as {', '.join(precisions)}",
        state=state,
        note="; ".join(words),
        notices=notices("STALE", named),
        tiles=list(_tiles(checks, sizes, bench)),
        sections=[
            Section(title, blocks)
            for title, blocks in _sections(bundle, manifest, rows, bench)
            if blocks
        ],
        footer=f"Written by van-deploy {__version__} on "
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; the bundle was last changed "
        f"{manifest['written']}.",
    )


def _sections(
    bundle: Bundle, manifest: Entry, verdicts: Sequence[Row], bench: Entry | None
) -> Iterator[tuple[str, Sequence[Block]]]:
    checks, sizes = manifest["checks"], bundle.sizes()
    ordered = sorted(verdicts, key=lambda v: STATES.index(v[0]) if v[0] in STATES else len(STATES))
    yield "Verdicts", checks_table(ordered)
    yield "Model", [*model_facts(manifest), *notices("NOTE", manifest["weights"]["notes"])]
    yield "Artifacts", [*artefacts_table(manifest, sizes), *sizes_plot(sizes)]
    if checks.get("verify", {}).get("artefacts"):
        yield "Verification", verify_blocks(checks["verify"], manifest["class_names"], full=True)
    if checks.get("evaluate", {}).get("losses"):
        yield "Accuracy", evaluate_blocks(checks["evaluate"])
    if checks.get("drift", {}).get("artefacts"):
        yield "Drift", drift_blocks(checks["drift"], SHOWN_PARTS)
    if bench is not None and bench["rows"]:
        yield "Speed", bench_blocks(bench)
        accuracies = checks.get("evaluate", {}).get("accuracy", {})
        yield "Throughput against accuracy", tradeoff_blocks(accuracies, bench)
    yield "Preprocessing", preprocessing_facts(manifest["preprocessing"])
    yield "Graph", graph_blocks(manifest)
    yield "Provenance", _provenance(manifest)
    yield "Not measured", _not_done(manifest, verdicts)


# --- what was found ----------------------------------------------------------------------------


def _files(bundle: Bundle) -> list[Row]:
    problems = [("FAIL", "files", problem) for problem in bundle.problems()]
    return problems or [("PASS", "files", f"all {len(bundle.digests)} have the manifest's SHA-256")]


def _verdicts(checks: Entry) -> Iterator[Row]:
    """Yield state, name and detail of every check."""
    yield from proof_rows(checks)
    for name, verdict in checks.get("verify", {}).get("artefacts", {}).items():
        yield state_of(verdict["outcome"]), f"verify {name}", _verified(verdict)
    evaluated = checks.get("evaluate", {})
    for name, loss in evaluated.get("losses", {}).items():
        own, original = (evaluated["accuracy"][n] for n in (name, "pytorch"))
        pair = f"{100 * own['top1']:.2f} %, PyTorch {100 * original['top1']:.2f} %"
        said = "; ".join(filter(None, [pair, *_said(loss)]))
        yield state_of(loss["outcome"]), f"{own['metric']} of {name}", said
    for skipped in evaluated.get("skipped", ()):
        yield "SKIPPED", f"evaluate {skipped['artefact']}", str(skipped["reason"])
    for name, entry in checks.items():  # a check this report knows nothing else about
        outcome = entry.get("outcome", entry.get("passed")) if isinstance(entry, Mapping) else None
        if outcome is not None and name not in KNOWN:
            yield state_of(outcome), name, str(entry.get("reason") or entry.get("detail") or "")


def _said(entry: Entry) -> list[str]:
    return [f["message"] for f in entry["findings"] if f["outcome"] == entry["outcome"]]


def _verified(verdict: Entry) -> str:
    figures, limit = verdict["comparison"], verdict["limit"]
    if verdict["outcome"] != "pass" or not figures or not limit:
        return "; ".join([said for said in _said(verdict) if said][:4])
    return (
        f"SQNR {float(figures['sqnr_db']):.1f} dB (limit {float(limit['value']):.1f}: "
        f"{limit['origin']}), {len(verdict['flips'])} label flips"
    )


def _fresh_checks(
    checks: Entry, digests: Mapping[str, str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the checks without entries of artifacts made anew since, and ``(check, what)``."""
    fresh, stale = {}, []
    for name, entry in checks.items():
        measured = entry.get("artefacts_sha256", {}) if isinstance(entry, Mapping) else {}
        gone = {
            artefact for artefact, digest in measured.items() if digests.get(artefact) != digest
        }
        stale += [(name, f"{name} of {artefact}") for artefact in sorted(gone)]
        fresh[name] = entry
        for key in BY_ARTEFACT if gone else ():
            kept = {n: item for n, item in (entry.get(key) or {}).items() if n not in gone}
            fresh[name] = {**fresh[name], key: kept}
    return fresh, stale


def _fresh_bench(
    bundle: Bundle, digests: Mapping[str, str]
) -> tuple[Entry | None, list[tuple[str, str]]]:
    """Return the benchmark kept in the bundle without rows of other files, and what is stale."""
    path = bundle.path / BENCH_FILE
    try:
        bench = plain(read_report(path))
    except InputError:
        try:
            schema = str(json_from(text_from(path))["schema"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, []
        other = schema.startswith("van-deploy/bench/") and schema != SCHEMA
        return None, [("bench", f"{BENCH_FILE}, of another version")] if other else []
    known = {*digests.values(), bundle.manifest.weights.sha256}
    gone = {name for name, entry in bench["contenders"].items() if entry["sha256"] not in known}
    for key in ("rows", "roofline"):
        bench[key] = [row for row in bench[key] if row["contender"] not in gone]
    bench["loading"] = {name: took for name, took in bench["loading"].items() if name not in gone}
    return bench, [("bench", f"speed of {name}") for name in sorted(gone)]


def _tiles(checks: Entry, sizes: Mapping[str, int], bench: Entry | None) -> Iterator[Tile]:
    """Yield the numbers people look for first, those that exist."""
    best = fastest(bench) if bench else None
    if best is not None and bench is not None:
        times = f"{best['ratio']['median']:.1f} x PyTorch, " if best["ratio"] else ""
        loaded = bench["during"]["under_load"]
        note = f"{times}{best['contender']}{', measured under load' if loaded else ''}"
        label, tone = f"Fastest at batch {best['batch']}", "warn" if loaded else ""
        yield Tile(label, f"{ms_text(best['latency']['p50_ms'])} ms", note, tone)
    evaluated = checks.get("evaluate", {})
    for name, loss in evaluated.get("losses", {}).items():
        own, original = (evaluated["accuracy"][n] for n in (name, "pytorch"))
        state = state_of(loss["outcome"])
        tone = {"FAIL": "bad", "INCONCLUSIVE": "open"}.get(state, "")
        note = f"PyTorch {100 * original['top1']:.2f} %{'' if state == 'PASS' else f', {state}'}"
        yield Tile(f"{own['metric']} of {name}", f"{100 * own['top1']:.2f} %", note, tone)
    if not evaluated.get("losses") and "agreement" in checks:
        levels = [e["sqnr_db"] for e in checks["agreement"]["batches"] if e["sqnr_db"] is not None]
        least = f"{min(map(float, levels), default=float('nan')):.1f} dB"
        yield Tile("FP32 against PyTorch", least, "lowest of all batch sizes")
    smallest = min(sizes, key=lambda name: sizes[name])
    yield Tile("Smallest artifact", bytes_text(sizes[smallest]), smallest)


# --- the model ---------------------------------------------------------------------------------


def _provenance(manifest: Entry) -> list[Block]:
    artefacts = manifest["artefacts"]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    files = [(n, file, digest) for n, e in artefacts.items() for file, digest in e["files"].items()]
    columns = "artifact = 0 name; file = 1 name; SHA-256 = 2 name"
    return [
        Facts({"made with": versions, "bundle schema": manifest["schema"]}),
        *table(files, columns, "Every file", folded=True),
    ]


def _not_done(manifest: Entry, verdicts: Sequence[Row]) -> list[Block]:
    artefacts = manifest["artefacts"].values()
    rows = [(name, detail) for state, name, detail in verdicts if state == "SKIPPED"]
    rows += [(name, what) for name, what in COMMANDS.items() if name not in manifest["checks"]]
    rows += [
        (kind.upper(), f"not made: `van-deploy quantize --precision {kind}`")
        for kind in ("fp16", "int8")
        if kind not in {entry["precision"] for entry in artefacts}
    ]
    if not any(entry["kind"] == "engine" for entry in artefacts):
        rows.append(("TensorRT engine", "not built: `van-deploy build`"))
    return table(rows, "what = 0 name; why = 1")


# --- paths -------------------------------------------------------------------------------------


def portable(value: Kind) -> Kind:
    """Return a document's part with the folders of every absolute path left out.

    >>> portable("16 of 520 images of '/data/cifar10/calib', in /srv/a/b.onnx; 3 images/s")
    "16 of 520 images of 'calib', in b.onnx; 3 images/s"
    """
    found: Any = value
    if isinstance(value, str):
        found = BARE_PATH.sub(r"\1", QUOTED_PATH.sub(r"'\1'", value))
    elif isinstance(value, Mapping):
        found = {name: portable(item) for name, item in value.items()}
    elif isinstance(value, list | tuple):
        found = [portable(item) for item in value]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.name != "svg"]
        found = dataclasses.replace(value, **{n: portable(getattr(value, n)) for n in fields})
    return found
