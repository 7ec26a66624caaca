"""``quantize`` from a bundle to a bundle: what it writes, reuses, judges and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import load

from van_deploy.bundle import Bundle
from van_deploy.calibration_set import CalibrationSet, ImageSelection
from van_deploy.config import QuantizeSettings
from van_deploy.errors import (
    BundleError,
    ConversionError,
    GateFailed,
    ImageError,
    MissingDependency,
    UsageError,
)
from van_deploy.graph.rebuilt import van_from_onnx
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.pipeline import quantize_bundle

FEW = CalibrationSet(images=ImageSelection(source="digits", count=60))
PLAIN = QuantizeSettings(equalize=False, bias_correction=False, threads=1)


@pytest.fixture
def bundle(digits_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_bundle.path, tmp_path / "van_digits"))


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "heldout", "heldout", 40)


def lines(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in facts["comparison"]}


def test_fp16_lands_in_the_bundle(bundle: Path) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(precision="fp16"), calibration=FEW)
    assert result
    assert Bundle.open(bundle).problems() == []
    artefact = result.bundle.artefact("fp16")
    assert artefact.file == "model.fp16.onnx"
    assert lines(result.facts)["fp16"]["sqnr_db"] > 60
    assert result.facts["audit"]["problems"] == []
    assert set(result.facts["kept"].values()) == {
        f"'{name}' is kept" for name in ("norm1", "norm2", "norm3", "norm4", "head")
    }
    assert result.facts["recommended"] is None
    assert result.facts["why"].startswith("speed not measured")


def test_every_technique_is_reported_and_the_record_fits_the_file(bundle: Path) -> None:
    settings = PLAIN.changed(equalize=True, bias_correction=True)
    result = quantize_bundle(bundle, settings, calibration=FEW)
    names = [gain["name"] for gain in result.facts["techniques"]]
    assert names == ["scales", "bias_correction", "cross_layer", "shift_scale", "shift"]
    kept = [gain for gain in result.facts["techniques"] if gain["kept"]]
    assert [gain["after_db"] for gain in kept] == sorted(gain["after_db"] for gain in kept)
    found = lines(result.facts)
    assert set(found) == {"fp32", "fp16", "int8"}
    assert found["int8"]["sqnr_db"] > 36
    assert found["int8"]["size_bytes"] < found["fp16"]["size_bytes"] < found["fp32"]["size_bytes"]
    assert result.facts["judged"]["outcome"] == "pass"
    assert 0.5 < result.facts["int8_share"] < 0.6
    with np.load(bundle / result.facts["channels"]) as channels:
        assert channels["block1.0.attn.spatial_gating_unit.factor"].shape == (16,)
        assert channels["block1.0.attn.spatial_gating_unit.shift"].shape == (16,)
    summary = json.loads((bundle / "ranges.int8.json").read_text())
    assert summary["scales"] == result.facts["scales"]
    assert result.bundle.problems() == []


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_other_scales(bundle: Path, method: str) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(method=method), calibration=FEW)
    assert lines(result.facts)["int8"]["sqnr_db"] > 20
    assert result.facts["method"] == method


def test_keep_keeps_out_of_int8_and_fp16(bundle: Path) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(keep=("block4",)), calibration=FEW)
    graph = load(bundle / "model.int8.onnx")
    weights = [t for t in graph.graph.initializer if t.name.startswith("block4.1.mlp.fc1.weight")]
    assert [t.name for t in weights] == ["block4.1.mlp.fc1.weight"]
    assert weights[0].data_type == 1
    assert result.facts["quantized"] == 35


def test_a_budget_is_searched_on_other_images_than_it_is_judged_on(
    bundle: Path, heldout: Path
) -> None:
    settings = PLAIN.changed(method="minmax", max_drop=0.0, evaluations=3)
    result = quantize_bundle(bundle, settings, calibration=FEW, evaluate=heldout)
    search = result.facts["search"]
    assert search["images"] == 60
    assert len(search["trials"]) <= 3
    assert result.facts["judged_on"]["images"] == 40
    assert result.facts["quantized"] == 45 - len(search["kept"])
    assert search["of"] == "top-1"
    own = quantize_bundle(bundle, settings, calibration=FEW, force=True)
    assert own.facts["search"]["images"] == 48  # the other 12 judge


def test_the_cpu_has_a_graph_of_its_own_beside_the_other(bundle: Path) -> None:
    quantize_bundle(bundle, PLAIN, calibration=FEW)
    result = quantize_bundle(bundle, PLAIN.changed(target="cpu"), calibration=FEW)
    assert list(result.bundle.artefacts) == ["fp32", "int8", "int8-cpu"]
    found = lines(result.facts)
    assert set(found) == {"fp32", "int8"}
    assert found["int8"]["sqnr_db"] > 25
    assert found["int8"]["ms_per_image"] > 0
    assert result.facts["recommended"] in {"fp32", "int8"}
    assert result.bundle.problems() == []
    assert [f for f in result.facts["judged"]["findings"] if f["outcome"] != "pass"] == []
    assert result.passed


def test_auto_takes_the_fastest_scope_that_holds(bundle: Path) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(target="cpu", scope=("auto",)), calibration=FEW)
    found = lines(result.facts)
    assert set(found) == {"fp32", "int8 pointwise", "int8 deep", "int8 all"}
    times = {n: row["ms_per_image"] for n, row in found.items() if row["passed"]}
    chosen = [name for name, row in found.items() if row["requested"]]
    assert chosen == [min(times, key=lambda name: times[name])]


def test_auto_needs_a_runtime_of_its_target(bundle: Path) -> None:
    with pytest.raises(MissingDependency, match="--scope auto times graphs on a GPU"):
        quantize_bundle(bundle, PLAIN.changed(scope=("auto",)), calibration=FEW)


class TestReuse:
    def test_nothing_changed_is_reused(self, bundle: Path) -> None:
        first = quantize_bundle(bundle, PLAIN, calibration=FEW)
        assert (first.reused, first.reason) == (False, "not there yet")
        second = quantize_bundle(bundle, PLAIN.changed(threads=2), calibration=FEW)
        assert second.reused
        assert second.facts == first.facts
        other = FEW.model_copy(update={"images": FEW.images.model_copy(update={"seed": 5})})
        third = quantize_bundle(bundle, PLAIN, calibration=other)
        assert third.reason == (
            "changed since: calibration images, held-out images, evaluation images"
        )

    def test_a_file_that_was_changed_is_made_anew(self, bundle: Path) -> None:
        quantize_bundle(bundle, PLAIN, calibration=FEW)
        (bundle / "model.int8.onnx").write_bytes(b"rubbish")
        result = quantize_bundle(bundle, PLAIN, calibration=FEW)
        assert not result.reused
        assert "model.int8.onnx" in result.reason
        load(bundle / "model.int8.onnx")


class TestImages:
    def test_too_few_to_decide_is_no_pass(self, bundle: Path, heldout: Path) -> None:
        result = quantize_bundle(bundle, PLAIN, calibration=FEW, evaluate=heldout)
        (row,) = [row for row in result.facts["comparison"] if row["requested"]]
        assert row["passed"]
        assert "would decide at this rate" in row["doubts"][0]
        assert not result.passed
        again = quantize_bundle(
            bundle, PLAIN.changed(allow_inconclusive=True), calibration=FEW, evaluate=heldout
        )
        assert again.reused
        assert again.passed

    def test_the_same_images_on_both_sides_are_an_error(self, bundle: Path, heldout: Path) -> None:
        with pytest.raises(ImageError, match="40 calibration image"):
            quantize_bundle(bundle, PLAIN, images=heldout, evaluate=heldout)
        assert list(Bundle.open(bundle).artefacts) == ["fp32"]

    def test_noise_is_labelled(self, bundle: Path, heldout: Path) -> None:
        result = quantize_bundle(bundle, PLAIN.changed(noise=True), evaluate=heldout)
        assert result.facts["calibration"]["noise"] is True
        assert "NOISE" in result.facts["calibration"]["description"]


def test_strict_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("van_deploy.precision.range_audit.FP16_LARGEST", 50.0)
    settings = PLAIN.changed(precision="fp16", strict=True)
    with pytest.raises(GateFailed, match="FP16 cannot hold everything"):
        quantize_bundle(bundle, settings, calibration=FEW)
    assert list(Bundle.open(bundle).artefacts) == ["fp32"]


def test_what_is_no_folded_network_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        quantize_bundle(tmp_path / "none", PLAIN)
    graph = load(bundle / "model.onnx")
    del graph.graph.node[:3]
    with pytest.raises(ConversionError, match="is not a folded VAN"):
        van_from_onnx(graph, Bundle.open(bundle).manifest.architecture)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"precision": "fp16", "target": "cpu"}, "FP16 makes no sense for target= cpu"),
        ({"precision": "fp16", "max_drop": 1.0}, "max_drop= is for INT8, and precision= is fp16."),
        ({"precision": "fp16", "scope": ("all",)}, "scope= is for INT8, and precision= is fp16."),
        ({"target": "cpu", "rest": "fp16"}, "rest= fp16 is for FP16, and target= cpu keeps"),
        ({"target": "cpu", "strict": True}, "strict= is for FP16, and target= cpu keeps"),
        ({"target": "cpu", "half_io": True}, "half_io= is for FP16, and target= cpu keeps"),
        ({"rest": "fp32", "half_io": True}, "half_io= is for FP16, and rest= is fp32."),
        ({"rest": "fp32", "strict": True}, "strict= is for FP16, and rest= is fp32."),
        ({"bias_correction": False}, "equalize= shifts channels, which loses more than it brings"),
        ({"scope": ("auto", "all")}, "scope= auto times whole scopes, and other scopes were"),
        ({"scope": ("auto",), "max_drop": 1.0}, "scope= auto times whole scopes, and max_drop="),
    ],
)
def test_contradictions_say_why(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeSettings(**asked)
    assert message in caught.value.message
