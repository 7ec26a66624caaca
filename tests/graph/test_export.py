"""The exported graph: its size, its names, its free batch, and every opset."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from van_deploy.errors import ConversionError, UsageError
from van_deploy.graph.export import INPUT_NAME, OPSETS, OUTPUT_NAME, onnx_from_van
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.graph.fold import fold_van
from van_deploy.graph.inspect import describe_onnx
from van_deploy.graph.rewritten import RewrittenVan
from van_deploy.graph.simplify import operator_counts, simplify_onnx
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

FORBIDDEN = {"BatchNormalization", "Reshape", "Shape", "Gather", "Concat", "Unsqueeze", "Cast"}


@pytest.fixture(scope="session")
def folded(digits: LoadedVan, digit_images: Tensor) -> RewrittenVan:
    return fold_van(digits.model, digit_images[:1]).model


@pytest.fixture(scope="session")
def graph(digits: LoadedVan, folded: RewrittenVan) -> onnx.ModelProto:
    return onnx_from_van(folded, digits.preprocessing.image_size)


@pytest.mark.parametrize(
    "depths",
    [
        VARIANTS["van_b1"].config.depths,
        VARIANTS["van_b2"].config.depths,
        (1, 1, 2, 1),
        *(
            pytest.param(VARIANTS[name].config.depths, marks=pytest.mark.slow)
            for name in VARIANTS
            if name not in {"van_b1", "van_b2"}
        ),
    ],
    ids=str,
)
def test_golden_operator_counts(depths: tuple[int, int, int, int]) -> None:
    # The counts follow from the depths alone, so narrow networks show them.
    config = VanConfig((8, 8, 8, 8), depths, (1, 1, 1, 1), num_classes=3)
    model = VAN(config).eval()
    rewritten = fold_van(model, torch.rand(1, 3, 32, 32)).model
    counts = operator_counts(onnx_from_van(rewritten, 32))
    blocks = config.blocks
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
    assert not FORBIDDEN & set(counts)


@pytest.mark.parametrize(
    "opset",
    [
        opset if opset in {17, 20, 23} else pytest.param(opset, marks=pytest.mark.slow)
        for opset in OPSETS
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


def test_an_unknown_opset_is_refused(folded: RewrittenVan) -> None:
    with pytest.raises(UsageError) as caught:
        onnx_from_van(folded, 64, opset=12)
    assert str(caught.value) == (
        "Opset 12 is not supported.\nChoose one from 17 to 23; the default is 20."
    )


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
    made = [node.output[0] for node in graph.graph.node if node.output[0] != OUTPUT_NAME]
    assert len(made) == len(set(made))
    for name in made:
        assert name in modules or name.rpartition(".")[0] in modules, name
    gate = "block3.1.attn.spatial_gating_unit"
    assert {"block3.1.attn.proj_1", gate, f"{gate}.conv_spatial", "block3.1.mlp.fc2", "norm4"} <= {
        *made
    }
    parameters = {t.name for t in graph.graph.initializer if not t.name.startswith("constant")}
    assert parameters <= set(digits.model.state_dict())


def test_the_batch_is_free_and_nothing_else_is(digits: LoadedVan, graph: onnx.ModelProto) -> None:
    facts = graph_facts(graph)
    images = TensorFacts(dtype="float32", shape=("batch", 3, *digits.preprocessing.sides))
    assert facts.inputs == {INPUT_NAME: images}
    assert facts.outputs == {OUTPUT_NAME: TensorFacts(dtype="float32", shape=("batch", 10))}


def test_the_file_names_no_path_of_this_machine(graph: onnx.ModelProto) -> None:
    text = graph.SerializeToString()
    assert b".py" not in text
    assert b"site-packages" not in text


@pytest.fixture(scope="module")
def unfolded(digits: LoadedVan) -> onnx.ModelProto:
    return onnx_from_van(digits.model, digits.preprocessing.image_size)


def test_the_unfolded_network_exports_and_loses_nodes_to_simplification(
    digits: LoadedVan, digit_images: Tensor, unfolded: onnx.ModelProto
) -> None:
    assert operator_counts(unfolded)["BatchNormalization"] == 2 * digits.config.blocks
    report = simplify_onnx(unfolded, digit_images.numpy(), onnxruntime_outputs)
    assert report.changed
    assert sum(report.removed.values()) == sum(report.before.values()) - sum(report.after.values())
    assert report.relative_error is not None
    assert report.relative_error < 1e-5


def test_a_simplified_graph_that_answers_differently_is_not_kept(
    digit_images: Tensor, unfolded: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxsim

    real = onnxsim.simplify

    def breaks(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
        simplified, _ = real(model)
        bias = next(t for t in simplified.graph.initializer if t.name == "head.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        return simplified, True  # it says all is well

    monkeypatch.setattr(onnxsim, "simplify", breaks)
    report = simplify_onnx(unfolded, digit_images.numpy(), onnxruntime_outputs)
    assert not report.changed
    assert report.model is unfolded
    assert report.reason.startswith("kept as exported: the simplified graph differs by")


def test_a_simplifier_that_crashes_is_survived(
    graph: onnx.ModelProto, digit_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashes(_: onnx.ModelProto) -> None:
        raise RuntimeError("bad node")

    monkeypatch.setattr("onnxsim.simplify", crashes)
    report = simplify_onnx(graph, digit_images.numpy(), onnxruntime_outputs)
    assert report.model is graph
    assert report.reason == "kept as exported: onnxsim failed (bad node)"


def test_large_weights_go_into_a_file_of_their_own(
    graph: onnx.ModelProto, digit_images: Tensor, tmp_path: object
) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "model.onnx"
    expected = onnxruntime_logits(graph, digit_images.numpy())
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    assert save_onnx(copy, path, external_limit_bytes=1000) == ["model.onnx", "model.onnx.data"]
    description = describe_onnx(path)
    assert description.external_files == ("model.onnx.data",)
    assert description.bytes < 200_000 < path.with_name("model.onnx.data").stat().st_size
    with OnnxRuntimeRunner(path) as runner:
        assert np.array_equal(runner.run(digit_images.numpy()), expected)
