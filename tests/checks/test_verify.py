"""Verification of correct and broken artifacts, parts that drift reports, and golden samples."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import ModelProto
from PIL import Image

from tests.artifacts import Subject
from tests.checks import faults
from tests.checks.conftest import Broken, tiny_bundle
from tests.checks.faults import Fault
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks import regression
from van_deploy.checks.drift import DriftReport, drift_of_bundle
from van_deploy.checks.gates import Limit, Outcome, sqnr_floor
from van_deploy.checks.golden import Samples, golden_images, golden_samples
from van_deploy.checks.outputs import check_outputs
from van_deploy.checks.verify import ArtifactVerdict, verify_bundle
from van_deploy.config import DriftSettings, RunnerSettings, VerifySettings
from van_deploy.errors import GateFailed
from van_deploy.graph.embed import TOP_PROBABILITIES, embed_preprocessing
from van_deploy.metrics import sqnr_db
from van_deploy.model.preprocess import OFFICIAL, normalise
from van_deploy.stopwatch import no_progress

DIGITS_BLOCKS = [f"block{s}.{b}" for s, depth in enumerate((2, 2, 3, 2), 1) for b in range(depth)]
PASS, FAIL = Outcome.PASS, Outcome.FAIL
WITHOUT_MODULES = VerifySettings(modules=False)


def verdict_of(whole: Subject, bundle: Bundle, name: str) -> ArtifactVerdict:
    settings = VerifySettings(artifacts=(name,))
    return verify_bundle(bundle, whole.samples, settings).artifacts[name]


def drift(whole: Subject, bundle: Bundle, name: str, **options: Any) -> DriftReport:
    settings = DriftSettings(artifacts=(name,), **options)
    return drift_of_bundle(bundle, whole.samples.first(2), settings, whole.loaded, no_progress)


@pytest.mark.slow
def test_trained_network_passes(cifar: Subject) -> None:
    found = verify_bundle(cifar.bundle, cifar.samples).artifacts
    outcomes = {name: verdict.outcome for name, verdict in found.items()}
    assert outcomes == {"fp32": PASS, "fp16": PASS, "int8": PASS}


def same(model: ModelProto) -> ModelProto:
    return model


OTHER_IMAGES = faults.change_normalisation(old=(0.305, 0.375), new=(0.5, 0.5))
HALF = ("Mul", [np.float32(0.5)])
ONE_NAN = ("Mul", [np.array([1, 1, 1, np.nan, 1], np.float32)])


@each(
    ("outputs", "spoil", "failed"),
    [
        ("logits", same, []),
        ("logits", OTHER_IMAGES, ["SQNR", "worst image"]),
        ("top5", same, []),
        ("top5", OTHER_IMAGES, ["probabilities"]),
        ("top5", faults.inserted(TOP_PROBABILITIES, ONE_NAN), ["probabilities"]),
        ("probabilities", faults.negate_logits, ["probabilities", "label flips"]),
        ("logits,top5,probabilities", same, []),
        # The logits are correct, and the other outputs are checked nevertheless.
        ("logits,top5", faults.inserted(TOP_PROBABILITIES, ONE_NAN), ["probabilities"]),
        ("logits,probabilities", faults.inserted("probabilities", HALF), ["probabilities"]),
    ],
)
def test_embedded_graphs(
    digits: Subject, broken: Broken, outputs: str, spoil: Fault, failed: list[str]
) -> None:
    preprocessing, names = digits.loaded.preprocessing, outputs.split(",")
    model = spoil(embed_preprocessing(digits.graph("fp32"), preprocessing, "uint8", names))
    verdict = verdict_of(digits, broken(digits, "bytes", "fp32", model, embedded="uint8"), "bytes")
    found = [f for f in verdict.findings if "batch" not in f.message and f.outcome is FAIL]
    assert [finding.rule for finding in found] == failed
    assert verdict.outcome is (FAIL if failed else PASS)


def test_every_row_of_a_batch_and_its_limit(digits: Subject) -> None:
    def run(of: Samples, images: npt.NDArray[np.int64]) -> dict[str, np.ndarray]:
        logits = of.logits[images]
        logits[wrong:] = 0.0
        return {"logits": logits[:, :classes] if len(images) > 1 else logits}

    samples, floor, wrong, classes = digits.samples, Limit(20.0, "floor for int8"), 99, 10
    verdict = check_outputs(run, samples, (1, 20, 32), floor, 30.0)
    limits = [f.limit.value for f in verdict.findings if f.rule == "SQNR" and f.limit]
    assert limits == [27.0, 20.0, 27.0], "20 images are 16 and the first four again"
    limits = [f.limit.value for f in verdict.findings if f.rule == "batch invariance" and f.limit]
    assert limits == [26.0, 26.0], "more than the floor of INT8"
    wrong = 20
    for sizes, classes, message in (  # noqa: B007 - read by run()
        ((1, 32), 10, "SQNR "),
        ((32,), 10, "SQNR "),
        ((1, 32), 9, "the output has shape (32, 9)"),
    ):
        verdict = check_outputs(run, samples, sizes, floor)
        assert verdict.reason.startswith(f"batch 32: {message}")
        assert (verdict.batches[-1].batch, verdict.batches[-1].outcome) == (32, FAIL)


def test_a_part_of_the_golden_samples_has_no_record(digits: Subject) -> None:
    report = verify_bundle(digits.bundle, digits.samples.first(1), WITHOUT_MODULES, digits.loaded)
    assert [finding.rule for finding in report.findings] == ["preprocessing/0.png"]
    origins = [v.limit.origin for v in report.artifacts.values() if v.limit]
    assert not any("recorded" in origin for origin in origins), "an average of 16 images"
    assert len(origins) == 3


def test_speed_is_measured_at_the_optimal_batch(
    digits: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes(slow: Callable[[], Any], fast: Callable[[], Any]) -> Any:
        return len(slow()), len(fast()["logits"])

    monkeypatch.setattr(regression, "paired_ratio", sizes)
    few, settings = digits.samples.first(1), RunnerSettings()
    ratios: Any = regression.speed_ratios(digits.bundle, digits.loaded, few, settings)
    assert ratios == dict.fromkeys(("fp32", "fp16", "int8"), (4, 4))


OVERFLOW = "passes 65504, the largest number of FP16"
PLACED: list[tuple[str, Fault, str]] = [
    ("fp32", OTHER_IMAGES, "patch_embed1"),
    *(("fp16", partial(faults.perturb_block, block=b), b) for b in DIGITS_BLOCKS[::4]),
    *(("fp32", partial(faults.perturb_block, block=b), b) for b in DIGITS_BLOCKS[::8]),
    *(("fp16", faults.overflow_fp16(tensor), tensor) for tensor in ("norm1", "norm4")),
    ("int8", partial(faults.multiply_scale, layer="block2.1.mlp.fc2", factor=8), "block2.1"),
]


@each(("precision", "spoil", "block"), PLACED)
def test_drift_reports_the_block_of_a_fault(
    digits: Subject, broken: Broken, precision: str, spoil: Fault, block: str
) -> None:
    bundle = broken(digits, "broken", precision, spoil(digits.graph(precision)))
    verdict = verdict_of(digits, bundle, "broken")
    assert verdict.outcome is FAIL, verdict.findings
    # Without a record the floor is the limit.
    assert verdict.limit == sqnr_floor(precision, digits.samples.noise_db)
    assert drift(digits, bundle, "broken").artifacts["broken"].worst_names[0] == block
    overflows = sum(finding.message.count(OVERFLOW) for finding in verdict.findings)
    assert overflows == block.startswith("norm")


@each(
    ("changes", "rule", "message"),
    [
        ({"mean": (0.5,) * 3}, "SQNR", " dB recorded at creation, minus 3)"),
        ({"interpolation": "nearest"}, "preprocessing/0.png", "or the preprocessing differs"),
    ],
)
def test_edited_preprocessing_fails(
    digits: Subject, changes: dict[str, Any], rule: str, message: str
) -> None:
    manifest = digits.bundle.manifest
    other = replace(manifest.preprocessing, **changes)
    edited = Bundle(digits.bundle.path, manifest.model_copy(update={"preprocessing": other}))
    report = verify_bundle(edited, golden_samples(edited), VerifySettings(artifacts=("fp32",)))
    failed = {f.rule: f.message for _, f in report.named_findings() if f.outcome is FAIL}
    assert failed[rule].endswith(message)


def renamed(old: bytes, new: bytes) -> Fault:
    return lambda model: ModelProto.FromString(model.SerializeToString().replace(old, new))


def lower_opset(model: ModelProto) -> ModelProto:
    """Give an opset without Gelu, which ONNX Runtime finds in its own."""
    model.opset_import[0].version = 17
    return model


@each(
    ("spoil", "reason"),
    [
        (faults.fix_batch("block2.1", (32, 8, 8)), "batch 2: it does not run: "),
        (renamed(b"Gelu", b"Gelo"), "it does not load: ONNX Runtime"),
        (renamed(b"logits", b"scores"), ""),
        (lower_opset, ""),
    ],
)
def test_graphs_that_do_not_run_fail(
    digits: Subject, broken: Broken, spoil: Fault, reason: str
) -> None:
    bundle = broken(digits, "fp16", "fp16", spoil(digits.graph("fp16")))
    settings = VerifySettings(artifacts=("fp16", "fp32"))
    report = verify_bundle(bundle, digits.samples, settings)
    verdict = report.artifacts["fp16"]
    assert (verdict.outcome, report.artifacts["fp32"].outcome) == (FAIL, PASS)
    assert verdict.reason.startswith(reason)
    assert not report
    if reason.startswith("batch"):
        failed = [row.batch for row in verdict.batches if row.outcome is FAIL]
        assert failed == [2, 3, 4, 5, 6]
        said = verdict.findings[-1].message
        assert said.startswith("modules cannot be compared: does not run at batch 2")


def test_a_failed_model_onnx_is_no_reference(digits: Subject, broken: Broken) -> None:
    model = faults.perturb_block(digits.graph("fp32"), "block1.0")
    bundle = broken(digits, "fp32", "fp32", model)
    with pytest.raises(GateFailed, match=r"model\.onnx fails its gate on the golden samples"):
        drift_of_bundle(bundle, digits.samples, DriftSettings(), None, no_progress)
    report = verify_bundle(bundle, digits.samples, VerifySettings(artifacts=("fp16",)))
    assert report.artifacts["fp16"].outcome is PASS, "its logits are right"
    assert not report, "its modules were compared with nothing"


# --- golden samples ---------------------------------------------------------------------------


def test_logits_and_noise_match_pytorch(digits: Subject) -> None:
    samples = golden_samples(digits.bundle)
    assert len(samples) == 16
    assert samples.pixels is not None
    inputs = normalise(samples.pixels, digits.loaded.preprocessing)
    assert np.array_equal(samples.inputs, inputs)
    with torch.inference_mode():
        parts = torch.from_numpy(inputs).split(8)  # how many at a time decides float32's noise
        single = torch.cat([digits.loaded.model(part) for part in parts]).numpy()
        double = digits.loaded.model.double()(torch.from_numpy(inputs).double()).numpy()
        digits.loaded.model.float()
    assert np.abs(samples.logits - double).max() < 1e-12
    assert 120 < samples.noise_db < 150
    assert abs(samples.noise_db - sqnr_db(double, single)) < 1e-3


def test_samples_are_distinct_and_originals_need_image_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    five = replace(OFFICIAL, mean=(0.5,) * 5, std=(0.5,) * 5, image_size=32)
    for preprocessing, source, count in ((five, None, 0), (OFFICIAL, tmp_path, 1)):
        images, originals = golden_images("x", preprocessing, source)
        assert (len(originals), images.inputs.shape[1]) == (count, preprocessing.channels)
        assert len({row.tobytes() for row in images.inputs}) == len(images.inputs) == 16


@each(
    ("choice", "licence"),
    [
        ("samples", "scikit-image's and scikit-learn's own photographs"),
        ("images", "the terms of the images given with --images"),
        ("none", ""),
    ],
)
def test_manifest_names_the_image_source(
    tmp_path: Path, digits: Subject, choice: str, licence: str
) -> None:
    path = tiny_bundle(tmp_path, 7, images=digits.labelled, golden=choice, simplify=False)
    golden = Bundle.open(path).manifest.golden
    if golden is None:
        assert (choice, list(path.glob("golden*"))) == ("none", [])
    else:
        assert licence in golden.licence
        assert (str(digits.labelled) in (path / "manifest.json").read_text()) is (
            choice == "images"
        )
