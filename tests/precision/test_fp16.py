"""FP16 graphs: their types, what stays FP32, and what refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, TensorProto, checker, numpy_helper

from tests.precision.conftest import Digits
from van_deploy.errors import GateFailed, UsageError
from van_deploy.graph.rebuilt import van_from_onnx
from van_deploy.metrics import sqnr_db
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.fp16 import DEFAULT_KEEP, fp16_from_fp32, kept_nodes
from van_deploy.precision.observers import ChannelRange, observe
from van_deploy.precision.range_audit import audit_ranges

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def run(model: ModelProto, digits: Digits) -> npt.NDArray[np.float32]:
    return logits_session(model, fuse=False, threads=1)(digits.images)


def operators(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def scaled(model: ModelProto, factors: Mapping[str, float]) -> ModelProto:
    """Return the graph with some stored tensors multiplied."""
    changed = ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in factors:
            values = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return changed


@pytest.mark.parametrize(
    ("keep", "half_io", "casts"),
    [
        (DEFAULT_KEEP, False, 8),
        ((), False, 2),
        ((), True, 0),
        (("block2", *DEFAULT_KEEP), False, 8),
    ],
)
def test_it_answers_as_fp32_does(
    digits_graph: ModelProto,
    heldout_digits: Digits,
    keep: tuple[str, ...],
    half_io: bool,
    casts: int,
) -> None:
    kept = kept_nodes(digits_graph, keep)
    half = fp16_from_fp32(digits_graph, kept, half_io=half_io)
    checker.check_model(half, full_check=True)
    assert operators(half)["Cast"] == casts
    edge = FLOAT16 if half_io else FLOAT
    assert half.graph.input[0].type.tensor_type.elem_type == edge
    assert half.graph.output[0].type.tensor_type.elem_type == edge
    assert half.graph.output[0].name == "logits"
    stored = {t.name: t.data_type for t in half.graph.initializer}
    for node in digits_graph.graph.node:
        weights = [stored[n] for n in node.input if stored.get(n) in {FLOAT, FLOAT16}]
        assert all(kind == (FLOAT if node.name in kept else FLOAT16) for kind in weights)
    assert sqnr_db(run(digits_graph, heldout_digits), run(half, heldout_digits)) > 60


def test_a_weight_read_in_both_types_is_stored_twice(digits_graph: ModelProto) -> None:
    shared = ModelProto()
    shared.CopyFrom(digits_graph)
    first = next(n for n in shared.graph.node if n.name == "block1.0.attn.proj_1")
    second = next(n for n in shared.graph.node if n.name == "block1.1.attn.proj_1")
    second.input[1] = first.input[1]
    half = fp16_from_fp32(shared, {"block1.1.attn.proj_1"})
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    assert kinds["block1.0.attn.proj_1.weight"] == FLOAT
    assert kinds["block1.0.attn.proj_1.weight.fp16"] == FLOAT16
    checker.check_model(half, full_check=True)


class TestKeptNodes:
    def test_a_module_means_all_below_it(self, digits_graph: ModelProto) -> None:
        kept = kept_nodes(digits_graph, ("block2.0", "norm1"))
        assert {name.split(".")[0] for name in kept} == {"block2", "norm1"}
        assert "block2.0" in kept
        assert kept["block2.0.mlp.fc1"] == "'block2.0' is kept"
        assert "block2.1.mlp.fc1" not in kept

    def test_otherwise_it_is_an_expression(self, digits_graph: ModelProto) -> None:
        assert set(kept_nodes(digits_graph, (r"block1\.\d\.mlp\.fc1",))) == {
            "block1.0.mlp.fc1",
            "block1.1.mlp.fc1",
        }

    @pytest.mark.parametrize(
        ("keep", "message"),
        [
            ("block9", "There is nothing called 'block9' to keep in FP32."),
            ("(", "'(' is neither a module nor a regular expression"),
        ],
    )
    def test_what_means_nothing_is_refused(
        self, digits_graph: ModelProto, keep: str, message: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            kept_nodes(digits_graph, (keep,))
        assert message in caught.value.message


class TestAudit:
    def test_a_quiet_network_has_no_problem(
        self, digits_graph: ModelProto, ranges: Mapping[str, ChannelRange]
    ) -> None:
        audit = audit_ranges(digits_graph, ranges, (), 64)
        assert audit.problems == ()
        assert audit.kept == {}
        assert audit.largest_activation[1] == max(r.largest for r in ranges.values())
        audit.require_passed()

    def test_what_overflows_is_kept_with_what_touches_it(
        self, digits_graph: ModelProto, van_digits: LoadedVan, calibration_digits: Digits
    ) -> None:
        name = "block2.0.attn.spatial_gating_unit.conv0"
        factors = {f"{name}.weight": 2.0**15, f"{name}.bias": 2.0**15}
        factors["block2.0.attn.spatial_gating_unit.conv_spatial.weight"] = 2.0**-15
        loud = scaled(digits_graph, factors)
        found = observe(van_from_onnx(loud, van_digits.config), calibration_digits.batches(), ())
        audit = audit_ranges(loud, found, (), 64)
        assert set(audit.kept) == {name, "block2.0.attn.spatial_gating_unit.conv_spatial"}
        assert "beyond half of FP16's 65504" in audit.kept[name]
        with pytest.raises(GateFailed, match=r"FP16 cannot hold everything: 'block2\.0\.attn"):
            audit.require_passed()
        assert audit_ranges(loud, found, audit.kept, 64).problems == ()
        half = fp16_from_fp32(loud, audit.kept)
        assert np.isfinite(run(half, calibration_digits)).all()

    def test_weights_that_vanish_are_found(
        self, digits_graph: ModelProto, ranges: Mapping[str, ChannelRange]
    ) -> None:
        tiny = scaled(digits_graph, {"block1.0.mlp.fc2.weight": 1e-9})
        audit = audit_ranges(tiny, ranges, (), 64)
        assert set(audit.kept) == {"block1.0.mlp.fc2"}
        assert "which FP16 rounds to zero" in audit.kept["block1.0.mlp.fc2"]
