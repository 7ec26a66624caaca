"""A bundle's whole story as a document: what it is, what was checked and measured, what was not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from van_deploy import __version__
from van_deploy.bench.document import SCHEMA, read_report
from van_deploy.bundle import Bundle
from van_deploy.config.sizes import size_text
from van_deploy.documents import plain
from van_deploy.errors import BundleError, InputError
from van_deploy.report import sections_bench as timed
from van_deploy.report import sections_checks as judged
from van_deploy.report import sections_model as model
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
)
from van_deploy.report.figures import bytes_text, count_text, ms_text, state_of

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
STATES = {"FAIL": "failed", "INCONCLUSIVE": "undecided", "PASS": "", "SKIPPED": "skipped"}
"""The worst first, and how the number of checks in each is worded."""
SHOWN_PARTS = 5  # of each artifact's drift
QUOTED_PATH = re.compile(r"'(?:[A-Za-z]:[\\/]|/)[^']*?([^'/\\]+)[/\\]?'")
BARE_PATH = re.compile(r"(?<![\w.:/'<-])/(?:[^\s'\"/,;()]+/)+([^\s'\"/,;()]+)")

Row = tuple[str, str, str]


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
        return _document(bundle)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BundleError(
            f"The manifest of '{bundle.path}' records a check or a graph in a form that this "
            f"version does not read ({type(error).__name__}: {error}).",
            "Run the checks again with this version; if it wrote the bundle, please report it.",
        ) from error


def _document(bundle: Bundle) -> Document:
    manifest, sizes = portable(plain(bundle.manifest)), bundle.sizes()
    digests = {name: artefact.sha256 for name, artefact in bundle.artefacts.items()}
    manifest["checks"], stale = _fresh_checks(manifest["checks"], digests)
    bench, old = _fresh_bench(bundle, digests)
    stale += old
    verdicts = [*_files(bundle), *_verdicts(manifest["checks"])]
    states = Counter(state for state, _, _ in verdicts)
    state = next(state for state in STATES if states[state])
    words = [f"{states['PASS']} of {len(verdicts)} checks passed"]
    words += [f"{states[one]} {word}" for one, word in STATES.items() if word and states[one]]
    precisions = dict.fromkeys(e["precision"].upper() for e in manifest["artefacts"].values())
    size, network = size_text(manifest["preprocessing"]["image_size"]), manifest["architecture"]
    gives = "feature maps" if network["out_indices"] else f"{network['num_classes']} classes"
    named = (f"{w}: measured on another file; run `van-deploy {c}` again" for c, w in stale)
    written = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    return Document(
        title=bundle.name,
        subtitle=f"Visual Attention Network, {count_text(manifest['parameters'])} parameters, "
        f"{size} pixels, {gives}, deployed as {', '.join(precisions)}",
        state="INCONCLUSIVE" if state == "PASS" and stale else state,
        note="; ".join([*words, *[f"{len(stale)} stale"] * bool(stale)]),
        notices=notices("STALE", named),
        tiles=list(_tiles(manifest["checks"], sizes, bench)),
        sections=[
            Section(title, blocks)
            for title, blocks in _sections(manifest, sizes, verdicts, bench)
            if blocks
        ],
        footer=f"Written by van-deploy {__version__} on {written}; the bundle was last changed "
        f"{manifest['written']}.",
    )


def _sections(
    manifest: Entry, sizes: Mapping[str, int], verdicts: Sequence[Row], bench: Entry | None
) -> Iterator[tuple[str, Sequence[Block]]]:
    checks, artefacts, order = manifest["checks"], manifest["artefacts"], [*STATES]
    ordered = sorted(verdicts, key=lambda v: order.index(v[0]) if v[0] in order else len(order))
    yield "Verdicts", checks_table(ordered)
    notes = notices("NOTE", manifest["weights"]["notes"])
    yield "Model", [*model.model_facts(manifest), *notes]
    yield "Artifacts", [*model.artefacts_table(manifest, sizes), *model.sizes_plot(sizes)]
    if checks.get("verify", {}).get("artefacts"):
        names = manifest["class_names"]
        yield "Verification", judged.verify_blocks(checks["verify"], names, full=True)
    if checks.get("evaluate", {}).get("losses"):
        yield "Accuracy", judged.evaluate_blocks(checks["evaluate"])
    if checks.get("drift", {}).get("artefacts"):
        yield "Drift", judged.drift_blocks(checks["drift"], SHOWN_PARTS)
    if bench is not None and bench["rows"]:
        yield "Speed", timed.bench_blocks(bench)
        accuracies = checks.get("evaluate", {}).get("accuracy", {})
        yield "Throughput against accuracy", timed.tradeoff_blocks(accuracies, bench)
    yield "Preprocessing", model.preprocessing_facts(manifest["preprocessing"])
    yield "Graph", model.graph_blocks(manifest)
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    files = [(n, file, digest) for n, e in artefacts.items() for file, digest in e["files"].items()]
    columns = "artifact = 0 name; file = 1 name; SHA-256 = 2 name"
    made_with = Facts({"made with": versions, "bundle schema": manifest["schema"]})
    yield "Provenance", [made_with, *table(files, columns, "Every file", folded=True)]
    left = [(name, detail) for state, name, detail in verdicts if state == "SKIPPED"]
    left += [(name, what) for name, what in COMMANDS.items() if name not in checks]
    made = {entry["precision"] for entry in artefacts.values()}
    left += [
        (kind.upper(), f"not made: `van-deploy quantize --precision {kind}`")
        for kind in ("fp16", "int8")
        if kind not in made
    ]
    if not any(entry["kind"] == "engine" for entry in artefacts.values()):
        left.append(("TensorRT engine", "not built: `van-deploy build`"))
    yield "Not measured", table(left, "what = 0 name; why = 1")


# --- what was found ----------------------------------------------------------------------------


def _files(bundle: Bundle) -> list[Row]:
    problems = [("FAIL", "files", problem) for problem in portable(bundle.problems())]
    return problems or [("PASS", "files", f"all {len(bundle.digests)} have the manifest's SHA-256")]


def _verdicts(checks: Entry) -> Iterator[Row]:
    """Yield state, name and detail of every check."""
    yield from model.proof_rows(checks)
    for name, verdict in checks.get("verify", {}).get("artefacts", {}).items():
        figures, limit = verdict["comparison"], verdict["limit"]
        said = "; ".join(_said(verdict)[:4])
        if verdict["outcome"] == "pass" and figures and limit:
            said = (
                f"SQNR {float(figures['sqnr_db']):.1f} dB (limit {float(limit['value']):.1f}: "
                f"{limit['origin']}), {len(verdict['flips'])} label flips"
            )
        yield state_of(verdict["outcome"]), f"verify {name}", said
    for own, original, loss in _losses(checks):
        pair = f"{100 * own['top1']:.2f} %, PyTorch {100 * original['top1']:.2f} %"
        said = "; ".join([pair, *_said(loss)])
        yield state_of(loss["outcome"]), f"{own['metric']} of {own['name']}", said
    for skipped in checks.get("evaluate", {}).get("skipped", ()):
        yield "SKIPPED", f"evaluate {skipped['artefact']}", str(skipped["reason"])
    for name, entry in checks.items():  # a check this report knows nothing else about
        outcome = entry.get("outcome", entry.get("passed")) if isinstance(entry, Mapping) else None
        if outcome is not None and name not in KNOWN:
            yield state_of(outcome), name, str(entry.get("reason") or entry.get("detail") or "")


def _losses(checks: Entry) -> Iterator[tuple[Entry, Entry, Entry]]:
    """Yield the accuracy of each artifact with its name, PyTorch's, and what was lost."""
    evaluated = checks.get("evaluate", {})
    for name, loss in evaluated.get("losses", {}).items():
        accuracy = evaluated["accuracy"]
        yield {**accuracy[name], "name": name}, accuracy["pytorch"], loss


