"""Report files: the deployment report of a bundle, the job summary and JUnit XML of a check."""

from __future__ import annotations

import contextlib
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from van_deploy import __version__
from van_deploy.bench.document import BENCH_FILE, read_report
from van_deploy.bundle import MANIFEST, Bundle, edit_bundle
from van_deploy.checks.gates import outcome_of
from van_deploy.checks.regression import CheckReport
from van_deploy.config.sizes import format_size
from van_deploy.documents import limit_lines, plain
from van_deploy.errors import BundleError, InputError
from van_deploy.files import write_atomic
from van_deploy.report import document as doc
from van_deploy.report import sections_bench, sections_checks, sections_model
from van_deploy.report.document import Block, Document, Entry, state_text, table
from van_deploy.report.render_html import html_from_document
from van_deploy.report.render_markdown import markdown_from_document

# State, name and message of a check.
Verdict = tuple[str, str, str]

# Keys of a check's result with one entry per artifact.
BY_ARTIFACT = ("artifacts", "accuracy", "losses", "runners")

# Commands for missing checks, precisions and kinds of artifacts.
COMMANDS = {
    "verify": "every artifact against PyTorch at every batch size: `van-deploy verify`",
    "evaluate": "accuracy on labelled images: `van-deploy evaluate`",
    "drift": "the error of each part of the network: `van-deploy drift`",
    "bench": "speed: `van-deploy bench`",
    "fp16": "not created: `van-deploy quantize --precision fp16`",
    "int8": "not created: `van-deploy quantize --precision int8`",
    "engine": "not built: `van-deploy build`",
}

# From the worst to the best, with the word for the number of checks.
STATES = {"FAIL": "failed", "INCONCLUSIVE": "undecided", "PASS": "", "SKIPPED": "skipped"}
QUOTED_PATH = re.compile(r"'(?:[A-Za-z]:[\\/]|/)[^']*?([^'/\\]+)[/\\]?'")
BARE_PATH = re.compile(r"(?<![\w.:/'<-])/(?:[^\s'\"/,;()]+/)+([^\s'\"/,;()]+)")


def document_of_bundle(bundle: Bundle) -> Document:
    """Return the report of a bundle from its manifest and its benchmark.

    Results of other files than those in the bundle are left out and listed at the top; missing
    measurements are listed in the last section. Paths lose their folders, because the report is
    read on other machines.

    Raises:
        BundleError: a file of an artifact is missing, or the record of a check in the manifest
            cannot be read.
    """
    try:
        return _document(bundle)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BundleError(
            f"The manifest of '{bundle.path}' has a record of a check or a graph that this "
            f"version cannot read ({type(error).__name__}: {error}).",
            "Run the checks again with this version; if it wrote the bundle, report a bug.",
        ) from error


def _document(bundle: Bundle) -> Document:
    manifest, sizes = portable(plain(bundle.manifest)), bundle.sizes()
    manifest["checks"], bench, stale = _drop_stale(bundle, manifest["checks"])
    problems = [("FAIL", "files", problem) for problem in portable(bundle.problems())]
    message = f"all {len(bundle.digests)} have the manifest's SHA-256"
    verdicts = [*(problems or [("PASS", "files", message)]), *_verdicts(manifest)]
    checks, artifacts = manifest["checks"], manifest["artifacts"]
    others = {*artifacts} - {*checks.get("verify", {"artifacts": artifacts})["artifacts"]}
    # A check that did not pass has, for example, a skip that no option accepts; a FAIL has a row.
    undecided = stale or others or any(one.get("passed") is False for one in checks.values())
    states = Counter(state for state, _, _ in verdicts)
    state = next(state for state in STATES if states[state])
    words = [f"{states['PASS']} of {len(verdicts)} checks passed"]
    words += [f"{states[one]} {word}" for one, word in STATES.items() if word and states[one]]
    words += [f"{len(stale)} stale"] * bool(stale)
    words += [f"not verified: {', '.join(sorted(others))}"] * bool(others)
    precisions = dict.fromkeys(one["precision"].upper() for one in artifacts.values())
    size, network = format_size(manifest["preprocessing"]["image_size"]), manifest["architecture"]
    gives = "feature maps" if network["out_indices"] else f"{network['num_classes']} classes"
    again = (f"{what}; run `van-deploy {command}` again" for command, what in stale)
    return Document(
        title=bundle.name,
        subtitle=f"Visual Attention Network, {doc.count_text(manifest['parameters'])} parameters, "
        f"{size} pixels, {gives}, deployed as {', '.join(precisions)}",
        state="INCONCLUSIVE" if state == "PASS" and undecided else state,
        note="; ".join(words),
        sections={t: blocks for t, blocks in _sections(manifest, sizes, verdicts, bench) if blocks},
        notices=doc.notices("STALE", again),
        footer=f"Written by van-deploy {__version__}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} "
        f"UTC; the bundle was last changed {manifest['written']}.",
    )


