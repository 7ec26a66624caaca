"""Errors of the real TensorRT parser and builder, with cause and remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.each import each
from tests.engine.conftest import SM89, Build
from van_deploy.engine.backend import Backend
from van_deploy.engine.messages import KNOWN_ERRORS, error_from_log
from van_deploy.errors import ConversionError, InputError, VanDeployError
from van_deploy.errors import MissingDependency as Missing


def node(kind: str, name: str, inputs: str, output: str = "logits") -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=name)


def model_of(*nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, **weights: Any) -> ModelProto:
    images = helper.make_tensor_value_info("images", kind, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", kind, None)
    stored = [numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [images], [logits], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def quantised(scale: float, zero: int) -> ModelProto:
    quantize = node("QuantizeLinear", "block1.0.quantize", "images s z", "q")
    back = node("DequantizeLinear", "block1.0.back", "q s z")
    return model_of(quantize, back, s=np.float32(scale), z=np.int8(zero))


CONV, RELU = node("Conv", "patch_embed1.proj", "images w"), node("Relu", "block1.0.act", "images")
GATE, NOWHERE = node("Mul", "block1.0.gate", "images m"), node("Relu", "act", "nowhere")
GELU = helper.make_node("QuickerGelu", ["images"], ["logits"], "act", domain="com.microsoft")
QUANTIZE, PROJ = "block1.0.quantize (QuantizeLinear)", "patch_embed1.proj (Conv)"
OUTSIDE = model_of(node("Reshape", "head.reshape", "images narrow"), narrow=np.array([2, 192]))
INSIDE = model_of(
    node("Reshape", "norm1.reshape", "images three", "flat"),
    node("Reshape", "norm1.back", "flat wide", "back"),
    node("Add", "norm1.add", "images back"),
    three=np.array([3, 192]),
    wide=np.array([-1, 3, 8, 8]),
)


GRAPHS = [
    (model_of(GELU), "unknown operator", "act (QuickerGelu)"),
    (quantised(0.0, 0), "scale not positive", QUANTIZE),
    (quantised(1.0, 1), "asymmetric quantisation", QUANTIZE),
    (model_of(RELU, kind=TensorProto.UINT8), "unsupported type", "block1.0.act (Relu)"),
    (model_of(GATE, m=np.ones(5, "f")), "shapes do not fit", "block1.0.gate (Mul"),
    (model_of(NOWHERE), "broken graph", "act (Relu)"),
    (model_of(CONV, w=np.ones((4, 3, 3, 3), "e")), "mixed types", PROJ),
    (model_of(CONV, w=np.ones((4, 5, 3, 3), "f")), "weights do not fit", PROJ),
    # TensorRT builds a graph that is frozen at the optimum, which then fails at other batches.
    (OUTSIDE, "frozen batch", "'logits' has a fixed batch of 2"),
    (INSIDE, "frozen batch", "'logits' has a fixed batch of 3"),
]


@each("model, name, where", GRAPHS)
def test_errors_of_the_parser_and_the_builder(
    rtx: Backend, build: Build, tmp_path: Path, model: ModelProto, name: str, where: str
) -> None:
    source, plan = tmp_path / "model.onnx", tmp_path / "out" / "e.plan"
    onnx.save(model, source)
    with pytest.raises(VanDeployError) as caught:
        build(plan, source=source)
    assert list(plan.parent.iterdir()) == [], "no file remains"
    error, known = caught.value, next(known for known in KNOWN_ERRORS if known.name == name)
    did = "built no plan from" if name == "frozen batch" else "cannot parse"
    assert error.message.startswith(f"{rtx.label} {did} 'model.onnx':")
    assert known.cause in error.message
    assert where in error.message
    assert (error.remedy, type(error)) == (known.remedy, known.error)
    assert "_src/" not in error.message


def test_types_that_turing_does_not_have(build: Build, digits_onnx: Path, tmp_path: Path) -> None:
    bf16, turing = tmp_path / "bf16.onnx", SM89.with_changes(targets=("sm_75",))
    onnx.save(model_of(RELU, kind=TensorProto.BFLOAT16), bf16)
    for source, remedy in ((digits_onnx, "fp16 --no-keep-defaults"), (bf16, "Build fp16 for")):
        with pytest.raises(ConversionError) as caught:
            build(tmp_path / "e.plan", turing, source)
        assert remedy in caught.value.remedy


NO_DRIVER = "CUDA initialization failure with error: 35"


LOGS = [
    ("reshaping failed for tensor: images", "frozen batch", ConversionError),
    ("incompatible device, expecting compute 8.6 got 7.5", "another GPU", ConversionError),
    ("expecting library version 8.0.0 got 8.0.1", "another version", ConversionError),
    ("Serialization assertion plan.header.size == blobSize", "damaged plan", InputError),
    ("Requested amount of GPU memory (9 bytes) could not", "device out of memory", Missing),
    (NO_DRIVER, "no driver", Missing),
    (f"{NO_DRIVER}|over within workspace limit", "workspace too small", ConversionError),
    ("Unable to load library: libnvinfer_builder_resource.so.11", "library not found", Missing),
]


@each("messages, name, error_class", LOGS)
def test_errors_from_the_log(messages: str, name: str, error_class: type[VanDeployError]) -> None:
    """The most specific error is selected, whatever the order."""
    logged = [f"Error Code 1: {message}, please rebuild." for message in messages.split("|")]
    error = error_from_log("TensorRT 11.4.0 cannot load 'e.plan'", ["noise", *logged])
    known = next(known for known in KNOWN_ERRORS if known.name == name)
    assert type(error) is error_class
    assert error.message.startswith(f"TensorRT 11.4.0 cannot load 'e.plan': {known.cause}. ")


def test_unknown_errors_are_quoted() -> None:
    assert "It reports: Full moon." in error_from_log("no plan", ["Full moon."]).message
    assert "no error message" in error_from_log("no plan", []).message
