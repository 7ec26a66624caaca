"""Preprocessing and answers inside the graph, so that nobody has to write them twice.

A plain graph takes normalised floats and gives logits. An embedded one takes
the image's own numbers and can give probabilities and the top-k classes too:

- ``uint8``: ``pixels (batch, S, S, C)`` bytes, as every image library holds
  them and a quarter of the transfer. Cast, layout and normalisation are nodes.
- ``normalize``: ``pixels (batch, C, S, S)`` float32 in 0..1.

Resizing and cropping stay with the client (:mod:`van_deploy.model.preprocess`).

Nothing is folded into the first convolution. It pads with zeros, which stand
for the *mean* colour: with the subtraction folded into its bias they would
stand for black, and the borders of the answer would be wrong. Kept as nodes,
the same three float32 operations in torchvision's order give the network the
very bits that the file pipeline gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from van_deploy.errors import ConversionError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import Task
from van_deploy.model.preprocess import Preprocessing

PIXELS_NAME = "pixels"
PROBABILITIES = "probabilities"
TOP_CLASSES = "top5_classes"
TOP_PROBABILITIES = "top5_probabilities"
TOP = 5


def embed_preprocessing(
    model: ModelProto,
    preprocessing: Preprocessing,
    embedding: str = "uint8",
    outputs: Sequence[str] = ("logits",),
    task: Task = Task.SINGLE_LABEL,
) -> ModelProto:
    """Return a copy of ``model`` that takes pixels and gives ``outputs``; the batch stays dynamic.

    Args:
        model: a graph from ``images (batch, C, S, S)`` to ``logits (batch, K)``, of any
            precision inside.
        preprocessing: what ``images`` must have gone through.
        embedding: ``uint8``, ``normalize``, or ``none``: the input stays as it is.
        outputs: some of ``logits``, ``probabilities`` and ``top5``, each once. ``probabilities``
            is the softmax ``(batch, K)`` float32, or what else ``task`` makes of logits; ``top5``
            gives ``top5_classes`` int64 and ``top5_probabilities`` float32, both
            ``(batch, min(5, K))``, the most probable first.
        task: how logits become probabilities.

    Raises:
        ConversionError: the graph gives something else than logits.
    """
    if [value.name for value in model.graph.output] != [OUTPUT_NAME]:
        given = ", ".join(f"'{value.name}'" for value in model.graph.output)
        raise ConversionError(
            f"Preprocessing cannot be embedded: the graph gives {given}, not '{OUTPUT_NAME}'.",
            "Start from the bundle's plain graph of a classifier.",
        )
    embedded = ModelProto()
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


def _prepend_(model: ModelProto, preprocessing: Preprocessing, embedding: str) -> None:
    """Put normalisation before the network; its old input becomes an inner value."""
    graph, nodes = model.graph, list[NodeProto]()
    images = graph.input[0]
    batch, channels, height, width = _shape(images)
    kind, shape, value = TensorProto.FLOAT, [batch, channels, height, width], PIXELS_NAME
    if embedding == "uint8":
        kind, shape = TensorProto.UINT8, [batch, height, width, channels]
        value = _node(nodes, "Cast", [value], "preprocess.float", to=TensorProto.FLOAT)
        value = _node(nodes, "Transpose", [value], "preprocess.channels_first", perm=[0, 3, 1, 2])
        _store_(model, "preprocess.255", np.array(255, np.float32))
        value = _node(nodes, "Div", [value, "preprocess.255"], "preprocess.unit")
    for step, operator in (("mean", "Sub"), ("std", "Div")):
        constant = np.array(getattr(preprocessing, step), np.float32).reshape(1, -1, 1, 1)
        _store_(model, f"preprocess.{step}", constant)
        value = _node(nodes, operator, [value, f"preprocess.{step}"], f"preprocess.by_{step}")
    wanted = images.type.tensor_type.elem_type
    if wanted != TensorProto.FLOAT:
        _node(nodes, "Cast", [value], "preprocess.to_network", to=wanted)
    nodes[-1].output[0] = images.name
    nodes += graph.node
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.value_info.append(images)
    images.CopyFrom(helper.make_tensor_value_info(PIXELS_NAME, kind, shape))


def _append_(model: ModelProto, outputs: Sequence[str], task: Task) -> None:
    """Put probabilities and the top-k classes behind the network."""
    graph, nodes = model.graph, list[NodeProto]()
    logits = ValueInfoProto()
    logits.CopyFrom(graph.output[0])
    batch, classes = _shape(logits)
    scores = logits.name
    if logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        scores = _node(nodes, "Cast", [scores], "answer.float", to=TensorProto.FLOAT)
    if task is Task.SINGLE_LABEL:
        _node(nodes, "Softmax", [scores], PROBABILITIES, axis=1)
    else:
        _node(nodes, "Identity" if task is Task.REGRESSION else "Sigmoid", [scores], PROBABILITIES)
    top = min(TOP, int(classes))
    if "top5" in outputs:  # of the logits: where a softmax saturates, it holds ties
        _store_(model, "answer.k", np.array([top], np.int64))
        _node(nodes, "TopK", [scores, "answer.k"], "answer.top_logits", TOP_CLASSES, axis=1)
        _node(nodes, "GatherElements", [PROBABILITIES, TOP_CLASSES], TOP_PROBABILITIES, axis=1)
    graph.node.extend(nodes)
    info, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    kinds = {
        "logits": [logits],
        "probabilities": [info(PROBABILITIES, floats, [batch, classes])],
        "top5": [
            info(TOP_CLASSES, TensorProto.INT64, [batch, top]),
            info(TOP_PROBABILITIES, floats, [batch, top]),
        ],
    }
    graph.ClearField("output")
    graph.output.extend(value for name in outputs for value in kinds[name])


def _node(
    nodes: list[NodeProto], operator: str, inputs: list[str], *outputs: str, **attributes: Any
) -> str:
    """Append a node called as its first output; return that name."""
    nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
    return outputs[0]


def _store_(model: ModelProto, name: str, values: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(values, name))


def _shape(value: ValueInfoProto) -> list[int | str]:
    """Return the dimensions of a value: numbers, and names where they are dynamic."""
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
