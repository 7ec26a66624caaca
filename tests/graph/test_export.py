"""The exported graph: its size, its names, its dynamic batch, every opset, and its file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from torch import Tensor

from tests.each import each
from van_deploy.errors import ConversionError, InputError
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.files import (
    describe_onnx,
    graph_facts,
    operator_counts,
    save_onnx,
    simplify_onnx,
)
from van_deploy.graph.fold import RewrittenVan, fold_van
from van_deploy.manifest import TensorFacts
from van_deploy.metrics import compare
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig
from van_deploy.runners.onnxruntime import (
    OnnxRuntimeRunner,
    onnxruntime_logits,
    onnxruntime_outputs,
)

DEPTHS = {name: variant.config.depths for name, variant in VARIANTS.items()}


@pytest.mark.parametrize(
    "depths",
    [
        DEPTHS["van_b1"],
        DEPTHS["van_b2"],
        (1, 1, 2, 1),
        *(
            pytest.param(depths, marks=pytest.mark.slow)
            for name, depths in DEPTHS.items()
            if name not in {"van_b1", "van_b2"}
        ),
    ],
    ids=str,
)
def test_golden_operator_counts(depths: tuple[int, int, int, int]) -> None:
    # The counts follow from the depths alone, so narrow networks show them.
    config = VanConfig((8, 8, 8, 8), depths, (1, 1, 1, 1), num_classes=3)
    rewritten = fold_van(VAN(config).eval(), torch.rand(1, 3, 32, 32)).model
    counts, blocks = operator_counts(onnx_from_van(rewritten, 32)), config.blocks
    assert counts == {
        "Conv": 8 * blocks + 4,
        "Gelu": 2 * blocks,
        "Add": 2 * blocks,
        "Mul": blocks,
        "Transpose": 7,
        "LayerNormalization": 4,
        "ReduceMean": 1,
        "Gemm": 1,
    }
    assert sum(counts.values()) == 13 * blocks + 17


@pytest.mark.parametrize(
    "opset",
    [
        opset if opset in {17, 20, 23} else pytest.param(opset, marks=pytest.mark.slow)
        for opset in range(17, 24)
    ],
)
def test_every_opset_is_the_one_asked_for_and_answers_alike(
    digits: LoadedVan, digit_images: Tensor, folded: RewrittenVan, opset: int
) -> None:
    model = onnx_from_van(folded, digits.preprocessing.image_size, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [opset]
    with torch.no_grad():
        expected = digits.model(digit_images).numpy()
    for batch in (1, 3, 5):
        actual = onnxruntime_logits(model, digit_images[:batch].numpy())
        assert compare(expected[:batch], actual).relative < 1e-5


def test_an_exporter_that_fails_is_one_error(
    folded: RewrittenVan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ConversionError, match=r"failed at opset 20: no such operator"):
        onnx_from_van(folded, 64)


def test_every_value_is_named_after_the_module_that_made_it(
    digits: LoadedVan, graph: onnx.ModelProto
) -> None:
    modules = {name for name, _ in digits.model.named_modules()}
    made = [node.output[0] for node in graph.graph.node if node.output[0] != "logits"]
    assert len(made) == len(set(made))
    assert not [n for n in made if not {n, n.rpartition(".")[0]} & modules]
    gate = "block3.1.attn.spatial_gating_unit"
    known = {"block3.1.attn.proj_1", gate, f"{gate}.conv_spatial", "block3.1.mlp.fc2", "norm4"}
    assert known <= set(made)
    parameters = {t.name for t in graph.graph.initializer if not t.name.startswith("constant")}
    assert parameters <= set(digits.model.state_dict())
    text = graph.SerializeToString()  # which names no path of the machine it was made on
    assert b".py" not in text
    assert b"site-packages" not in text


def test_the_batch_is_dynamic_and_nothing_else_is(
    digits: LoadedVan, graph: onnx.ModelProto
) -> None:
    facts, sides = graph_facts(graph), digits.preprocessing.sides
    assert facts.inputs == {"images": TensorFacts(dtype="float32", shape=("batch", 3, *sides))}
    assert facts.outputs == {"logits": TensorFacts(dtype="float32", shape=("batch", 10))}


# --- simplification --------------------------------------------------------------------------


def test_the_unfolded_network_loses_nodes_to_simplification(
    digits: LoadedVan, digit_images: Tensor, unfolded: onnx.ModelProto
) -> None:
    assert operator_counts(unfolded)["BatchNormalization"] == 2 * digits.config.blocks
    model, facts = simplify_onnx(unfolded, digit_images.numpy(), onnxruntime_outputs)
    assert (facts["changed"], facts["reason"]) == (True, "simplified")
    assert facts["nodes_before"] == len(unfolded.graph.node)
    assert facts["nodes_after"] == len(model.graph.node)
    assert sum(facts["removed"].values()) == facts["nodes_before"] - facts["nodes_after"] > 0
    assert facts["relative_error"] < 1e-5


def test_a_simplified_graph_that_answers_differently_is_not_kept(
    digit_images: Tensor, unfolded: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onnxsim.simplify

    def breaks(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
        simplified, _ = real(model)
        bias = next(t for t in simplified.graph.initializer if t.name == "head.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        return simplified, True  # it says all is well

    def crashes(_: onnx.ModelProto) -> None:
        raise RuntimeError("bad node")

    for simplify, reason in (
        (breaks, "kept as exported: the simplified graph differs by"),
        (crashes, "kept as exported: onnxsim failed, or what it made does not run (bad node)"),
    ):
        monkeypatch.setattr(onnxsim, "simplify", simplify)
        model, facts = simplify_onnx(unfolded, digit_images.numpy(), onnxruntime_outputs)
        assert model is unfolded
        assert not facts["changed"]
        assert facts["reason"].startswith(reason)


# --- files -----------------------------------------------------------------------------------


def test_large_weights_go_into_a_file_of_their_own(
    graph: onnx.ModelProto, digit_images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    expected = onnxruntime_logits(graph, digit_images.numpy())
    assert save_onnx(copy.deepcopy(graph), path, external_limit_bytes=1000) == [
        *("model.onnx", "model.onnx.data")
    ]
    description = describe_onnx(path)
    assert description.external_files == ("model.onnx.data",)
    assert description.bytes < 200_000 < path.with_name("model.onnx.data").stat().st_size
    with OnnxRuntimeRunner(path) as runner:
        assert np.array_equal(runner.run(digit_images.numpy()), expected)


def small() -> onnx.ModelProto:
    value, result = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3])
        for name in "xy"
    )
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    node = onnx.helper.make_node("Mul", ["x", "w"], ["y"], "scale")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [result], [weight]))
    model.metadata_props.add(key="a", value="text")
    return model


def unknown_type(data: bytes) -> bytes:
    model = onnx.ModelProto.FromString(data)
    model.graph.initializer[0].data_type = 36
    return model.SerializeToString()


def no_opset(data: bytes) -> bytes:
    model = onnx.ModelProto.FromString(data)
    model.opset_import[0].domain = "other"
    return model.SerializeToString()


@each(
    "spoil",
    [unknown_type, no_opset, lambda data: data.replace(b"text", b"te\xffx"), lambda data: b""],
)
def test_a_damaged_file_is_one_message(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(small(), path)
    assert describe_onnx(path).metadata == {"a": "text"}
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"m\.onnx' is not an ONNX file, or is damaged"):
        describe_onnx(path)
