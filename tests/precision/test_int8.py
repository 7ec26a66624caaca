"""INT8: histograms, scales, scopes, equalisation, both targets' graphs, the budget's search."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import ModelProto, checker, numpy_helper

from benchmarks.accuracy import count_kernels
from tests.each import each
from tests.precision.conftest import Digits, batches, run
from tests.precision.test_fp16 import scaled
from van_deploy.checks.golden import OutputLayout
from van_deploy.config import QuantizeSettings
from van_deploy.data.images import ImageItem, ImageSet
from van_deploy.errors import ConversionError, ImageError, UsageError
from van_deploy.graph.export import RebuiltVan, onnx_from_van, van_from_onnx
from van_deploy.graph.files import operator_counts
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import Task, sqnr_db
from van_deploy.model.van import random_van, smooth_images
from van_deploy.model.variants import VanConfig
from van_deploy.precision import comparison, fp16, int8, qdq, scales
from van_deploy.precision.equalize import FACTOR_LIMIT, TECHNIQUES, equalize
from van_deploy.precision.images import ImageSets
from van_deploy.precision.plan import (
    QuantizationPlan,
    correct_biases,
    histogram_tensors,
    layers_in_scope,
    logits,
    make_plan,
    multiply_adds,
)
from van_deploy.stopwatch import Stopwatch


def parts(model: ModelProto) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return a graph's initialisers, and the node that computes each other value."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return values, {o: n for n in model.graph.node for o in n.output}


@pytest.fixture(scope="module")
def heavy() -> scales.Images:
    """Values ``(N, 3)`` with heavy tails, of three sizes."""
    values = np.random.default_rng(0).standard_t(3, (40_000, 3)) * [0.1, 1.0, 2.0]
    return values.astype(np.float32)


def record(values: scales.Images) -> scales.ChannelRange:
    return scales.channel_range(torch.from_numpy(values), histogram=True)


def error(values: scales.Images, quantizer: scales.Quantizer) -> float:
    codes = np.clip(np.rint(values / quantizer.scale), *quantizer.limits)
    return float(np.square(values - codes * quantizer.scale).mean())


@pytest.fixture(scope="module")
def plain(digits: Digits) -> QuantizationPlan:
    """Return a plan without any technique."""
    return make_plan(QuantizationPlan(digits.network), digits.ranges, digits.pointwise)


@pytest.fixture(scope="module")
def plan(digits: Digits) -> QuantizationPlan:
    """Return a plan with every technique."""
    changed = equalize(digits.network, digits.ranges, digits.pointwise)
    return correct_biases(make_plan(changed, digits.ranges, digits.pointwise), digits.train)


@pytest.fixture(scope="module")
def cpu_plan(digits: Digits) -> QuantizationPlan:
    layers = layers_in_scope(digits.network.model, ("deep",))
    changed = equalize(digits.network, digits.ranges, layers, ("cross_layer", "shift"))
    return correct_biases(make_plan(changed, digits.ranges, layers, target="cpu"), digits.train)


# --- histograms ------------------------------------------------------------------------------


@each("layout", [torch.contiguous_format, torch.channels_last])
def test_histogram_bins_of_each_channel(layout: torch.memory_format) -> None:
    values = torch.zeros(2, 3, 4, 4).contiguous(memory_format=layout)
    values[:, 1] = 0.7
    values[0, 2, 0, :] = torch.tensor([-3.0, 1e-9, 60000.0, -1e8])
    found = scales.channel_range(values, histogram=True)
    assert found.counts.shape == (3, scales.BINS)
    assert found.counts.sum() == values.numel()
    assert found.minimum.tolist() == [0.0, np.float32(0.7), np.float32(-1e8)]
    assert found.maximum.tolist() == [0.0, np.float32(0.7), 60000.0]
    assert found.largest == np.float32(1e8)
    held = [np.repeat(scales.bin_values(), counts) for counts in found.counts]
    assert held[1] == pytest.approx([0.7] * 32, rel=0.07)
    assert held[2][[1, -1]] == pytest.approx([-3.0, 60000.0], rel=0.07)
    assert list(held[2][2:-1]) == [0.0] * 29
    rising = scales.bin_values()[scales.bin_values() > 0]
    assert 1 < (rising[1:] / rising[:-1]).max() <= 1.13


def test_ranges_do_not_depend_on_the_batch_size(digits: Digits) -> None:
    name = "block1.0.mlp.act"
    ranges = scales.observe_ranges(digits.network, batches(digits.train, 7), [name])
    actual, expected = ranges[name], digits.ranges[name]
    difference = np.abs(actual.counts.astype(float) - expected.counts).sum()
    assert difference < 1e-3 * actual.counts.sum()
    assert actual.counts.sum() == expected.counts.sum()
    assert np.allclose(actual.minimum, expected.minimum, rtol=1e-4)
    assert np.allclose(actual.maximum, expected.maximum, rtol=1e-4)
    assert set(ranges) == set(digits.network.tensors)
    assert [tensor for tensor, r in ranges.items() if r.counts.size] == [name]
    assert ranges["images"].largest == pytest.approx(np.abs(digits.train).max())
    assert [scales.range_batch_size(side**2) for side in (64, 224, 2000)] == [32, 5, 1]


def test_nan_is_rejected_with_the_name_of_its_tensor(digits: Digits) -> None:
    broken = replace(digits.network, model=copy.deepcopy(digits.network.model))
    broken.model.stage_blocks(2)[0].mlp.fc1.bias.data[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ConversionError, match=r"'block2\.0\.mlp\.fc1' is infinite or NaN"):
        scales.observe_ranges(broken, batches(digits.train), ["block2.0.mlp.fc1"])


# --- scales ----------------------------------------------------------------------------------


def test_minmax_clips_nothing_and_percentile_clips_at_most_its_share(heavy: scales.Images) -> None:
    found = scales.symmetric_quantizer(record(heavy), "minmax")
    assert float(found.scale) * 127 == pytest.approx(np.abs(heavy).max(), rel=1e-3)
    assert found.limits == (-128, 127)
    found = scales.symmetric_quantizer(record(heavy), "percentile")
    assert 0 < (np.abs(heavy) > 127.5 * float(found.scale)).mean() <= 2e-5
    low, high = scales.percentile_range(record(heavy), 99.0)  # of each channel
    inside = ((heavy >= 1.07 * low) & (heavy <= 1.07 * high)).mean(axis=0)
    assert (inside > 0.97).all()
    assert high[0] < high[1] < high[2]
    found = scales.per_channel_quantizer(record(heavy))
    assert (found.scale.shape, found.zero_point) == ((3,), 128)
    assert (np.abs(heavy) <= 127.01 * found.scale).all()


def test_mse_minimises_the_error_after_the_affine(heavy: scales.Images) -> None:
    found = scales.symmetric_quantizer(record(heavy), "mse")
    tried = [error(heavy, scales.Quantizer(found.scale * f)) for f in np.geomspace(0.3, 4, 60)]
    assert error(heavy, found) <= 1.02 * min(tried)
    for make in (scales.symmetric_quantizer, scales.unsigned_quantizer):
        clipped, whole = (make(record(heavy), method) for method in ("mse", "minmax"))
        assert error(heavy, clipped) < 0.9 * error(heavy, whole)
    affine = scales.ChannelAffine(np.array([0.1, 0.0, -1.0]), np.array([0.1, 1.0, 2.0]))
    changed = affine.apply(heavy).astype(np.float32)
    found = scales.symmetric_quantizer(record(heavy), "mse", affine)
    direct = scales.symmetric_quantizer(record(changed), "mse")
    assert float(found.scale) == pytest.approx(float(direct.scale), rel=0.1)
    multiplier, offset = affine.multiply_add()
    assert np.allclose(heavy * multiplier + offset, changed, atol=1e-5)


@each("method", ("minmax", "percentile", "mse"))
def test_unsigned_range_contains_zero_and_fits_the_data(heavy: Any, method: scales.Method) -> None:
    values = np.maximum(heavy, -0.17)
    found = scales.unsigned_quantizer(record(values), method)
    low, high = (limit * float(found.scale) for limit in found.limits)
    assert found.limits[0] == -found.zero_point <= 0
    assert low >= values.min() - 2 * float(found.scale)
    assert high <= values.max() + 2 * float(found.scale)
    found = scales.unsigned_quantizer(record(heavy), method, lowest=-0.5)
    assert found.limits[0] * float(found.scale) >= -0.5 - float(found.scale)
    zeros = record(np.zeros((10, 2), np.float32))
    for make in (scales.symmetric_quantizer, scales.unsigned_quantizer):
        assert float(make(zeros, method).scale) == scales.SMALLEST_SCALE


def test_weight_scales_use_all_integers_without_overflow() -> None:
    wanted = np.array([0.0, 0.1, 1.2345, 1e9])
    found = scales.fp16_scales(wanted)
    assert (found.astype(np.float16).astype(np.float32) == found).all()
    assert (found[:3] >= wanted[:3]).all()
    assert (found[0], found[3]) == (scales.SMALLEST_SCALE, scales.FP16_LARGEST)
    weight = np.ones((3, 8, 1, 1), np.float32)
    weight[1, 0] = 7.3
    weight[2] *= -1000
    integers = scales.quantize_weight(weight, scales.weight_scales(weight))
    assert np.abs(integers).reshape(3, -1).max(axis=1).tolist() == [127] * 3
    found = scales.cpu_weight_scales(weight, np.zeros(3), np.array(0.1))
    for one in (weight, weight[:, :, 0, 0]):  # of a convolution, and of a linear layer
        integers = scales.quantize_weight(one, found)
        assert (scales.pair_sums(integers) <= scales.PAIR_LIMIT).all()
        assert (scales.cpu_weight_scales(one, np.zeros(3), np.array(0.1)) == found).all()
    bias = np.array([1e6, 0.0, 0.0])
    wide = scales.cpu_weight_scales(weight, bias, np.array(1e-4))
    assert bias[0] / (wide[0] * 1e-4) <= 2**30 * 1.01
    assert wide[1] == found[1]


# --- scopes ----------------------------------------------------------------------------------


@each(("scope", "count"), [("pointwise", 45), ("all", 76), ("deep", 59), (r"fc1$", 9), ("head", 1)])
def test_scopes_select_layers(digits: Digits, scope: str, count: int) -> None:
    layers = layers_in_scope(digits.network.model, (scope,))
    assert len(layers) == count
    if count > 1:
        kept = fp16.fp32_nodes(digits.graph, ("block4",))
        fewer = layers_in_scope(digits.network.model, (scope,), kept)
        assert fewer == tuple(name for name in layers if not name.startswith("block4"))
    for wrong, message in (
        ("resnet", "'resnet' is none of pointwise, deep, all, and as a regular expression"),
        ("(", r"matches no convolution of this network \(missing"),
        (layers[0], "are kept in higher precision"),
    ):
        with pytest.raises(UsageError, match=message):
            layers_in_scope(digits.network.model, (wrong,), layers[:1])


# --- equalisation and bias correction --------------------------------------------------------


@each("scope", ["pointwise", "all", "block2"])
@each("technique", TECHNIQUES)
def test_equalised_network_is_equivalent(digits: Digits, scope: str, technique: str) -> None:
    layers = layers_in_scope(digits.network.model, (scope,))
    changed = equalize(digits.network, digits.ranges, layers, [technique])
    assert changed.affines or changed.inserted
    found = logits(QuantizationPlan(changed.network), digits.heldout)
    assert sqnr_db(digits.expected, found) > 100


def test_recorded_affines_describe_the_changed_tensors(digits: Digits) -> None:
    changed = equalize(digits.network, digits.ranges, digits.pointwise)
    now = scales.observe_ranges(changed.network, batches(digits.train), [])
    assert {"block1.0.add", "block2.0", "block1.0.attn.spatial_gating_unit"} <= set(changed.affines)
    for tensor, affine in changed.affines.items():
        wanted = affine.apply(digits.ranges[tensor].maximum)
        assert np.allclose(now[tensor].maximum, wanted, atol=2e-3 * np.abs(wanted).max()), tensor
        assert (affine.factor >= 1 / FACTOR_LIMIT).all()
        assert (affine.factor <= FACTOR_LIMIT).all()


def add_skip_gain(network: RebuiltVan) -> None:
    block = network.model.stage_blocks(2)[1]
    block.skip_gain = torch.ones(len(block.attn.proj_2.weight))
    block.skip_gain[::2] = 0.25


def zero_one_channel(network: RebuiltVan) -> None:
    unit = network.model.stage_blocks(1)[0].attn.spatial_gating_unit
    unit.conv_spatial.weight.data[0] = unit.conv1.weight.data[0] = 0.0
    unit.conv1.bias.data[0] = 0.0  # type: ignore[union-attr]


@each("change", [add_skip_gain, zero_one_channel])
def test_unusual_networks_are_equalised_exactly(digits: Digits, change: Any) -> None:
    other = replace(digits.network, model=copy.deepcopy(digits.network.model))
    change(other)
    ranges = scales.observe_ranges(other, batches(digits.train), set(other.tensors))
    pair = [QuantizationPlan(n) for n in (other, equalize(other, ranges, digits.pointwise).network)]
    before, after = (logits(each, digits.train[:8]) for each in pair)
    assert sqnr_db(before, after) > 100


def test_techniques_improve_the_sqnr_and_do_not_change_the_original(
    digits: Digits, plan: QuantizationPlan, plain: QuantizationPlan
) -> None:
    network = digits.network
    before = copy.deepcopy(network.model.state_dict())
    only = equalize(network, digits.ranges, digits.pointwise, ("cross_layer",))
    one = correct_biases(make_plan(only, digits.ranges, digits.pointwise), digits.train)
    none = correct_biases(plain, digits.train)
    found = [sqnr_db(digits.expected, logits(p, digits.heldout)) for p in (plain, none, one, plan)]
    assert all(np.diff(found) > [0, 0.5, 0.5]), found
    after = network.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_sequential_heads_grey_images_and_pointwise_large_kernels_are_quantised() -> None:
    head = ("batchnorm", 16, "relu", 5)
    config = VanConfig(
        (8,) * 4, (1,) * 4, (2,) * 4, num_classes=5, in_chans=1, lka_kernels=(5, 1), head=head
    )
    images = smooth_images(8, 1, 32)
    folded = fold_van(random_van(config), images[:1]).model
    model = onnx_from_van(folded, 32, 1)
    network = van_from_onnx(model, config)
    layers = layers_in_scope(network.model, ("all", "head"))
    assert layers[-2:] == ("head.1", "head.3")
    tensors = histogram_tensors(network, layers, "cpu")
    ranges = scales.observe_ranges(network, [images.numpy()], tensors)
    equalized = equalize(network, ranges, layers, ("cross_layer", "shift"))
    expected = logits(QuantizationPlan(network), images.numpy())
    assert sqnr_db(expected, logits(QuantizationPlan(equalized.network), images.numpy())) > 90
    plan = make_plan(equalized, ranges, layers, target="cpu")
    graph = qdq.qdq_for_cpu(model, plan)
    checker.check_model(graph, full_check=True)
    assert sqnr_db(logits(plan, images.numpy()), run(graph, images.numpy())) > 25
    stem = parts(graph)[0]["patch_embed1.proj.weight.int8"]  # of one channel, yet not depth-wise
    assert scales.pair_sums(stem).max() <= scales.PAIR_LIMIT


# --- graphs ----------------------------------------------------------------------------------


def test_tensorrt_graph_matches_the_plan_and_has_explicit_qdq(
    digits: Digits, plan: QuantizationPlan
) -> None:
    single = qdq.qdq_for_tensorrt(digits.graph, plan, rest="fp32")
    checker.check_model(single, full_check=True)
    assert sqnr_db(logits(plan, digits.heldout), run(single, digits.heldout)) > 45
    graph = qdq.qdq_for_tensorrt(digits.graph, plan, kept=fp16.default_fp32_nodes(digits.graph))
    found = run(graph, digits.heldout)
    assert sqnr_db(digits.expected, found) > 39
    assert comparison.count_lost_labels(digits.expected, found, None) == 0
    (values, makers), counts = parts(graph), operator_counts(graph)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (45, 90)
    for node in graph.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (values[name] for name in node.input[1:])
            assert (str(scale.dtype), scale.shape, str(zero.dtype)) == ("float16", (), "int8")
            assert float(scale) >= scales.SMALLEST_SCALE
            assert int(zero) == 0
        if node.name in plan.layers:
            assert all(makers[n].op_type == "DequantizeLinear" for n in node.input[:2])
            assert values[node.input[2]].dtype == np.float16
    weights = [v for n, v in values.items() if n.endswith("weight.int8")]
    assert [int(np.abs(w.astype(int)).max()) for w in weights] == [127] * 45
    assert not [n for n in values if n not in {i for m in graph.graph.node for i in m.input}]
    some = {"block2.0.mlp.fc2": "FP16 cannot represent its input"}  # nor that of its affine
    values, makers = parts(qdq.qdq_for_tensorrt(digits.graph, plan, kept=some))
    for block, kind in ((0, np.float32), (1, np.float16)):
        names = (f"block2.{block}.mlp.fc2.{one}.by" for one in ("Mul", "Add"))
        assert [values[name].dtype for name in names] == [kind, kind]
    assert makers["block2.0.mlp.fc2.mul"].input[0] == "block2.0.mlp.act.fp32"
    layers = layers_in_scope(digits.network.model, ("all",))  # readers with one scale share a pair
    every = make_plan(QuantizationPlan(digits.network), digits.ranges, layers)
    counts = operator_counts(qdq.qdq_for_tensorrt(digits.graph, every, rest="fp32"))
    assert counts["QuantizeLinear"] == len({digits.network.reads[n] for n in layers})


def test_inserted_nodes_add_no_kernel(
    digits: Digits, plan: QuantizationPlan, plain: QuantizationPlan
) -> None:
    """Number of kernels of one block in an Ada plan of TensorRT for RTX."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    kept = fp16.default_fp32_nodes(digits.graph)
    graphs = [qdq.qdq_for_tensorrt(digits.graph, made, kept=kept) for made in (plain, plan)]
    half = fp16.fp16_from_fp32(digits.graph, kept)
    before, added, half_count = (count_kernels(graph)["block2.0"] for graph in (*graphs, half))
    assert len(graphs[1].graph.node) > len(graphs[0].graph.node)
    assert before == added > half_count


