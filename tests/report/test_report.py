"""Reports of real bundles: what they say, in HTML and in Markdown, and on the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.report.content import document_of
from van_deploy.report.document import Document, Facts, Grid, Section, Text, Tile
from van_deploy.report.html import html_of_document
from van_deploy.report.markdown import markdown_of_document

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Outline(HTMLParser):
    """Collects addresses, headings and unbalanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.identifiers: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "action", "data", "srcset"}:
                self.addresses.append(value or "")
            if name == "id":
                self.identifiers.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def edited(bundle: Bundle, folder: Path, **checks: object) -> Bundle:
    """Return a copy whose manifest says something else of some checks."""
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["checks"].update(checks)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_the_page_needs_nothing_but_itself(full: Bundle) -> None:
    html = html_of_document(document_of(full))
    found = outline(html)
    assert len(html.encode()) < 1_000_000
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert "script" not in found.tags
    assert "http" not in re.sub(r'http-equiv="', "", html), "no address of any kind"
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_a_full_bundle_has_every_section_and_working_links(full: Bundle) -> None:
    found = outline(html_of_document(document_of(full)))
    assert found.headings == [
        "What was asked",
        "What was made",
        "Preprocessing",
        "Verdicts",
        "Accuracy",
        "Drift",
        "Speed",
        "Throughput against accuracy",
        "Roofline",
        "Graph",
        "Provenance",
        "What was skipped, and why",
    ]
    links = [address[1:] for address in found.addresses if address.startswith("#")]
    assert sorted(links) == sorted(found.identifiers)


def test_an_export_alone_says_what_was_not_measured(bare: Bundle) -> None:
    document = document_of(bare)
    assert document.verdict == "PASS"
    titles = [section.title for section in document.sections]
    assert not {"Accuracy", "Drift", "Speed", "Roofline"} & set(titles)
    (grid,) = document.sections[-1].blocks
    assert isinstance(grid, Grid)
    said = " ".join(" ".join(row) for row in grid.rows)
    for command in ("verify", "evaluate", "drift", "bench", "quantize", "build"):
        assert f"van-deploy {command}" in said


def test_figures_are_the_manifests_own(full: Bundle) -> None:
    text = markdown_of_document(document_of(full))
    manifest = full.manifest
    accuracy = manifest.checks["evaluate"]["accuracies"]["fp32"]
    bench = json.loads((full.path / "bench.json").read_text())
    assert manifest.weights.sha256 in text
    assert f"| {100 * accuracy['top1']:.2f} |" in text
    for row in bench["rows"]:
        assert f"| {row['contender']} |" in text
        assert f"{row['images_per_s']:,.1f}" in text
    for skipped in bench["skipped"]:
        assert skipped["reason"] in text
    graph = manifest.artefacts["fp32"].graph
    assert graph
    for kind, count in graph.operators.items():
        assert f"| {kind} | {count} |" in text


def test_html_and_markdown_say_the_same(full: Bundle) -> None:
    document = document_of(full)
    html, text = html_of_document(document), markdown_of_document(document)
    for section in document.sections:
        assert f"## {section.title}" in text
        for block in section.blocks:
            if isinstance(block, Grid):
                assert html.count("<tr>") >= len(block.rows)
                assert all(cell in text for row in block.rows for cell in row if "|" not in cell)


def test_a_failed_check_makes_the_whole_report_fail(full: Bundle, tmp_path: Path) -> None:
    agreement = json.loads(json.dumps(full.manifest.checks["agreement"]))
    agreement["outcome"] = agreement["batches"][0]["outcome"] = "fail"
    agreement["batches"][0]["sqnr_db"] = 12.0
    document = document_of(edited(full, tmp_path / "copy", agreement=agreement))
    assert document.verdict == "FAIL"
    assert document.verdict_note.endswith("; 1 failed")
    verdicts = next(s for s in document.sections if s.title == "Verdicts").blocks[0]
    assert isinstance(verdicts, Grid)
    assert verdicts.rows[0][0] == "FAIL"
    assert verdicts.rows[0][2] == "SQNR 12.0 dB"


