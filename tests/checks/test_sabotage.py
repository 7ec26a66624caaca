"""Faults whose manifest vouches for them: verify passes none, nor a sabotaged quantiser."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from tests.artifacts import Subject
from tests.checks import faults
from tests.checks.conftest import Broken
from van_deploy.checks.gates import BELOW_RECORD_DB, Outcome
from van_deploy.checks.judging import judge_new
from van_deploy.checks.verdicts import ArtefactVerdict
from van_deploy.checks.verify import verify_bundle
from van_deploy.metrics import sqnr_db
from van_deploy.runners.onnxruntime import onnxruntime_logits

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


@pytest.fixture(params=["digits", "cifar"])
def whole(request: pytest.FixtureRequest) -> Subject:
    """Return the embedded network and, where it is, the shared one."""
    found: Subject = request.getfixturevalue(request.param)
    return found


def verdict_of(whole: Subject, broken: Broken, name: str, model: ModelProto) -> ArtefactVerdict:
    bundle = broken(whole, name, name, model)
    report = verify_bundle(bundle, whole.samples, artefacts=[name])
    return report.artefacts[0]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_a_fault_of_3_db_fails(whole: Subject, broken: Broken, name: str, fault: str) -> None:
    right = whole.bundle.artefact(name).golden_sqnr_db
    (recorded,) = right.values()
    model = FAULTS[fault](whole.graph(name))
    inputs = whole.samples.inputs
    alone = np.concatenate(
        [onnxruntime_logits(model, inputs[i : i + 1]) for i in range(len(inputs))]
    )
    together = onnxruntime_logits(model, inputs)
    effect = recorded - min(sqnr_db(whole.samples.logits, x) for x in (alone, together))
    verdict = verdict_of(whole, broken, name, model)
    if effect >= BELOW_RECORD_DB:
        assert verdict.outcome is Outcome.FAIL, (effect, verdict.findings)
    else:
        assert fault in {"layer norm epsilon", "bgr", "bias lost"}, effect
