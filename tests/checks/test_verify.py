"""Verification of correct and broken artifacts, and the parts that drift reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from tests.artifacts import Copy, Subject, add_artifact, add_placeholder_engine
from tests.checks import faults
from tests.checks.conftest import Broken
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks.drift import DriftReport, drift_of_bundle
from van_deploy.checks.gates import Outcome
from van_deploy.checks.golden import golden_samples, samples_for
from van_deploy.checks.verify import ArtifactVerdict, verify_bundle
from van_deploy.config import DriftSettings, VerifySettings
from van_deploy.errors import GateFailed
from van_deploy.graph.embed import TOP_PROBABILITIES, embed_preprocessing
from van_deploy.stopwatch import no_progress

DIGITS_BLOCKS = [f"block{s}.{b}" for s, depth in enumerate((2, 2, 3, 2), 1) for b in range(depth)]
PASS, FAIL = Outcome.PASS, Outcome.FAIL


def verdict_of(whole: Subject, bundle: Bundle, name: str) -> ArtifactVerdict:
    settings = VerifySettings(artifacts=(name,))
    return verify_bundle(bundle, whole.samples, settings).artifacts[name]


def drift(whole: Subject, bundle: Bundle, *names: str, known: bool = True) -> DriftReport:
    settings, few = DriftSettings(artifacts=names), whole.samples.first(2)
    return drift_of_bundle(bundle, few, settings, whole.loaded if known else None, no_progress)


def test_artifacts_pass_on_the_golden_samples(digits: Subject) -> None:
    report = verify_bundle(digits.bundle, digits.samples)
    assert report.passed
    assert report.against == "the golden samples"
    assert (
        report.modules == "model.onnx in ONNX Runtime, which passes its gate on the golden samples"
    )
    for verdict in report.artifacts.values():
        assert verdict.outcome is PASS, verdict.reason
        assert [row.batch for row in verdict.batches] == [1, 2, 3, 4, 5, 6]
        assert verdict.comparison is not None
        assert verdict.findings[0].value == verdict.comparison.sqnr_db
        assert verdict.margin_db == pytest.approx(3.0, abs=0.01)
        assert verdict.limit is not None
        assert verdict.limit.origin.endswith(" dB recorded at creation, minus 3")
        assert len(verdict.worst_modules) == (0 if verdict.artifact == "fp32" else 10)


@pytest.mark.slow
def test_trained_network_passes(cifar: Subject) -> None:
    found = verify_bundle(cifar.bundle, cifar.samples).artifacts
    outcomes = {name: verdict.outcome for name, verdict in found.items()}
    assert outcomes == {"fp32": PASS, "fp16": PASS, "int8": PASS}


def test_artifacts_pass_against_the_original_network(digits: Subject) -> None:
    samples = samples_for(digits.bundle, digits.loaded, None)
    report = verify_bundle(digits.bundle, samples, loaded=digits.loaded)
    assert report.passed
    assert report.modules == "PyTorch, the rewritten network in float64"
    assert all(verdict.worst_modules for verdict in report.artifacts.values())
    assert np.array_equal(samples.logits, digits.samples.logits)


def test_without_a_record_the_floor_is_the_limit(digits: Subject, copy_bundle: Copy) -> None:
    bundle = add_artifact(Bundle.open(copy_bundle(digits)), "fp16", "fp16", digits.graph("fp16"))
    limit = verdict_of(digits, bundle, "fp16").limit
    assert limit is not None
    assert (limit.value, limit.origin) == (45.0, "floor for fp16")


@each(
    ("output", "mean", "factors", "outcome", "rule"),
    [
        ("logits", None, None, PASS, "SQNR"),
        ("logits", (0.35,), None, FAIL, "SQNR"),
        ("top5", None, None, PASS, "probabilities"),
        ("top5", (0.9,), None, FAIL, "probabilities"),
        ("top5", None, [1, 1, 1, np.nan, 1], FAIL, "probabilities"),
    ],
)
def test_embedded_graphs(
    digits: Subject,
    copy_bundle: Copy,
    tmp_path: Path,
    output: str,
    mean: tuple[float, ...] | None,
    factors: list[float] | None,
    outcome: Outcome,
    rule: str,
) -> None:
    preprocessing = digits.loaded.preprocessing.override(mean=mean)
    model = embed_preprocessing(digits.graph("fp32"), preprocessing, "uint8", (output,))
    if factors:
        faults.insert_after(model, TOP_PROBABILITIES, ("Mul", [np.array(factors, np.float32)]))
    copy = Bundle.open(copy_bundle(digits, f"copy {tmp_path.name}"))
    verdict = verdict_of(
        digits, add_artifact(copy, "bytes", "fp32", model, embedded="uint8"), "bytes"
    )
    assert (verdict.outcome, verdict.findings[0].rule) == (outcome, rule)


OVERFLOW = "passes 65504, the largest number of FP16"
Fault = Callable[[ModelProto], ModelProto]
OTHER_IMAGES = partial(faults.change_normalisation, old=(0.305, 0.375), new=(0.5, 0.5))
PLACED: list[tuple[str, Fault, str]] = [
    ("fp32", OTHER_IMAGES, "patch_embed1"),
    *(("fp16", partial(faults.perturb_block, block=b), b) for b in DIGITS_BLOCKS[::4]),
    *(("fp32", partial(faults.perturb_block, block=b), b) for b in DIGITS_BLOCKS[::8]),
    *(("fp16", partial(faults.overflow_fp16, tensor=t), t) for t in ("norm1", "norm4")),
]


@each(("precision", "spoil", "block"), PLACED)
def test_drift_reports_the_block_of_a_fault(
    digits: Subject, broken: Broken, precision: str, spoil: Fault, block: str
) -> None:
    bundle = broken(digits, "broken", precision, spoil(digits.graph(precision)))
    verdict = verdict_of(digits, bundle, "broken")
    assert verdict.outcome is FAIL, verdict.findings
    assert drift(digits, bundle, "broken").artifacts["broken"].worst_names[0] == block
    overflows = sum(finding.message.count(OVERFLOW) for finding in verdict.findings)
    assert overflows == block.startswith("norm")


def test_edited_preprocessing_fails(digits: Subject, copy_bundle: Copy) -> None:
    bundle = Bundle.open(copy_bundle(digits))
    other = replace(bundle.manifest.preprocessing, mean=(0.5,) * 3)
    edited = Bundle(bundle.path, bundle.manifest.model_copy(update={"preprocessing": other}))
    report = verify_bundle(edited, golden_samples(edited), VerifySettings(artifacts=("fp32",)))
    assert report.artifacts["fp32"].outcome is FAIL


def test_fixed_batch_fails(digits: Subject, broken: Broken) -> None:
    model = faults.fix_batch(digits.graph("fp32"), "block2.1", (1, 32, 8, 8))
    verdict = verdict_of(digits, broken(digits, "frozen", "fp32", model), "frozen")
    failed = [row.batch for row in verdict.batches if row.outcome is FAIL]
    assert failed == [2, 3, 4, 5, 6]
    assert verdict.reason.startswith("batch 2: it does not run: ")
    said = verdict.findings[-1].message
    assert said.startswith("modules cannot be compared: does not run at batch 2")


def test_a_graph_that_does_not_load_fails(digits: Subject, broken: Broken) -> None:
    model = digits.graph("fp16")
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Gelo"
    bundle = broken(digits, "fp16", "fp16", model)
    settings = VerifySettings(modules=False, artifacts=("fp16", "fp32"))
    report = verify_bundle(bundle, digits.samples, settings)
    assert [v.outcome for v in report.artifacts.values()] == [FAIL, PASS]
    assert report.artifacts["fp16"].reason.startswith("it does not load: ONNX Runtime")
    assert not report


def test_unknown_outputs_fail(digits: Subject, broken: Broken) -> None:
    model = digits.graph("fp16")
    next(node for node in model.graph.node if node.output[0] == "logits").output[0] = "scores"
    model.graph.output[0].name = "scores"
    verdict = verdict_of(digits, broken(digits, "fp16", "fp16", model), "fp16")
    assert verdict.outcome is FAIL


def test_a_failed_overflow_check_fails(digits: Subject, broken: Broken) -> None:
    model = digits.graph("fp16")
    model.opset_import[0].version = 17  # no Gelu there, which ONNX Runtime finds in its own
    bundle = broken(digits, "fp16", "fp16", model)
    assert verdict_of(digits, bundle, "fp16").outcome is FAIL


def test_a_skipped_engine_alone_is_no_pass(digits: Subject, copy_bundle: Copy) -> None:
    bundle = add_placeholder_engine(copy_bundle(digits), "x", made_from="fp16")
    settings = VerifySettings(artifacts=("x",), allow_skip=("engines",))
    report = verify_bundle(bundle, digits.samples, settings)
    if report.artifacts["x"].outcome is not Outcome.SKIPPED:
        pytest.skip("this machine has a GPU")
    assert report.artifacts["x"].reason == "engine not executed: no GPU"
    assert not report, "nothing was verified"


def test_drift_against_model_onnx(digits: Subject, broken: Broken) -> None:
    bundle = broken(digits, "fp16", "fp16", faults.perturb_block(digits.graph("fp16"), "block3.1"))
    report = drift(digits, bundle, known=False)
    assert list(report.artifacts) == ["fp16", "int8"]
    assert report.artifacts["fp16"].worst_names[0] == "block3.1"
    assert [link.name for link in report.chain] == ["PyTorch float32", "fp32", "fp16", "int8"]


def test_a_failed_model_onnx_is_no_reference(digits: Subject, broken: Broken) -> None:
    model = faults.perturb_block(digits.graph("fp32"), "block1.0")
    bundle = broken(digits, "fp32", "fp32", model)
    with pytest.raises(GateFailed, match=r"model\.onnx fails its gate on the golden samples"):
        drift(digits, bundle, known=False)
    report = verify_bundle(bundle, digits.samples, VerifySettings(artifacts=("fp16",)))
    assert report.artifacts["fp16"].outcome is PASS, "its logits are right"
    assert not report, "its modules were compared with nothing"


def test_drift_reports_a_faulty_scale(digits: Subject, broken: Broken) -> None:
    layer = "block2.1.mlp.fc2"
    model = faults.multiply_scale(digits.graph("int8"), layer, "activation", 8)
    settings = DriftSettings(level="module", artifacts=("int8",))
    bundle = broken(digits, "int8", "int8", model)
    found = drift_of_bundle(bundle, digits.samples, settings, digits.loaded, no_progress).artifacts[
        "int8"
    ]
    assert found.worst_names[0] == layer
    faults_of = {row.name: row.fault for row in found.rows}
    assert "times the scale of least error on the golden images" in faults_of[layer]