def test_a_changed_file_makes_the_report_fail(full: Bundle, tmp_path: Path) -> None:
    shutil.copytree(full.path, tmp_path / "copy")
    with (tmp_path / "copy" / "model.onnx").open("ab") as file:
        file.write(b"!")
    document = document_of(Bundle.open(tmp_path / "copy"))
    assert document.verdict == "FAIL"


def test_results_of_another_file_are_left_out_and_named(full: Bundle, tmp_path: Path) -> None:
    evaluate = json.loads(json.dumps(full.manifest.checks["evaluate"]))
    evaluate["artefacts_sha256"]["fp32"] = "0" * 64
    document = document_of(edited(full, tmp_path / "copy", evaluate=evaluate))
    text = markdown_of_document(document)
    assert "| evaluate fp32 | measured on another file: run `van-deploy evaluate` again |" in text
    assert "top-1 of fp32" not in text


def test_a_verdict_of_an_unknown_check_is_shown(full: Bundle, tmp_path: Path) -> None:
    bundle = edited(full, tmp_path / "copy", novelty={"passed": False, "reason": "it is new"})
    text = markdown_of_document(document_of(bundle))
    assert "| FAIL | novelty | it is new |" in text


def test_nothing_from_a_bundle_is_taken_for_markup() -> None:
    nasty = '<script>alert("x")</script> & $title'
    blocks = (Text(nasty), Facts({nasty: nasty}), Grid((nasty,), ((nasty,),), caption=nasty))
    document = Document(
        nasty, nasty, "PASS", nasty, (Tile(nasty, nasty, nasty),), (Section(nasty, blocks),), nasty
    )
    html = html_of_document(document)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 12
    assert "$title" in html


def test_the_command_writes_both_files_into_the_bundle(
    full: Bundle, cli: Cli, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(full.path, folder)
    result = cli("report", folder)
    assert result.exit_code == 0
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# van_digits\n")
    assert Bundle.open(folder).problems() == []
    elsewhere = tmp_path / "deep" / "page.html"
    values = json.loads(cli("report", folder, "--output", elsewhere, "--json").stdout)
    assert values["verdict"] == "PASS"
    assert set(values["files"]) == {str(elsewhere), str(elsewhere.with_suffix(".md"))}


def test_the_command_refuses_what_it_cannot_do(full: Bundle, cli: Cli, tmp_path: Path) -> None:
    assert cli("report", tmp_path / "nothing").exit_code == 5
    result = cli("report", full.path, "--output", tmp_path / "report.md")
    assert result.exit_code == 5
    assert "is where the Markdown would go" in result.stderr
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli("report", full.path, "--output", blocked / "report.html").exit_code == 5


def test_a_benchmark_of_another_version_is_named_and_left_out(full: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(full.path, folder)
    (folder / "bench.json").write_text('{"schema": "van-deploy/bench/1", "rows": []}')
    document = document_of(Bundle.open(folder))
    assert "Speed" not in [section.title for section in document.sections]
    words = "bench.json was written by another version: run `van-deploy bench` again"
    assert words in markdown_of_document(document)


@each("text", ["", "{", '{"schema": "other"}'])
def test_a_damaged_benchmark_is_as_good_as_none(full: Bundle, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(full.path, folder)
    (folder / "bench.json").write_text(text)
    titles = [section.title for section in document_of(Bundle.open(folder)).sections]
    assert "Speed" not in titles


def test_the_table_of_precisions_is_whole_in_a_pipe() -> None:
    from rich.console import Console

    from van_deploy.report.precision_view import precision_table

    line = {
        "name": "int8",
        "size_bytes": 123 << 20,
        "sqnr_db": 37.04,
        "cosine": 0.99873,
        "kl": 1.8e-4,
        "agreement": 0.9935,
        "correct": 1538,
        "images": 2000,
        "ms_per_image": 116.06,
        "passed": True,
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(precision_table([{**line, "passed": None}, line]))
    shown = console.export_text()
    for text in ("precision", "top-1 % (95 %)", "gate", "123.0 MiB", "76.90 (75.0-78.7)", "PASS"):
        assert text in shown
