"""Files TensorRT would take without a word are refused before it sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.each import each
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.source import read_source
from van_deploy.errors import InputError

Spoil = Callable[[ModelProto], object]


def dimension(model: ModelProto, axis: int) -> onnx.TensorShapeProto.Dimension:
    return model.graph.input[0].type.tensor_type.shape.dim[axis]


def of_opset(version: int) -> Spoil:
    return lambda model: setattr(model.opset_import[0], "version", version)


def of_type(kind: int) -> Spoil:
    return lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", kind)


def float64_weights(model: ModelProto) -> None:
    first = model.graph.initializer[0]
    wide = numpy_helper.to_array(first).astype(np.float64)
    first.CopyFrom(numpy_helper.from_array(wide, first.name))


def made_for_cpus(model: ModelProto) -> None:
    scale = numpy_helper.from_array(np.ones((), np.float32), "s")
    zero = numpy_helper.from_array(np.zeros((), np.uint8), "z")
    model.graph.initializer.extend([scale, zero])
    node = helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="block1.0.q")
    model.graph.node.insert(0, node)


def second_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1]))


def free(*axes: int) -> Spoil:
    def set_free(model: ModelProto) -> None:
        for axis in axes:
            dimension(model, axis).dim_param = f"axis{axis}"

    return set_free


OPSET = "uses ONNX opset {}; TensorRT's parser knows 9 to 25"


@each(
    ("spoil", "words"),
    [
        *((of_opset(version), OPSET.format(version)) for version in (8, 26, 99)),
        (of_type(TensorProto.DOUBLE), "'images' float64, which TensorRT would narrow to float32"),
        (of_type(TensorProto.STRING), "text, which TensorRT does not have"),
        (of_type(TensorProto.COMPLEX64), "complex numbers"),
        (float64_weights, "float64, which TensorRT would narrow"),
        (made_for_cpus, "UINT8 zero-point in 'block1.0.q', which TensorRT would read as INT8"),
        (free(2), "dynamic along axis 2; engines here have a dynamic batch"),
        (free(1, 2, 3), "dynamic along axis 1, 2, 3"),
        (second_input, "has 2 inputs; a VAN has one"),
        (lambda model: model.graph.ClearField("node"), "is not an ONNX file"),
        (lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"), "without a shap"),
    ],
    fresh="graph",
)
def test_what_tensorrt_would_misread(
    graph: ModelProto, tmp_path: Path, spoil: Spoil, words: str
) -> None:
    spoil(graph)
    path = tmp_path / "model.onnx"
    onnx.save(graph, path)
    with pytest.raises(InputError) as caught:
        read_source(path)
    assert words in caught.value.message
    assert "van-deploy export" in caught.value.remedy


@each("content", [None, b"", b"hello world, this is no protobuf", b"\0" * 64, 20_000])
def test_a_file_that_is_not_onnx(
    digits_onnx: Path, tmp_path: Path, content: bytes | int | None
) -> None:
    path, message = tmp_path / "model.onnx", "is not an ONNX file"
    if content is None:
        message = "There is no ONNX file"
    elif isinstance(content, int):
        path.write_bytes(digits_onnx.read_bytes()[:content])
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_source(path)


def test_weights_that_were_left_behind(graph: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="model.bin", size_threshold=0)
    assert read_source(path).has_external_weights
    (tmp_path / "model.bin").unlink()
    with pytest.raises(InputError, match=r"are in 'model\.bin', which is not beside it"):
        read_source(path)


def test_what_is_asked_must_be_what_the_graph_serves(graph: ModelProto, tmp_path: Path) -> None:
    path, sizes = tmp_path / "model.onnx", SizeRange(32, 64, 96)
    onnx.save(graph, path)
    source = read_source(path)
    assert source.input_shape == (-1, 3, 32, 32)
    assert not source.has_external_weights
    source.refuse(BuildOptions(profiles=(BatchRange(1, 8, 32),)))
    with pytest.raises(InputError, match="takes one image size, so it cannot serve 32:64:96"):
        source.refuse(BuildOptions(dynamic_size=sizes))
    free(2, 3)(graph)
    onnx.save(graph, path)
    read_source(path).refuse(BuildOptions(dynamic_size=sizes))
    with pytest.raises(InputError, match="has dynamic height and width, and no sizes"):
        read_source(path).refuse(BuildOptions())
    dimension(graph, 0).dim_value = 4
    onnx.save(graph, path)
    fixed = read_source(path)
    fixed.refuse(BuildOptions(profiles=(BatchRange(4, 4, 4),), dynamic_size=sizes))
    with pytest.raises(InputError, match="has a fixed batch of 4, so it cannot serve 1:8:32"):
        fixed.refuse(BuildOptions(profiles=(BatchRange(1, 8, 32),), dynamic_size=sizes))
