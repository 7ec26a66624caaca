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

from van_deploy.errors import ConversionError, UsageError
from van_deploy.graph.embed import embed_preprocessing
from van_deploy.graph.export import onnx_from_van
from van_deploy.metrics import softmax
from van_deploy.model.pixels import normalised
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

ort = pytest.importorskip("onnxruntime")

PREPROCESSING = Preprocessing(
    32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, "test"
)
ALL = ("logits", "probabilities", "top5")


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


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_bytes_in_the_same_logits_out(plain: onnx.ModelProto, batch: int) -> None:
    values = pixels(batch)
    expected = run(plain, normalised(values, PREPROCESSING))["logits"]
    found = run(embed_preprocessing(plain, PREPROCESSING, "uint8"), values)["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_network_is_given_the_very_bits_of_the_file_pipeline(plain: onnx.ModelProto) -> None:
    embedded = embed_preprocessing(plain, PREPROCESSING, "uint8")
    head = onnx.utils.Extractor(embedded).extract_model(["pixels"], ["images"])
    every = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    for values in (pixels(3), every, np.zeros_like(every), np.full_like(every, 255)):
        assert np.array_equal(run(head, values)["images"], normalised(values, PREPROCESSING))


@pytest.mark.parametrize("value", [0, 124, 255])
def test_borders_are_exact(plain: onnx.ModelProto, value: int) -> None:
    """A flat picture: whatever the padding adds shows at the borders of the first stage."""
    flat = np.full((1, 32, 32, 3), value, np.uint8)
    first = next(node.output[0] for node in plain.graph.node if node.op_type == "Conv")
    before = onnx.utils.Extractor(plain).extract_model(["images"], [first])
    embedded = embed_preprocessing(plain, PREPROCESSING, "uint8")
    after = onnx.utils.Extractor(embedded).extract_model(["pixels"], [first])
    expected = run(before, normalised(flat, PREPROCESSING))[first]
    assert np.ptp(expected[0, 0]) > 0  # the border does differ from the middle
    assert np.array_equal(run(after, flat)[first], expected)


def test_floats_in_zero_to_one(plain: onnx.ModelProto) -> None:
    values = pixels(2)
    expected = run(plain, normalised(values, PREPROCESSING))["logits"]
    embedded = embed_preprocessing(plain, PREPROCESSING, "normalize")
    unit = values.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(run(embedded, unit)["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", [ALL, ("top5",), ("probabilities",), ("top5", "logits")])
def test_outputs(plain: onnx.ModelProto, outputs: Sequence[str]) -> None:
    values = pixels(3)
    logits = run(plain, normalised(values, PREPROCESSING))["logits"]
    found = run(embed_preprocessing(plain, PREPROCESSING, "uint8", outputs), values)
    expected_names = [
        name
        for output in outputs
        for name in (("top5_classes", "top5_probabilities") if output == "top5" else (output,))
    ]
    assert list(found) == expected_names
    order = np.argsort(-logits, axis=1)[:, :5]
    odds = softmax(logits)
    if "top5" in outputs:
        assert found["top5_classes"].dtype == np.int64
        assert np.array_equal(found["top5_classes"], order)
        np.testing.assert_allclose(
            found["top5_probabilities"], np.take_along_axis(odds, order, 1), atol=1e-6
        )
    if "probabilities" in outputs:
        np.testing.assert_allclose(found["probabilities"], odds, atol=1e-6)


def test_the_batch_stays_free_and_the_plain_graph_as_it_was(plain: onnx.ModelProto) -> None:
    before = plain.SerializeToString()
    embedded = embed_preprocessing(plain, PREPROCESSING, "uint8", ALL)
    assert plain.SerializeToString() == before
    assert shape_of(embedded.graph.input[0]) == ["batch", 32, 32, 3]
    assert [shape_of(output) for output in embedded.graph.output] == [
        *(["batch", 7], ["batch", 7], ["batch", 5], ["batch", 5])
    ]


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


@pytest.mark.parametrize(
    ("embedding", "outputs", "message"),
    [
        ("bgr", ("logits",), "There is no embedded preprocessing called 'bgr'."),
        ("uint8", ("boxes",), "'boxes' is not an output: 'boxes'."),
        ("uint8", (), "The outputs make no sense: ''."),
        ("uint8", ("logits", "logits"), "The outputs make no sense: 'logits,logits'."),
    ],
)
def test_what_does_not_exist_is_refused(
    plain: onnx.ModelProto, embedding: str, outputs: Sequence[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        embed_preprocessing(plain, PREPROCESSING, embedding, outputs)
    assert caught.value.message == message


def test_twice_is_refused(plain: onnx.ModelProto) -> None:
    once = embed_preprocessing(plain, PREPROCESSING, "uint8")
    with pytest.raises(ConversionError, match="has its preprocessing inside already"):
        embed_preprocessing(once, PREPROCESSING, "uint8")


def test_other_channels_are_refused(plain: onnx.ModelProto) -> None:
    grey = Preprocessing(32, (0.5,), (0.5,), "bicubic", 0.9, "test")
    with pytest.raises(ConversionError, match="'images' has 3 channels; the preprocessing has 1"):
        embed_preprocessing(plain, grey, "uint8")


def test_it_builds_in_tensorrt_for_rtx(plain: onnx.ModelProto) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    embedded = embed_preprocessing(plain, PREPROCESSING, "uint8", ALL)
    assert parser.parse(embedded.SerializeToString()), parser.get_error(0).desc()
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("pixels", (1, 32, 32, 3), (2, 32, 32, 3), (4, 32, 32, 3))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    assert plan.nbytes > 10_000
