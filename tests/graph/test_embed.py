"""Preprocessing inside the graph: the same bits into the network, borders included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import nn

from benchmarks.ablation import plan_kernels
from tests.each import each
from van_deploy.errors import ConversionError
from van_deploy.graph.embed import embed_preprocessing
from van_deploy.graph.export import onnx_from_van
from van_deploy.metrics import Task, probabilities
from van_deploy.model.pixels import normalised
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

ort = pytest.importorskip("onnxruntime")

PREPROCESSING = Preprocessing(
    32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, "test"
)
ALL = ("logits", "probabilities", "top5")
NAMES = {"top5": ("top5_classes", "top5_probabilities")}


@pytest.fixture(scope="module")
def plain() -> onnx.ModelProto:
    """Return a tiny network with trained-looking statistics."""
    torch.manual_seed(0)
    config = VanConfig(
        embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2), num_classes=7
    )
    model = VAN(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return onnx_from_van(model, 32)


@pytest.fixture(scope="module")
def embedded(plain: onnx.ModelProto) -> onnx.ModelProto:
    return embed_preprocessing(plain, PREPROCESSING, "uint8")


def pixels(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def run(model: onnx.ModelProto, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: values}), strict=True))


def part(model: onnx.ModelProto, first: str, last: str) -> onnx.ModelProto:
    return onnx.utils.Extractor(model).extract_model([first], [last])


def test_bytes_or_floats_in_the_same_logits_out(
    plain: onnx.ModelProto, embedded: onnx.ModelProto
) -> None:
    values = pixels(5)
    expected = run(plain, normalised(values, PREPROCESSING))["logits"]
    for batch in (1, 2, 5):
        found = run(embedded, values[:batch])["logits"]
        np.testing.assert_allclose(found, expected[:batch], atol=1e-6 * np.abs(expected).max())
    unit = values.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    floats = embed_preprocessing(plain, PREPROCESSING, "normalize")
    np.testing.assert_allclose(run(floats, unit)["logits"], expected, rtol=1e-5, atol=1e-6)


def test_the_network_is_given_the_very_bits_of_the_file_pipeline(embedded: onnx.ModelProto) -> None:
    head = part(embedded, "pixels", "images")
    every = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    for values in (pixels(3), every, np.zeros_like(every), np.full_like(every, 255)):
        assert np.array_equal(run(head, values)["images"], normalised(values, PREPROCESSING))


@each("value", [0, 124, 255])
def test_borders_are_exact(plain: onnx.ModelProto, embedded: onnx.ModelProto, value: int) -> None:
    """A flat image: whatever the padding adds shows at the borders of the first stage."""
    flat = np.full((1, 32, 32, 3), value, np.uint8)
    first = next(node.output[0] for node in plain.graph.node if node.op_type == "Conv")
    expected = run(part(plain, "images", first), normalised(flat, PREPROCESSING))[first]
    assert np.ptp(expected[0, 0]) > 0  # the border does differ from the middle
    assert np.array_equal(run(part(embedded, "pixels", first), flat)[first], expected)


@each("outputs", [ALL, ("top5",), ("probabilities",), ("top5", "logits")])
@each("task", [Task.SINGLE_LABEL, Task.MULTI_LABEL])
def test_outputs(plain: onnx.ModelProto, outputs: Sequence[str], task: Task) -> None:
    values = pixels(3)
    logits = run(plain, normalised(values, PREPROCESSING))["logits"]
    found = run(embed_preprocessing(plain, PREPROCESSING, "uint8", outputs, task), values)
    assert list(found) == [name for o in outputs for name in NAMES.get(o, (o,))]
    order = np.argsort(-logits, axis=1)[:, :5]
    odds = probabilities(logits, task)
    expected = {
        "logits": logits,
        "probabilities": odds,
        "top5_classes": order,
        "top5_probabilities": np.take_along_axis(odds, order, 1),
    }
    for name, value in found.items():
        assert value.dtype == (np.int64 if name == "top5_classes" else np.float32)
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)


def test_the_batch_stays_dynamic_and_the_plain_graph_as_it_was(plain: onnx.ModelProto) -> None:
    before = plain.SerializeToString()
    graph = embed_preprocessing(plain, PREPROCESSING, "uint8", ALL).graph
    assert plain.SerializeToString() == before
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    ]
    assert shapes == [["batch", 32, 32, 3], *(["batch", count] for count in (7, 7, 5, 5))]


def test_three_classes_have_a_top_three() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 3 * 32 * 32)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Flatten", ["images"], ["flat"]),
        onnx.helper.make_node("Gemm", ["flat", "weights"], ["logits"], transB=1),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "linear",
        [onnx.helper.make_tensor_value_info("images", 1, ["batch", 3, 32, 32])],
        [onnx.helper.make_tensor_value_info("logits", 1, ["batch", 3])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    small = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9
    )
    found = run(embed_preprocessing(small, PREPROCESSING, "uint8", ("top5",)), pixels(2))
    assert found["top5_classes"].shape == (2, 3)


def test_other_outputs_are_refused(plain: onnx.ModelProto) -> None:
    maps = onnx.ModelProto.FromString(plain.SerializeToString())
    maps.graph.output[0].name = "stage4"
    with pytest.raises(ConversionError, match="the graph gives 'stage4', not 'logits'"):
        embed_preprocessing(maps, PREPROCESSING, "uint8")


def test_it_builds_in_tensorrt_for_rtx(plain: onnx.ModelProto) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert plan_kernels(embed_preprocessing(plain, PREPROCESSING, "uint8", ALL))["total"] > 10
