"""INT8: what is quantised and equalised, both targets' graphs, and the search for a budget."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import ModelProto, checker, numpy_helper

from benchmarks.ablation import plan_kernels
from tests.each import each
from tests.precision.conftest import Images, batches
from van_deploy.errors import ConversionError, ImageError, UsageError
from van_deploy.graph.export import RebuiltVan
from van_deploy.metrics import sqnr_db
from van_deploy.precision.comparison import labels_lost, logits_session
from van_deploy.precision.equalize import FACTOR_LIMIT, TECHNIQUES, Equalization, equalize
from van_deploy.precision.fp16 import DEFAULT_KEEP, fp16_from_fp32, kept_nodes
from van_deploy.precision.int8 import (
    LayerSensitivity,
    rank_layers,
    require_resolution,
    search_kept,
)
from van_deploy.precision.plan import (
    QuantizationPlan,
    bias_corrected,
    layers_in_scope,
    logits,
    make_plan,
    multiply_adds,
)
from van_deploy.precision.qdq import qdq_for_cpu, qdq_for_tensorrt
from van_deploy.precision.scales import PAIR_LIMIT, SMALLEST_SCALE, ChannelRange, observe, pair_sums

Ranges = Mapping[str, ChannelRange]


def stored(model: ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def operators(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(model: ModelProto, images: Images, *, fuse: bool = False) -> Images:
    return logits_session(model, fuse=fuse, threads=1)(images)


@pytest.fixture(scope="module")
def plan(
    network: RebuiltVan, pointwise: tuple[str, ...], ranges: Ranges, calibration_digits: Images
) -> QuantizationPlan:
    made = make_plan(equalize(network, ranges, pointwise), ranges, pointwise)
    return bias_corrected(made, calibration_digits)


@pytest.fixture(scope="module")
def plain_plan(network: RebuiltVan, pointwise: tuple[str, ...], ranges: Ranges) -> QuantizationPlan:
    """Return the plan without any technique."""
    return make_plan(Equalization(network), ranges, pointwise)


@pytest.fixture(scope="module")
def cpu_plan(network: RebuiltVan, ranges: Ranges, calibration_digits: Images) -> QuantizationPlan:
    layers = layers_in_scope(network.model, ("deep",))
    changed = equalize(network, ranges, layers, ("cross_layer", "shift"))
    return bias_corrected(make_plan(changed, ranges, layers, target="cpu"), calibration_digits)


# --- what is quantised -----------------------------------------------------------------------


@each(("scope", "count"), [("pointwise", 45), ("all", 76), ("deep", 59), (r"fc1$", 9), ("head", 1)])
def test_what_a_scope_means(
    network: RebuiltVan, digits_graph: ModelProto, scope: str, count: int
) -> None:
    layers = layers_in_scope(network.model, (scope,))
    assert len(layers) == count
    kept = [name for name in kept_nodes(digits_graph, ("block4",)) if name in layers]
    if count > len(kept):
        fewer = layers_in_scope(network.model, (scope,), kept)
        assert fewer == tuple(name for name in layers if not name.startswith("block4"))


@each(
    ("scope", "kept", "message"),
    [
        ("resnet", (), "'resnet' is neither pointwise nor deep nor all nor a regular expression"),
        ("(", (), "for a convolution of this network (missing"),
        ("block1.0.mlp.fc1", ("block1.0.mlp.fc1",), "holds nothing that is not kept"),
    ],
)
def test_a_scope_that_holds_nothing_is_refused(
    network: RebuiltVan, scope: str, kept: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        layers_in_scope(network.model, (scope,), kept)
    assert message in caught.value.message


def test_fewer_layers_lose_the_gates_between_them(cpu_plan: QuantizationPlan) -> None:
    unit = "block2.0.attn.spatial_gating_unit"
    fewer = cpu_plan.without([f"{unit}.conv1"])
    assert unit in cpu_plan.layers
    assert unit not in fewer.layers
    assert len(fewer.convolutions) == len(cpu_plan.convolutions) - 1


# --- equalisation and bias correction --------------------------------------------------------


@each("scope", ["pointwise", "all", "block2"])
@each("technique", TECHNIQUES)
def test_an_equalised_network_computes_what_it_did(
    network: RebuiltVan,
    ranges: Ranges,
    heldout_digits: Images,
    expected: Images,
    scope: str,
    technique: str,
) -> None:
    changed = equalize(network, ranges, layers_in_scope(network.model, (scope,)), [technique])
    assert changed.affines or changed.inserted
    found = logits(QuantizationPlan(changed.network), heldout_digits)
    assert sqnr_db(expected, found) > 100


def test_every_changed_tensor_is_what_the_record_says(
    network: RebuiltVan, pointwise: tuple[str, ...], ranges: Ranges, calibration_digits: Images
) -> None:
    changed = equalize(network, ranges, pointwise)
    now = observe(changed.network, batches(calibration_digits), [])
    assert {"block1.0.add", "block2.0", "block1.0.attn.spatial_gating_unit"} <= set(changed.affines)
    for tensor, affine in changed.affines.items():
        wanted = affine.of(ranges[tensor].maximum)
        assert np.allclose(now[tensor].maximum, wanted, atol=2e-3 * np.abs(wanted).max()), tensor
        assert (affine.factor >= 1 / FACTOR_LIMIT).all()
        assert (affine.factor <= FACTOR_LIMIT).all()


def with_a_multiply(network: RebuiltVan) -> None:
    block = network.model.stage_blocks(2)[1]
    block.carry = torch.ones(len(block.attn.proj_2.weight))
    block.carry[::2] = 0.25


def with_a_dead_channel(network: RebuiltVan) -> None:
    unit = network.model.stage_blocks(1)[0].attn.spatial_gating_unit
    for conv in (unit.conv_spatial, unit.conv1):
        conv.weight.data[0] = 0.0
        if conv.bias is not None:
            conv.bias.data[0] = 0.0


@each("spoil", [with_a_multiply, with_a_dead_channel])
def test_odd_networks_are_equalised_exactly(
    network: RebuiltVan, pointwise: tuple[str, ...], calibration_digits: Images, spoil: Any
) -> None:
    other, images = replace(network, model=copy.deepcopy(network.model)), calibration_digits[:8]
    spoil(other)
    found = observe(other, batches(calibration_digits), set(other.tensors))
    changed = QuantizationPlan(equalize(other, found, pointwise).network)
    assert sqnr_db(logits(QuantizationPlan(other), images), logits(changed, images)) > 100


def test_the_techniques_bring_decibels_and_leave_the_original_as_it_was(
    network: RebuiltVan,
    pointwise: tuple[str, ...],
    ranges: Ranges,
    plan: QuantizationPlan,
    plain_plan: QuantizationPlan,
    calibration_digits: Images,
    heldout_digits: Images,
    expected: Images,
) -> None:
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    only = equalize(network, ranges, pointwise, ("cross_layer",))
    one = bias_corrected(make_plan(only, ranges, pointwise), calibration_digits)
    none = bias_corrected(plain_plan, calibration_digits)
    db = [sqnr_db(expected, logits(made, heldout_digits)) for made in (none, one, plan)]
    assert db[1] > db[0] + 0.5
    assert db[2] > db[1] + 0.5
    after = network.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert np.array_equal(logits(QuantizationPlan(network), heldout_digits), expected)


def test_bias_correction_takes_the_mean_error_out(
    plain_plan: QuantizationPlan, calibration_digits: Images
) -> None:
    corrected = bias_corrected(plain_plan, calibration_digits)
    exact, means = plain_plan.without(plain_plan.convolutions), []
    for shown in (exact, plain_plan, corrected):
        seen: dict[str, Images] = {}
        module = shown.network.model.get_submodule("block4.1.mlp.fc2")
        handle = module.register_forward_hook(
            lambda _m, _a, y, seen=seen: seen.update(y=y.mean(dim=(0, 2, 3)).numpy())
        )
        logits(shown, calibration_digits, batch=len(calibration_digits))
        handle.remove()
        means.append(seen["y"])
    before, after = (np.abs(mean - means[0]).mean() for mean in means[1:])
    assert after < 0.1 * before


# --- graphs ----------------------------------------------------------------------------------


def test_a_graph_for_tensorrt_computes_what_was_planned(
    digits_graph: ModelProto, plan: QuantizationPlan, heldout_digits: Images, expected: Images
) -> None:
    graph = qdq_for_tensorrt(digits_graph, plan, rest="fp32")
    checker.check_model(graph, full_check=True)
    found = run(graph, heldout_digits)
    assert sqnr_db(logits(plan, heldout_digits), found) > 45
    half = qdq_for_tensorrt(digits_graph, plan, kept=kept_nodes(digits_graph, DEFAULT_KEEP))
    found = run(half, heldout_digits)
    assert sqnr_db(expected, found) > 39
    assert (expected.argmax(axis=1) == found.argmax(axis=1)).all()


def test_it_is_of_the_form_tensorrt_reads(digits_graph: ModelProto, plan: QuantizationPlan) -> None:
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
    network: RebuiltVan, digits_graph: ModelProto, ranges: Ranges
) -> None:
    layers = layers_in_scope(network.model, ("all",))
    made = make_plan(Equalization(network), ranges, layers)
    graph = qdq_for_tensorrt(digits_graph, made, rest="fp32")
    assert operators(graph)["QuantizeLinear"] == len({network.reads[n] for n in layers})


def test_fp16_scales_need_a_newer_opset(digits_graph: ModelProto, plan: QuantizationPlan) -> None:
    old = copy.deepcopy(digits_graph)
    old.opset_import[0].version = 18
    with pytest.raises(ConversionError, match="opset 18; FP16 scales need 19") as caught:
        qdq_for_tensorrt(old, plan)
    assert "--rest fp32" in caught.value.remedy


def test_an_added_node_adds_no_kernel(
    digits_graph: ModelProto, plan: QuantizationPlan, plain_plan: QuantizationPlan
) -> None:
    """Kernels of one block in the plan that TensorRT for RTX builds, for Ada GPUs."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    kept = kept_nodes(digits_graph, DEFAULT_KEEP)
    half = fp16_from_fp32(digits_graph, kept)
    graphs = [qdq_for_tensorrt(digits_graph, made, kept=kept) for made in (plain_plan, plan)]
    plain, added, fp16 = (plan_kernels(graph)["block2.0"] for graph in (*graphs, half))
    assert len(graphs[1].graph.node) > len(graphs[0].graph.node)
    assert plain == added > fp16


