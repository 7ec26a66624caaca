"""Preprocessing and answers inside the graph, so that nobody has to write them twice.

A plain graph takes normalised floats and gives logits. An embedded one takes
the picture's own numbers and can give probabilities and the first classes too:

- ``uint8``: ``pixels (batch, S, S, C)`` bytes, as every image library holds
  them and a quarter of the transfer. Cast, layout and normalisation are nodes.
- ``normalize``: ``pixels (batch, C, S, S)`` float32 in 0..1.

Resizing and cropping stay with the client (:mod:`van_deploy.model.pixels`).

Nothing is folded into the first convolution. It pads with zeros, which stand
for the *mean* colour: with the subtraction folded into its bias they would
stand for black, and the borders of the answer would be wrong. Kept as nodes,
the same three float32 operations in torchvision's order give the network the
very bits that the file pipeline gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.errors import ConversionError, UsageError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import Task

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

    from van_deploy.model.preprocess import Preprocessing

__all__ = [
    "EMBEDDINGS",
    "OUTPUTS",
    "PIXELS_NAME",
    "TOP_CLASSES",
    "TOP_PROBABILITIES",
    "check_embedding",
    "embed_preprocessing",
]

EMBEDDINGS = ("none", "normalize", "uint8")
OUTPUTS = ("logits", "probabilities", "top5")

PIXELS_NAME = "pixels"
PROBABILITIES = "probabilities"
TOP_CLASSES = "top5_classes"
TOP_PROBABILITIES = "top5_probabilities"
TOP = 5


def check_embedding(embedding: str, outputs: Sequence[str]) -> None:
    """Refuse what :func:`embed_preprocessing` cannot make.

    Raises:
        UsageError: an unknown embedding, or unknown, repeated or no outputs.
    """
    if embedding not in EMBEDDINGS:
        raise UsageError(
            f"There is no embedded preprocessing called '{embedding}'.",
            f"Known: {', '.join(EMBEDDINGS)}.",
        )
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs or len(set(outputs)) != len(outputs):
        what = f"'{unknown[0]}' is not an output" if unknown else "The outputs make no sense"
        raise UsageError(
            f"{what}: '{','.join(outputs)}'.", f"Give some of {','.join(OUTPUTS)}, each once."
        )


def embed_preprocessing(
    model: ModelProto,
    preprocessing: Preprocessing,
    embedding: str = "uint8",
    outputs: Sequence[str] = ("logits",),
    task: Task = Task.SINGLE_LABEL,
) -> ModelProto:
    """Return a copy of ``model`` that takes pixels and gives ``outputs``; the batch stays free.

    Args:
        model: a graph from ``images (batch, C, S, S)`` to ``logits (batch, K)``, of any
            precision inside.
        preprocessing: what ``images`` must have gone through.
        embedding: one of :data:`EMBEDDINGS`; with ``none`` the input stays as it is.
        outputs: some of :data:`OUTPUTS`. ``probabilities`` is the softmax ``(batch, K)``
            float32, or what else ``task`` makes of logits; ``top5`` gives ``top5_classes``
            int64 and ``top5_probabilities`` float32, both ``(batch, min(5, K))``, the most
            probable first.
        task: how logits become probabilities.

    Raises:
        UsageError: see :func:`check_embedding`.
        ConversionError: the graph has another number of inputs, outputs or channels, or
            is embedded already.
    """
    import onnx

    check_embedding(embedding, outputs)
    _require_plain(model, preprocessing)
    embedded = onnx.ModelProto()
    embedded.CopyFrom(model)
    if embedding != "none":
        _prepend_(embedded, preprocessing, embedding)
    if tuple(outputs) != ("logits",):
        _append_(embedded, outputs, task)
    entries = {"van_deploy.embedded": embedding, "van_deploy.outputs": ",".join(outputs)}
    for key, value in entries.items():
        embedded.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(embedded)
    return embedded


def _require_plain(model: ModelProto, preprocessing: Preprocessing) -> None:
    graph = model.graph
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise ConversionError(
            f"The graph has {len(graph.input)} inputs and {len(graph.output)} outputs; "
            "preprocessing can be embedded where there is one of each.",
            "Start from the bundle's plain graph.",
        )
    name, shape = graph.input[0].name, graph.input[0].type.tensor_type.shape.dim
    if name == PIXELS_NAME or any(p.key == "van_deploy.embedded" for p in model.metadata_props):
        raise ConversionError(
            "The graph has its preprocessing inside already.", "Start from the plain graph."
        )
    if len(shape) != 4 or shape[1].dim_value != preprocessing.channels:
        raise ConversionError(
            f"The graph's input '{name}' has {shape[1].dim_value if len(shape) > 1 else 0} "
            f"channels; the preprocessing has {preprocessing.channels}.",
            "Export the model again.",
        )


def _prepend_(model: ModelProto, preprocessing: Preprocessing, embedding: str) -> None:
    """Put normalisation before the network; its old input becomes an inner value."""
    from onnx import TensorProto, helper

    graph = model.graph
    images = graph.input[0]
    batch, channels, height, width = (_dimension(d) for d in images.type.tensor_type.shape.dim)
    kind = images.type.tensor_type.elem_type
    nodes: list[NodeProto] = []
    value = PIXELS_NAME
    if embedding == "uint8":
        value = _node(nodes, "Cast", [value], "preprocess.float", to=TensorProto.FLOAT)
        value = _node(nodes, "Transpose", [value], "preprocess.channels_first", perm=[0, 3, 1, 2])
        value = _node(nodes, "Div", [value, "preprocess.255"], "preprocess.unit")
        _constant(model, "preprocess.255", np.array(255, np.float32))
        shape = (batch, height, width, channels)
        pixels = helper.make_tensor_value_info(PIXELS_NAME, TensorProto.UINT8, shape)
    else:
        shape = (batch, channels, height, width)
        pixels = helper.make_tensor_value_info(PIXELS_NAME, TensorProto.FLOAT, shape)
    for step, operator in (("mean", "Sub"), ("std", "Div")):
        constant = np.array(getattr(preprocessing, step), np.float32).reshape(1, -1, 1, 1)
        _constant(model, f"preprocess.{step}", constant)
        value = _node(nodes, operator, [value, f"preprocess.{step}"], f"preprocess.by_{step}")
    if kind == TensorProto.FLOAT:
        nodes[-1].output[0] = images.name
    else:
        nodes.append(
            helper.make_node(
                "Cast", [value], [images.name], name="preprocess.to_network", to=int(kind)
            )
        )
    later = list(graph.node)
    graph.ClearField("node")
    graph.node.extend([*nodes, *later])
    graph.value_info.append(images)
    graph.input[0].CopyFrom(pixels)


def _append_(model: ModelProto, outputs: Sequence[str], task: Task) -> None:
    """Put probabilities and the first classes behind the network."""
    from onnx import TensorProto, helper

    graph = model.graph
    logits = graph.output[0]
    batch, classes = (_dimension(d) for d in logits.type.tensor_type.shape.dim)
    top = min(TOP, int(classes))
    nodes: list[NodeProto] = []
    scores = logits.name
    if logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        scores = _node(nodes, "Cast", [scores], "answer.float", to=TensorProto.FLOAT)
    if task is Task.SINGLE_LABEL:
        _node(nodes, "Softmax", [scores], PROBABILITIES, axis=1)
    else:
        operator = "Identity" if task is Task.REGRESSION else "Sigmoid"
        _node(nodes, operator, [scores], PROBABILITIES)
    if "top5" in outputs:  # of the logits: where a softmax saturates, it holds ties
        _constant(model, "answer.k", np.array([top], np.int64))
        nodes.append(
            helper.make_node(
                "TopK",
                [scores, "answer.k"],
                ["answer.top_logits", TOP_CLASSES],
                name="answer.top",
                axis=1,
            )
        )
        gathered = [PROBABILITIES, TOP_CLASSES]
        _node(nodes, "GatherElements", gathered, TOP_PROBABILITIES, axis=1)
    graph.node.extend(nodes)
    kinds = {
        "logits": [logits],
        "probabilities": [_info(PROBABILITIES, TensorProto.FLOAT, (batch, classes))],
        "top5": [
            _info(TOP_CLASSES, TensorProto.INT64, (batch, top)),
            _info(TOP_PROBABILITIES, TensorProto.FLOAT, (batch, top)),
        ],
    }
    wanted = [info for name in outputs for info in kinds[name]]
    if logits.name != OUTPUT_NAME and "logits" in outputs:
        raise ConversionError(
            f"The graph's output is called '{logits.name}', not '{OUTPUT_NAME}'.",
            "Export the model again.",
        )
    copies = [type(info).FromString(info.SerializeToString()) for info in wanted]
    graph.ClearField("output")
    graph.output.extend(copies)


def _node(
    nodes: list[NodeProto], operator: str, inputs: list[str], name: str, **attributes: Any
) -> str:
    """Append a node whose output has its own name; return that name."""
    from onnx import helper

    nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
    return name


def _constant(model: ModelProto, name: str, values: npt.NDArray[Any]) -> None:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(values, name))


def _info(name: str, kind: int, shape: Sequence[int | str]) -> ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, kind, shape)


def _dimension(dimension: Any) -> int | str:
    """Return a dimension's number, or its name where it is free."""
    return dimension.dim_param or dimension.dim_value