def _sections(
    manifest: Entry, sizes: Mapping[str, int], verdicts: Sequence[Verdict], bench: Entry | None
) -> Iterator[tuple[str, Sequence[Block]]]:
    checks, artifacts = manifest["checks"], manifest["artifacts"]
    ordered = sorted(verdicts, key=lambda verdict: [*STATES, verdict[0]].index(verdict[0]))
    yield "Verdicts", doc.checks_table(ordered)
    notes = doc.notices("NOTE", manifest["weights"]["notes"])
    yield "Model", [*sections_model.model_properties(manifest), *notes]
    yield "Artifacts", sections_model.artifacts_table(manifest, sizes)
    if checks.get("verify", {}).get("artifacts"):
        names = manifest["class_names"]
        yield "Verification", sections_checks.verify_blocks(checks["verify"], names)
    if checks.get("evaluate", {}).get("losses"):
        yield "Accuracy", sections_checks.evaluate_blocks(checks["evaluate"])
    if checks.get("drift", {}).get("artifacts"):
        yield "Drift", sections_checks.drift_blocks(checks["drift"])
    if bench is not None and bench["rows"]:
        accuracies = checks.get("evaluate", {}).get("accuracy", {})
        tradeoff = sections_bench.tradeoff_plots(accuracies, bench)
        yield "Speed", [*sections_bench.bench_blocks(bench), *tradeoff]
    yield "Preprocessing", sections_model.preprocessing_properties(manifest["preprocessing"])
    yield "Graph", sections_model.graph_blocks(artifacts)
    files = [(n, file, digest) for n, e in artifacts.items() for file, digest in e["files"].items()]
    columns = "artifact = 0 name; file = 1 name; SHA-256 = 2 name"
    made_with = {"made with": manifest["versions"], "bundle schema": manifest["schema"]}
    yield "Provenance", [*doc.key_values(made_with), *table(files, columns, "Every file")]
    done = {*checks, *(e[key] for e in artifacts.values() for key in ("precision", "kind"))}
    network = manifest["architecture"]
    if network["out_indices"] or network["problem_type"] == "regression":
        done.add("evaluate")  # there are no classes
    missing = [(name, message) for state, name, message in verdicts if state == "SKIPPED"]
    missing += [(name, command) for name, command in COMMANDS.items() if name not in done]
    for command, key in (("verify", "artifacts"), ("evaluate", "losses")):
        check = checks.get(command, {key: artifacts})
        found = {**check[key], **check.get("skipped", {})}
        missing += [(n, f"no result: `van-deploy {command}`") for n in artifacts if n not in found]
    yield "Not measured", table(missing, "name = 0 name; reason = 1")