def test_integer_kernels_compute_what_the_file_for_a_cpu_says(
    digits_graph: ModelProto, cpu_plan: QuantizationPlan, heldout_digits: Images, expected: Images
) -> None:
    """With or without VNNI: against every pair as written, and against FP32."""
    graph = qdq_for_cpu(digits_graph, cpu_plan)
    checker.check_model(graph, full_check=True)
    fused = run(graph, heldout_digits, fuse=True)
    for reference in (run(graph, heldout_digits), expected):
        assert sqnr_db(reference, fused) > 36
    assert sqnr_db(expected, logits(cpu_plan, heldout_digits)) > 36


def test_it_is_of_the_form_onnxruntime_fuses(
    digits_graph: ModelProto, cpu_plan: QuantizationPlan
) -> None:
    graph = qdq_for_cpu(digits_graph, cpu_plan)
    values, makers = stored(graph), {o: n for n in graph.graph.node for o in n.output}
    readers = {i: n for n in graph.graph.node for i in n.input}
    assert len([n for n in cpu_plan.layers if n.endswith("spatial_gating_unit")]) == 7
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


# --- the search for a budget -----------------------------------------------------------------


def searched(plan: QuantizationPlan, needed: int, limit: int = 16) -> dict[str, Any]:
    """Search where a plan holds once the ``needed`` worst layers are out of it."""
    ranking = tuple(LayerSensitivity(name, 30.0 + n, 0.01) for n, name in enumerate(plan.layers))

    def lost(candidate: QuantizationPlan) -> int:
        gone = len(plan.layers) - len(candidate.layers)
        return max(0, 2 * (needed - gone) + 1) if gone < needed else 1

    return search_kept(plan, ranking, lost, 0.2, 500, limit=limit)


