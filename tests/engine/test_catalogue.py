"""TensorRT's messages, provoked from the real parser and builder, in words for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.each import each
from tests.engine.conftest import built
from van_deploy.engine.backend import Backend
from van_deploy.engine.catalogue import (
    CATALOGUE,
    build_failure,
    entry_for,
    load_failure,
    parser_failure,
)
from van_deploy.errors import ConversionError, InputError, MissingDependency, VanDeployError

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
Spoil = Callable[[ModelProto], None]


def small(
    nodes: list[onnx.NodeProto], weights: Mapping[str, object], kind: int = FLOAT
) -> ModelProto:
    images = helper.make_tensor_value_info("images", kind, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", kind, None)
    stored = [numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items()]
    graph = helper.make_graph(nodes, "g", [images], [logits], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def quantised(scale: float, zero: int) -> ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="block1.0.quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["logits"], name="block1.0.back"),
    ]
    return small(nodes, {"s": np.float32(scale), "z": np.int8(zero)})


def conv(weights: np.ndarray) -> ModelProto:
    node = helper.make_node("Conv", ["images", "w"], ["logits"], name="patch_embed1.proj")
    return small([node], {"w": weights})


def failure(model: ModelProto, rtx: Backend, folder: Path) -> VanDeployError:
    """Build for real, and return the error; nothing may be left behind."""
    source, plan = folder / "in" / "model.onnx", folder / "out" / "e.plan"
    source.parent.mkdir()
    onnx.save(model, source)
    with pytest.raises(VanDeployError) as caught:
        built(source, plan, rtx)
    assert list(plan.parent.iterdir()) == []
    return caught.value


def unknown_operator(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.domain, node.op_type = "com.microsoft", "QuickerGelu"


def dangling_input(model: ModelProto) -> None:
    next(n for n in model.graph.node if n.name.endswith("proj_2")).input[0] = "nowhere"


@each(
    ("spoil", "node", "cause"),
    [
        (
            unknown_operator,
            "block1.0.attn.activation (QuickerGelu)",
            "TensorRT has no operator of this name and no plugin for it",
        ),
        (dangling_input, "block1.0.attn.proj_2 (Conv)", "a node reads a value that nothing makes"),
    ],
    fresh="graph",
)
def test_the_parser_names_the_pytorch_module(
    rtx: Backend, graph: ModelProto, tmp_path: Path, spoil: Spoil, node: str, cause: str
) -> None:
    spoil(graph)
    error = failure(graph, rtx, tmp_path)
    assert type(error) is ConversionError
    assert error.message.startswith(f"{rtx.label} cannot take 'model.onnx':\n{node}: {cause}. ")
    assert error.remedy


@each(
    ("model", "name", "node"),
    [
        (quantised(0.0, 0), "scale not positive", "block1.0.quantize (QuantizeLinear)"),
        (quantised(1.0, 1), "asymmetric quantisation", "block1.0.quantize (QuantizeLinear)"),
        (
            small(
                [helper.make_node("Relu", ["images"], ["logits"], name="block1.0.act")], {}, UINT8
            ),
            "unsupported type",
            "block1.0.act (Relu)",
        ),
        (
            small(
                [helper.make_node("Mul", ["images", "m"], ["logits"], name="block1.0.gate")],
                {"m": np.ones(5, np.float32)},
            ),
            "shapes do not fit",
            "block1.0.gate (Mul)",
        ),
        (conv(np.ones((4, 3, 3, 3), np.float16)), "mixed types", "patch_embed1.proj (Conv)"),
        (conv(np.ones((4, 5, 3, 3), np.float32)), "weights do not fit", "patch_embed1.proj (Conv)"),
    ],
)
def test_what_the_parser_refuses(
    rtx: Backend, tmp_path: Path, model: ModelProto, name: str, node: str
) -> None:
    entry = next(entry for entry in CATALOGUE if entry.name == name)
    error = failure(model, rtx, tmp_path)
    assert f"\n{node}: {entry.cause}. TensorRT says: " in error.message
    assert error.remedy == entry.remedy
    assert "_src/" not in error.message


def frozen(outside: bool) -> ModelProto:
    if outside:
        reshape = helper.make_node("Reshape", ["images", "narrow"], ["logits"], name="head.reshape")
        return small([reshape], {"narrow": np.array([2, 192])})
    there = helper.make_node("Reshape", ["images", "three"], ["flat"], name="norm1.reshape")
    add = helper.make_node("Add", ["images", "back"], ["logits"], name="norm1.add")
    back = helper.make_node("Reshape", ["flat", "wide"], ["back"], name="norm1.back")
    shapes = {"three": np.array([3, 192]), "wide": np.array([-1, 3, 8, 8])}
    return small([there, back, add], shapes)


@each(("model", "size"), [(frozen(outside=True), 2), (frozen(outside=False), 3)])
def test_a_frozen_batch(rtx: Backend, tmp_path: Path, model: ModelProto, size: int) -> None:
    """TensorRT builds the one frozen at the optimum, and would fail for any batch but 2."""
    error = failure(model, rtx, tmp_path)
    assert error.message.startswith(
        f"{rtx.label} built no plan from 'model.onnx': a Reshape in the graph holds the batch"
    )
    assert error.message.endswith(f"The output 'logits' has a fixed batch of {size}.")
    assert error.exit_code == 4


@each(
    ("said", "name", "kind"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (kOPT values for "
            "profile 0 violate shape constraints: IShuffleLayer head.reshape: reshaping failed "
            "for tensor: images reshape would change volume 1536 to 384)",
            "frozen batch",
            ConversionError,
        ),
        (
            "6: The engine plan file is generated on an incompatible device, expecting compute "
            "8.6 got compute 7.5, please rebuild.",
            "another GPU",
            ConversionError,
        ),
        (
            "The engine plan file is not compatible with this version of TensorRT, expecting "
            "library version 8.0.0 got 8.0.1, please rebuild.",
            "another version",
            ConversionError,
        ),
        (
            "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization "
            "assertion plan.header.size == blobSize failed. In parsePlan)",
            "damaged plan",
            InputError,
        ),
        (
            "Requested amount of GPU memory (2147483648 bytes) could not be allocated.",
            "device out of memory",
            MissingDependency,
        ),
        ("CUDA initialization failure with error: 35", "no driver", MissingDependency),
        (
            "Unable to load library: libnvinfer_builder_resource.so.11",
            "library not found",
            MissingDependency,
        ),
    ],
)
def test_what_the_builder_and_the_loader_say(
    said: str, name: str, kind: type[VanDeployError]
) -> None:
    entry = entry_for(said)
    assert entry is not None
    assert entry.name == name
    error = load_failure("TensorRT 11.4.0", "e.plan", ["noise", said])
    assert type(error) is kind
    assert error.message.startswith(f"TensorRT 11.4.0 does not load 'e.plan': {entry.cause}. ")


def test_the_most_particular_cause_wins_and_an_unknown_one_is_shown() -> None:
    noise = "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
    cause = "no tactics to implement the operation within workspace limit"
    error = build_failure("TensorRT for RTX 1.7.1", "m.onnx", [noise, cause])
    assert "no kernel fits into the workspace" in error.message
    assert build_failure("T", "m.onnx", ["The moon is full."]).message == (
        "T built no plan from 'm.onnx', for a reason this program does not know. "
        "It says: The moon is full."
    )
    assert "nothing at all" in build_failure("T", "m.onnx", []).message


class Reporting:
    """A parser with some problems, of a kind that TensorRT never reports."""

    def __init__(self, problems: int) -> None:
        self.num_errors = problems

    def get_error(self, number: int) -> Mock:
        error = Mock(node_name=lambda: f"block{number}", node_operator=lambda: "Conv")
        error.desc.return_value, error.code.return_value.name = "odd", "INVALID_NODE"
        return error


def test_many_problems_are_cut() -> None:
    message = parser_failure("T", "m.onnx", Reporting(5)).message
    assert "\nblock0 (Conv): not a failure this program knows. TensorRT says: odd\n" in message
    assert message.count("TensorRT says") == 3
    assert message.endswith("and 2 more.")
    assert "without saying why" in parser_failure("T", "m.onnx", Reporting(0)).message


def test_every_entry_helps() -> None:
    for entry in CATALOGUE:
        assert entry.cause, entry.name
        assert not entry.cause.endswith("."), entry.name
        assert entry.remedy.endswith("."), entry.name
    assert len({entry.name for entry in CATALOGUE}) == len(CATALOGUE)
