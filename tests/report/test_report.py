"""Reports of measured bundles in HTML, Markdown, a terminal and Chromium."""

import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import van_deploy as vd
from tests.artifacts import ArtifactCache, Copy
from tests.conftest import Cli
from tests.each import each
from tests.json_documents import edit_json, edited
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.checks.gates import allowed_loss
from van_deploy.report import document as doc
from van_deploy.report.document import Block, Document, table
from van_deploy.report.files import document_of_bundle
from van_deploy.report.render_html import html_from_document
from van_deploy.report.render_markdown import markdown_from_document
from van_deploy.report.render_rich import HarmlessConsole, rich_from_blocks

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0"),
)
DARK = "--blink-settings=preferredColorScheme=0"
TIMEOUT_S = 120
ROW = {"requested": True, "sqnr_db": 36.3, "images": 40, "failures": (), "inconclusive": ("few",)}
WRONG = {"outcome": "fail", "message": "20 % of the scales differ"}


def report_of(folder: Path) -> Document:
    return document_of_bundle(Bundle.open(folder))


def quantized(*findings: Any) -> dict[str, Any]:
    return {"comparison": [ROW], "golden_check": {"findings": findings}}


def rows_of(document: Document, title: str) -> list[list[str]]:
    """Return the rows of a section of one table."""
    (only,) = document.sections[title]
    assert isinstance(only, doc.Table)
    return [[*row] for row in only.rows]