def _verdicts(manifest: Entry) -> Iterator[Verdict]:
    """Yield the verdict of every check."""
    checks = manifest["checks"]
    for outcome, name, message in sections_model.export_check_rows(checks):
        yield state_text(outcome), name, message
    for name, artifact in manifest["artifacts"].items():
        if facts := artifact["quantization"]:
            yield _quantize_verdict(name, facts)
    for finding in checks.get("verify", {}).get("findings", ()):
        message = finding["message"] or "same pixels as at export"
        yield state_text(finding["outcome"]), finding["rule"], message
    for name, verdict in checks.get("verify", {}).get("artifacts", {}).items():
        comparison, limit, message = verdict["comparison"], verdict["limit"], verdict["reason"]
        if verdict["outcome"] == "pass" and comparison and limit:
            flips = f", {len(verdict['flips'])} label flips"
            message = (
                f"SQNR {float(comparison['sqnr_db']):.1f} dB (limit {float(limit['value']):.1f}: "
                f"{limit['origin']}){flips * (comparison['top1_agreement'] is not None)}"
            )
        yield state_text(verdict["outcome"]), f"verify {name}", message
    evaluated = checks.get("evaluate", {})
    for name, loss in evaluated.get("losses", {}).items():
        own, original = evaluated["accuracy"][name], evaluated["accuracy"]["pytorch"]
        pair = f"{100 * own['top1']:.2f} %, PyTorch {100 * original['top1']:.2f} %"
        messages = [f["message"] for f in loss["findings"] if f["outcome"] == loss["outcome"]]
        message = "; ".join(filter(None, [pair, *messages]))
        yield state_text(loss["outcome"]), f"{own['metric']} of {name}", message
    for name, skipped in evaluated.get("skipped", {}).items():
        yield "SKIPPED", f"evaluate {name}", skipped["message"]


def _quantize_verdict(name: str, facts: Entry) -> Verdict:
    """Return the verdict of the gates that ``quantize`` applied, as in its exit code."""
    (row,) = (row for row in facts["comparison"] if row["requested"])
    found = (facts.get("golden_check") or {}).get("findings", ())
    failed, undecided = (
        [*row[key], *(f["message"] for f in found if f["outcome"] == outcome)]
        for key, outcome in (("failures", "fail"), ("inconclusive", "inconclusive"))
    )
    if not (facts.get("search") or {"passed": True})["passed"]:
        failed.append("no plan was within the accuracy budget")
    state = "FAIL" if failed else "INCONCLUSIVE" if undecided else "PASS"
    measured = f"SQNR {doc.format_value(row['sqnr_db'], '.1f')} dB on {row['images']} images"
    return state, f"quantize {name}", "; ".join([measured, *limit_lines(failed or undecided, 4)])


def _drop_stale(bundle: Bundle, checks: Entry) -> tuple[Entry, Entry | None, list[tuple[str, str]]]:
    """Return checks and benchmark without stale results, and command and message of the latter."""
    digests = {name: artifact.sha256 for name, artifact in bundle.artifacts.items()}
    fresh, stale, path = {}, [], bundle.path / BENCH_FILE
    for name, entry in checks.items():
        measured = entry.get("artifacts_sha256", {}).items()
        gone = {one for one, digest in measured if digests.get(one) != digest}
        stale += [(name, f"{name} of {one}: measured on another file") for one in sorted(gone)]
        fresh[name] = dict(entry)
        for key in {*BY_ARTIFACT} & {*entry} if gone else ():
            fresh[name][key] = {n: one for n, one in entry[key].items() if n not in gone}
        if "chain" in entry:
            fresh[name]["chain"] = [row for row in entry["chain"] if row["name"] not in gone]
    try:
        bench = portable(plain(read_report(path)))
    except InputError:
        unreadable = [("bench", f"{BENCH_FILE}: not of this version")]
        return fresh, None, [*stale, *unreadable * path.is_file()]
    known = {*digests.values(), bundle.manifest.weights.sha256}
    gone = {name for name, entry in bench["contenders"].items() if entry["sha256"] not in known}
    for key in ("rows", "roofline"):
        bench[key] = [row for row in bench[key] if row["contender"] not in gone]
    stale += [("bench", f"speed of {one}: measured on another file") for one in sorted(gone)]
    return fresh, bench, stale


def portable(value: Any) -> Any:
    r"""Return a JSON value with absolute paths reduced to their last part.

    >>> portable(["16 of 520 images of '/data/cifar10/calib',\n/srv/a/b.onnx; 3 images/s"])
    ["16 of 520 images of 'calib',\nb.onnx; 3 images/s"]
    """
    if isinstance(value, str):
        return BARE_PATH.sub(r"\1", QUOTED_PATH.sub(r"'\1'", value))
    if isinstance(value, Mapping):
        return {name: portable(item) for name, item in value.items()}
    return [portable(item) for item in value] if isinstance(value, list | tuple) else value