def test_integer_kernels_match_the_qdq_graph_for_a_cpu(
    digits: Digits, cpu_plan: QuantizationPlan
) -> None:
    """Fused kernels match separate Q/DQ nodes and FP32, with or without VNNI."""
    graph = qdq.qdq_for_cpu(digits.graph, cpu_plan)
    checker.check_model(graph, full_check=True)
    fused = run(graph, digits.heldout, fuse=True)
    for reference in (run(graph, digits.heldout), digits.expected):
        assert sqnr_db(reference, fused) > 36
    assert sqnr_db(digits.expected, logits(cpu_plan, digits.heldout)) > 36
    values, makers = parts(graph)
    readers = {i: n for n in graph.graph.node for i in n.input}
    assert len([n for n in cpu_plan.layers if n.endswith("spatial_gating_unit")]) == 7
    unit = "block2.0.attn.spatial_gating_unit"  # is not quantised without its convolution
    assert cpu_plan.layers.keys() - cpu_plan.without([f"{unit}.conv1"]).layers.keys() == {
        *(unit, f"{unit}.conv1")
    }
    for node in graph.graph.node:
        if node.name in cpu_plan.layers:
            assert all(makers[n].op_type == "DequantizeLinear" for n in node.input)
            assert readers[node.output[0]].op_type == "QuantizeLinear"
    for name, value in values.items():
        if name.endswith("weight.int8") and value.shape[1] > 1:  # not depth-wise
            assert scales.pair_sums(value).max() <= scales.PAIR_LIMIT
        assert not name.endswith("bias.int32") or np.abs(value.astype(float)).max() < 2**31
    for name in ("patch_embed2.proj", "block2.0.attn.proj_2", "block2.0.mlp.fc2"):
        assert makers[name].op_type == "Mul"
        assert values[f"{name}.units"].shape[1] > 1


