"""``quantize`` from a bundle to a bundle: images, what it writes, reuses, judges and refuses."""

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
from van_deploy.checks.golden import golden_samples
from van_deploy.config import QuantizeSettings
from van_deploy.errors import (
    BundleError,
    GateFailed,
    ImageError,
    MissingDependency,
    UsageError,
)
from van_deploy.metrics import sqnr_db
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.pipeline import QuantizeResult, quantize_bundle
from van_deploy.runners.network import Network

PLAIN = QuantizeSettings(equalize=False, bias_correction=False, threads=1)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a calibration set of 60 digits."""
    path = tmp_path_factory.mktemp("sets") / "few.toml"
    path.write_text('[images]\nsource = "digits"\ncount = 60\n')
    return str(path)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "heldout", "heldout", 40)


@pytest.fixture
def bundle(digits_bundle: Bundle, copy_of: Copy) -> Path:
    return copy_of(digits_bundle)


@pytest.fixture(scope="module")
def made(
    digits_bundle: Bundle, few: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, QuantizeResult]:
    """Return what making every precision of one bundle gave; not to be changed."""
    path = Path(shutil.copytree(digits_bundle.path, tmp_path_factory.mktemp("made") / "b"))
    every = PLAIN.changed(calibration=few)
    asked = (
        every.changed(precision="fp16"),
        every.changed(precision="bf16"),
        every.changed(equalize=True, bias_correction=True),
        every.changed(target="cpu"),
    )
    return {one.artefact: quantize_bundle(path, one) for one in asked}


def lines(result: QuantizeResult) -> dict[str, Any]:
    return {row["name"]: row for row in result.facts["comparison"]}


# --- what is made ----------------------------------------------------------------------------


def test_everything_lands_in_the_bundle_and_passes(made: dict[str, QuantizeResult]) -> None:
    bundle = made["int8-cpu"].bundle
    assert bundle.problems() == []
    assert list(bundle.artefacts) == ["fp32", "fp16", "bf16", "int8", "int8-cpu"]
    for name, result in made.items():
        assert result, name
        assert bundle.artefact(name).file == f"model.{name}.onnx"
        assert result.facts["judged"]["outcome"] == "pass"
        assert [f for f in result.facts["judged"]["findings"] if f["outcome"] != "pass"] == []


def test_fp16_and_bf16_are_judged_and_recommend_nothing_unmeasured(
    made: dict[str, QuantizeResult],
) -> None:
    for name, row, least in (("fp16", "fp16", 60), ("bf16", "BF16 emulated", 50)):
        result = made[name]
        assert list(lines(result)) == ["fp32", row]
        assert lines(result)[row]["sqnr_db"] > least
        assert set(result.facts["kept"].values()) == {
            f"'{kept}' is kept" for kept in ("norm1", "norm2", "norm3", "norm4", "head")
        }
        assert result.facts["recommended"] is None
        assert result.facts["why"].startswith("speed not measured")
    assert made["fp16"].facts["audit"]["problems"] == []
    assert "audit" not in made["bf16"].facts


def test_every_technique_is_reported_and_the_record_fits_the_file(
    made: dict[str, QuantizeResult],
) -> None:
    result, path = made["int8"], made["int8"].bundle.path
    techniques = result.facts["techniques"]
    names = [gain["name"] for gain in techniques]
    assert names == ["scales", "bias_correction", "cross_layer", "shift_scale", "shift"]
    kept = [gain["after_db"] for gain in techniques if gain["kept"]]
    assert kept == sorted(kept)
    found = lines(result)
    assert list(found) == ["fp32", "fp16", "int8"]
    assert found["int8"]["sqnr_db"] > 36
    assert found["int8"]["size_bytes"] < found["fp16"]["size_bytes"] < found["fp32"]["size_bytes"]
    assert 0.5 < result.facts["int8_share"] < 0.6
    with np.load(path / result.facts["channels"]) as channels:
        for part in ("factor", "shift"):
            assert channels[f"block1.0.attn.spatial_gating_unit.{part}"].shape == (16,)
    summary = json.loads((path / "ranges.int8.json").read_text())
    assert summary["scales"] == result.facts["scales"]


def test_a_graph_for_a_cpu_is_timed(made: dict[str, QuantizeResult]) -> None:
    found = lines(made["int8-cpu"])
    assert list(found) == ["fp32", "int8"]
    assert found["int8"]["sqnr_db"] > 25
    assert found["int8"]["ms_per_image"] > 0
    assert made["int8-cpu"].facts["recommended"] in {"fp32", "int8"}


def test_bf16_is_run_verified_and_built_and_said_to_be_emulated(
    made: dict[str, QuantizeResult], copy_of: Copy, cli: Cli
) -> None:
    bundle = made["int8-cpu"].bundle
    assert bundle.artefact("bf16").golden_sqnr_db["ort-cpu/bf16"] > 50
    samples = golden_samples(bundle)
    with Network(bundle, "bf16") as network:
        assert network.described == "ort-cpu, BF16 emulated"
        assert sqnr_db(samples.logits, network.run(samples.inputs)["logits"]) > 50
    verified = cli("verify", bundle.path, "--artefact", "bf16")
    assert verified.exit_code == 0, verified.stdout
    assert "BF16 emulated" in " ".join(verified.stdout.split())
    drift = cli("drift", bundle.path, "--artefact", "bf16", "--against", "golden")
    assert drift.exit_code == 0, drift.stdout
    assert "bfloat16" in cli("inspect", bundle.path / "model.bf16.onnx", "--json").stdout
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    path = copy_of(bundle)
    built = cli("build", path, "--precision", "bf16", "--target", "sm_89")
    assert built.exit_code == 0, built.stderr
    [engine] = [a for a in Bundle.open(path).artefacts.values() if a.kind == "engine"]
    assert engine.precision == "bf16"


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_other_scales_and_what_is_kept(bundle: Path, few: str, method: Any) -> None:
    asked = PLAIN.changed(calibration=few, method=method, keep=("block4",))
    result = quantize_bundle(bundle, asked)
    assert lines(result)["int8"]["sqnr_db"] > 20
    assert (result.facts["method"], result.facts["quantized"]) == (method, 35)
    weights = [
        (t.name, t.data_type)
        for t in load(bundle / "model.int8.onnx").graph.initializer
        if t.name.startswith("block4.1.mlp.fc1.weight")
    ]
    assert weights == [("block4.1.mlp.fc1.weight", 1)]


@pytest.mark.slow
def test_auto_takes_the_fastest_scope_that_holds(bundle: Path, few: str) -> None:
    asked = PLAIN.changed(calibration=few, scope=("auto",))
    with pytest.raises(MissingDependency, match="--scope auto times graphs on a GPU"):
        quantize_bundle(bundle, asked)
    found = lines(quantize_bundle(bundle, asked.changed(target="cpu")))
    assert list(found) == ["fp32", "int8 pointwise", "int8 deep", "int8 all"]
    times = {n: row["ms_per_image"] for n, row in found.items() if row["passed"]}
    chosen = [name for name, row in found.items() if row["requested"]]
    assert chosen == [min(times, key=lambda name: times[name])]


def test_a_budget_is_searched_on_other_images_than_it_is_judged_on(
    bundle: Path, few: str, heldout: Path
) -> None:
    settings = PLAIN.changed(calibration=few, method="minmax", max_drop=0.0, evaluations=3)
    result = quantize_bundle(bundle, settings.changed(evaluate=heldout))
    search = result.facts["search"]
    assert (search["images"], search["of"]) == (60, "top-1")
    assert len(search["trials"]) <= 3
    assert result.facts["judged_on"]["images"] == 40
    assert result.facts["quantized"] == 45 - len(search["kept"])
    own = quantize_bundle(bundle, settings, force=True)
    assert own.facts["search"]["images"] == 48  # the other 12 judge


def test_nothing_changed_is_reused_and_what_changed_is_named(
    bundle: Path, few: str, tmp_path: Path
) -> None:
    asked = PLAIN.changed(calibration=few)
    first = quantize_bundle(bundle, asked)
    assert (first.reused, first.reason) == (False, "not there yet")
    second = quantize_bundle(bundle, asked.changed(threads=2))
    assert second.reused
    assert second.facts == first.facts
    (tmp_path / "other.toml").write_text(Path(few).read_text() + "seed = 5\n")
    third = quantize_bundle(bundle, asked.changed(calibration=str(tmp_path / "other.toml")))
    assert third.reason == "changed since: calibration images, held-out images, evaluation images"
    (bundle / "model.int8.onnx").write_bytes(b"rubbish")
    result = quantize_bundle(bundle, asked)
    assert not result.reused
    assert "model.int8.onnx" in result.reason
    load(bundle / "model.int8.onnx")


def test_too_few_images_to_decide_are_no_pass(bundle: Path, few: str, heldout: Path) -> None:
    asked = PLAIN.changed(calibration=few, evaluate=heldout)
    result = quantize_bundle(bundle, asked)
    (row,) = [row for row in result.facts["comparison"] if row["requested"]]
    assert row["passed"]
    assert "would decide at this rate" in row["doubts"][0]
    assert not result.passed
    again = quantize_bundle(bundle, asked.changed(allow_inconclusive=True))
    assert again.reused
    assert again.passed


def test_noise_is_labelled(bundle: Path, heldout: Path) -> None:
    result = quantize_bundle(bundle, PLAIN.changed(noise=True, evaluate=heldout))
    assert result.facts["calibration"]["noise"] is True
    assert "NOISE" in result.facts["calibration"]["description"]


def test_what_is_refused_leaves_the_bundle_as_it_was(
    bundle: Path, few: str, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError):
        quantize_bundle(tmp_path / "none", PLAIN)
    with pytest.raises(ImageError, match="40 calibration image"):
        quantize_bundle(bundle, PLAIN.changed(images=heldout, evaluate=heldout))
    monkeypatch.setattr("van_deploy.precision.fp16.FP16_LARGEST", 50.0)
    with pytest.raises(GateFailed, match="FP16 cannot hold everything"):
        quantize_bundle(bundle, PLAIN.changed(calibration=few, precision="fp16", strict=True))
    assert list(Bundle.open(bundle).artefacts) == ["fp32"]


@each(
    ("asked", "message"),
    [
        ({"precision": "fp16", "target": "cpu"}, "FP16 makes no sense for target= cpu"),
        ({"precision": "bf16", "target": "cpu"}, "BF16 makes no sense for target= cpu"),
        ({"precision": "fp16", "max_drop": 1.0}, "max_drop= is for INT8, and precision= is fp16."),
        ({"precision": "fp16", "scope": ("all",)}, "scope= is for INT8, and precision= is fp16."),
        ({"target": "cpu", "rest": "fp16"}, "rest= fp16 is for FP16, and target= cpu keeps"),
        ({"target": "cpu", "strict": True}, "strict= is for FP16, and target= cpu keeps"),
        ({"rest": "fp32", "strict": True}, "strict= is for FP16, and rest= is fp32."),
        ({"bias_correction": False}, "equalize= shifts channels, which loses more than it brings"),
        ({"scope": ("auto", "all")}, "scope= auto times whole scopes, and other scopes were"),
        ({"scope": ("auto",), "max_drop": 1.0}, "scope= auto times whole scopes, and max_drop="),
        ({"noise": True, "images": Path("x")}, "noise= and images= are both given."),
    ],
)
def test_contradictions_say_why(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeSettings(**asked)
    assert message in caught.value.message
