"""Graphs with Q/DQ compute what was planned, in the form each target reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, TensorProto, checker, numpy_helper

from benchmarks.ablation import plan_kernels
from tests.precision.conftest import Digits
from van_deploy.errors import ConversionError, UsageError
from van_deploy.graph.rebuilt import RebuiltVan
from van_deploy.metrics import sqnr_db
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.equalize import TECHNIQUES, Equalization, equalize
from van_deploy.precision.fp16 import DEFAULT_KEEP, fp16_from_fp32, kept_nodes
from van_deploy.precision.observers import ChannelRange
from van_deploy.precision.plan import (
    QuantizationPlan,
    layers_in_scope,
    make_plan,
    multiply_adds,
)
from van_deploy.precision.qdq import qdq_for_cpu, qdq_for_tensorrt
from van_deploy.precision.scales import PAIR_LIMIT, SMALLEST_SCALE, pair_sums
from van_deploy.precision.simulate import bias_corrected, logits, quantizing

Floats = npt.NDArray[np.float32]
Ranges = Mapping[str, ChannelRange]


def stored(model: ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def operators(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture(scope="module")
def plan(
    network: RebuiltVan,
    pointwise: tuple[str, ...],
    ranges: Ranges,
    calibration_digits: Digits,
) -> QuantizationPlan:
    made = make_plan(equalize(network, ranges, pointwise), ranges, pointwise)
    return bias_corrected(made, calibration_digits.images)


@pytest.fixture(scope="module")
def cpu_plan(network: RebuiltVan, ranges: Ranges, calibration_digits: Digits) -> QuantizationPlan:
    layers = layers_in_scope(network.model, ("deep",))
    changed = equalize(network, ranges, layers, ("cross_layer", "shift"))
    made = make_plan(changed, ranges, layers, target="cpu")
    return bias_corrected(made, calibration_digits.images)


class TestTensorRt:
    def test_the_file_computes_what_was_planned(
        self, digits_graph: ModelProto, plan: QuantizationPlan, heldout_digits: Digits
    ) -> None:
        graph = qdq_for_tensorrt(digits_graph, plan, rest="fp32")
        checker.check_model(graph, full_check=True)
        found = logits_session(graph, fuse=False, threads=1)(heldout_digits.images)
        assert sqnr_db(logits(plan, heldout_digits.images), found) > 45

    def test_int8_holds_forty_decibels(
        self,
        digits_graph: ModelProto,
        plan: QuantizationPlan,
        heldout_digits: Digits,
        expected: Floats,
    ) -> None:
        graph = qdq_for_tensorrt(digits_graph, plan, kept=kept_nodes(digits_graph, DEFAULT_KEEP))
        found = logits_session(graph, fuse=False, threads=1)(heldout_digits.images)
        assert sqnr_db(expected, found) > 39
        assert (expected.argmax(axis=1) == found.argmax(axis=1)).all()

    def test_it_is_of_the_form_tensorrt_reads(
        self, digits_graph: ModelProto, plan: QuantizationPlan
    ) -> None:
        graph = qdq_for_tensorrt(digits_graph, plan, kept=kept_nodes(digits_graph, DEFAULT_KEEP))
        values, makers = stored(graph), {o: n for n in graph.graph.node for o in n.output}
        assert operators(graph)["QuantizeLinear"] == len(plan.layers) == 45
        assert operators(graph)["DequantizeLinear"] == 2 * 45
        for node in graph.graph.node:
            if node.op_type == "QuantizeLinear":
                scale, zero = (values[name] for name in node.input[1:])
                assert (str(scale.dtype), scale.shape, str(zero.dtype)) == ("float16", (), "int8")
                assert float(scale) >= SMALLEST_SCALE
                assert int(zero) == 0
            if node.name in plan.layers:
                assert all(makers[n].op_type == "DequantizeLinear" for n in node.input[:2])
                assert values[node.input[2]].dtype == np.float16
        weights = [v for n, v in values.items() if n.endswith("weight.int8")]
        assert len(weights) == 45
        assert all(np.abs(w.astype(int)).max() == 127 for w in weights)
        assert not [n for n in values if n not in {i for m in graph.graph.node for i in m.input}]

    def test_two_readers_with_one_scale_share_a_pair(
        self, network: RebuiltVan, digits_graph: ModelProto, ranges: Ranges
    ) -> None:
        layers = layers_in_scope(network.model, ("all",))
        graph = qdq_for_tensorrt(
            digits_graph, make_plan(Equalization(network), ranges, layers), rest="fp32"
        )
        assert operators(graph)["QuantizeLinear"] == len({network.reads[n] for n in layers})

    def test_fp16_scales_need_a_newer_opset(
        self, digits_graph: ModelProto, plan: QuantizationPlan
    ) -> None:
        old = ModelProto()
        old.CopyFrom(digits_graph)
        old.opset_import[0].version = 18
        with pytest.raises(ConversionError, match="opset 18; FP16 scales need 19") as caught:
            qdq_for_tensorrt(old, plan)
        assert "--rest fp32" in caught.value.remedy

    def test_an_added_node_adds_no_kernel(
        self,
        digits_graph: ModelProto,
        network: RebuiltVan,
        pointwise: tuple[str, ...],
        ranges: Ranges,
    ) -> None:
        """Kernels of one block in the plan that TensorRT for RTX builds, for Ada GPUs."""
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
        kept = kept_nodes(digits_graph, DEFAULT_KEEP)
        counts = []
        for techniques in ((), TECHNIQUES):
            made = make_plan(equalize(network, ranges, pointwise, techniques), ranges, pointwise)
            graph = qdq_for_tensorrt(digits_graph, made, kept=kept)
            counts.append(plan_kernels(graph)["block2.0"])
        assert len(graph.graph.node) > 13 * 9 + 17
        assert counts[0] == counts[1]
        assert plan_kernels(fp16_from_fp32(digits_graph, kept))["block2.0"] < counts[0]


class TestCpu:
    def test_integer_kernels_compute_what_the_file_says(
        self,
        digits_graph: ModelProto,
        cpu_plan: QuantizationPlan,
        heldout_digits: Digits,
        expected: Floats,
    ) -> None:
        """With or without VNNI: against every pair as written, and against FP32."""
        graph = qdq_for_cpu(digits_graph, cpu_plan)
        checker.check_model(graph, full_check=True)
        written = logits_session(graph, fuse=False, threads=1)(heldout_digits.images)
        fused = logits_session(graph, fuse=True, threads=1)(heldout_digits.images)
        assert sqnr_db(written, fused) > 36
        assert sqnr_db(expected, fused) > 36
        assert sqnr_db(expected, logits(cpu_plan, heldout_digits.images)) > 36

    def test_it_is_of_the_form_onnxruntime_fuses(
        self, digits_graph: ModelProto, cpu_plan: QuantizationPlan
    ) -> None:
        graph = qdq_for_cpu(digits_graph, cpu_plan)
        values, makers = stored(graph), {o: n for n in graph.graph.node for o in n.output}
        readers = {i: n for n in graph.graph.node for i in n.input}
        gates = [n for n in cpu_plan.layers if n.endswith("spatial_gating_unit")]
        assert len(gates) == 7
        for node in graph.graph.node:
            if node.name in cpu_plan.layers:
                assert all(makers[n].op_type == "DequantizeLinear" for n in node.input)
                assert readers[node.output[0]].op_type == "QuantizeLinear"
        for name, value in values.items():
            if name.endswith("weight.int8"):
                assert (pair_sums(value) <= PAIR_LIMIT).all()
            if name.endswith("bias.int32"):
                assert np.abs(value.astype(float)).max() < 2**31
        for name in ("patch_embed2.proj", "block2.0.attn.proj_2", "block2.0.mlp.fc2"):
            assert makers[name].op_type == "Mul"
            assert values[f"{name}.units"].shape[1] > 1


class TestScope:
    @pytest.mark.parametrize(
        ("scope", "count"), [("pointwise", 45), ("all", 76), ("deep", 59), (r"fc1$", 9)]
    )
    def test_what_a_scope_means(self, network: RebuiltVan, scope: str, count: int) -> None:
        assert len(layers_in_scope(network.model, (scope,))) == count

    def test_what_is_kept_is_left_out(self, network: RebuiltVan, digits_graph: ModelProto) -> None:
        kept = kept_nodes(digits_graph, ("block4",))
        layers = layers_in_scope(network.model, ("pointwise",), kept)
        assert layers
        assert not [name for name in layers if name.startswith("block4")]

    @pytest.mark.parametrize(
        ("scope", "kept", "message"),
        [
            (("resnet",), (), "The scope 'resnet' matches no convolution of this network."),
            (("(",), (), "The scope '(' is neither pointwise nor deep nor all nor a regular"),
            (
                ("block1.0.mlp.fc1",),
                ("block1.0.mlp.fc1",),
                "The scope 'block1.0.mlp.fc1' holds nothing that is not kept",
            ),
        ],
    )
    def test_a_scope_that_holds_nothing_is_refused(
        self, network: RebuiltVan, scope: Sequence[str], kept: Sequence[str], message: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            layers_in_scope(network.model, scope, kept)
        assert message in caught.value.message

    def test_work_is_counted(self, network: RebuiltVan) -> None:
        work = multiply_adds(network.model, 3, 64)
        assert work["patch_embed1.proj"] == 7 * 7 * 3 * 16 * 16 * 16
        assert work["head"] == 64 * 10


def test_fewer_layers_lose_the_gates_between_them(cpu_plan: QuantizationPlan) -> None:
    unit = "block2.0.attn.spatial_gating_unit"
    fewer = cpu_plan.without([f"{unit}.conv1"])
    assert unit in cpu_plan.layers
    assert unit not in fewer.layers
    assert len(fewer.convolutions) == len(cpu_plan.convolutions) - 1


def test_rounding_ends_with_the_block(
    network: RebuiltVan, plan: QuantizationPlan, heldout_digits: Digits
) -> None:
    images = heldout_digits.images[:2]
    before = logits(plan.without(plan.convolutions), images)
    with quantizing(plan):
        pass
    assert (logits(plan.without(plan.convolutions), images) == before).all()
    assert (logits(plan, images) != before).any()


def test_bias_correction_takes_the_mean_error_out(
    network: RebuiltVan,
    pointwise: tuple[str, ...],
    ranges: Ranges,
    calibration_digits: Digits,
) -> None:
    images = calibration_digits.images
    raw = make_plan(Equalization(network), ranges, pointwise)
    corrected = bias_corrected(raw, images)
    means = {}
    for key, candidate, only in (("fp32", raw, ()), ("raw", raw, None), ("ours", corrected, None)):
        seen: dict[str, Floats] = {}
        layers = candidate.layers if only is None else {}
        shown = QuantizationPlan(candidate.network, layers)
        module = candidate.network.model.get_submodule("block4.1.mlp.fc2")
        handle = module.register_forward_hook(
            lambda _m, _a, y, seen=seen: seen.update(y=y.mean(dim=(0, 2, 3)).numpy())
        )
        logits(shown, images, batch=len(images))
        handle.remove()
        means[key] = seen["y"]
    before = np.abs(means["raw"] - means["fp32"]).mean()
    assert np.abs(means["ours"] - means["fp32"]).mean() < 0.1 * before


def test_types_of_the_file(digits_graph: ModelProto, plan: QuantizationPlan) -> None:
    graph = qdq_for_tensorrt(digits_graph, plan, kept=(), half_io=True)
    assert graph.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