# --- the search for a budget -----------------------------------------------------------------


@each(
    ("needed", "limit", "passed", "kept"),
    [
        *((needed, 16, True, needed) for needed in (0, 1, 2, 3, 7, 20, 45)),
        *((99, 16, False, 45), (30, 4, False, 4), (5, 6, True, 6)),  # the best that was seen
    ],
)
def test_search_keeps_the_fewest_layers_that_meet_the_budget(
    plain: QuantizationPlan, needed: int, limit: int, passed: bool, kept: int
) -> None:
    ranking = [int8.LayerSensitivity(k, 30.0 + n, 0.01) for n, k in enumerate(plain.layers)]

    def lost(candidate: QuantizationPlan) -> int:
        """Pass without the first ``needed`` layers."""
        removed = len(plain.layers) - len(candidate.layers)
        return 2 * (needed - removed) + 1 if removed < needed else 1

    report = int8.search_fp16_layers(plain, ranking, lost, 0.2, 500, limit=limit)
    assert report["passed"] == passed
    assert list(report["excluded"]) == [layer.name for layer in ranking[:kept]]
    assert report["share"] == pytest.approx(0.01 * (45 - kept))
    assert len(report["trials"]) <= min(limit, 13)


def test_layers_are_ranked_by_noise_per_multiply_add(
    digits: Digits, plain: QuantizationPlan
) -> None:
    work = multiply_adds(digits.network.model, 64)
    assert work["patch_embed1.proj"] == 7 * 7 * 3 * 16 * 16 * 16
    assert work["head"] == 64 * 10
    ranking = int8.rank_layers(plain, digits.train[:4], work)
    assert {layer.name for layer in ranking} == set(plain.convolutions)
    order = [layer.ranking_db for layer in ranking]
    assert order == sorted(order)
    assert all(20 < layer.sqnr_db < 90 for layer in ranking)
    assert sum(layer.share for layer in ranking) == pytest.approx(0.57, abs=0.01)


