"""``quantize``: the files it writes, its cache, its gates, and rejected options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import load

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.config import QuantizeSettings
from van_deploy.errors import BundleError, GateFailed, ImageError, MissingDependency, UsageError
from van_deploy.intervals import wilson_interval
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.pipeline import QuantizeResult, quantize_bundle

SET = '[images]\nsource = "digits"\ncount = 60\n'
PLAIN = QuantizeSettings(equalize=False, bias_correction=False, threads=1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> QuantizeSettings:
    """Return settings with a calibration set of 60 digits."""
    path = tmp_path_factory.mktemp("sets") / "calibration.toml"
    path.write_text(SET)
    return PLAIN.with_changes(calibration=str(path))


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "heldout", "heldout", 40)


@pytest.fixture
def bundle(digits_bundle: Bundle, copy_bundle: Copy) -> Path:
    return copy_bundle(digits_bundle)


@pytest.fixture(scope="module")
def results(
    digits_bundle: Bundle, settings: QuantizeSettings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, QuantizeResult]:
    """Return the results of all precisions of one bundle; tests must not change them."""
    path = Path(shutil.copytree(digits_bundle.path, tmp_path_factory.mktemp("results") / "b"))
    every = [
        settings.with_changes(precision="fp16"),
        settings.with_changes(precision="bf16"),
        settings.with_changes(equalize=True, bias_correction=True),
        settings.with_changes(target="cpu"),
    ]
    return {one.artifact: quantize_bundle(path, one) for one in every}


def lines(result: QuantizeResult) -> dict[str, Any]:
    return {row["name"]: row for row in result.facts["comparison"]}


# --- results ---------------------------------------------------------------------------------


def test_all_precisions_are_saved_and_pass(results: dict[str, QuantizeResult]) -> None:
    bundle = results["int8-cpu"].bundle
    assert bundle.problems() == []
    assert list(bundle.artifacts) == ["fp32", "fp16", "bf16", "int8", "int8-cpu"]
    rows = {"fp16": "fp16", "bf16": "BF16 emulated", "int8": "int8", "int8-cpu": "int8"}
    for (name, result), least in zip(results.items(), (60, 50, 36, 25), strict=True):
        assert result, name
        assert result.facts["golden_check"]["outcome"] == "pass"
        assert lines(result)[rows[name]]["sqnr_db"] > least
        if name != "int8-cpu":
            assert result.facts["recommended"] is None
            assert result.facts["recommendation_reason"].startswith("speed not measured")
            assert set(result.facts["fp32_nodes"].values()) == {
                f"'{kept}' is kept" for kept in ("norm1", "norm2", "norm3", "norm4", "head")
            }
    assert results["fp16"].facts["audit"]["problems"] == []
    assert "audit" not in results["bf16"].facts
    timed = results["int8-cpu"]  # for a CPU the time decides
    assert lines(timed)["int8"]["ms_per_image"] > 0
    assert timed.facts["recommended"] in {"fp32", "int8"}


def test_techniques_and_files_match_the_facts(results: dict[str, QuantizeResult]) -> None:
    result, path = results["int8"], results["int8"].bundle.path
    kept = [gain["after_db"] for gain in result.facts["techniques"] if gain["used"]]
    assert len(kept) > 1
    assert kept == sorted(kept)
    sizes = [lines(result)[name]["size_bytes"] for name in ("int8", "fp16", "fp32")]
    assert sizes == sorted(sizes)
    assert 0.5 < result.facts["int8_share"] < 0.6
    with np.load(path / result.facts["channels"]) as channels:
        for part in ("factor", "shift"):
            assert channels[f"block1.0.attn.spatial_gating_unit.{part}"].shape == (16,)
    summary = json.loads((path / "ranges.int8.json").read_text())
    assert summary["scales"] == result.facts["scales"]


def test_bf16_runs_emulated_and_can_be_verified_and_built(
    results: dict[str, QuantizeResult], copy_bundle: Copy, cli: Cli
) -> None:
    bundle = results["int8-cpu"].bundle
    assert bundle.artifact("bf16").golden_sqnr_db["ort-cpu/bf16"] > 50
    path = copy_bundle(bundle)
    assert "BF16 emulated" in cli.passes("verify --artifact bf16", path)
    cli.passes("drift --artifact bf16 --against golden", path)
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    cli.passes("build --precision bf16 --target sm_89", path)
    [engine] = [a for a in Bundle.open(path).artifacts.values() if a.kind == "engine"]
    assert engine.precision == "bf16"


@pytest.mark.slow
def test_scope_auto_selects_the_fastest_passing_scope(
    bundle: Path, settings: QuantizeSettings
) -> None:
    settings = settings.with_changes(scope=("auto",))
    with pytest.raises(MissingDependency, match="--scope auto measures latency on a GPU"):
        quantize_bundle(bundle, settings)
    found = lines(quantize_bundle(bundle, settings.with_changes(target="cpu")))
    assert list(found) == ["fp32", "int8 pointwise", "int8 deep", "int8 all"]
    times = {n: row["ms_per_image"] for n, row in found.items() if row["passed"]}
    chosen = [name for name, row in found.items() if row["requested"]]
    assert chosen == [min(times, key=lambda name: times[name])]


def test_budget_search_does_not_use_evaluation_images(
    bundle: Path, settings: QuantizeSettings, heldout: Path
) -> None:
    settings = settings.with_changes(method="minmax", max_drop=0.0, evaluations=3)
    result = quantize_bundle(bundle, settings.with_changes(evaluate=heldout))
    assert lines(result)["int8"]["sqnr_db"] > 20
    search = result.facts["search"]
    assert (search["images"], search["metric"]) == (60, "top-1")
    assert len(search["trials"]) <= 3
    assert result.facts["evaluated_on"]["images"] == 40
    assert result.facts["quantized"] == 45 - len(search["excluded"])
    own = quantize_bundle(bundle, settings, force=True)
    assert own.facts["search"]["images"] == 48  # the other 12 judge


def test_unchanged_result_is_reused_and_changes_are_reported(
    bundle: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    settings = settings.with_changes(method="percentile", keep=("block4",))
    first = quantize_bundle(bundle, settings)
    assert (first.reused, first.reason) == (False, "new")
    assert (first.facts["method"], first.facts["quantized"]) == ("percentile", 35)
    assert lines(first)["int8"]["sqnr_db"] > 20
    second = quantize_bundle(bundle, settings.with_changes(threads=2))
    assert (second.reused, second.facts) == (True, first.facts)
    (tmp_path / "other.toml").write_text(f"{SET}seed = 5\n")
    third = quantize_bundle(bundle, settings.with_changes(calibration=str(tmp_path / "other.toml")))
    assert third.reason == "changed since: calibration images, held-out images, evaluation images"
    (bundle / "model.int8.onnx").write_bytes(b"rubbish")
    result = quantize_bundle(bundle, settings)
    assert not result.reused
    assert "model.int8.onnx" in result.reason
    load(bundle / "model.int8.onnx")


def test_noise_is_labelled_and_inconclusive_results_do_not_pass(
    bundle: Path, settings: QuantizeSettings, heldout: Path
) -> None:
    noise = quantize_bundle(bundle, PLAIN.with_changes(noise=True, evaluate=heldout))
    assert noise.facts["calibration"]["noise"] is True
    assert "NOISE" in noise.facts["calibration"]["description"]
    settings = settings.with_changes(evaluate=heldout)
    result = quantize_bundle(bundle, settings)
    (row,) = [row for row in result.facts["comparison"] if row["requested"]]
    assert row["passed"]
    intervals = {"agreement": round(40 * row["agreement"]), "top1": row["correct"]}
    for name, hits in intervals.items():
        assert tuple(row[f"{name}_interval"]) == wilson_interval(hits, 40)
    assert "would decide at this rate" in row["inconclusive"][0]
    assert not result.passed
    again = quantize_bundle(bundle, settings.with_changes(allow_inconclusive=True))
    assert (again.reused, again.passed) == (True, True)


# --- rejected requests -----------------------------------------------------------------------


def test_failed_quantisation_does_not_change_the_bundle(
    bundle: Path, settings: QuantizeSettings, heldout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError):
        quantize_bundle(bundle / "none", PLAIN)
    with pytest.raises(ImageError, match="40 calibration image"):
        quantize_bundle(bundle, PLAIN.with_changes(images=heldout, evaluate=heldout))
    monkeypatch.setattr("van_deploy.precision.fp16.FP16_LARGEST", 50.0)
    with pytest.raises(GateFailed, match="FP16 cannot represent every tensor"):
        quantize_bundle(bundle, settings.with_changes(precision="fp16", strict=True))
    assert list(Bundle.open(bundle).artifacts) == ["fp32"]


@each(
    ("values", "message"),
    [
        ({"precision": "bf16", "strict": True}, "strict= is for FP16"),
        ({"target": "cpu", "strict": True}, "strict= is for FP16"),
        ({"rest": "fp32", "strict": True}, "rest= is fp32"),
    ],
)
def test_conflicting_settings_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeSettings(**values)
