"""A bundle quantised: what lands in it, what is reused, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import load

from tests.artifacts import Copy
from van_deploy.bundle import Bundle
from van_deploy.calibration_set import calibration_set_named
from van_deploy.config import QuantizeSettings
from van_deploy.errors import BundleError, GateFailed, ImageError, UsageError
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.stage import quantize_bundle
from van_deploy.precision.verdict import PrecisionRow, precision_row, recommended

PLAIN = QuantizeSettings(equalize=False, refine=False, threads=1)
FEW = calibration_set_named("digits").changed(
    images=calibration_set_named("digits").images.changed(count=60, digest=""),
)


@pytest.fixture
def bundle(digits_bundle: Bundle, copy_of: Copy) -> Path:
    """Return a bundle of the embedded network to write into."""
    return copy_of(digits_bundle)


def lines(facts: object) -> dict[str, dict[str, float]]:
    assert isinstance(facts, dict)
    return {row["precision"]: row for row in facts["comparison"]}


def test_fp16_lands_in_the_bundle(bundle: Path) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(precision="fp16"), calibration=FEW)
    assert result
    assert Bundle.open(bundle).problems() == []
    artefact = result.bundle.artefact("fp16")
    assert artefact.file == "model.fp16.onnx"
    assert artefact.made_from.sha256 == result.bundle.artefact("fp32").sha256
    assert lines(dict(artefact.quantization))["fp16"]["sqnr_db"] > 60
    assert artefact.quantization["audit"]["problems"] == []
    assert set(artefact.quantization["kept"].values()) == {
        f"'{name}' is kept" for name in ("norm1", "norm2", "norm3", "norm4", "head")
    }


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "mse", "entropy"])
def test_int8_by_every_method(bundle: Path, method: str) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(method=method), calibration=FEW)
    found = lines(dict(result.facts))
    assert set(found) == {"fp32", "fp16", "int8"}
    assert found["int8"]["sqnr_db"] > 20
    assert found["int8"]["size_bytes"] < found["fp16"]["size_bytes"] < found["fp32"]["size_bytes"]
    assert result.facts["plan"]["method"] == method
    assert result.facts["recommended"] == "int8"
    summary = json.loads((bundle / "ranges.json").read_text())
    assert summary["images"] == 48
    assert set(summary["scales"]) == set(result.facts["scales"])
    assert result.bundle.problems() == []


def test_auto_takes_the_method_with_the_least_divergence(bundle: Path) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(method="auto"), calibration=FEW)
    table = result.facts["methods"]
    assert set(table["kl"]) == {"minmax", "average", "percentile", "mse", "entropy"}
    assert table["chosen"] == min(table["kl"], key=table["kl"].get)
    assert result.facts["plan"]["method"] == table["chosen"]
    assert table["images"] == 12


def test_every_improvement_together(bundle: Path) -> None:
    settings = QuantizeSettings(threads=1)
    plain = quantize_bundle(bundle, PLAIN, calibration=FEW)
    result = quantize_bundle(bundle, settings, calibration=FEW)
    assert (
        lines(dict(result.facts))["int8"]["sqnr_db"] > lines(dict(plain.facts))["int8"]["sqnr_db"]
    )
    assert result.facts["equalize"]
    assert result.facts["refine"]["changes"]


def test_a_budget_keeps_the_worst_layers_out(bundle: Path) -> None:
    settings = PLAIN.changed(method="entropy", max_drop=0.0, evaluations=6)
    result = quantize_bundle(bundle, settings, calibration=FEW)
    search = result.facts["search"]
    assert len(search["trials"]) <= 6
    assert search["searched_on"] == result.facts["judged_on"]["description"]
    assert result.facts["quantized"] == 45 - len(search["kept"])


def test_the_cpu_has_a_graph_of_its_own(bundle: Path) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(target="cpu"), calibration=FEW)
    artefact = result.bundle.artefact("int8-cpu")
    assert (artefact.file, artefact.precision) == ("model.int8-cpu.onnx", "int8")
    found = lines(dict(result.facts))
    assert set(found) == {"fp32", "int8"}
    assert found["int8"]["sqnr_db"] > 25
    assert found["int8"]["ms_per_image"] > 0
    assert (bundle / "ranges.int8-cpu.json").exists()
    assert 0.5 < result.facts["int8_share"] < 0.6  # all but the stem and the first stage


def test_both_targets_live_side_by_side(bundle: Path) -> None:
    quantize_bundle(bundle, PLAIN, calibration=FEW)
    result = quantize_bundle(bundle, PLAIN.changed(target="cpu"), calibration=FEW)
    assert list(result.bundle.artefacts) == ["fp32", "int8", "int8-cpu"]
    assert result.bundle.problems() == []


class TestReuse:
    def test_nothing_changed_is_reused(self, bundle: Path) -> None:
        first = quantize_bundle(bundle, PLAIN, calibration=FEW)
        assert (first.reused, first.reason) == (False, "not there yet")
        before = (bundle / "model.int8.onnx").stat().st_mtime_ns
        second = quantize_bundle(bundle, PLAIN.changed(threads=2), calibration=FEW)
        assert second.reused
        assert second.reason == (
            "the weights, graph, images, settings and versions are those it was made from"
        )
        assert second.facts == first.facts
        assert (bundle / "model.int8.onnx").stat().st_mtime_ns == before

    def test_another_method_reuses_the_ranges(self, bundle: Path) -> None:
        quantize_bundle(bundle, PLAIN, calibration=FEW)
        result = quantize_bundle(bundle, PLAIN.changed(method="minmax"), calibration=FEW)
        assert (result.reused, result.reason) == (False, "changed since: settings")
        assert result.facts["ranges"] == {"reused": True, "reason": "nothing changed"}

    def test_other_images_reuse_nothing(self, bundle: Path) -> None:
        quantize_bundle(bundle, PLAIN, calibration=FEW)
        other = FEW.changed(images=FEW.images.changed(seed=5))
        result = quantize_bundle(bundle, PLAIN, calibration=other)
        assert result.reason == (
            "changed since: calibration images, held-out images, evaluation images"
        )
        assert result.facts["ranges"] == {
            "reused": False,
            "reason": "changed since: calibration images",
        }

    def test_a_file_that_was_changed_is_made_anew(self, bundle: Path) -> None:
        quantize_bundle(bundle, PLAIN, calibration=FEW)
        (bundle / "model.int8.onnx").write_bytes(b"rubbish")
        result = quantize_bundle(bundle, PLAIN, calibration=FEW)
        assert not result.reused
        assert "model.int8.onnx" in result.reason
        load(bundle / "model.int8.onnx")

    def test_it_can_be_forced(self, bundle: Path) -> None:
        quantize_bundle(bundle, PLAIN, calibration=FEW)
        result = quantize_bundle(bundle, PLAIN, calibration=FEW, force=True)
        assert (result.reused, result.reason) == (False, "asked to (--force)")


class TestImages:
    def test_a_folder_needs_no_manifest(self, bundle: Path, tmp_path: Path) -> None:
        train = write_digits_folder(tmp_path / "train", "train", 40)
        heldout = write_digits_folder(tmp_path / "heldout", "heldout", 30)
        result = quantize_bundle(bundle, PLAIN, images=train, evaluate=heldout)
        assert result.facts["judged_on"]["images"] == 30
        assert result.facts["calibration"]["images"] == 32
        assert lines(dict(result.facts))["fp32"]["correct"] >= 28

    def test_the_same_images_on_both_sides_are_an_error(self, bundle: Path, tmp_path: Path) -> None:
        train = write_digits_folder(tmp_path / "train", "train", 40)
        with pytest.raises(ImageError, match="40 calibration image"):
            quantize_bundle(bundle, PLAIN, images=train, evaluate=train)
        assert list(Bundle.open(bundle).artefacts) == ["fp32"]

    def test_noise_is_labelled(self, bundle: Path, tmp_path: Path) -> None:
        heldout = write_digits_folder(tmp_path / "heldout", "heldout", 20)
        result = quantize_bundle(bundle, PLAIN.changed(noise=True), evaluate=heldout)
        artefact = Bundle.open(bundle).artefact("int8")
        assert artefact.quantization["calibration"]["noise"] is True
        assert "NOISE" in artefact.quantization["calibration"]["description"]
        assert result.facts["judged_on"]["images"] == 20

    def test_noise_and_images_together_are_refused(self, bundle: Path) -> None:
        with pytest.raises(UsageError, match="were both given"):
            quantize_bundle(bundle, PLAIN.changed(noise=True), calibration=FEW)

    def test_other_networks_need_images(self, bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        (bundle / "manifest.json").write_text(json.dumps({**manifest, "name": "mine"}))
        with pytest.raises(ImageError, match="INT8 needs images to calibrate on"):
            quantize_bundle(bundle, PLAIN)


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"precision": "int4"}, "'precision=' is 'int4': it should be 'fp16' or 'int8'."),
            ({"percentile": 0.999}, "'percentile=' is 0.999: it should be greater than 50."),
            ({"precision": "fp16", "target": "cpu"}, "FP16 makes no sense for target= cpu"),
            ({"target": "cpu", "rest": "fp16"}, "target= cpu keeps what is not INT8 in FP32"),
            ({"precision": "fp16", "max_drop": 1.0}, "max_drop= is for INT8, and precision= is"),
            ({"noise": True, "calibration": "digits"}, "noise= and calibration= are both given."),
        ],
    )
    def test_contradictions_say_why(self, asked: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError) as caught:
            QuantizeSettings(**asked)
        assert message in caught.value.message

    def test_there_must_be_a_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError):
            quantize_bundle(tmp_path / "none", PLAIN)

    def test_strict_leaves_the_bundle_as_it_was(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("van_deploy.precision.audit.FP16_LARGEST", 50.0)
        settings = PLAIN.changed(precision="fp16", strict=True)
        with pytest.raises(GateFailed, match="FP16 cannot hold everything"):
            quantize_bundle(bundle, settings, calibration=FEW)
        assert list(Bundle.open(bundle).artefacts) == ["fp32"]


class TestGates:
    """A gate on a share of images fails only where its whole interval is on the wrong side."""

    @staticmethod
    def row(images: int, wrong: int, labelled: bool = False) -> PrecisionRow:
        expected = np.zeros((images, 4), np.float32)
        expected[:, :2] = 10.0, 9.99
        found = expected.copy()
        found[:wrong, 1] = 10.01
        labels = np.zeros(images, int) if labelled else None
        return precision_row("int8", 1, expected, found, labels)

    def test_two_of_a_hundred_are_too_few_to_fail(self) -> None:
        row = self.row(102, 2)
        assert row.passed
        assert row.failures == ()
        assert row.doubts == ("agreement 98.04 % (93.1 to 99.5 on 102 images) is below 98.5 %",)
        assert row.as_dict()["doubts"] == list(row.doubts)

    def test_forty_of_two_thousand_are_enough(self) -> None:
        row = self.row(2000, 60)
        assert not row.passed
        assert row.failures == ("agreement 97.00 % (96.2 to 97.7 on 2000 images) is below 98.5 %",)
        assert row.doubts == ()

    def test_lost_top_1_likewise(self) -> None:
        few, many = self.row(102, 2, labelled=True), self.row(2000, 60, labelled=True)
        assert any("top-1 lost 1.96 points" in doubt for doubt in few.doubts)
        assert any("top-1 lost 3.00 points" in failure for failure in many.failures)


class TestRecommendation:
    @pytest.fixture
    def row(self) -> Callable[..., PrecisionRow]:
        def make(
            precision: str, size: int, passed: bool | None, ms: float | None = None
        ) -> PrecisionRow:
            failures = ("agreement 90.00 % is below 98.5 %",) if passed is False else ()
            return PrecisionRow(
                precision, size, 40.0, 1.0, 0.0, 0.99, 100, None, ms, passed, failures
            )

        return make

    def test_the_smallest_that_holds(self, row: Callable[..., PrecisionRow]) -> None:
        rows = (row("fp32", 400, None), row("fp16", 200, True), row("int8", 120, True))
        assert recommended(rows, "tensorrt") == (
            "int8",
            "3.33 times smaller than FP32, at 99.00 % agreement",
        )

    def test_int8_that_fails_is_not_worth_it(self, row: Callable[..., PrecisionRow]) -> None:
        rows = (row("fp32", 400, None), row("fp16", 200, True), row("int8", 120, False))
        best, why = recommended(rows, "tensorrt")
        assert best == "fp16"
        assert why.endswith("INT8 is not worth it: agreement 90.00 % is below 98.5 %")

    def test_int8_that_saves_nothing_is_not_worth_it(
        self, row: Callable[..., PrecisionRow]
    ) -> None:
        rows = (row("fp32", 400, None), row("fp16", 200, True), row("int8", 190, True))
        best, why = recommended(rows, "tensorrt")
        assert best == "fp16"
        assert why.endswith("INT8 is not worth it: 0.95 times the size of FP16")

    def test_on_a_cpu_speed_decides(self, row: Callable[..., PrecisionRow]) -> None:
        slow = (row("fp32", 400, None, 10.0), row("int8", 100, True, 12.0))
        assert recommended(slow, "cpu") == (
            "fp32",
            "nothing smaller holds its gate and pays; "
            "INT8 is not worth it: 1.20 times the time of FP32",
        )
        fast = (row("fp32", 400, None, 13.0), row("int8", 100, True, 10.0))
        assert recommended(fast, "cpu")[1] == (
            "1.30 times FP32's speed here, 4.00 times smaller than FP32"
        )
