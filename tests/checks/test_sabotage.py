"""Faults whose manifest vouches for them: verify passes none, nor a sabotaged quantiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from onnx import ModelProto

from tests.artifacts import Subject
from tests.checks import faults
from tests.checks.conftest import Broken
from tests.each import each
from van_deploy.checks.gates import BELOW_RECORD_DB, Limit, Outcome
from van_deploy.checks.judging import judge_graph, judge_new
from van_deploy.checks.verify import verify_bundle
from van_deploy.config import VerifySettings
from van_deploy.metrics import sqnr_db
from van_deploy.runners.onnxruntime import onnxruntime_logits

INT8 = Limit(20.0, "floor for int8")
Fault = Callable[[ModelProto], ModelProto]

FAULTS: dict[str, Fault] = {
    "negated": faults.negated,
    "zeroed": faults.zeroed,
    "rows shifted": faults.rows_shifted,
    "classes swapped": faults.classes_swapped,
    "bgr": faults.swapped_channels,
    "layer norm epsilon": faults.layer_norm_epsilon,
    "bias lost": faults.bias_lost,
    "channel zeroed": faults.channel_zeroed,
}


@pytest.fixture(params=["digits", pytest.param("cifar", marks=pytest.mark.slow)])
def whole(request: pytest.FixtureRequest) -> Subject:
    """Return the embedded network and, where it is, the shared one."""
    found: Subject = request.getfixturevalue(request.param)
    return found


@each(("name", "fault"), [(name, fault) for name in ("fp32", "fp16", "int8") for fault in FAULTS])
def test_a_fault_of_3_db_fails(whole: Subject, broken: Broken, name: str, fault: str) -> None:
    (recorded,) = whole.bundle.artefact(name).golden_sqnr_db.values()
    model, inputs = FAULTS[fault](whole.graph(name)), whole.samples.inputs
    alone = np.concatenate(
        [onnxruntime_logits(model, inputs[i : i + 1]) for i in range(len(inputs))]
    )
    together = onnxruntime_logits(model, inputs)
    effect = recorded - min(sqnr_db(whole.samples.logits, x) for x in (alone, together))
    asked = VerifySettings(artefacts=(name,), modules=False)
    report = verify_bundle(broken(whole, name, name, model), whole.samples, asked)
    if effect >= BELOW_RECORD_DB:
        assert report.artefacts[name].outcome is Outcome.FAIL, effect
    else:
        assert fault in {"layer norm epsilon", "bgr", "bias lost"}, effect


def weights_times(factor: float) -> Fault:
    return partial(faults.weights_rounded_anew, scales=lambda w: factor * abs(w).max(axis=1) / 127)


SABOTAGE: dict[str, Fault] = {
    **{
        f"activation scales x {factor:g}": partial(faults.scales_times, factor=factor)
        for factor in (0.3, 0.5, 2, 6)
    },
    "ranges of the next layer": faults.scales_of_another_layer,
    "ranges of another block": partial(faults.scales_of_another_layer, step=5),
    **{f"weight scales x {factor:g}": weights_times(factor) for factor in (0.3, 2, 6)},
    "weight scales of the wrong axis": partial(
        faults.weights_rounded_anew, scales=lambda w: abs(w).max(axis=0) / 127
    ),
}


@each("sabotage", SABOTAGE)
def test_no_sabotaged_quantiser_passes(whole: Subject, broken: Broken, sabotage: str) -> None:
    """Its own records are consistent: what it makes is all that is known of it."""
    model = SABOTAGE[sabotage](whole.graph("int8"))
    judged, record = judge_new(model, "int8", whole.samples)  # as quantize asks
    assert judged.outcome is Outcome.FAIL, [f.message for f in judged.findings]
    bundle = broken(whole, "int8", "int8", model, golden_sqnr_db=record)
    report = verify_bundle(
        bundle, whole.samples, VerifySettings(artefacts=("int8",), modules=False)
    )
    assert report.artefacts["int8"].outcome is Outcome.FAIL
    assert not report


def test_a_right_quantiser_is_far_from_the_bounds(whole: Subject) -> None:
    judged, _ = judge_new(whole.graph("int8"), "int8", whole.samples)
    found = {finding.rule: finding.value or 0.0 for finding in judged.findings}
    assert judged.outcome is Outcome.PASS
    assert found["median scale"] == pytest.approx(1.0, abs=0.15)
    assert found["spread of scales"] <= 0.05
    assert judge_graph(whole.graph("int8"), "int8", whole.samples, INT8)[1] == []


def test_each_doubled_weight_scale_is_named(digits: Subject) -> None:
    """A scale twice too large costs one bit in one layer; the integers show it."""
    few = digits.samples.first(2)
    model = digits.graph("int8")
    makers = {node.output[0]: node.op_type for node in model.graph.node}
    layers = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and makers.get(node.input[1]) == "DequantizeLinear"
    ]
    for layer in layers[::7]:
        model = faults.scale_doubled(digits.graph("int8"), layer, "weight")
        assert layer in dict(judge_graph(model, "int8", few, INT8)[1])
