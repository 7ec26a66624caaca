"""TensorRT's messages, provoked from the real parser and builder, in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.each import each
from tests.engine.conftest import built
from van_deploy.engine.backend import Backend
from van_deploy.engine.messages import CATALOGUE, entry_for, failure
from van_deploy.errors import ConversionError, InputError, VanDeployError
from van_deploy.errors import MissingDependency as Missing

UINT8 = TensorProto.UINT8


def node(kind: str, name: str, inputs: str, output: str = "logits") -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=name)


def small(
    *nodes: onnx.NodeProto, weights: Mapping[str, object], kind: int = TensorProto.FLOAT
) -> ModelProto:
    images = helper.make_tensor_value_info("images", kind, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", kind, None)
    stored = [numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [images], [logits], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def quantised(scale: float, zero: int) -> ModelProto:
    return small(
        node("QuantizeLinear", "block1.0.quantize", "images s z", "q"),
        node("DequantizeLinear", "block1.0.back", "q s z"),
        weights={"s": np.float32(scale), "z": np.int8(zero)},
    )


def conv(channels: int, kind: str) -> ModelProto:
    weights = {"w": np.ones((4, channels, 3, 3)).astype(kind)}
    return small(node("Conv", "patch_embed1.proj", "images w"), weights=weights)


def failed(model: ModelProto, rtx: Backend, folder: Path) -> VanDeployError:
    """Build for real, and return the error; nothing may be left behind."""
    source, plan = folder / "in" / "model.onnx", folder / "out" / "e.plan"
    source.parent.mkdir()
    onnx.save(model, source)
    with pytest.raises(VanDeployError) as caught:
        built(source, plan, rtx)
    assert list(plan.parent.iterdir()) == []
    return caught.value


QUANTIZE, CONV = "block1.0.quantize (QuantizeLinear)", "patch_embed1.proj (Conv)"
GELU = helper.make_node("QuickerGelu", ["images"], ["logits"], "act", domain="com.microsoft")
FIVE = np.ones(5, np.float32)
RELU, GATE = node("Relu", "block1.0.act", "images"), node("Mul", "block1.0.gate", "images m")


@each(
    ("model", "name", "where"),
    [
        (small(GELU, weights={}), "unknown operator", "act (QuickerGelu)"),
        (quantised(0.0, 0), "scale not positive", QUANTIZE),
        (quantised(1.0, 1), "asymmetric quantisation", QUANTIZE),
        (small(RELU, weights={}, kind=UINT8), "unsupported type", "block1.0.act (Relu)"),
        (
            small(GATE, weights={"m": FIVE}),
            "shapes do not fit",
            "block1.0.gate (Mul",
        ),
        (small(node("Relu", "act", "nowhere"), weights={}), "broken graph", "act (Relu)"),
        (conv(3, "float16"), "mixed types", CONV),
        (conv(5, "float32"), "weights do not fit", CONV),
    ],
)
def test_what_the_parser_refuses(
    rtx: Backend, tmp_path: Path, model: ModelProto, name: str, where: str
) -> None:
    entry = next(entry for entry in CATALOGUE if entry.name == name)
    error = failed(model, rtx, tmp_path)
    assert f"{entry.cause}. TensorRT says: " in error.message
    assert f"\n{where}" in error.message
    assert error.message.startswith(f"{rtx.label} cannot take 'model.onnx':")
    assert error.remedy == entry.remedy
    assert "_src/" not in error.message


def test_a_frozen_batch(rtx: Backend, tmp_path: Path) -> None:
    """TensorRT builds one that is frozen at the optimum, and would fail for any batch but 2."""
    outside = small(
        node("Reshape", "head.reshape", "images narrow"), weights={"narrow": np.array([2, 192])}
    )
    shapes = {"three": np.array([3, 192]), "wide": np.array([-1, 3, 8, 8])}
    inside = small(
        node("Reshape", "norm1.reshape", "images three", "flat"),
        node("Reshape", "norm1.back", "flat wide", "back"),
        node("Add", "norm1.add", "images back"),
        weights=shapes,
    )
    for model, size in ((outside, 2), (inside, 3)):
        folder = tmp_path / str(size)
        folder.mkdir()
        error = failed(model, rtx, folder)
        assert "built no plan from 'model.onnx': a Reshape in the graph holds" in error.message
        assert f"'logits' has a fixed batch of {size}" in error.message
        assert error.exit_code == 4


@each(
    ("said", "name", "kind"),
    [
        ("reshaping failed for tensor: images", "frozen batch", ConversionError),
        ("incompatible device, expecting compute 8.6 got 7.5", "another GPU", ConversionError),
        ("expecting library version 8.0.0 got 8.0.1", "another version", ConversionError),
        ("Serialization assertion plan.header.size == blobSize", "damaged plan", InputError),
        ("Requested amount of GPU memory (9 bytes) could not", "device out of memory", Missing),
        ("CUDA initialization failure with error: 35", "no driver", Missing),
        ("Unable to load library: libnvinfer_builder_resource.so.11", "library not found", Missing),
    ],
)
def test_what_the_builder_and_the_loader_say(
    said: str, name: str, kind: type[VanDeployError]
) -> None:
    entry = entry_for(f"Error Code 1: {said}, please rebuild.")
    assert entry is not None
    assert entry.name == name
    error = failure("TensorRT 11.4.0 does not load 'e.plan'", ["noise", said])
    assert type(error) is kind
    assert error.message.startswith(f"TensorRT 11.4.0 does not load 'e.plan': {entry.cause}. ")


def test_the_most_particular_cause_wins_and_an_unknown_one_is_shown() -> None:
    noise = "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
    cause = "no tactics to implement the operation within workspace limit"
    assert "no kernel fits into the workspace" in failure("no plan", [noise, cause]).message
    assert "It says: The moon is full." in failure("no plan", ["The moon is full."]).message
    assert "nothing at all" in failure("no plan", []).message
