"""FP16 and BF16 graphs: types, BF16 emulation, nodes kept in FP32, and the FP16 audit."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, checker, numpy_helper

from tests.each import each
from tests.precision.conftest import Digits, batches, run
from van_deploy.checks.graphs import quiet_session, run_taps, with_taps
from van_deploy.errors import GateFailed, UsageError
from van_deploy.graph.bfloat16 import emulate_bf16
from van_deploy.graph.export import onnx_from_van, van_from_onnx
from van_deploy.graph.files import operator_counts
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import sqnr_db
from van_deploy.precision import fp16
from van_deploy.precision.scales import observe_ranges

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
GATE = "block2.0.attn.spatial_gating_unit"


def scaled(model: ModelProto, factors: Mapping[str, float]) -> ModelProto:
    """Return the graph with some initialisers multiplied."""
    changed = copy.deepcopy(model)
    for tensor in changed.graph.initializer:
        if tensor.name in factors:
            values = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return changed


@each(
    ("make", "kind", "keep", "casts"),
    [
        (fp16.fp16_from_fp32, FLOAT16, fp16.DEFAULT_KEEP, 8),
        (fp16.fp16_from_fp32, FLOAT16, (), 2),
        (fp16.fp16_from_fp32, FLOAT16, ("block2", *fp16.DEFAULT_KEEP), 8),
        # Eight Casts: four norms in and out, less the images.
        (fp16.bf16_from_fp32, BFLOAT16, fp16.DEFAULT_KEEP, 8),
    ],
)
def test_16_bit_graphs_have_explicit_types_and_match_fp32(
    digits: Digits, make: Callable[..., ModelProto], kind: int, keep: tuple[str, ...], casts: int
) -> None:
    kept = fp16.fp32_nodes(digits.graph, keep)
    half = make(digits.graph, kept)
    checker.check_model(half, full_check=True)
    assert operator_counts(half)["Cast"] == casts
    edges = [*half.graph.input, *half.graph.output]
    assert {e.type.tensor_type.elem_type for e in edges} == {FLOAT}
    assert half.graph.output[0].name == "logits"
    stored = {t.name: t.data_type for t in half.graph.initializer}
    for node in digits.graph.graph.node:
        weights = [stored[n] for n in node.input if stored.get(n) in {FLOAT, FLOAT16, BFLOAT16}]
        assert all(found == (FLOAT if node.name in kept else kind) for found in weights)
    assert sqnr_db(digits.expected, run(half, digits.heldout)) > (60 if kind == FLOAT16 else 50)


def test_weight_used_in_both_types_is_stored_twice(digits: Digits) -> None:
    shared = copy.deepcopy(digits.graph)
    nodes = {node.name: node for node in shared.graph.node}
    first, second = (nodes[f"block1.{block}.attn.proj_1"] for block in (0, 1))
    second.input[1] = first.input[1]
    half = fp16.fp16_from_fp32(shared, {second.name})
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    assert (kinds[first.input[1]], kinds[f"{first.input[1]}.fp16"]) == (FLOAT, FLOAT16)
    checker.check_model(half, full_check=True)


# --- BF16 ------------------------------------------------------------------------------------


def test_bf16_emulation_rounds_every_bf16_result_only(digits: Digits) -> None:
    half = fp16.bf16_from_fp32(digits.graph, fp16.fp32_nodes(digits.graph, fp16.DEFAULT_KEEP))
    emulation = emulate_bf16(half)
    checker.check_model(emulation, full_check=True)
    found, given = Counter(operator_counts(emulation)), Counter(operator_counts(half))
    assert set(found - given) == {"Cast"}
    assert not given - found
    names = ["block1.0.attn.proj_1", GATE, "block3.0"]
    session = quiet_session(with_taps(half, [*names, "norm4.layernormalization"]))
    for name, values in run_taps(session, {"images": digits.heldout[:2]}):
        # A BF16 number is the upper half of an FP32 one.
        assert (values.astype(np.float32).view(np.uint32) & 0xFFFF).any() == (name not in names)


@pytest.mark.slow
@each("opset", [18, 23])
def test_bf16_upgrades_the_opset(digits: Digits, opset: int) -> None:
    folded = fold_van(digits.loaded.model, torch.from_numpy(digits.heldout[:1])).model
    graph = onnx_from_van(folded, 64, opset=opset)
    half = fp16.bf16_from_fp32(graph, fp16.fp32_nodes(graph, fp16.DEFAULT_KEEP))
    checker.check_model(half, full_check=True)
    assert half.opset_import[0].version == max(opset, 22)
    assert sqnr_db(run(graph, digits.heldout[:2]), run(half, digits.heldout[:2])) > 45


# --- what stays FP32 -------------------------------------------------------------------------


def test_fp32_nodes_match_modules_or_regular_expressions(digits: Digits) -> None:
    kept = fp16.fp32_nodes(digits.graph, ("block2.0", "norm1"))
    assert {name.split(".")[0] for name in kept} == {"block2", "norm1"}
    assert "block2.0" in kept
    assert kept["block2.0.mlp.fc1"] == "'block2.0' is kept"
    assert "block2.1.mlp.fc1" not in kept
    found = fp16.fp32_nodes(digits.graph, (r"block1\.\d\.mlp\.fc1",))
    assert set(found) == {"block1.0.mlp.fc1", "block1.1.mlp.fc1"}
    for keep, message in (("block9", "'block9' matches no"), ("(", "not a valid regular")):
        with pytest.raises(UsageError, match=message):
            fp16.fp32_nodes(digits.graph, (keep,))


def test_audit_keeps_weights_that_fp16_rounds_to_zero(digits: Digits) -> None:
    audit = fp16.audit_ranges(digits.graph, digits.ranges, (), strict=True)
    assert (audit["problems"], audit["fp32_nodes"], audit["advice"]) == ([], {}, "")
    tiny = scaled(digits.graph, {"block1.0.mlp.fc2.weight": 1e-9})
    vanishing = fp16.audit_ranges(tiny, digits.ranges, ())["fp32_nodes"]
    assert set(vanishing) == {"block1.0.mlp.fc2"}
    assert "which FP16 rounds to zero" in vanishing["block1.0.mlp.fc2"]


def test_audit_keeps_overflowing_nodes_and_recommends_bf16(digits: Digits) -> None:
    factors = {f"{GATE}.conv0.weight": 2.0**15, f"{GATE}.conv0.bias": 2.0**15}
    loud = scaled(digits.graph, {**factors, f"{GATE}.conv_spatial.weight": 2.0**-15})
    ranges = observe_ranges(van_from_onnx(loud, digits.loaded.config), batches(digits.train), ())
    audit = fp16.audit_ranges(loud, ranges, ())
    kept = audit["fp32_nodes"]
    assert set(kept) == {f"{GATE}.conv0", f"{GATE}.conv_spatial"}
    assert "beyond half of FP16's 65504" in kept[f"{GATE}.conv0"]
    assert "--precision bf16" in audit["advice"]
    with pytest.raises(GateFailed, match=r"FP16 cannot represent every tensor: 'block2\.0\.attn"):
        fp16.audit_ranges(loud, ranges, (), strict=True)
    assert fp16.audit_ranges(loud, ranges, kept)["problems"] == []
    images = digits.train[:8]
    half = fp16.bf16_from_fp32(loud, fp16.fp32_nodes(loud, fp16.DEFAULT_KEEP))
    for graph in (fp16.fp16_from_fp32(loud, kept), half):
        assert sqnr_db(run(loud, images), run(graph, images)) > 45


def test_audit_covers_tensors_that_no_module_computes(digits: Digits) -> None:
    network = replace(digits.network, model=copy.deepcopy(digits.network.model))
    last = network.model.stage_blocks(2)[-1]
    last.skip_gain = torch.full((len(last.mlp.fc2.weight),), -1e5)
    graph = onnx_from_van(network.model, 64)
    ranges = observe_ranges(network, batches(digits.train), ())
    read = ranges["block2.0"]
    assert ranges["block2.1.mul"].maximum == pytest.approx(-1e5 * read.minimum)
    assert ranges["block2.1.mul"].minimum == pytest.approx(-1e5 * read.maximum)
    kept = fp16.audit_ranges(graph, ranges, ())["fp32_nodes"]
    assert {"block2.1.mul", "norm2.transpose", "norm2.layernormalization"} <= set(kept)
