"""The exported graph: operators, names, dynamic batch, opsets, simplification and files."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from onnx import TensorProto, helper

from tests.each import each
from tests.graph.conftest import Exported
from van_deploy.errors import ConversionError, InputError
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.files import describe_onnx, operator_counts, save_onnx, simplify_onnx
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import compare
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner, onnxruntime_outputs


def slow_but(fast: set[Any], values: Mapping[Any, Any]) -> list[Any]:
    """Return the parameters, by name; all but a few are slow."""
    slow = pytest.mark.slow
    return [pytest.param(v, id=str(k), marks=() if k in fast else slow) for k, v in values.items()]


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("no such operator")


@pytest.mark.parametrize(
    "depths", slow_but({"van_b1", "van_b2"}, {k: v.config.depths for k, v in VARIANTS.items()})
)
def test_golden_operator_counts(depths: tuple[int, int, int, int]) -> None:
    # The counts follow from the depths alone, so narrow networks show them.
    config = VanConfig((8, 8, 8, 8), depths, (1, 1, 1, 1), num_classes=3)
    rewritten = fold_van(VAN(config).eval(), torch.rand(1, 3, 32, 32)).model
    counts, blocks = operator_counts(onnx_from_van(rewritten, 32)), sum(config.depths)
    expected = {"Transpose": 7, "LayerNormalization": 4, "ReduceMean": 1, "Gemm": 1}
    expected |= {"Conv": 8 * blocks + 4, "Gelu": 2 * blocks, "Add": 2 * blocks, "Mul": blocks}
    assert counts == expected


@pytest.mark.parametrize("opset", slow_but({17, 20, 23}, {n: n for n in range(17, 24)}))
def test_every_opset_gives_the_same_outputs(digits: Exported, opset: int) -> None:
    model = onnx_from_van(digits.folded, digits.loaded.preprocessing.image_size, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [opset]
    expected = digits.loaded.model(digits.images).detach().numpy()
    for batch in (1, 3, 5):
        actual = onnxruntime_outputs(model, digits.images[:batch].numpy())["logits"]
        assert compare(expected[:batch], actual).relative < 1e-5


def test_values_are_named_after_their_modules(digits: Exported) -> None:
    graph, model = digits.graph.graph, digits.loaded.model
    modules = {name for name, _ in model.named_modules()}
    made = [node.output[0] for node in graph.node if node.output[0] != "logits"]
    assert len(made) == len(set(made))
    assert not [n for n in made if not {n, n.rpartition(".")[0]} & modules]
    gate = "block3.1.attn.spatial_gating_unit"
    assert {gate, f"{gate}.conv_spatial", "block3.1.mlp.fc2", "norm4"} <= set(made)
    parameters = {t.name for t in graph.initializer if not t.name.startswith("constant")}
    assert parameters <= set(model.state_dict()) - {f"{gate}.conv_spatial.bias"}
    assert b".py" not in digits.graph.SerializeToString()  # no path of this machine


# --- simplification --------------------------------------------------------------------------


def test_simplification_removes_nodes_of_the_unfolded_network_or_is_not_used(
    digits: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digits.unfolded
    assert operator_counts(before)["BatchNormalization"] == 2 * sum(digits.loaded.config.depths)
    model, facts = simplify_onnx(before, digits.images.numpy(), onnxruntime_outputs)
    assert (facts["changed"], facts["reason"]) == (True, "simplified")
    removed = len(before.graph.node) - len(model.graph.node)
    assert sum(facts["removed"].values()) == facts["nodes_before"] - facts["nodes_after"] == removed
    assert removed > 0
    real = onnxsim.simplify

    def breaks(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
        simplified, _ = real(model)
        bias = next(t for t in simplified.graph.initializer if t.name == "head.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        return simplified, True  # it says all is well

    for simplify, reason in (
        (breaks, "kept as exported: the simplified graph differs by"),
        (fails, "kept as exported: onnxsim failed, or its result does not run (no such opera"),
    ):
        monkeypatch.setattr(onnxsim, "simplify", simplify)
        model, facts = simplify_onnx(before, digits.images.numpy(), onnxruntime_outputs)
        assert model is before
        assert facts["reason"].startswith(reason)
    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ConversionError, match="failed at opset 20: no such operator"):
        onnx_from_van(digits.folded, 64)


# --- files -----------------------------------------------------------------------------------


def test_large_weights_are_saved_as_external_data(digits: Exported, tmp_path: Path) -> None:
    path, images = tmp_path / "model.onnx", digits.images.numpy()
    expected = onnxruntime_outputs(digits.graph, images)["logits"]
    files = save_onnx(copy.deepcopy(digits.graph), path, external_limit_bytes=1000)
    assert files == ["model.onnx", "model.onnx.data"]
    description = describe_onnx(path)
    assert description.external_files == ("model.onnx.data",)
    assert description.weights["float"].bytes == 4 * description.weights["float"].values
    assert description.bytes < 200_000 < path.with_name("model.onnx.data").stat().st_size
    with OnnxRuntimeRunner(path) as runner:
        assert np.array_equal(runner.run(images), expected)


def test_weights_in_typed_fields_and_dimensions_without_a_name(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 3]) for n in "xy")
    kinds = {TensorProto.FLOAT: 12, TensorProto.FLOAT16: 6, TensorProto.INT4: 2}
    weights = [helper.make_tensor(str(kind), kind, [3], [1, 2, 3]) for kind in kinds]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y], weights)
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    description = describe_onnx(tmp_path / "m.onnx")
    assert [one.bytes for one in description.weights.values()] == list(kinds.values())
    assert description.graph.inputs["x"].shape == ("?", 3)


@each(
    "spoil",
    [
        lambda model: setattr(model.graph.initializer[0], "data_type", 36),
        lambda model: setattr(model.opset_import[0], "domain", "other"),
        lambda model: model.graph.output[0].type.tensor_type.shape.Clear(),
        lambda model: model.Clear(),
        lambda model: model.metadata_props.add(key="b", value="not UTF-8"),
    ],
)
def test_damaged_files_are_rejected(
    digits: Exported, tmp_path: Path, spoil: Callable[[onnx.ModelProto], object]
) -> None:
    path, model = tmp_path / "m.onnx", copy.deepcopy(digits.graph)
    model.metadata_props.add(key="a", value='{"b": 1}')
    onnx.save(model, path)
    assert describe_onnx(path).metadata == {"a": {"b": 1}}
    spoil(model)
    path.write_bytes(model.SerializeToString().replace(b"not UTF-8", b"\xff" * 9))
    with pytest.raises(InputError, match=r"m\.onnx' is not the ONNX file of a network"):
        describe_onnx(path)
