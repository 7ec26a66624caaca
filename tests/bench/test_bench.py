"""Whole benchmarks of the embedded network with the real ONNX Runtime."""

from __future__ import annotations

import copy
import functools
import json
import operator
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from van_deploy.bench.benchmark import LoadMonitor, benchmark_bundle
from van_deploy.bench.document import BenchReport, compare_reports, read_report
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings, Budget
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import UsageError

HAS_GPU = bool((driver := nvidia_driver()) and driver.gpus)
SHORT = BenchSettings(
    batches=(1, 2),
    device="cpu",
    threads=1,
    runners=("ort-cpu",),
    budget=Budget(seconds=0.1, calls=4, limit_s=0.5, rounds=2, warmup_s=0.02),
)
SHORT_OPTIONS = (
    "--runners ort-cpu --device cpu --threads 1 --warmup 0 --batches 1 --seconds 0.1 --calls 4 "
    "--rounds 2 --limit 0.5"
)


@pytest.fixture(scope="module")
def report(digits_bundle: Bundle) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(benchmark_bundle(digits_bundle, SHORT).text())
    return result


def load(report: dict[str, Any]) -> BenchReport:
    return BenchReport.model_validate_json(json.dumps(report), strict=True)


def test_report_is_consistent_and_reproducible(report: dict[str, Any]) -> None:
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        latency = row["latency"]
        assert latency["calls"] >= 4
        assert latency["min_ms"] <= latency["p50_ms"] <= latency["p90_ms"] <= latency["p99_ms"]
        rate = 1e3 * row["batch"] / latency["mean_ms"]
        assert row["images_per_s"] == pytest.approx(rate, rel=0.2)
        assert row["peak_rss_bytes"] > 10e6
        assert min(row["first_call_ms"], row["load_s"]) > 0
        assert row["rounds"] == 2
    assert report["reference"] == "ort-cpu/fp32", "the first available contender"
    assert (report["settings"]["threads"], report["settings"]["device"]) == (1, "cpu")
    digests = (report["contenders"]["ort-cpu/fp32"]["sha256"], report["weights"]["sha256"])
    assert all((report["versions"]["onnxruntime"], *digests))
    assert report["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert 0 < report["seconds"]["timed"] < report["seconds"]["wall"]
    assert report["ceilings"]["ops_per_s"]["int8"] > 0
    assert ("bf16" in report["ceilings"]["ops_per_s"]) == cpu().has_bfloat16
    assert [entry["batch"] for entry in report["roofline"]] == [1, 2]
    assert all(0 < entry["percent_of_limit"] < 150 for entry in report["roofline"])


def test_image_sizes_embedded_preprocessing_streams_and_profiles(uint8_bundle: Bundle) -> None:
    runners = ("ort-cpu", "openvino/fp32")[: 1 + (find_spec("openvino") is not None)]
    sizes: dict[str, Any] = {"batches": (1,), "image_sizes": (32, 64)}
    settings = SHORT.with_changes(**sizes, runners=runners, roofline=False, profile=True, streams=2)
    report = benchmark_bundle(uint8_bundle, settings)
    rows = {(row.contender, row.image_size): row for row in report.rows}
    assert len(rows) == 2 * len(report.contenders)
    assert {name for name, _ in rows} > {"ort-cpu/fp32"}, "also the graph with uint8 input"
    assert {row.error for row in rows.values()} == {""}
    assert all(row.latency and row.latency.calls >= 2 * row.rounds for row in rows.values())
    lines = {line.kind: line for line in report.profiles["ort-cpu/fp32"]}
    assert {"dw 7x7 d3", "1x1", "GELU"} <= set(lines)
    assert sum(line.percent for line in lines.values()) == pytest.approx(100)
    if "openvino/fp32" in report.contenders:
        assert "openvino/fp32 was not profiled" in " ".join(report.warnings)


def test_p99_limit_selects_the_best_batch_size(digits_bundle: Bundle) -> None:
    settings = SHORT.with_changes(roofline=False)
    report = benchmark_bundle(digits_bundle, settings.with_changes(p99_ms=1e6))
    best = (report.best_under_p99 or {})["ort-cpu/fp32"]
    assert [row.batch for row in report.rows] == [1, 2, 4, 8]
    assert best == max(report.rows, key=lambda row: row.images_per_s or 0)
    report = benchmark_bundle(digits_bundle, settings.with_changes(p99_ms=1e-6))
    assert [row.batch for row in report.rows] == [1], "no larger batch after the limit is exceeded"
    assert report.best_under_p99 == {"ort-cpu/fp32": None}


def test_bench_command_saves_compares_and_prints_the_report(
    digits_bundle: Bundle, copy_bundle: Copy, cli: Cli, tmp_path: Path
) -> None:
    bundle, output = copy_bundle(digits_bundle), tmp_path / "deep" / "new.json"
    first = cli("bench", bundle, *SHORT_OPTIONS.split(), "--output", output)
    assert first.exit_code == 0
    assert "ort-cpu/fp32" in first.stdout
    assert "roofline" in first.stdout.lower()
    assert read_report(output) == read_report(bundle / "bench.json")
    summary = Bundle.open(bundle).manifest.checks["bench"]
    assert [row["batch"] for row in summary["rows"]] == [1]
    options = (*SHORT_OPTIONS.split(), "--no-roofline", "--no-save", "--json")
    result = json.loads(cli("bench", digits_bundle.path, *options, "--compare", output).stdout)
    assert result["changes"][0]["contender"] == "ort-cpu/fp32"
    assert not (digits_bundle.path / "bench.json").exists()


@each(
    ("words", "code", "message"),
    [
        ("--batches 1,two", 2, "'--batches' is 'two': it should be a whole number."),
        ("--runners tvm", 2, "There is no runner 'tvm'."),
        ("--reference pytorch-compile", 2, "The reference 'pytorch-compile' is not among"),
        ("--compare no.json", 5, "The benchmark 'no.json' cannot be read"),
        ("--paper-limits abacus", 2, "There are no figures for the device 'abacus'."),
        ("--output /dev/null/x.json", 5, "'/dev/null/x.json' cannot be written"),
        ("--device cuda:0", 3, "There is no NVIDIA GPU 'cuda:0'"),
        ("--device cuda:0 --streams 2", 2, "--streams is 2; on a GPU one stream is timed"),
    ],
)
def test_invalid_options_of_the_bench_command(
    digits_bundle: Bundle, cli: Cli, words: str, code: int, message: str
) -> None:
    if HAS_GPU and "cuda:0" in words:
        pytest.skip("this machine has a GPU")
    options = (*SHORT_OPTIONS.split(), "--no-roofline", "--no-save", *words.split())
    result = cli("bench", digits_bundle.path, *options)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_published_limits_are_labelled_as_not_measured(digits_bundle: Bundle, cli: Cli) -> None:
    result = cli("bench", digits_bundle.path, "--paper-limits", "L4", "--batches", "8")
    output = " ".join(result.stdout.split())
    assert "Theoretical limits of L4 (NVIDIA L4 data sheet (2023)), not measured" in output
    values = json.loads(cli("bench", digits_bundle.path, "--paper-limits", "h100", "--json").stdout)
    assert {limit["precision"] for limit in values["limits"]} == {"fp32", "tf32", "fp16"}


def test_load_of_other_processes_is_detected() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        monitor = LoadMonitor()
        time.sleep(0.5)
        machine = monitor.machine()
        process.kill()
    assert machine.other_load_cores > 0.2, "a child that has not exited counts as another process"
    assert machine.under_load


@each(
    ("factor", "spread", "changed"),
    [(2.04, 0.01, False), (2.2, 0.02, True), (2.2, 0.2, False), (1.8, 0.02, True)],
)
def test_ratio_moved_if_it_changed_by_more_than_its_uncertainty_and_5_percent(
    report: dict[str, Any], factor: float, spread: float, changed: bool
) -> None:
    def with_ratio(factor: float) -> BenchReport:
        changed = copy.deepcopy(report)
        for row in changed["rows"]:
            low, high = factor * (1 - spread), factor * (1 + spread)
            row["ratio"].update(median=factor, low=low, high=high)
            row["latency"]["p50_ms"] = 1.0 / factor
        return load(changed)

    changes = compare_reports(with_ratio(2.0), with_ratio(factor)).changes
    assert [change.batch for change in changes] == [1, 2]
    for change in changes:
        assert (change.same_file, change.changed) == (True, changed)
        assert change.before_ms / change.after_ms == pytest.approx(factor / 2)
        assert change.ratio_change_percent == pytest.approx(100 * (factor / 2 - 1))


@each(
    ("path", "value", "message"),
    [
        ("machine.cpu.name", "Another CPU", "the device was cpu of Another CPU"),
        ("versions.tensorrt", "10.16.1", "TensorRT's major version was 10"),
        ("settings.threads", 7, "the number of threads was 7, now it is 1"),
        ("settings.streams", 3, "the number of streams was 3, now it is 1"),
        ("reference", "pytorch", "the reference was pytorch, now it is ort-cpu/fp32"),
        ("rows", [], "no row in common"),
    ],
)
def test_reports_that_cannot_be_compared(
    report: dict[str, Any], path: str, value: object, message: str
) -> None:
    old, (*keys, last) = copy.deepcopy(report), path.split(".")
    functools.reduce(operator.getitem, keys, old)[last] = value
    with pytest.raises(UsageError, match=message):
        compare_reports(load(old), load(report))