# --- files ------------------------------------------------------------------------------------


def write_report(document: Document, bundle: Bundle, output: Path | None) -> list[Path]:
    """Write a document as HTML and Markdown and return the two paths.

    Args:
        document: the document.
        bundle: destination, unless ``output`` is given.
        output: the HTML file; the Markdown file is written to the same folder.

    Raises:
        InputError: ``output`` is a folder, ends in ``.md``, or cannot be written.
        BundleError: the bundle cannot be written.
    """
    html = output or bundle.path / "report.html"
    if html.is_dir():
        raise InputError(f"'{html}' is a folder.", "Give the path of the HTML file.")
    markdown = html.with_suffix(".md")
    if html == markdown:
        raise InputError(f"'{html}' is the name of the Markdown file.", "Use --output FILE.html.")
    texts = {html: html_from_document(document), markdown: markdown_from_document(document)}
    if output is None:
        with edit_bundle(bundle.path) as draft:
            for path, text in texts.items():
                draft.file(path.name).write_text(text, encoding="utf-8")
    for path, text in texts.items() if output is not None else ():
        write_text(path, text)
    return list(texts)


def append_summary(report: CheckReport, path: Path) -> None:
    """Append a check to a GitHub Markdown file such as ``$GITHUB_STEP_SUMMARY``.

    Raises:
        InputError: the file cannot be written.
    """
    rejected = outcome_of(finding for _, finding in report.rejected)
    failures = () if report.passed else (sections_checks.failure_text(report, "checked"),)
    document = Document(
        title=f"van-deploy: {report.model} {'passed' if report.passed else 'failed'}",
        subtitle=report.images,
        state="PASS" if report.passed else state_text(rejected.value),
        note=" ".join([f"{len(report.rows)} rows.", *failures]),
        sections={"Gates and baseline": sections_checks.check_blocks(plain(report))},
    )
    write_text(path, markdown_from_document(document, level=2), append=True)


def write_junit(report: CheckReport, path: Path) -> None:
    """Write a check as JUnit XML for CI servers, with one test suite per kind of row.

    A finding that is not accepted is a failure, as for the exit code.
    """
    root = ElementTree.Element("testsuites", name="van-deploy check")
    prefixes = {"skipped": "not checked: ", "inconclusive": "undecided: "}
    suites, child = dict[str, ElementTree.Element](), ElementTree.SubElement
    for row in report.rows:
        finding, (kind, _, name) = row.finding, row.name.partition("/")
        suite = f"{report.model}.{kind}"
        if kind not in suites:
            suites[kind] = child(root, "testsuite", name=suite)
        case = child(suites[kind], "testcase", classname=suite, name=name, time="0")
        if not report.accepts(finding):
            message = f"{prefixes.get(finding.outcome.value, '')}{finding.message}"
            failure = child(case, "failure", message=message, type="gate")
            failure.text = f"baseline {row.baseline}, now {finding.value}: {message}"
        elif finding.outcome.value != "pass":
            child(case, "skipped", message=finding.message)
    for element in (root, *root):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped",) * 2):
            element.set(attribute, str(len(element.findall(f".//{tag}"))))
        element.set("errors", "0")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def write_text(path: Path, text: str, *, append: bool = False) -> None:
    """Write a text file, or append to it, and create its folder.

    Raises:
        InputError: the file cannot be written, or it belongs to a bundle and would change.
    """
    # Links may lead into a bundle; one that is the file itself is replaced, unless appended to.
    real = os.path.realpath
    place = Path(real(path)) if append else Path(real(path.parent), path.name)
    try:
        is_same = not append and place.is_file() and place.read_bytes() == text.encode()
        for folder in () if is_same else place.parents:
            with contextlib.suppress(BundleError):  # not a bundle
                if place.relative_to(folder).as_posix() in {MANIFEST, *Bundle.open(folder).digests}:
                    raise InputError(f"'{path}' is a file of a bundle.", "Choose another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if append:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        else:
            write_atomic(path, text)
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be written: {error.strerror or error}.", "Choose another file."
        ) from error
