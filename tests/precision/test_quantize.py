"""Q/DQ files: their form, what they compute, and that TensorRT takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from tests.precision.conftest import Digits
from van_deploy.errors import ConversionError, UsageError
from van_deploy.metrics import compare
from van_deploy.precision.cpu import (
    PAIR_LIMIT,
    CpuScales,
    added_tensors,
    cpu_scales,
    cpu_weight_scales,
    pair_sums,
)
from van_deploy.precision.cpu_writer import qdq_for_cpu
from van_deploy.precision.half import DEFAULT_KEEP, kept_nodes
from van_deploy.precision.initial import initial_plan, is_pointwise, nodes_in_scope, rounded_weight
from van_deploy.precision.observer import float_tensors
from van_deploy.precision.plan import (
    QuantizationPlan,
    parameters_of,
    simulate,
    weight_scales,
    weighted_nodes,
)
from van_deploy.precision.quantize import multiply_adds, qdq_from_plan, quantized_share
from van_deploy.precision.ranges import Ranges, record_ranges
from van_deploy.precision.scales import Method, affine_scale
from van_deploy.precision.session import logits_session

SCOPES = ["pointwise", "deep", "all", (r"block[34]\..*fc1", "head")]


@pytest.fixture(scope="module")
def ranges(digits_graph: ModelProto, calibration_digits: Digits) -> Ranges:
    every = float_tensors(digits_graph)
    return record_ranges(
        digits_graph,
        calibration_digits.batches(),
        histograms=every,
        channels=added_tensors(digits_graph),
        threads=1,
    )


@pytest.fixture(scope="module")
def plan(digits_graph: ModelProto, ranges: Ranges) -> QuantizationPlan:
    return initial_plan(digits_graph, ranges)


@pytest.fixture(scope="module")
def expected(digits_graph: ModelProto, heldout_digits: Digits) -> npt.NDArray[np.float32]:
    return logits_session(digits_graph, fuse=False, threads=1)(heldout_digits.images)


def run(model: ModelProto, digits: Digits, fuse: bool = False) -> npt.NDArray[np.float32]:
    return logits_session(model, fuse=fuse, threads=1)(digits.images)


def stored(model: ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture(scope="module", params=["deep", "all"])
def cpu_graph(
    request: pytest.FixtureRequest, digits_graph: ModelProto, ranges: Ranges
) -> ModelProto:
    plan = initial_plan(digits_graph, ranges, request.param, weight_steps=cpu_weight_scales)
    return qdq_for_cpu(plan, cpu_scales(plan, ranges))


class TestScope:
    def test_pointwise_means_the_1x1_convolutions(self, digits_graph: ModelProto) -> None:
        names = nodes_in_scope(digits_graph)
        kinds = {name.rpartition(".")[2] for name in names}
        assert kinds == {"proj_1", "conv1", "proj_2", "fc1", "fc2"}
        assert all(is_pointwise(weighted_nodes(digits_graph)[name]) for name in names)

    def test_all_means_every_convolution_but_not_the_head(self, digits_graph: ModelProto) -> None:
        names = nodes_in_scope(digits_graph, "all")
        convolutions = [n.name for n in digits_graph.graph.node if n.op_type == "Conv"]
        assert list(names) == convolutions

    def test_deep_means_all_but_the_stem_and_the_first_stage(
        self, digits_graph: ModelProto
    ) -> None:
        everything, deep = (nodes_in_scope(digits_graph, scope) for scope in ("all", "deep"))
        left = [name for name in everything if name not in deep]
        assert {name.split(".")[0] for name in left} == {"patch_embed1", "block1"}
        assert {name.split(".")[0] for name in deep} == {
            *("patch_embed2", "block2", "patch_embed3", "block3", "patch_embed4", "block4")
        }

    def test_deep_of_one_stage_is_refused(self) -> None:
        given, made = (helper.make_tensor_value_info(n, 1, [1, 1, 1, 1]) for n in "xy")
        node = helper.make_node("Conv", ["x", "w"], ["y"], name="block1.0.mlp.fc1")
        weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
        model = helper.make_model(helper.make_graph([node], "one", [given], [made], [weight]))
        with pytest.raises(UsageError, match="has no second stage"):
            nodes_in_scope(model, "deep")

    def test_expressions_are_searched_for(self, digits_graph: ModelProto) -> None:
        names = nodes_in_scope(digits_graph, ["head", r"block1\.0\.mlp"])
        assert names == (
            "block1.0.mlp.fc1",
            "block1.0.mlp.dwconv.dwconv",
            "block1.0.mlp.fc2",
            "head",
        )

    def test_a_wrong_scope_is_refused(self, digits_graph: ModelProto) -> None:
        with pytest.raises(UsageError, match="matches no convolution of this network"):
            nodes_in_scope(digits_graph, "resnet")
        with pytest.raises(UsageError, match="neither pointwise nor deep nor all nor a"):
            nodes_in_scope(digits_graph, "block[")


class TestPlan:
    @pytest.mark.parametrize("method", list(Method))
    def test_every_number_is_usable(
        self, digits_graph: ModelProto, ranges: Ranges, method: Method
    ) -> None:
        for conv in initial_plan(digits_graph, ranges, "all", method).convs.values():
            for scale in (conv.activation_scale, *conv.weight_scale):
                assert np.isfinite(scale)
                assert scale >= 2.0**-14
                assert float(np.float16(scale)) == scale
            assert np.abs(conv.weight).max() <= 127
            covered = ranges.tensors[conv.activation].largest
            if method is Method.MINMAX:
                assert conv.activation_scale * 127 >= covered

    def test_weights_are_within_half_a_step(
        self, digits_graph: ModelProto, plan: QuantizationPlan
    ) -> None:
        weights = stored(digits_graph)
        for conv in plan.convs.values():
            error = np.abs(conv.dequantized_weight - weights[f"{conv.node}.weight"])
            steps = conv.weight_scale.reshape(-1, 1, 1, 1)
            assert (error <= steps * 0.5001).all()

    def test_the_share_of_int8_is_that_of_the_multiply_adds(self, plan: QuantizationPlan) -> None:
        work = multiply_adds(plan.model)
        assert work["patch_embed1.proj"] == 16 * 16 * np.prod(
            stored(plan.model)["patch_embed1.proj.weight"].shape
        )
        assert quantized_share(plan) == pytest.approx(
            sum(work[n] for n in plan.convs) / sum(work.values())
        )


class TestTensorrt:
    @pytest.mark.parametrize("rest", ["fp16", "fp32"])
    @pytest.mark.parametrize("scope", SCOPES, ids=["pointwise", "deep", "all", "expressions"])
    def test_it_is_valid_and_close(
        self,
        digits_graph: ModelProto,
        ranges: Ranges,
        heldout_digits: Digits,
        expected: npt.NDArray[np.float32],
        rest: str,
        scope: str | tuple[str, ...],
    ) -> None:
        plan = initial_plan(digits_graph, ranges, scope)
        kept = kept_nodes(digits_graph, DEFAULT_KEEP)
        graph = qdq_from_plan(plan, rest=rest, kept=kept)
        checker.check_model(graph, full_check=True)
        found = compare(expected, run(graph, heldout_digits))
        assert found.sqnr_db > 30
        assert found.top1_agreement == 1.0

    def test_the_file_computes_what_the_simulation_does(
        self, plan: QuantizationPlan, heldout_digits: Digits
    ) -> None:
        graph = qdq_from_plan(plan, rest="fp32")
        found = compare(run(simulate(plan), heldout_digits), run(graph, heldout_digits))
        assert found.sqnr_db > 90

    def test_only_inputs_and_weights_are_quantised_symmetrically(
        self, plan: QuantizationPlan
    ) -> None:
        graph = qdq_from_plan(plan, rest="fp32")
        values = stored(graph)
        makers = {name: node for node in graph.graph.node for name in node.output}
        for name, conv in plan.convs.items():
            node = next(n for n in graph.graph.node if n.name == name)
            activation, weight = makers[node.input[0]], makers[node.input[1]]
            assert activation.op_type == weight.op_type == "DequantizeLinear"
            assert makers[activation.input[0]].op_type == "QuantizeLinear"
            assert makers[activation.input[0]].input[0] == conv.activation
            assert weight.input[0] in values  # stored as integers
            assert values[weight.input[0]].dtype == np.int8
            assert values[weight.input[1]].shape == (len(conv.weight),)
            for half in (activation, weight):
                assert not values[half.input[2]].any()  # zero-point 0
            assert values[node.input[2]].dtype == np.float32  # the bias
        operators = Counter(node.op_type for node in graph.graph.node)
        activations = {conv.activation for conv in plan.convs.values()}
        assert operators["QuantizeLinear"] == len(activations)
        assert operators["DequantizeLinear"] == len(activations) + len(plan.convs)

    def test_scales_and_what_is_not_int8_are_fp16(self, plan: QuantizationPlan) -> None:
        graph = qdq_from_plan(plan, rest="fp16", kept=kept_nodes(plan.model, DEFAULT_KEEP))
        values = stored(graph)
        scales = {n: v for n, v in values.items() if n.endswith(".scale")}
        assert {v.dtype for v in scales.values()} == {np.dtype(np.float16)}
        assert all((v > 0).all() for v in scales.values())
        assert values["block1.0.attn.proj_1.bias"].dtype == np.float16
        assert values["head.weight"].dtype == np.float32
        assert "block1.0.attn.proj_1.weight" not in values  # nothing is stored twice

    def test_a_dead_channel_keeps_a_scale_that_fp16_holds(
        self, digits_graph: ModelProto, ranges: Ranges
    ) -> None:
        model = ModelProto()
        model.CopyFrom(digits_graph)
        name = "block1.0.mlp.fc1.weight"
        tensor = next(t for t in model.graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[0] *= 1e-9
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        graph = qdq_from_plan(initial_plan(model, ranges), rest="fp16")
        scale = stored(graph)[f"{name}.scale"]
        assert scale.dtype == np.float16
        assert scale[0] == np.float16(2.0**-14)

    def test_a_scale_that_is_none_is_refused(self, plan: QuantizationPlan) -> None:
        name, conv = next(iter(plan.convs.items()))
        broken = replace(plan, convs={**plan.convs, name: replace(conv, activation_scale=0.0)})
        with pytest.raises(ConversionError) as caught:
            qdq_from_plan(broken)
        assert caught.value.message == f"A scale of '{name}' is not a positive number: 0."

    def test_fp16_scales_need_opset_19(self, plan: QuantizationPlan) -> None:
        old = ModelProto()
        old.CopyFrom(plan.model)
        old.opset_import[0].version = 18
        with pytest.raises(ConversionError) as caught:
            qdq_from_plan(replace(plan, model=old))
        assert caught.value.message == "The graph has opset 18; FP16 scales need 19 or newer."
        qdq_from_plan(replace(plan, model=old), rest="fp32")

    def test_the_plan_is_not_changed(self, plan: QuantizationPlan) -> None:
        before = plan.model.SerializeToString(deterministic=True)
        qdq_from_plan(plan)
        simulate(plan)
        assert plan.model.SerializeToString(deterministic=True) == before

    @pytest.mark.parametrize("rest", ["fp16", "fp32"])
    def test_tensorrt_for_rtx_builds_it(
        self, plan: QuantizationPlan, rtx_plan: Callable[[ModelProto], bytes], rest: str
    ) -> None:
        kept = kept_nodes(plan.model, DEFAULT_KEEP)
        assert len(rtx_plan(qdq_from_plan(plan, rest=rest, kept=kept))) > 100_000


class TestCpu:
    def test_it_is_valid_and_close(
        self,
        cpu_graph: ModelProto,
        heldout_digits: Digits,
        expected: npt.NDArray[np.float32],
    ) -> None:
        checker.check_model(cpu_graph, full_check=True)
        found = compare(expected, run(cpu_graph, heldout_digits, fuse=True))
        assert found.sqnr_db > 25
        assert found.top1_agreement >= 0.97

    def test_activations_are_uint8_weights_int8_and_biases_int32(
        self, cpu_graph: ModelProto
    ) -> None:
        values = stored(cpu_graph)
        quantizers = [n for n in cpu_graph.graph.node if n.op_type == "QuantizeLinear"]
        assert {values[n.input[2]].dtype for n in quantizers} == {np.dtype(np.uint8)}
        for node in cpu_graph.graph.node:
            if node.op_type == "Conv" and node.input[1].endswith(".dequantized"):
                weight, *bias = (n.removesuffix(".dequantized") for n in node.input[1:])
                assert values[f"{weight}.integers"].dtype == np.int8
                assert [values[f"{b}.integers"].dtype for b in bias] == [np.int32] * len(bias)

    def test_no_two_products_overflow_sixteen_bits(
        self, digits_graph: ModelProto, ranges: Ranges
    ) -> None:
        """A plan whose steps ignore them, with two large neighbours, is widened on writing."""
        plan = initial_plan(digits_graph, ranges, "all")
        name = "block1.0.mlp.fc1"
        weight = plan.convs[name].weight.copy()
        weight[0, :2] = 127
        changed = replace(
            plan, convs={**plan.convs, name: replace(plan.convs[name], weight=weight)}
        )
        sums = [pair_sums(conv.weight).max() for conv in changed.convs.values()]
        assert max(sums) == 254
        graph = qdq_for_cpu(changed, cpu_scales(changed, ranges))
        values = stored(graph)
        for node in graph.graph.node:
            if node.op_type == "Conv":
                integers = values[f"{node.input[1].removesuffix('.dequantized')}.integers"]
                assert pair_sums(integers).max() <= PAIR_LIMIT

    def test_integers_give_what_the_file_says(
        self, cpu_graph: ModelProto, heldout_digits: Digits
    ) -> None:
        """ONNX Runtime's integer kernels, with or without VNNI, against every pair as written."""
        as_written = run(cpu_graph, heldout_digits, fuse=False)
        assert compare(as_written, run(cpu_graph, heldout_digits, fuse=True)).sqnr_db > 45

    def test_steps_for_a_cpu_leave_room_for_two_products(self, digits_graph: ModelProto) -> None:
        for node in weighted_nodes(digits_graph).values():
            weight, _ = parameters_of(digits_graph, node)
            steps = cpu_weight_scales(weight)
            assert pair_sums(rounded_weight(weight, steps)).max(initial=0.0) <= PAIR_LIMIT
            assert (steps >= weight_scales(weight)).all()

    def test_onnxruntime_fuses_every_quantised_convolution(
        self, cpu_graph: ModelProto, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        import onnxruntime as ort
        from onnx import load

        path = tmp_path_factory.mktemp("fused") / "fused.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(
            cpu_graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        operators = Counter(node.op_type for node in load(path).graph.node)
        convolutions = [node for node in cpu_graph.graph.node if node.op_type == "Conv"]
        quantized = [node.name for node in convolutions if node.input[1].endswith(".dequantized")]
        gates = {name.rpartition(".attn.")[0] for name in quantized if ".conv1" in name}
        assert len(quantized) > 0.7 * len(convolutions)
        assert operators["QLinearConv"] == len(quantized)
        assert operators["QLinearMul"] == len(gates)  # one a block

    def test_a_bias_that_would_not_fit_widens_its_channels_step(
        self, digits_graph: ModelProto, ranges: Ranges
    ) -> None:
        plan = initial_plan(digits_graph, ranges, "all")
        name = "block1.0.mlp.fc1"
        conv = plan.convs[name]
        assert conv.bias is not None
        bias = conv.bias.copy()
        bias[0] = 1e9
        changed = replace(plan, convs={**plan.convs, name: replace(conv, bias=bias)})
        graph = qdq_for_cpu(changed, cpu_scales(changed, ranges))
        integers = stored(graph)[f"{name}.bias.integers"]
        assert integers[0] == pytest.approx(2**30, rel=1e-3)

    def test_what_the_residual_stream_gets_has_a_step_for_every_channel(
        self, digits_graph: ModelProto, ranges: Ranges, heldout_digits: Digits
    ) -> None:
        """Two ways to write it: fused by ONNX Runtime, and in the network's own units."""
        plan = initial_plan(digits_graph, ranges, "all")
        scales = cpu_scales(plan, ranges)
        assert len(scales.outputs) == 4 + 2 * 9  # patch embeddings, and two a block
        for name, steps in scales.outputs.items():
            record = ranges.tensors[name]
            largest = np.maximum(record.channel_maximum, -record.channel_minimum)
            assert (steps * 127 >= largest * (1 - 1e-5)).all()
        fused, open_graph = (qdq_for_cpu(plan, scales, own_units=own) for own in (False, True))
        found = run(fused, heldout_digits, fuse=True)
        apart = compare(run(open_graph, heldout_digits, fuse=False), found)
        assert apart.sqnr_db > 35
        by_tensor = CpuScales(
            {name: affine_scale(ranges.tensors[name], Method.MSE) for name in scales.outputs}
            | dict(scales.tensors)
        )
        whole = run(qdq_for_cpu(plan, by_tensor), heldout_digits, fuse=True)
        expected = run(digits_graph, heldout_digits, fuse=False)
        assert compare(expected, found).sqnr_db > compare(expected, whole).sqnr_db + 0.5

    def test_types_of_input_and_output_stay(self, cpu_graph: ModelProto) -> None:
        for value in (*cpu_graph.graph.input, *cpu_graph.graph.output):
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT
