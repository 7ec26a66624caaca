"""Files that are nearly ONNX are one message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from van_deploy.errors import InputError
from van_deploy.graph.inspect import describe_onnx


def small() -> ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    node = helper.make_node("Mul", ["x", "w"], ["y"], "scale")
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    model = helper.make_model(helper.make_graph([node], "g", [value], [result], [weight]))
    model.metadata_props.add(key="a", value="text")
    return model


def test_a_sound_file(tmp_path: Path) -> None:
    onnx.save(small(), tmp_path / "m.onnx")
    assert describe_onnx(tmp_path / "m.onnx").metadata == {"a": "text"}


def unknown_type(data: bytes) -> bytes:
    model = ModelProto.FromString(data)
    model.graph.initializer[0].data_type = 36
    return model.SerializeToString()


def not_utf8(data: bytes) -> bytes:
    return data.replace(b"text", b"te\xffx")


@pytest.mark.parametrize("spoil", [unknown_type, not_utf8])
def test_a_damaged_graph_is_one_message(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(spoil(small().SerializeToString()))
    with pytest.raises(InputError, match=r"m\.onnx' is (damaged|not an ONNX file)"):
        describe_onnx(path)