@each("task", [Task.BINARY, Task.MULTI_LABEL, Task.REGRESSION])
def test_comparison_has_only_the_figures_of_the_task(digits: Digits, task: Task) -> None:
    graph, is_binary = copy.deepcopy(digits.graph), task is Task.BINARY
    for tensor in graph.graph.initializer:
        if is_binary and tensor.name.startswith("head."):
            values = numpy_helper.to_array(tensor)[:1]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    if is_binary:
        graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    items = tuple(
        ImageItem(str(n), image, "", n % 2 if is_binary else None)
        for n, image in enumerate(digits.heldout)
    )
    images, preprocessing = ImageSet(items, "digits"), digits.loaded.preprocessing
    sets = ImageSets(images, images, images, True, preprocessing, Stopwatch())
    noisy = scaled(graph, {"head.bias": -1.0, "head.weight": 0.99})
    graphs = {"fp32": graph, "int8": noisy}
    candidates = [comparison.Candidate(name, name, model) for name, model in graphs.items()]
    layout = OutputLayout(task=task)
    _, row = comparison.compare_precisions(candidates, sets, QuantizeSettings(threads=1), layout)
    before, after = (run(one, digits.heldout) >= 0 for one in (graph, noisy))
    same = float((before == after).all(axis=1).mean())
    correct = int((after[:, 0] == np.arange(len(after)) % 2).sum())
    has_labels = task is not Task.REGRESSION
    found = (row["kl"], row["agreement"], row["correct"])
    assert found == (None, same if has_labels else None, correct if is_binary else None)
    messages = " ".join((*row["failures"], *row["inconclusive"]))
    assert ("lost on 48 images" in messages) == has_labels