def _said(entry: Entry) -> list[str]:
    said = (f["message"] for f in entry["findings"] if f["outcome"] == entry["outcome"])
    return list(filter(None, said))


def _fresh_checks(
    checks: Entry, digests: Mapping[str, str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the checks without entries of artifacts made anew since, and ``(check, what)``."""
    fresh, stale = {}, []
    for name, entry in checks.items():
        measured = entry.get("artefacts_sha256", {}) if isinstance(entry, Mapping) else {}
        gone = {one for one, digest in measured.items() if digests.get(one) != digest}
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
        bench = portable(plain(read_report(path)))
    except InputError:
        head = path.read_text("utf-8", "replace")[:100] if path.is_file() else ""
        other = "van-deploy/bench/" in head and SCHEMA not in head
        return None, [("bench", f"{BENCH_FILE}, of another version")] * other
    known = {*digests.values(), bundle.manifest.weights.sha256}
    gone = {name for name, entry in bench["contenders"].items() if entry["sha256"] not in known}
    for key in ("rows", "roofline"):
        bench[key] = [row for row in bench[key] if row["contender"] not in gone]
    return bench, [("bench", f"speed of {name}") for name in sorted(gone)]


def _tiles(checks: Entry, sizes: Mapping[str, int], bench: Entry | None) -> Iterator[Tile]:
    """Yield the numbers people look for first, those that exist."""
    if bench is not None and (best := timed.fastest(bench)) is not None:
        reference, name = str(bench["reference"]), best["contender"]
        slower = "PyTorch" if reference.startswith("pytorch") else reference
        is_faster = best["ratio"] and name != reference
        times = f"{best['ratio']['median']:.1f} x {slower}, " if is_faster else ""
        loaded = bench["machine"]["under_load"]
        note = f"{times}{name}{', measured under load' * loaded}"
        label, value = f"Fastest at batch {best['batch']}", f"{ms_text(best['p50'])} ms"
        yield Tile(label, value, note, "warn" * loaded)
    losses = list(_losses(checks))
    for own, original, loss in losses:
        state = state_of(loss["outcome"])
        tone = {"FAIL": "bad", "INCONCLUSIVE": "open"}.get(state, "")
        note = f"PyTorch {100 * original['top1']:.2f} %{'' if state == 'PASS' else f', {state}'}"
        yield Tile(f"{own['metric']} of {own['name']}", f"{100 * own['top1']:.2f} %", note, tone)
    if not losses and "agreement" in checks:
        levels = [e["sqnr_db"] for e in checks["agreement"]["batches"] if e["sqnr_db"] is not None]
        least = f"{min(map(float, levels), default=float('nan')):.1f} dB"
        yield Tile("FP32 against PyTorch", least, "lowest of all batch sizes")
    smallest = min(sizes, key=sizes.__getitem__)
    yield Tile("Smallest artifact", bytes_text(sizes[smallest]), smallest)


def portable(value: Any) -> Any:
    r"""Return what JSON can hold with the folders of every absolute path left out.

    >>> portable(["16 of 520 images of '/data/cifar10/calib',\n/srv/a/b.onnx; 3 images/s"])
    ["16 of 520 images of 'calib',\nb.onnx; 3 images/s"]
    """
    if isinstance(value, str):
        return BARE_PATH.sub(r"\1", QUOTED_PATH.sub(r"'\1'", value))
    if isinstance(value, Mapping):
        return {name: portable(item) for name, item in value.items()}
    return [portable(item) for item in value] if isinstance(value, list | tuple) else value
