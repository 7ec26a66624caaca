"""FP16 graphs: their types, what stays FP32, and what refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper
from onnxruntime import InferenceSession

from tests.precision.conftest import Digits
from van_deploy.errors import GateFailed, UsageError
from van_deploy.metrics import compare
from van_deploy.precision.audit import audit_ranges, require_no_surprise
from van_deploy.precision.half import DEFAULT_KEEP, half_from_fp32, kept_nodes
from van_deploy.precision.ranges import Ranges, record_ranges
from van_deploy.precision.session import logits_session


@pytest.fixture(scope="module")
def ranges(digits_graph: ModelProto, calibration_digits: Digits) -> Ranges:
    return record_ranges(digits_graph, calibration_digits.batches())


def run(model: ModelProto, digits: Digits) -> npt.NDArray[np.float32]:
    return logits_session(model, fuse=False, threads=1)(digits.images)


def initializer(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def scaled(model: ModelProto, name: str, factor: float) -> ModelProto:
    """Return the graph with one stored tensor multiplied."""
    changed = ModelProto()
    changed.CopyFrom(model)
    tensor = initializer(changed, name)
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    return changed


@pytest.fixture(scope="module")
def loud(digits_graph: ModelProto, calibration_digits: Digits) -> tuple[ModelProto, Ranges]:
    """A network one of whose tensors overflows FP16, exactly undone by the next weight."""
    name = "block2.0.attn.spatial_gating_unit.conv0"
    model = scaled(digits_graph, f"{name}.weight", 2.0**15)
    model = scaled(model, f"{name}.bias", 2.0**15)
    model = scaled(model, "block2.0.attn.spatial_gating_unit.conv_spatial.weight", 2.0**-15)
    return model, record_ranges(model, calibration_digits.batches())


class TestHalfFromFp32:
    def test_it_answers_as_fp32_does(
        self, digits_graph: ModelProto, heldout_digits: Digits
    ) -> None:
        half = half_from_fp32(digits_graph, kept_nodes(digits_graph, DEFAULT_KEEP))
        checker.check_model(half.model, full_check=True)
        found = compare(run(digits_graph, heldout_digits), run(half.model, heldout_digits))
        assert found.sqnr_db > 60
        assert found.top1_agreement == 1.0

    def test_casts_stand_only_where_the_type_changes(self, digits_graph: ModelProto) -> None:
        half = half_from_fp32(digits_graph, kept_nodes(digits_graph, DEFAULT_KEEP))
        operators = Counter(node.op_type for node in half.model.graph.node)
        # the input; into and out of three LayerNorms between stages; into the last
        assert operators["Cast"] == half.casts == 1 + 3 * 2 + 1
        before = Counter(node.op_type for node in digits_graph.graph.node)
        assert operators - Counter({"Cast": half.casts}) == before

    def test_inputs_outputs_and_the_kept_stay_fp32(self, digits_graph: ModelProto) -> None:
        half = half_from_fp32(digits_graph, kept_nodes(digits_graph, DEFAULT_KEEP)).model
        types = [v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)]
        assert types == [TensorProto.FLOAT, TensorProto.FLOAT]
        assert initializer(half, "head.weight").data_type == TensorProto.FLOAT
        assert initializer(half, "norm1.weight").data_type == TensorProto.FLOAT
        assert initializer(half, "block1.0.mlp.fc1.weight").data_type == TensorProto.FLOAT16

    def test_the_source_is_not_changed(self, digits_graph: ModelProto) -> None:
        before = digits_graph.SerializeToString(deterministic=True)
        half_from_fp32(digits_graph, {})
        assert digits_graph.SerializeToString(deterministic=True) == before

    def test_fp16_throughout_with_fp16_input_and_output_has_no_cast(
        self, digits_graph: ModelProto, heldout_digits: Digits
    ) -> None:
        half = half_from_fp32(digits_graph, {}, half_io=True)
        checker.check_model(half.model, full_check=True)
        assert half.casts == 0
        kinds = {tensor.data_type for tensor in half.model.graph.initializer}
        assert TensorProto.FLOAT not in kinds
        found = compare(run(digits_graph, heldout_digits), run(half.model, heldout_digits))
        assert found.sqnr_db > 50

    def test_fp16_output_of_an_fp32_head_is_cast_once(self, digits_graph: ModelProto) -> None:
        half = half_from_fp32(digits_graph, kept_nodes(digits_graph, ["head"]), half_io=True)
        checker.check_model(half.model, full_check=True)
        assert half.casts == 2  # into the head and out of it
        assert half.model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16

    def test_kept_throughout_is_the_same_graph(
        self, digits_graph: ModelProto, heldout_digits: Digits
    ) -> None:
        half = half_from_fp32(digits_graph, {n.name: "" for n in digits_graph.graph.node})
        assert half.casts == 0
        assert np.array_equal(run(half.model, heldout_digits), run(digits_graph, heldout_digits))

    def test_tensorrt_for_rtx_builds_it(
        self, digits_graph: ModelProto, rtx_plan: Callable[[ModelProto], bytes]
    ) -> None:
        half = half_from_fp32(digits_graph, kept_nodes(digits_graph, DEFAULT_KEEP))
        assert len(rtx_plan(half.model)) > 100_000


class TestKeptNodes:
    def test_a_module_means_all_below_it(self, digits_graph: ModelProto) -> None:
        kept = kept_nodes(digits_graph, ["block1.0.attn"])
        assert "block1.0.attn.spatial_gating_unit.conv0" in kept
        assert "block1.0.mlp.fc1" not in kept

    def test_an_expression_means_whole_names(self, digits_graph: ModelProto) -> None:
        assert set(kept_nodes(digits_graph, [r"block1\.\d+\.mlp\.fc2"])) == {
            "block1.0.mlp.fc2",
            "block1.1.mlp.fc2",
        }

    def test_what_means_nothing_is_refused(self, digits_graph: ModelProto) -> None:
        with pytest.raises(UsageError, match=r"There is no module 'block9' to keep in FP32\."):
            kept_nodes(digits_graph, ["block9"])
        with pytest.raises(UsageError, match="neither a module nor a regular expression"):
            kept_nodes(digits_graph, ["block["])


class TestAudit:
    def test_a_healthy_network_has_nothing_to_keep(
        self, digits_graph: ModelProto, ranges: Ranges
    ) -> None:
        audit = audit_ranges(digits_graph, ranges, kept_nodes(digits_graph, DEFAULT_KEEP))
        assert audit.passed
        require_no_surprise(audit)
        assert len([t for t in audit.tensors if t.kind == "activation"]) == len(ranges.tensors)

    def test_what_overflows_is_kept_and_named(
        self, loud: tuple[ModelProto, Ranges], heldout_digits: Digits
    ) -> None:
        model, ranges = loud
        asked = kept_nodes(model, DEFAULT_KEEP)
        audit = audit_ranges(model, ranges, asked)
        unit = "block2.0.attn.spatial_gating_unit"
        assert set(audit.kept) == {f"{unit}.conv0", f"{unit}.conv_spatial"}
        assert "beyond half of FP16's 65504" in audit.kept[f"{unit}.conv0"]
        half = half_from_fp32(model, {**asked, **audit.kept})
        good = compare(run(model, heldout_digits), run(half.model, heldout_digits))
        assert good.sqnr_db > 60

    def test_fp16_really_overflows_there(
        self, loud: tuple[ModelProto, Ranges], heldout_digits: Digits
    ) -> None:
        model, _ = loud
        careless = half_from_fp32(model, kept_nodes(model, DEFAULT_KEEP)).model
        name = "block2.0.attn.spatial_gating_unit.conv0"
        careless.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None))
        session = InferenceSession(careless.SerializeToString(), providers=["CPUExecutionProvider"])
        _, found = session.run(None, {"images": heldout_digits.images[:8]})
        assert np.isinf(found).any()

    def test_strict_refuses_it(self, loud: tuple[ModelProto, Ranges]) -> None:
        model, ranges = loud
        with pytest.raises(GateFailed) as caught:
            require_no_surprise(audit_ranges(model, ranges, ()))
        assert caught.value.message.startswith(
            "FP16 cannot hold everything: 'block2.0.attn.spatial_gating_unit.conv0' reaches "
        )
        assert "--keep" in caught.value.remedy

    def test_what_vanishes_is_kept(
        self, digits_graph: ModelProto, calibration_digits: Digits
    ) -> None:
        name = "block2.0.attn.spatial_gating_unit.conv0"
        model = scaled(digits_graph, f"{name}.weight", 2.0**-24)
        model = scaled(model, f"{name}.bias", 2.0**-24)
        ranges = record_ranges(model, [calibration_digits.images[:4]])
        audit = audit_ranges(model, ranges, ())
        assert name in audit.kept
        made = next(t for t in audit.tensors if t.name == name)
        assert "below FP16's smallest normal number" in made.problem
        weight = next(t for t in audit.tensors if t.name == f"{name}.weight")
        assert "which FP16 rounds to zero" in weight.problem
        assert weight.vanishing_share > 0.1

    def test_a_weight_beyond_fp16_is_kept(self, digits_graph: ModelProto, ranges: Ranges) -> None:
        model = scaled(digits_graph, "block3.0.mlp.fc1.weight", 1e6)
        audit = audit_ranges(model, ranges, ())
        assert "beyond FP16's 65504" in audit.kept["block3.0.mlp.fc1"]

    def test_what_stays_fp32_anyway_is_no_problem(
        self, digits_graph: ModelProto, ranges: Ranges
    ) -> None:
        model = scaled(digits_graph, "head.weight", 1e6)
        assert audit_ranges(model, ranges, kept_nodes(model, ["head"])).passed

    def test_the_figures_are_in_the_manifest(
        self, digits_graph: ModelProto, ranges: Ranges
    ) -> None:
        facts = audit_ranges(digits_graph, ranges, ()).as_dict()
        assert facts["images"] == 64
        assert facts["largest_activation"]["largest"] > 10
        assert facts["problems"] == []
