"""Whole benchmarks of the embedded network with the real ONNX Runtime, and their contenders."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.json_documents import edit_json
from van_deploy.bench import document
from van_deploy.bench.benchmark import LoadMonitor, benchmark_bundle
from van_deploy.bench.contenders import list_contenders, select_contenders
from van_deploy.bench.document import BenchReport, Contender, compare_reports, read_report
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.config import BenchSettings, Budget
from van_deploy.documents import plain
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import BundleError, InputError, MissingDependency, UsageError
from van_deploy.report.files import write_text
from van_deploy.report.sections_bench import bench_blocks
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import CUDA

HAS_GPU = bool((driver := nvidia_driver()) and driver.gpus)
ANY_BATCH = BenchSettings(
    device="cpu",
    threads=1,
    runners=("ort-cpu",),
    budget=Budget(seconds=0.1, calls=4, limit_s=0.5, rounds=2, warmup_s=0.02),
)
SHORT = ANY_BATCH.with_changes(batches=(1, 2))
SHORT_BENCH = (
    "bench --runners ort-cpu --device cpu --threads 1 --warmup 0 --batches 1 --seconds 0.1 "
    "--calls 4 --rounds 2 --limit 0.5"
)


@pytest.fixture(scope="module")
def saved(digits_bundle: Bundle) -> BenchReport:
    return benchmark_bundle(digits_bundle, SHORT)


def test_report_is_consistent_and_reproducible(saved: BenchReport) -> None:
    report = json.loads(saved.text())
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert row["latency"]["calls"] >= 4
        rate = 1e3 * row["batch"] / row["latency"]["mean_ms"]
        assert row["images_per_s"] == pytest.approx(rate, rel=0.2)
        assert row["peak_rss_bytes"] > 10e6
        assert min(row["first_call_ms"], row["load_s"]) > 0
        assert row["rounds"] == 2
    assert report["reference"] == "ort-cpu/fp32", "the first available contender"
    assert (report["settings"]["threads"], report["settings"]["device"]) == (1, "cpu")
    assert report["contenders"]["ort-cpu/fp32"]["sha256"]
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
    report = benchmark_bundle(uint8_bundle, settings.with_changes(p99_ms=1e6))
    rows = {(row.contender, row.image_size): row for row in report.rows}
    assert len(rows) == 2 * len(report.contenders)
    assert {name for name, _ in rows} > {"ort-cpu/fp32"}, "also the graph with uint8 input"
    assert {row.error for row in rows.values()} == {""}
    assert all(row.latency and row.latency.calls >= 2 * row.rounds for row in rows.values())
    best = {f"{name} at {size}x{size}": row for (name, size), row in rows.items()}
    assert report.best_under_p99 == best, "the smallest images are not the best batch of all"
    lines = {line.kind: line for line in report.profiles["ort-cpu/fp32"]}
    assert {"dw 7x7 d3", "1x1", "GELU"} <= set(lines)
    assert sum(line.percent for line in lines.values()) == pytest.approx(100)
    titles = [getattr(block, "title", "") for block in bench_blocks(plain(report))]
    assert "Time by type of layer at each runner's largest batch, 64x64 pixels" in titles
    if "openvino/fp32" in report.contenders:
        assert "openvino/fp32 was not profiled" in " ".join(report.warnings)


def test_p99_limit_selects_the_best_batch_size(digits_bundle: Bundle) -> None:
    settings = ANY_BATCH.with_changes(roofline=False, p99_ms=1e6)
    report = benchmark_bundle(digits_bundle, settings)
    assert [row.batch for row in report.rows] == [1, 2, 4, 8]
    best = max(report.rows, key=lambda row: row.images_per_s or 0)
    assert report.best_under_p99 == {"ort-cpu/fp32": best}
    report = benchmark_bundle(digits_bundle, settings.with_changes(p99_ms=1e-6, batches=(2, 4)))
    assert [row.batch for row in report.rows] == [2], "no larger batch after the limit is exceeded"
    assert report.best_under_p99 == {"ort-cpu/fp32": None}
    states = [pair for block in bench_blocks(plain(report)) for pair in getattr(block, "pairs", ())]
    assert ("NO", "ort-cpu/fp32: no p99 below 1e-06 ms") in states


def test_bench_command_saves_compares_and_prints_the_report(
    digits_bundle: Bundle, copy_bundle: Copy, cli: Cli, tmp_path: Path
) -> None:
    bundle, output = copy_bundle(digits_bundle), tmp_path / "deep" / "new.json"
    table = cli.passes(SHORT_BENCH, bundle, "--output", output)
    assert "ort-cpu/fp32" in table
    assert "roofline" in table.lower()
    assert read_report(output) == read_report(bundle / "bench.json")
    write_text(bundle / "bench.json", output.read_text())  # `--output BUNDLE/bench.json`
    (tmp_path / "link").symlink_to(bundle / "golden")
    for file in (bundle / "bench.json", tmp_path / "link/0.png"):
        with pytest.raises(InputError, match="' is a file of a bundle"):
            write_text(file, "{}")
    summary = Bundle.open(bundle).manifest.checks["bench"]
    assert [row["batch"] for row in summary["rows"]] == [1]
    options = ("--no-roofline", "--no-save", "--compare", output)
    result = cli.document(SHORT_BENCH, digits_bundle.path, *options)
    assert result["changes"][0]["contender"] == "ort-cpu/fp32"
    assert not (digits_bundle.path / "bench.json").exists()


INVALID = [
    ("--batches 1,two", 2, "'--batches' is 'two': it should be a whole number."),
    ("--runners tvm", 2, "There is no runner 'tvm'."),
    ("--reference pytorch-compile", 2, "The reference 'pytorch-compile' is not among"),
    ("--paper-limits l4 -o x.json", 2, "conflicts with --output, --device, --runners, --threads,"),
    ("--compare no.json", 5, "The benchmark 'no.json' cannot be read"),
    ("--output /dev/null/x.json", 5, "'/dev/null/x.json' cannot be written"),
    ("--device cuda:0", 3, "There is no NVIDIA GPU 'cuda:0'"),
    ("--device cuda:0 --streams 2", 2, "--streams is 2; on a GPU one stream is timed"),
]


@each("words, code, message", INVALID)
def test_invalid_options_of_the_bench_command(
    digits_bundle: Bundle, cli: Cli, words: str, code: int, message: str
) -> None:
    if HAS_GPU and "cuda:0" in words:
        pytest.skip("this machine has a GPU")
    command = f"{SHORT_BENCH} --no-roofline --no-save {words}"
    assert message in cli.fails(code, command, digits_bundle.path)


def test_published_limits_are_labelled_as_not_measured(digits_bundle: Bundle, cli: Cli) -> None:
    output = cli.passes("bench --paper-limits L4 --batches 8", digits_bundle.path)
    unknown = cli.fails(2, "bench --paper-limits abacus", digits_bundle.path)
    assert "There are no figures for the device 'abacus'." in unknown
    title = "Theoretical limits of L4 (NVIDIA L4 data sheet (2023)), not measured"
    assert title in " ".join(output.split())
    values = cli.document("bench --paper-limits h100", digits_bundle.path)
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
    saved: BenchReport, factor: float, spread: float, changed: bool
) -> None:
    def with_ratio(median: float) -> BenchReport:
        ratio = document.Ratio(median, median * (1 - spread), median * (1 + spread), 9)
        latency = document.Latency.of([1.0 / median])
        rows = tuple(replace(row, ratio=ratio, latency=latency) for row in saved.rows)
        return saved.model_copy(update={"rows": rows})

    changes = compare_reports(with_ratio(2.0), with_ratio(factor)).changes
    assert [change.batch for change in changes] == [1, 2]
    for change in changes:
        assert (change.same_file, change.changed) == (True, changed)
        assert change.before_ms / change.after_ms == pytest.approx(factor / 2)
        assert change.ratio_change_percent == pytest.approx(100 * (factor / 2 - 1))


DIFFERENCES = [
    ("machine cpu name", "Another CPU", "the device was cpu of Another CPU"),
    ("versions tensorrt", "10.16.1", "TensorRT's major version was 10"),
    ("settings threads", 7, "the number of threads was 7, now it is 1"),
    ("settings streams", 3, "the number of streams was 3, now it is 1"),
    ("reference", "pytorch", "the reference was pytorch, now it is ort-cpu/fp32"),
    ("settings tf32", False, "was False EXHAUSTIVE False, now it is True EXHAUSTIVE False"),
    ("rows", [], "no row in common"),
]


@each("keys, value, message", DIFFERENCES)
def test_reports_that_cannot_be_compared(
    saved: BenchReport, tmp_path: Path, keys: str, value: object, message: str
) -> None:
    old = tmp_path / "old.json"
    old.write_text(saved.text())
    edit_json(old, keys, value)
    with pytest.raises(UsageError, match=message):
        compare_reports(read_report(old), saved)


def test_damaged_reports(saved: BenchReport, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(saved.text().replace('"median": 1.0', '"median": 0.0'))
    with pytest.raises(InputError, match=r"'rows\.0\.ratio\.median' is 0"):
        read_report(old)
    old.write_text(saved.text())
    edit_json(old, "contenders", {})
    changes = compare_reports(read_report(old), saved).changes
    assert [change.same_file for change in changes] == [False, False]


def test_static_graph_is_timed_at_its_batch_only(digits_bundle: Bundle, copy_bundle: Copy) -> None:
    folder = copy_bundle(digits_bundle)
    edit_json(folder / MANIFEST, "batch", {"min": 2, "opt": 2, "max": 2})
    settings = ANY_BATCH.with_changes(roofline=False, profile=True)
    report = benchmark_bundle(Bundle.open(folder), settings)
    assert [(row.batch, row.error) for row in report.rows] == [(2, "")]
    graph = report.contenders["ort-cpu/fp32"]
    assert (graph.min_batch, graph.max_batch) == (2, 2)


# --- contenders ------------------------------------------------------------------------------

NAMES = ("pytorch", "pytorch-compile", "ort-cpu/fp32", "ort-cpu/int8-cpu")
READY = {name: Contender(name, "onnxruntime", "fp32") for name in NAMES}
SKIPPED = {"openvino/fp32": "OpenVINO is not installed"}


PATTERNS = [
    ("", (*NAMES, *SKIPPED)),
    ("pytorch", ("pytorch",)),
    ("pytorch*", ("pytorch", "pytorch-compile")),
    ("ort-cpu", ("ort-cpu/fp32", "ort-cpu/int8-cpu")),
    ("*/int8* pytorch", ("pytorch", "ort-cpu/int8-cpu")),
    ("*/fp32", ("ort-cpu/fp32", "openvino/fp32")),
    ("tvm", "There is no runner 'tvm'."),
    ("openvino", "The runner 'openvino/fp32' cannot start: OpenVINO is not installed."),
]


@each("patterns, names", PATTERNS)
def test_contenders_are_selected_by_name_runtime_or_pattern(patterns: str, names: Any) -> None:
    try:
        ready, skipped = select_contenders((READY, SKIPPED), patterns.split())
        result: object = (*ready, *skipped)
    except (UsageError, MissingDependency) as error:
        result = error.message
    assert result == names


def with_artifacts(copy: Path, **artifacts: dict[str, Any]) -> Bundle:
    """Return a copy of a bundle with these artifacts, which differ from its FP32 graph."""
    fp32 = json.loads((copy / MANIFEST).read_text())["artifacts"]["fp32"]
    entries = {name: {**fp32, **changes} for name, changes in artifacts.items()}
    edit_json(copy / MANIFEST, "artifacts", entries)
    return Bundle.open(copy)


def compiled(kind: str, target: str, low: int, high: int) -> dict[str, Any]:
    profile = {"min": low, "opt": high, "max": high}
    engine = {"backend": f"{kind} 1", "targets": [target], "profiles": [profile]}
    return {"kind": kind, "engine": {**engine, "parser_layers": 1}}


def test_contenders_and_skip_reasons(
    digits_bundle: Bundle, copy_bundle: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.bench.contenders.execution_providers", lambda: (CUDA,))
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp16": {"precision": "fp16"},
        "int8": {"precision": "int8", "made_with": {"settings": {"target": "tensorrt"}}},
        "int8-cpu": {"precision": "int8", "made_with": {"settings": {"target": "cpu"}}},
        "engine": compiled("engine", "sm_89", 2, 8),
        "package": compiled("package", "x86_64", 1, 128),
    }
    bundle = with_artifacts(copy_bundle(digits_bundle), **kinds)
    (on_cpu, cpu_reasons), (on_gpu, gpu_reasons) = (
        list_contenders(bundle, BenchSettings(device=device)) for device in ("cpu", "cuda:0")
    )
    assert {"pytorch", "ort-cpu/fp32", "ort-cpu/int8-cpu", "inductor/package"} <= set(on_cpu)
    for name, reason in {
        "ort-cpu/fp16": "FP16 is for GPUs",
        "ort-cpu/int8": "quantised for tensorrt",
        "openvino/int8": "quantised for tensorrt",
        "tensorrt/engine": "it runs on a GPU" if HAS_GPU else "no NVIDIA GPU was found",
    }.items():
        assert cpu_reasons[name].startswith(reason)
    engine = on_gpu["tensorrt-graph/engine"]
    assert (engine.min_batch, engine.max_batch, engine.device) == (2, 8, "cuda:0")
    assert {"ort-cuda/int8", "ort-cuda-graph/int8", "pytorch-compile-fp16"} <= set(on_gpu)
    modes = ("ort-cuda", "ort-cuda-nhwc", "ort-cuda-graph")
    for_cpus = {f"{mode}/int8-cpu" for mode in modes}
    assert set(gpu_reasons) == {"inductor/package", "ort-cuda-nhwc/int8", *for_cpus}
    options: Any = {"tf32": False, "conv_search": "DEFAULT", "fuse_conv_bias": True}
    contenders, _ = list_contenders(bundle, BenchSettings(device="cuda:1", **options))
    assert {entry.device for entry in contenders.values()} == {"cuda:1"}
    provided = {n: CudaOptions(**c.options) for n, c in contenders.items() if n.endswith("fp32")}
    chosen = CudaOptions(False, False, "DEFAULT", True)
    assert provided == {
        "ort-cuda/fp32": chosen,
        "ort-cuda-nhwc/fp32": replace(chosen, prefer_nhwc=True),
        "ort-cuda-graph/fp32": replace(chosen, cuda_graph=True),
    }
    (bundle.path / "model.onnx").write_bytes(b"!")
    with pytest.raises(BundleError, match="was changed after the manifest"):
        list_contenders(Bundle.open(bundle.path), BenchSettings())
    with pytest.raises(BundleError, match="has no artifact to time"):
        list_contenders(with_artifacts(bundle.path), BenchSettings())