def in_terminal(blocks: Iterable[Block], width: int) -> list[str]:
    console = HarmlessConsole(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(rich_from_blocks(blocks, width))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.fixture(scope="module")
def full(artifact_cache: ArtifactCache, digits_bundle: Bundle, heldout_200: Path) -> Bundle:
    """Return van_digits with verification, drift, accuracy and a benchmark; not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(digits_bundle.path, folder)
        bundle = vd.open_bundle(folder)
        bundle.verify()
        bundle.drift(level="stage", count=2)
        bundle.evaluate(heldout_200)
        short: Any = {"seconds": 0.05, "calls": 2, "limit": 0.2, "rounds": 2, "warmup": 0.0}
        bundle.benchmark(batches=(1, 2), threads=1, runners=("ort-*",), roofline=False, **short)

    return Bundle.open(artifact_cache("full_report", make))


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


def test_missing_measurements_are_listed(uint8_bundle: Bundle, copy_bundle: Copy) -> None:
    folder = copy_bundle(uint8_bundle)
    document = report_of(folder)
    assert document.state == "PASS"
    shown = "| ✅ PASS | embedded fp32-uint8 | relative difference"
    assert shown in markdown_from_document(document)
    assert not {"Verification", "Accuracy", "Drift", "Speed"} & set(document.sections)
    missing = str(rows_of(document, "Not measured"))
    for command in ("verify", "evaluate", "drift", "bench", "quantize", "build"):
        assert f"van-deploy {command}" in missing
    edit_json(folder / MANIFEST, "architecture problem_type", "regression")
    assert "van-deploy evaluate" not in str(rows_of(report_of(folder), "Not measured"))


def test_values_are_those_of_the_manifest(full: Bundle, document: Document) -> None:
    text = markdown_from_document(document)
    checked = full.manifest.checks["evaluate"]
    bench = json.loads((full.path / "bench.json").read_text())
    assert full.manifest.weights.sha256 in text
    top1 = {name: f"{100 * one['top1']:.2f}" for name, one in checked["accuracy"].items()}
    pair = f"{top1['fp32']} %, PyTorch {top1['pytorch']} %"
    assert f"| ✅ PASS | top-1 of fp32 | {pair};" in text
    for name, percent in top1.items():
        assert f"| {name} | {checked['runners'][name]} | {percent} | " in text
    for row in bench["rows"]:
        assert f"| {row['contender']} |" in text
        assert f"{row['images_per_s']:,.1f}" in text
    assert all(reason in text for reason in bench["skipped"].values())
    _, _, losses, plot = document.sections["Accuracy"]
    assert isinstance(losses, doc.Table)
    assert isinstance(plot, doc.Plot)
    assert plot.svg.count('stroke="var(--bad)"') == 1, "one artifact, one allowed loss"
    allowed = losses.rows[0][list(losses.columns).index("allowed pp")]
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
    folder = copy_bundle(full, outcome)
    with edited(folder / MANIFEST) as manifest:
        verified, evaluated = (manifest["checks"][name] for name in ("verify", "evaluate"))
        loss = evaluated["losses"]["fp32"]
        for finding in (loss["findings"][-1], verified["findings"][0]):
            finding.update(outcome=outcome, message="not as PyTorch")
        loss.update(outcome=outcome)
        del verified["artifacts"]["fp32"]
    document, state = report_of(folder), outcome.upper()
    assert document.state == state
    assert f"; 2 {'failed' if outcome == 'fail' else 'undecided'}" in document.note
    first, second, *_ = rows_of(document, "Verdicts")
    assert first == [state, "preprocessing/0.png", "not as PyTorch"]
    assert second[:2] == [state, "top-1 of fp32"]
    assert second[2].endswith("; not as PyTorch")
    assert "| fp32 | no result: `van-deploy verify` |" in markdown_from_document(document)
    html = html_from_document(document)
    assert html.count(f'<span class="badge {tone}">{state}</span>') >= 3
    assert f"{state}</text>" in html, "next to the interval"


@each(
    ("place", "value", "state", "row"),
    [
        ("checks verify passed", False, "INCONCLUSIVE", "PASS verify fp32"),  # as by a skip
        ("checks verify artifacts", {}, "INCONCLUSIVE", "PASS files"),  # of other artifacts only
        ("artifacts fp32 quantization", quantized(), "INCONCLUSIVE", "INCONCLUSIVE quantize fp32"),
        ("artifacts fp32 quantization", quantized(WRONG), "FAIL", "FAIL quantize fp32"),
    ],
)
def test_the_state_is_not_better_than_that_of_any_command(
    full: Bundle, copy_bundle: Copy, place: str, value: Any, state: str, row: str
) -> None:
    folder = copy_bundle(full, f"{place}{state}")
    edit_json(folder / MANIFEST, place, value)
    document = report_of(folder)
    assert document.state == state
    assert row in [f"{found[0]} {found[1]}" for found in rows_of(document, "Verdicts")]


def test_values_without_decisions_have_no_label_flips(full: Bundle, copy_bundle: Copy) -> None:
    folder = copy_bundle(full)
    for flips in (True, False):
        sections = report_of(folder).sections
        for title in ("Verdicts", "Verification"):
            assert ("label flips" in str(sections[title])) is flips
        edit_json(folder / MANIFEST, "checks verify artifacts fp32 comparison top1_agreement", None)


def test_stale_results_are_listed_at_the_top(full: Bundle, copy_bundle: Copy) -> None:
    folder = copy_bundle(full)
    with edited(folder / MANIFEST) as manifest:
        drift, evaluated = (manifest["checks"][name] for name in ("drift", "evaluate"))
        for entry in (drift, evaluated):
            entry["artifacts_sha256"]["fp32"] = "0" * 64
        drift["artifacts"]["other"] = drift["artifacts"]["fp32"]
    document = report_of(folder)
    message = "{0} of fp32: measured on another file; run `van-deploy {0}` again"
    messages = [message.format(command) for command in ("drift", "evaluate")]
    assert document.notices == doc.notices("STALE", messages)
    chain = document.sections["Drift"][1]
    assert isinstance(chain, doc.Table)
    assert [row[0] for row in chain.rows] == ["PyTorch float32", "rewritten, float64"]
    assert document.state == "INCONCLUSIVE"
    assert "top-1 of fp32" not in markdown_from_document(document)
    html = html_from_document(document)
    assert html.index("evaluate of fp32") < html.index("<h2>"), "above everything else"
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"!")
    assert report_of(folder).state == "FAIL"


def test_stale_and_unreadable_benchmarks_are_left_out(full: Bundle, copy_bundle: Copy) -> None:
    folder = copy_bundle(full)
    edit_json(folder / "bench.json", "contenders ort-cpu/fp32 sha256", "0" * 64)
    text = markdown_from_document(report_of(folder))
    assert "speed of ort-cpu/fp32: measured on another" in text
    assert "| ort-cpu/fp32 |" not in text
    assert "| pytorch |" in text
    for content in ("{", '{"schema": "van-deploy/bench/1", "rows": []}'):
        (folder / "bench.json").write_text(content)
        document = report_of(folder)
        assert "Speed" not in document.sections
        assert "bench.json: not of this version" in markdown_from_document(document)


def test_markup_and_control_characters_are_escaped() -> None:
    nasty = '<script>alert("x")</script> & $title'
    paragraph, rows = doc.Paragraph(nasty), doc.Table({nasty: ""}, [[nasty]], nasty)
    notices, pairs = doc.notices(nasty, [nasty]), doc.key_values({nasty: nasty}, nasty)
    sections = {nasty: [paragraph, *pairs, *notices, rows]}
    document = Document(nasty, nasty, "PASS", nasty, sections, notices, nasty)
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
    row = ["inconclusive", "more images would decide " * 3, *(1234.5 + i for i in range(9))]
    figures = "; ".join(f"figure {place} ms = {place} ,.2f" for place in range(2, 11))
    lines = in_terminal(table([row], f"verdict = 0 state; {figures}; why = 1"), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "INCONCLUSIVE" in text
    assert all(f"{value:,.2f}" in text for value in row[2:]), "no number is broken"


def test_report_command_writes_html_and_markdown(full: Bundle, cli: Cli, copy_bundle: Copy) -> None:
    folder = copy_bundle(full)
    cli.passes("report", folder)
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# ✅ van_digits\n")
    assert Bundle.open(folder).problems() == []
    output = folder.parent / "deep" / "page.html"
    values = cli.document("report", folder, "--output", output)
    assert values["verdict"] == "PASS"
    assert set(values["files"]) == {str(output), str(output.with_suffix(".md"))}
    cli.fails(5, "report", folder / "nothing")
    for name in ("report.md", "model.onnx/report.html"):
        cli.fails(5, "report", folder, "--output", folder / name)


# --- in a browser ----------------------------------------------------------------------------


def chromium(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    page, profile = folder / "report.html", f"--user-data-dir={folder / 'profile'}"
    words = [str(CHROMIUM), *FLAGS, profile, *flags, page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)


def screenshot(folder: Path, *flags: str, width: int = 1180) -> np.ndarray:
    target = folder / "shot.png"
    chromium(folder, f"--window-size={width},1600", f"--screenshot={target}", *flags)
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB"), np.float64)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_page_in_light_dark_narrow_and_printed(full: Bundle, tmp_path: Path) -> None:
    page = html_from_document(document_of_bundle(full))
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    light, dark = screenshot(tmp_path), screenshot(tmp_path, DARK)
    assert light.shape == dark.shape == (1600, 1180, 3)
    assert light[4, 4].min() > 235
    assert light.mean() > 200
    assert light.std() > 15, "there is something on the page"
    assert dark[4, 4].max() < 40
    assert dark.mean() < 80
    narrow = screenshot(tmp_path, width=500)
    assert (narrow[:, -3:] == narrow[0, 0]).all(), "nothing reaches over the right edge"
    result = chromium(tmp_path, "--dump-dom")
    assert "Throughput against accuracy: each artifact" in result.stdout
    assert [line for line in result.stderr.splitlines() if ":CONSOLE" in line] == []
    chromium(tmp_path, DARK, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") <= 20
