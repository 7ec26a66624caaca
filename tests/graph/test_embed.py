"""Preprocessing embedded in the graph (bit-identical), and outputs after the network."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from benchmarks.accuracy import count_kernels
from tests.each import each
from van_deploy.errors import ConversionError
from van_deploy.graph.embed import embed_preprocessing
from van_deploy.graph.export import onnx_from_van
from van_deploy.metrics import Task, probabilities
from van_deploy.model.preprocess import Preprocessing, normalise
from van_deploy.model.van import random_van
from van_deploy.model.variants import VanConfig
from van_deploy.runners.onnxruntime import onnxruntime_outputs

run: Any = onnxruntime_outputs
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(32, MEAN, STD, "bicubic", 0.9, "test")
ALL = ("logits", "probabilities", "top5")
NAMES = {"top5": ("top5_classes", "top5_probabilities")}


@pytest.fixture(scope="module")
def plain() -> ModelProto:
    """Return a tiny network of four classes: fewer than the five best."""
    return onnx_from_van(random_van(VanConfig((8, 8, 16, 16), (1,) * 4, (2,) * 4, 4)), 32)


def pixels(count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_embedded_preprocessing_is_bit_identical(plain: ModelProto) -> None:
    """Borders are exact too, where padding represents the mean colour."""
    embedded = embed_preprocessing(plain, PREPROCESSING, "uint8")
    head = onnx.utils.Extractor(embedded).extract_model(["pixels"], ["images"])
    every = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    for values in (pixels(3), every):
        assert np.array_equal(run(head, values)["images"], normalise(values, PREPROCESSING))
    values = pixels(5)
    expected = run(plain, normalise(values, PREPROCESSING))["logits"]
    for batch in (1, 2, 5):
        found = run(embedded, values[:batch])["logits"]
        np.testing.assert_allclose(found, expected[:batch], atol=1e-6 * np.abs(expected).max())
    unit = values.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    floats = embed_preprocessing(plain, PREPROCESSING, "normalize")
    np.testing.assert_allclose(run(floats, unit)["logits"], expected, rtol=1e-5, atol=1e-6)


@each("outputs", [ALL, ("top5",), ("probabilities",), ("top5", "logits")])
@each("task", [Task.SINGLE_LABEL, Task.MULTI_LABEL])
def test_embedded_outputs(plain: ModelProto, outputs: Sequence[str], task: Task) -> None:
    loud, values = ModelProto.FromString(plain.SerializeToString()), pixels(3)
    for tensor in loud.graph.initializer:  # so loud that the best five are ties after a softmax
        if tensor.name.startswith("head"):
            much = 1000 * numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(much, tensor.name))
    logits = run(loud, normalise(values, PREPROCESSING))["logits"]
    model = embed_preprocessing(loud, PREPROCESSING, "uint8", outputs, task)
    found, odds = run(model, values), probabilities(logits, task)
    assert list(found) == [name for o in outputs for name in NAMES.get(o, (o,))]
    order = np.argsort(-logits, axis=1)
    best = np.take_along_axis(odds, order, 1)
    expected: dict[str, Any] = {"logits": logits, "probabilities": odds}
    expected |= {"top5_classes": order, "top5_probabilities": best}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    for name, values in found.items():
        assert values.dtype == (np.int64 if name == "top5_classes" else np.float32)
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-5)


def test_backbones_are_rejected_and_embedded_graphs_build_in_tensorrt(plain: ModelProto) -> None:
    maps = ModelProto.FromString(plain.SerializeToString())
    maps.graph.output[0].name = "stage4"
    with pytest.raises(ConversionError, match="the graph outputs 'stage4', not 'logits'"):
        embed_preprocessing(maps, PREPROCESSING, "uint8")
    pytest.importorskip("tensorrt_rtx")
    assert count_kernels(embed_preprocessing(plain, PREPROCESSING, "uint8", ALL))["total"] > 10
