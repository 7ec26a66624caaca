"""Reports of measured bundles in HTML, Markdown and a terminal."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.checks.gates import allowed_loss
from van_deploy.report import document as doc
from van_deploy.report.document import Block, Document, table
from van_deploy.report.files import document_of_bundle
from van_deploy.report.render_html import html_from_document
from van_deploy.report.render_markdown import markdown_from_document
from van_deploy.report.render_rich import HarmlessConsole, rich_from_blocks
from van_deploy.report.sections_checks import quantize_blocks


def document_with(folder: Path, change: Callable[[Any], None]) -> Document:
    """Return the report of a bundle after a change of the checks in its manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["checks"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return document_of_bundle(Bundle.open(folder))


def in_terminal(blocks: Iterable[Block], width: int) -> list[str]:
    console = HarmlessConsole(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(rich_from_blocks(blocks, width))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.fixture(scope="module")
def document(full: Bundle) -> Document:
    return document_of_bundle(full)


def test_html_is_complete_and_self_contained(document: Document) -> None:
    html = html_from_document(document)
    body = ET.fromstring(html[html.index("<body>") : html.index("</html>")])
    assert [heading.text for heading in body.iter("h2")] == [
        *("Verdicts", "Model", "Artifacts", "Verification", "Accuracy", "Drift", "Speed"),
        *("Preprocessing", "Graph", "Provenance", "Not measured"),
    ]
    links = [link.get("href", "") for link in body.iter("a")]
    assert links == [f"#{section.get('id')}" for section in body.iter("section")]
    assert len(html.encode()) < 1_000_000
    assert not re.search(r"<script|http(?!-equiv)|url\(|@import|src=", html), "nothing is loaded"
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_missing_measurements_are_listed(uint8_bundle: Bundle) -> None:
    document = document_of_bundle(uint8_bundle)
    assert document.state == "PASS"
    shown = "| ✅ PASS | embedded fp32-uint8 | relative difference"
    assert shown in markdown_from_document(document)
    assert not {"Verification", "Accuracy", "Drift", "Speed"} & set(document.sections)
    (missing,) = document.sections["Not measured"]
    assert isinstance(missing, doc.Table)
    text = " ".join(" ".join(row) for row in missing.rows)
    for command in ("verify", "evaluate", "drift", "bench", "quantize", "build"):
        assert f"van-deploy {command}" in text


def test_values_are_those_of_the_manifest(full: Bundle, document: Document) -> None:
    text = markdown_from_document(document)
    accuracy = full.manifest.checks["evaluate"]["accuracy"]
    bench = json.loads((full.path / "bench.json").read_text())
    assert full.manifest.weights.sha256 in text
    pair = (100 * accuracy[name]["top1"] for name in ("fp32", "pytorch"))
    assert "| ✅ PASS | top-1 of fp32 | {:.2f} %, PyTorch {:.2f} %;".format(*pair) in text
    for name, entry in accuracy.items():
        runner = full.manifest.checks["evaluate"]["runners"][name]
        assert f"| {name} | {runner} | {100 * entry['top1']:.2f} | " in text
    for row in bench["rows"]:
        assert f"| {row['contender']} |" in text
        assert f"{row['images_per_s']:,.1f}" in text
    assert all(reason in text for reason in bench["skipped"].values())
    _, _, losses, plot = document.sections["Accuracy"]
    assert isinstance(losses, doc.Table)
    assert isinstance(plot, doc.Plot)
    assert plot.svg.count('stroke="var(--bad)"') == 1, "one artifact, one allowed loss"
    allowed = dict(zip(losses.columns, losses.rows[0], strict=True))["allowed pp"]
    assert allowed == f"{allowed_loss('fp32').value:g}", "and no other rule's limit"


def test_all_formats_have_the_same_content_and_no_folders(full: Bundle, document: Document) -> None:
    html, text = html_from_document(document), markdown_from_document(document)
    folder = str(full.path.parent)
    assert folder in json.dumps(full.manifest.checks["evaluate"]["images"])
    assert folder not in html + text
    for title, blocks in document.sections.items():
        assert f"## {title}" in text
        shown = " ".join(" ".join(in_terminal(blocks, 400)).split())
        for block in blocks:
            rows = (*getattr(block, "rows", ()), *getattr(block, "pairs", ()))
            cells = [cell for row in rows for cell in row]
            assert all(cell in text for cell in cells if not set("|<>\n") & set(cell))
            assert all(" ".join(cell.split()) in shown for cell in cells)
        assert html.count("<tr>") >= sum(len(getattr(b, "rows", ())) for b in blocks)


@each(("outcome", "tone"), [("fail", "bad"), ("inconclusive", "open")])
def test_failed_checks_come_first_and_have_a_colour(
    full: Bundle, copy_bundle: Copy, outcome: str, tone: str
) -> None:
    def fail(checks: Any) -> None:
        loss, state = checks["evaluate"]["losses"]["fp32"], {"outcome": outcome}
        loss["findings"][-1].update(state, message="too much was lost")
        loss.update(state)

    document, state = document_with(copy_bundle(full, outcome), fail), outcome.upper()
    assert document.state == state
    assert f"; 1 {'failed' if outcome == 'fail' else 'undecided'}; 1 skipped" in document.note
    (verdicts,) = document.sections["Verdicts"]
    assert isinstance(verdicts, doc.Table)
    assert verdicts.rows[0][:2] == [state, "top-1 of fp32"]
    assert verdicts.rows[0][2].endswith("; too much was lost")
    html = html_from_document(document)
    assert html.count(f'<span class="badge {tone}">{state}</span>') >= 3
    assert f"{state}</text>" in html, "next to the interval"


def test_different_decoding_fails(full: Bundle, copy_bundle: Copy) -> None:
    def change(checks: Any) -> None:
        checks["verify"]["findings"][0].update(outcome="fail", message="another decoder")
        del checks["verify"]["artifacts"]["fp32"]

    document = document_with(copy_bundle(full), change)
    assert document.state == "FAIL"
    text = markdown_from_document(document)
    assert "| ❌ FAIL | preprocessing/0.png | another decoder |" in text
    assert "| fp32 | not selected in `van-deploy verify` |" in text


def test_stale_results_are_listed_at_the_top(full: Bundle, copy_bundle: Copy) -> None:
    folder = copy_bundle(full)
    stale = {"artifacts_sha256": {"fp32": "0" * 64}}
    document = document_with(folder, lambda checks: checks["evaluate"].update(stale))
    message = "evaluate of fp32: measured on another file; run `van-deploy evaluate` again"
    assert document.notices == doc.notices("STALE", [message])
    assert document.state == "INCONCLUSIVE"
    assert "top-1 of fp32" not in markdown_from_document(document)
    html = html_from_document(document)
    assert html.index("evaluate of fp32") < html.index("<h2>"), "above everything else"
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"!")
    assert document_of_bundle(Bundle.open(folder)).state == "FAIL"


def test_stale_and_unreadable_benchmarks_are_left_out(full: Bundle, copy_bundle: Copy) -> None:
    folder = copy_bundle(full)
    bench = json.loads((folder / "bench.json").read_text())
    name = next(name for name in bench["contenders"] if name.startswith("ort-cpu"))
    bench["contenders"][name]["sha256"] = "0" * 64
    (folder / "bench.json").write_text(json.dumps(bench))
    text = markdown_from_document(document_of_bundle(Bundle.open(folder)))
    assert f"speed of {name}: measured on another" in text
    assert f"| {name} |" not in text
    assert "| pytorch |" in text
    for content in ("{", '{"schema": "van-deploy/bench/1", "rows": []}'):
        (folder / "bench.json").write_text(content)
        document = document_of_bundle(Bundle.open(folder))
        assert "Speed" not in document.sections
        assert "bench.json: not of this version" in markdown_from_document(document)


def test_markup_and_control_characters_are_escaped() -> None:
    nasty = '<script>alert("x")</script> & $title'
    blocks: list[Block] = [
        *(
            doc.Paragraph(nasty),
            *doc.key_values({nasty: nasty}, nasty),
            *doc.notices(nasty, [nasty]),
        ),
        doc.Table({nasty: ""}, [[nasty]], nasty),
    ]
    document = Document(
        *(nasty, nasty, "PASS", nasty, {nasty: blocks}, doc.notices("STALE", [nasty]), nasty),
    )
    html, text = html_from_document(document), markdown_from_document(document)
    assert "<script" not in html + text
    assert html.count("&lt;script&gt;") >= 12
    assert "$title" in html
    (shown,) = in_terminal([doc.Paragraph("\x1b]0;title\x07a\x1b[31mb\x9b2J[bold]")], 60)
    assert shown == "\ufffd]0;titleab\ufffd2J[bold]", "nor for a terminal's"


@each(("columns", "folded"), [("ms = 1 .1f", True), ("verdict = 0 state; ms = 1 .1f", False)])
def test_long_tables_without_verdicts_are_collapsed(columns: str, folded: bool) -> None:
    blocks = table([("fail", 1.0)] * 30, columns, "title")
    html = html_from_document(Document("name", "", "FAIL", "", {"Speed": blocks}))
    assert ("<details>" in html) is folded


@each("width", [60, 80, 100])
def test_a_wide_table_becomes_a_list(width: int) -> None:
    row = {"name": "fp16", "verdict": "inconclusive", "why": "more images would decide " * 3}
    numbers = {f"n{i}": 1234.5 + i for i in range(9)}
    columns = "verdict = verdict state; artifact = name name; " + "; ".join(
        f"figure {i} ms = n{i} ,.2f" for i in range(9)
    )
    lines = in_terminal(table([row | numbers], f"{columns}; why = why"), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "INCONCLUSIVE" in text
    assert all(f"{value:,.2f}" in text for value in numbers.values()), "no number is broken"


def test_report_command_writes_html_and_markdown(full: Bundle, cli: Cli, copy_bundle: Copy) -> None:
    folder = copy_bundle(full)
    assert cli("report", folder).exit_code == 0
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# ✅ van_digits\n")
    assert Bundle.open(folder).problems() == []
    output = folder.parent / "deep" / "page.html"
    values = json.loads(cli("report", folder, "--output", output, "--json").stdout)
    assert values["verdict"] == "PASS"
    assert set(values["files"]) == {str(output), str(output.with_suffix(".md"))}
    assert cli("report", folder / "nothing").exit_code == 5
    for name in ("report.md", "model.onnx/report.html"):
        assert cli("report", folder, "--output", folder / name).exit_code == 5


@each(("passed", "gate"), [(True, "PASS"), (False, "FAIL")])
def test_quantize_table_fits_a_pipe(passed: bool, gate: str) -> None:
    row = {
        "name": "int8",
        "size_bytes": 123 << 20,
        "sqnr_db": 37.04,
        "cosine": 0.99873,
        "kl": 1.8e-4,
        "agreement": 0.9935,
        "correct": 1538,
        "images": 2000,
        "inconclusive": (),
        "ms_per_image": 116.06,
        "passed": passed,
        "top1_interval": (0.75, 0.787),
    }
    images = {"images": 5, "description": "images"}
    facts = {
        "comparison": [{**row, "passed": None}, row],
        "evaluated_on": images,
        "calibration": {**images, "noise": False, "unreadable": []},
        "recommended": None,
        "recommendation_reason": "speed not measured",
        "golden_check": {
            "findings": [
                {"outcome": "inconclusive", "rule": "scales", "message": "odd", "skip": ""}
            ]
        },
    }
    result = {"facts": facts, "artifact": "int8", "bundle": "b", "seconds": {}, "reused": False}
    output = "\n".join(in_terminal(quantize_blocks(result), 100))
    for text in ("precision", "top-1 %", "gate", "123.0 MiB", "76.90", "75.00 to 78.70", gate):
        assert text in output
    assert "INCONCLUSIVE  scales: odd" in output  # the reason for exit code 1
