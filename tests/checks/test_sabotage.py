"""Faulty graphs and quantisers with a consistent manifest fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from tests.artifacts import Subject
from tests.checks import faults
from tests.checks.conftest import Broken
from tests.checks.faults import Fault
from tests.each import each
from van_deploy.checks.gates import RECORD_MARGIN_DB, Limit, Outcome, outcome_of
from van_deploy.checks.golden import OutputLayout
from van_deploy.checks.outputs import check_graph, check_new_graph
from van_deploy.checks.verify import verify_bundle
from van_deploy.config import VerifySettings
from van_deploy.metrics import Task, sqnr_db
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

INT8 = Limit(20.0, "floor for int8")
FAULTS: tuple[Fault, ...] = (
    *(faults.negate_logits, faults.zero_logits, faults.reverse_rows, faults.swap_classes),
    *(faults.swap_channels, faults.change_epsilon, faults.zero_channel),
)


@pytest.fixture(params=["digits", pytest.param("cifar", marks=pytest.mark.slow)])
def whole(request: pytest.FixtureRequest) -> Subject:
    """Return the bundle of the embedded network, or of a trained network if available."""
    found: Subject = request.getfixturevalue(request.param)
    return found


@each(("name", "fault"), [(name, fault) for name in ("fp32", "fp16", "int8") for fault in FAULTS])
def test_faults_of_3_db_fail(whole: Subject, broken: Broken, name: str, fault: Fault) -> None:
    (recorded,) = whole.bundle.artifact(name).golden_sqnr_db.values()
    model, inputs = fault(whole.graph(name)), whole.samples.inputs
    with OnnxRuntimeRunner(model) as runner:
        apart = [runner.run(image[None]) for image in inputs]
        answers = (np.concatenate(apart), runner.run(inputs))
    effect = recorded - min(sqnr_db(whole.samples.logits, found) for found in answers)
    settings = VerifySettings(artifacts=(name,), modules=False)
    report = verify_bundle(broken(whole, name, name, model), whole.samples, settings)
    if effect >= RECORD_MARGIN_DB:
        assert report.artifacts[name].outcome is Outcome.FAIL, effect
    else:
        assert fault in (faults.change_epsilon, faults.swap_channels), effect


Change = Callable[[Any], Any]


def minmax(factor: float) -> Change:
    """Return scales for weights (O, I): those of the largest weights times ``factor``."""
    return lambda weights: factor * abs(weights).max(axis=1) / 127


SABOTAGE: list[tuple[Callable[..., ModelProto], Change]] = [
    *((faults.change_scales, lambda s, by=by: [by * one for one in s]) for by in (0.3, 0.5, 2, 6)),
    (faults.change_scales, lambda scales: scales[-1:] + scales[:-1]),  # of the next layer
    (faults.change_scales, lambda scales: scales[-5:] + scales[:-5]),  # of another block
    *((faults.requantize_weights, minmax(factor)) for factor in (0.3, 2, 6)),
    (faults.requantize_weights, lambda weights: abs(weights).max(axis=0) / 127),  # other axis
]


@each(("sabotage", "change"), SABOTAGE)
def test_faulty_quantisers_fail(
    whole: Subject, broken: Broken, sabotage: Callable[..., ModelProto], change: Change
) -> None:
    model = sabotage(whole.graph("int8"), change)
    judged, record = check_new_graph(model, "int8", whole.samples)  # as quantize asks
    assert judged.outcome is Outcome.FAIL, judged.reason
    bundle = broken(whole, "int8", "int8", model, golden_sqnr_db=record)
    settings = VerifySettings(artifacts=("int8",), modules=False)
    assert verify_bundle(bundle, whole.samples, settings).artifacts["int8"].outcome is Outcome.FAIL


def test_a_correct_quantiser_is_far_from_the_bounds(whole: Subject) -> None:
    findings, bad = check_graph(whole.graph("int8"), "int8", whole.samples, INT8)
    found = {finding.rule: finding.value or 0.0 for finding in findings}
    assert {finding.outcome for finding in findings} == {Outcome.PASS}
    assert found["median scale"] == pytest.approx(1.0, abs=0.15)
    assert found["spread of scales"] <= 0.05
    assert bad == []


@each("precision", ["fp32", "fp16", "int8"])
def test_constant_values_of_a_regression_fail(digits: Subject, precision: str) -> None:
    logits, regression = digits.samples.logits + 100, OutputLayout(task=Task.REGRESSION)
    samples = replace(digits.samples, logits=logits, outputs=regression)
    shifted = faults.inserted("logits", ("Add", [np.float32(100)]))
    same = ("Mul", [np.float32(0)]), ("Add", [logits.mean(axis=0).astype(np.float32)])
    constant = faults.inserted("logits", *same)
    for fault, outcome in ((shifted, Outcome.PASS), (constant, Outcome.FAIL)):
        verdict, _ = check_new_graph(fault(digits.graph(precision)), precision, samples)
        assert verdict.outcome is outcome, verdict.reason
    assert sqnr_db(logits, logits.mean(axis=0)[None].repeat(16, axis=0)) > INT8.value


def test_an_overflow_on_the_last_image_fails(digits: Subject) -> None:
    model = faults.overflow_fp16("images")(digits.graph("fp16"))
    for value, outcome in ((4.0, Outcome.FAIL), (0.0, Outcome.PASS)):
        samples = replace(digits.samples, inputs=np.zeros_like(digits.samples.inputs))
        samples.inputs[-1] = value
        assert outcome_of(check_graph(model, "fp16", samples, INT8)[0]) is outcome


def test_each_faulty_scale_is_reported(digits: Subject) -> None:
    names = [tensor.name.split(".weight.int8") for tensor in digits.graph("int8").graph.initializer]
    for layer in [parts[0] for parts in names if len(parts) > 1][::7]:
        twice = faults.requantize_weights(digits.graph("int8"), minmax(2), layer)
        for model in (twice, faults.multiply_scale(digits.graph("int8"), layer, 8)):
            assert layer in dict(check_graph(model, "int8", digits.samples.first(2), INT8)[1])


def test_one_scale_is_inconclusive_on_sample_photographs(digits: Subject) -> None:
    general = replace(digits.samples, description="16 images and shifts of 7 natural photographs")
    one = faults.multiply_scale(digits.graph("int8"), "block1.0.mlp.fc1", 8)
    every = faults.change_scales(digits.graph("int8"), lambda scales: [6 * s for s in scales])
    for model, samples, outcome, word in (
        (one, general, Outcome.INCONCLUSIVE, "--images"),
        (one, digits.samples, Outcome.FAIL, "is allowed"),
        (every, general, Outcome.FAIL, "times the optimal"),
    ):
        findings, _ = check_graph(model, "int8", samples, INT8)
        assert outcome_of(findings) is outcome
        assert any(word in finding.message for finding in findings)