@each("needed", [0, 1, 2, 3, 7, 20, 45])
def test_the_fewest_that_hold_are_kept(plain_plan: QuantizationPlan, needed: int) -> None:
    report = searched(plain_plan, needed)
    assert report["passed"]
    assert list(report["kept"]) == [layer["name"] for layer in report["ranking"][:needed]]
    assert report["share"] == pytest.approx(0.01 * (45 - needed))
    assert len(report["trials"]) <= 13


@each(
    ("needed", "limit", "passed", "kept"), [(99, 16, False, 45), (30, 4, False, 4), (5, 6, True, 6)]
)
def test_what_does_not_hold_in_time_ends_with_the_best_seen(
    plain_plan: QuantizationPlan, needed: int, limit: int, passed: bool, kept: int
) -> None:
    report = searched(plain_plan, needed, limit)
    assert (report["passed"], len(report["kept"])) == (passed, kept)
    assert len(report["trials"]) <= limit


def test_layers_are_ranked_by_noise_for_the_work_they_do(
    plain_plan: QuantizationPlan, network: RebuiltVan, calibration_digits: Images
) -> None:
    work = multiply_adds(network.model, 3, 64)
    assert work["patch_embed1.proj"] == 7 * 7 * 3 * 16 * 16 * 16
    assert work["head"] == 64 * 10
    ranking = rank_layers(plain_plan, calibration_digits[:4], work)
    assert {layer.name for layer in ranking} == set(plain_plan.convolutions)
    worths = [layer.worth_db for layer in ranking]
    assert worths == sorted(worths)
    assert all(20 < layer.sqnr_db < 90 for layer in ranking)
    assert sum(layer.share for layer in ranking) == pytest.approx(0.57, abs=0.01)


def test_improvements_do_not_offset_regressions_and_a_budget_below_one_image_is_refused() -> None:
    expected, after = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[0, 2, 1, 1]]
    assert labels_lost(expected, after, np.array([0, 1, 1, 1])) == 1  # type: ignore[arg-type]
    assert labels_lost(expected, after, None) == 3  # type: ignore[arg-type]
    require_resolution(0.2, 500)
    require_resolution(0.0, 10)
    with pytest.raises(ImageError) as caught:
        require_resolution(0.2, 410)
    assert caught.value.message == (
        "A budget of 0.2 points cannot be searched on 410 images: one label is 0.24 points."
    )
    assert caught.value.remedy.startswith("Give 500 calibration images or more")