def test_undecided_candidates_are_not_recommended() -> None:
    fast: dict[str, Any] = {"name": "int8", "passed": True, "inconclusive": ("few images",)}
    fast |= {"ms_per_image": 1.0, "size_bytes": 1}
    slow = {**fast, "name": "int8 all", "inconclusive": (), "ms_per_image": 2.0}
    fp32 = {**slow, "name": "fp32", "passed": None, "ms_per_image": 3.0}
    every = (fp32, slow, fast, {**fast, "passed": False})
    assert [comparison.gate_rank(row) for row in every] == [0, 0, 1, 2]
    assert comparison.recommend([fp32, fast, slow], fast) == (None, "INT8 is undecided")
    assert comparison.recommend([fp32, fast, slow], slow)[0] == "int8 all"


def test_improvements_do_not_offset_regressions_and_too_small_budgets_are_rejected() -> None:
    expected, after = (np.eye(3, dtype=np.float32)[rows] for rows in ([0, 1, 2, 0], [0, 2, 1, 1]))
    assert comparison.count_lost_labels(expected, after, np.array([0, 1, 1, 1])) == 1
    assert comparison.count_lost_labels(expected, after, None) == 3
    int8.require_resolution(0.2, 500, 625)
    int8.require_resolution(0.0, 10, 10)
    with pytest.raises(ImageError, match=r"one label is 0.24 points") as caught:
        int8.require_resolution(0.2, 410, 512)
    assert "with count = 625 and as many images" in caught.value.remedy
