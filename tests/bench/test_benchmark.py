"""Whole benchmarks on the embedded network, with the real ONNX Runtime."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.each import each
from van_deploy.bench.benchmark import benchmark_bundle
from van_deploy.bench.compare import agreement, compare_reports
from van_deploy.bench.contenders import gpu_answers
from van_deploy.bench.document import BenchReport, read_report
from van_deploy.bench.machine import Watch, busy_cores
from van_deploy.bench.store import save_report
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings, Budget
from van_deploy.environment.hardware import cpu
from van_deploy.errors import InputError, MissingDependency, UsageError, VanDeployError
from van_deploy.report.document import Table
from van_deploy.report.sections_bench import bench_blocks

QUICK_WORDS = (
    *("--seconds", "0.05", "--calls", "2", "--rounds", "2", "--warmup", "0", "--limit", "0.2"),
    *("--threads", "1", "--runners", "ort-cpu", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def measured(digits: Bundle) -> BenchReport:
    budget = Budget(seconds=0.1, calls=4, limit_s=0.5, rounds=2, warmup_s=0.0)
    settings = BenchSettings(
        batches=(1, 2), device="cpu", threads=1, runners=("ort-cpu",), budget=budget
    )
    return benchmark_bundle(digits, settings)


@pytest.fixture
def plain(measured: BenchReport) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(measured.text())
    return result


def read(plain: dict[str, Any]) -> BenchReport:
    return BenchReport.model_validate_json(json.dumps(plain), strict=True)


def test_every_batch_has_a_row_with_figures_that_belong_together(measured: BenchReport) -> None:
    rows = {row.batch: row for row in measured.rows}
    assert sorted(rows) == [1, 2]
    for batch, row in rows.items():
        assert row.latency is not None
        assert row.images_per_s is not None
        assert row.latency.calls >= 4
        assert row.latency.min_ms <= row.latency.p50_ms <= row.latency.p90_ms <= row.latency.p99_ms
        assert row.images_per_s == pytest.approx(1e3 * batch / row.latency.mean_ms, rel=0.2)
        assert row.peak_rss_bytes is not None
        assert row.peak_rss_bytes > 10e6
        assert len(row.round_ms) == 2


def test_the_report_holds_what_is_needed_to_repeat_it(plain: dict[str, Any]) -> None:
    assert plain["threads"] == 1
    assert plain["settings"]["budget"]["rounds"] == 2
    assert plain["versions"]["onnxruntime"]
    assert plain["machine"]["cpu"]["name"]
    assert plain["contenders"]["ort-cpu/fp32"]["sha256"]
    assert plain["subject"]["weights"]["sha256"]
    assert plain["loading"]["ort-cpu/fp32"]["load_s"] > 0
    assert 0 < plain["seconds"]["timed"] < plain["seconds"]["wall"]
    assert plain["device"] == "cpu"


def test_the_roofline_stands_above_what_was_measured(plain: dict[str, Any]) -> None:
    assert plain["ceilings"]["source"] == "measured"
    assert plain["ceilings"]["ops_per_s"]["int8"] > 0
    assert ("bf16" in plain["ceilings"]["ops_per_s"]) == cpu().has_bfloat16
    entries = plain["roofline"]
    assert {entry["batch"] for entry in entries} == {1, 2}
    assert all(0 < entry["percent_of_limit"] < 150 for entry in entries)


def test_the_reference_is_the_first_that_runs_unless_it_was_named(
    digits: Bundle, measured: BenchReport, quick: BenchSettings
) -> None:
    assert measured.reference == "ort-cpu/fp32"
    with pytest.raises(UsageError, match="The reference 'pytorch-compile' is not among"):
        benchmark_bundle(digits, quick.changed(reference="pytorch-compile"))


def test_a_latency_limit_gives_the_best_batch_below_it(
    digits: Bundle, quick: BenchSettings
) -> None:
    report = benchmark_bundle(digits, quick.changed(p99_ms=1e6))
    assert report.best_under_p99
    best = report.best_under_p99.best["ort-cpu/fp32"]
    assert best
    assert [row.batch for row in report.rows] == [1, 2, 4, 8]
    assert best.images_per_s == max(row.images_per_s or 0 for row in report.rows)
    report = benchmark_bundle(digits, quick.changed(p99_ms=1e-6))
    assert [row.batch for row in report.rows] == [1], "what is too slow is not tried at more"
    assert report.best_under_p99
    assert report.best_under_p99.best["ort-cpu/fp32"] is None


def test_other_image_sizes_run_the_same_weights(digits: Bundle, quick: BenchSettings) -> None:
    report = benchmark_bundle(digits, quick.changed(batches=(1,), image_sizes=(32, 64)))
    small, native = sorted(report.rows, key=lambda row: row.image_size)
    assert (small.image_size, native.image_size) == (32, 64)
    assert small.error == native.error == ""


@each(
    ("change", "kind", "words"),
    [
        ({}, MissingDependency, "No NVIDIA GPU answers here, so nothing can be timed on 'cuda:0'."),
        (
            {"streams": 2},
            UsageError,
            "--streams is 2, and on a GPU one stream is timed, with batches queued on it.",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_said_before_anything_runs(
    digits: Bundle, quick: BenchSettings, change: dict[str, Any], kind: type, words: str
) -> None:
    if gpu_answers():
        pytest.skip("a GPU answers here")
    with pytest.raises(VanDeployError) as caught:
        benchmark_bundle(digits, quick.changed(device="cuda:0", **change))
    assert type(caught.value) is kind
    assert caught.value.message == words


@each(
    "change", [{"batches": ()}, {"batches": (0,)}, {"streams": 0}, {"threads": 0}, {"p99_ms": 0.0}]
)
def test_nonsense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BenchSettings(**change)


def test_load_by_others_is_noticed() -> None:
    import subprocess
    import sys

    watch = Watch(cores=1)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            busy = busy_cores(0.4)
            report = watch.report()
        finally:
            process.kill()
    assert busy > 0.2
    assert report.under_load, "a process that was not waited for is others' work"


def test_compare_pairs_rows_and_says_what_changed(plain: dict[str, Any]) -> None:
    slower = copy.deepcopy(plain)
    for row in slower["rows"]:
        row["latency"]["p50_ms"] *= 2
    changes = compare_reports(read(slower), read(plain))
    assert [change.batch for change in changes] == [1, 2]
    assert all(change.speedup == pytest.approx(2.0) for change in changes)
    assert all(change.same_file for change in changes)
    assert all(change.ratio_change_percent == pytest.approx(0.0) for change in changes)


def shifted(report: dict[str, Any], factor: float, spread: float) -> dict[str, Any]:
    """Return a report whose ratios are ``factor``, known to ``spread``."""
    changed = copy.deepcopy(report)
    for row in changed["rows"]:
        low, high = factor * (1 - spread), factor * (1 + spread)
        row["ratio"].update(median=factor, low=low, high=high)
    return changed


@pytest.mark.parametrize(
    ("factor", "spread", "within", "moved"),
    [(2.04, 0.01, 2, 0), (2.2, 0.02, 0, 2), (2.2, 0.2, 0, 0), (1.8, 0.02, 0, 2)],
)
def test_a_ratio_moved_if_it_changed_by_more_than_its_uncertainty_and_5_percent(
    plain: dict[str, Any], factor: float, spread: float, within: int, moved: int
) -> None:
    before, after = shifted(plain, 2.0, spread), shifted(plain, factor, spread)
    changes = compare_reports(read(before), read(after))
    agreed = agreement(changes)
    assert agreed.ratios == 2
    assert agreed.within == within
    assert len(agreed.moved) == moved
    assert agreed.open == 2 - within - moved
    assert agreed.worst_percent == pytest.approx(100 * (factor / 2 - 1))
    assert agreed.worst == "ort-cpu/fp32 at batch 1, 64 pixels"


def test_an_older_version_s_file_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": "van-deploy/bench/1", "rows": []}')
    with pytest.raises(InputError) as caught:
        read_report(path)
    assert caught.value.message == (
        f"'{path}' has schema 'van-deploy/bench/1'; this version reads 'van-deploy/bench/5'."
    )
    assert caught.value.remedy.startswith("Measure again with this version")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("machine", "cpu", "name"), "Another CPU", "the device was Another CPU"),
        (("versions", "tensorrt"), "10.16.1", "TensorRT's major version was TensorRT 10"),
        (("threads",), 7, "the number of threads was 7, now it is 1"),
        (("settings", "streams"), 3, "the number of streams was 3, now it is 1"),
        (("reference",), "pytorch", "the reference was pytorch, now it is ort-cpu/fp32"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    plain: dict[str, Any], path: tuple[str, ...], value: object, words: str
) -> None:
    old = copy.deepcopy(plain)
    place = old
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UsageError) as caught:
        compare_reports(read(old), read(plain))
    assert caught.value.message.startswith("The two benchmarks cannot be compared: ")
    assert words in caught.value.message


@each("text", ["", "[]", "{}", '{"schema": "something/else"}'])
def test_another_file_is_not_taken_for_a_benchmark(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(InputError):
        read_report(path)


def test_a_result_is_kept_in_the_bundle_and_in_a_file(
    digits: Bundle, measured: BenchReport, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits.path, folder)
    output = tmp_path / "deep" / "bench.json"
    save_report(measured, Bundle.open(folder), output)
    assert read_report(output) == read_report(folder / "bench.json") == measured
    summary = Bundle.open(folder).manifest.checks["bench"]
    assert [row["batch"] for row in summary["rows"]] == [1, 2]


def test_the_command_prints_tables_and_one_json(digits: Bundle, cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "new.json"
    words = (digits.path, "--batches", "1", *QUICK_WORDS, "--no-save", "--output", output)
    first = cli("bench", *words)
    assert first.exit_code == 0
    assert "ort-cpu/fp32" in first.stdout
    assert "Roofline" in first.stdout
    second = cli("bench", *words, "--json", "--compare", output)
    result = json.loads(second.stdout)
    assert result["schema"] == "van-deploy/bench/5"
    assert result["changes"][0]["contender"] == "ort-cpu/fp32"
    assert result["agreement"]["within_percent"] == 5.0
    assert not (digits.path / "bench.json").exists()


def test_the_command_refuses_in_words(digits: Bundle, cli: Cli, tmp_path: Path) -> None:
    result = cli("bench", digits.path, "--batches", "1,two")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: '--batches' is 'two': it should be a whole number.\n  Correct it.\n"
    )
    assert cli("bench", digits.path, "--runners", "tvm").exit_code == 2
    assert cli("bench", tmp_path / "nothing").exit_code == 5
    assert cli("bench", digits.path, "--compare", tmp_path / "no.json").exit_code == 5


def test_a_roofline_of_several_image_sizes_says_which(plain: dict[str, Any]) -> None:
    def columns(report: dict[str, Any]) -> list[str]:
        tables = [block for block in bench_blocks(report) if isinstance(block, Table)]
        (roofline,) = (one for one in tables if one.title.startswith("Roofline"))
        return list(roofline.columns)

    assert "size" not in columns(plain)
    several = copy.deepcopy(plain)
    several["roofline"][0]["image_size"] = 32
    assert columns(several)[:3] == ["runner", "batch", "size"]


def test_limits_on_paper_are_labelled_so(digits: Bundle, cli: Cli) -> None:
    result = cli("bench", digits.path, "--paper-limits", "l4", "--batches", "8")
    assert result.exit_code == 0
    assert "Limits on paper of L4 (NVIDIA L4 data sheet (2023)); nothing here was measured" in (
        " ".join(result.stdout.split())
    )
    values = json.loads(cli("bench", digits.path, "--paper-limits", "h100", "--json").stdout)
    assert {limit["precision"] for limit in values["limits"]} == {"fp32", "tf32", "fp16"}
    assert cli("bench", digits.path, "--paper-limits", "abacus").exit_code == 2
