"""Files TensorRT would take without a word are refused before it sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.each import each
from van_deploy.config import BatchRange
from van_deploy.engine.source import read_source
from van_deploy.errors import InputError


def one_node(operator: str, kind: int, **attributes: Any) -> ModelProto:
    images = helper.make_tensor_value_info("images", kind, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", kind, None)
    node = helper.make_node(operator, ["images"], ["logits"], name="block1.0.act", **attributes)
    made = helper.make_graph([node], "g", [images], [logits])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])


def refused(model: ModelProto, tmp_path: Path) -> InputError:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(InputError) as caught:
        read_source(path)
    return caught.value


def test_what_is_read(digits_onnx: Path, digits_graph: ModelProto) -> None:
    source = read_source(digits_onnx)
    assert (source.opset, source.input_name) == (20, "images")
    assert source.input_shape[0] == -1
    assert source.nodes == len(digits_graph.graph.node)
    assert not source.has_external_weights
    source.refuse_profile(BatchRange(1, 8, 32))


@pytest.mark.parametrize("opset", [8, 26, 99])
def test_an_opset_the_parser_does_not_know(graph: ModelProto, tmp_path: Path, opset: int) -> None:
    graph.opset_import[0].version = opset
    error = refused(graph, tmp_path)
    assert f"uses ONNX opset {opset}; TensorRT's parser knows 9 to 25" in error.message
    assert error.remedy == "Export it again with `--opset 20`."


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no ONNX file"):
        read_source(tmp_path / "none.onnx")


@each("content", [b"", b"hello world, this is no protobuf", b"\0" * 64])
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not an ONNX file"):
        read_source(path)


def test_a_file_cut_short(digits_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(digits_onnx.read_bytes()[:20_000])
    with pytest.raises(InputError, match="not an ONNX file, or it is damaged"):
        read_source(path)


@each(
    ("kind", "words"),
    [
        (TensorProto.DOUBLE, "float64, which TensorRT would narrow to float32"),
        (TensorProto.STRING, "text, which TensorRT does not have"),
        (TensorProto.COMPLEX64, "complex numbers"),
    ],
)
def test_types(tmp_path: Path, kind: int, words: str) -> None:
    assert words in refused(one_node("Identity", kind), tmp_path).message


def test_float64_weights(graph: ModelProto, tmp_path: Path) -> None:
    first = graph.graph.initializer[0]
    wide = numpy_helper.to_array(first).astype(np.float64)
    first.CopyFrom(numpy_helper.from_array(wide, first.name))
    assert f"'{first.name}' holds float64" in refused(graph, tmp_path).message


def test_the_graph_made_for_cpus(tmp_path: Path) -> None:
    model = one_node("Identity", TensorProto.FLOAT)
    scale = numpy_helper.from_array(np.ones((), np.float32), "s")
    zero = numpy_helper.from_array(np.zeros((), np.uint8), "z")
    model.graph.initializer.extend([scale, zero])
    model.graph.node.insert(
        0, helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="block1.0.q")
    )
    message = refused(model, tmp_path).message
    assert "'block1.0.q' has a UINT8 zero-point, which TensorRT would read as INT8" in message


def test_weights_that_were_left_behind(graph: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="model.bin", size_threshold=0)
    assert read_source(path).has_external_weights
    (tmp_path / "model.bin").unlink()
    with pytest.raises(InputError, match=r"are in 'model\.bin', which is not beside it"):
        read_source(path)


def test_a_free_image_size(graph: ModelProto, tmp_path: Path) -> None:
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert "free along axis 2; engines here have a free batch" in refused(graph, tmp_path).message


def test_two_inputs(graph: ModelProto, tmp_path: Path) -> None:
    graph.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1]))
    assert "it has 2 inputs; a VAN has one" in refused(graph, tmp_path).message


def test_a_fixed_batch(graph: ModelProto, tmp_path: Path) -> None:
    dim = graph.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_value = 4
    path = tmp_path / "model.onnx"
    onnx.save(graph, path)
    source = read_source(path)
    source.refuse_profile(BatchRange(4, 4, 4))
    with pytest.raises(InputError, match="has a fixed batch of 4, so it cannot serve 1:8:32"):
        source.refuse_profile(BatchRange(1, 8, 32))
