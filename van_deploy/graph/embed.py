"""Embed preprocessing and postprocessing in the graph, so that clients need not implement them.

A plain graph maps normalised floats to logits. An embedded one takes the
pixels of an image, and can also output probabilities and the top-k classes:

- ``uint8``: ``pixels (batch, S, S, C)`` bytes, the layout of image libraries,
  a quarter of the transfer. Cast, transpose and normalisation are nodes.
- ``normalize``: ``pixels (batch, C, S, S)`` float32 in 0..1.

Resizing and cropping stay with the client (:mod:`van_deploy.model.preprocess`).

The normalisation is not folded into the first convolution. The convolution
pads with zeros, which represent the *mean* colour; with the mean folded into
its bias they would represent black, and the borders would be incorrect. The
same three float32 operations in torchvision's order give the network
bit-identical inputs to the preprocessing in Python.
"""

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
    """Return a copy of ``model`` from pixels to ``outputs``; the batch stays dynamic.

    Args:
        model: a graph from ``images (batch, C, S, S)`` to ``logits (batch, K)``, both float32,
            of any precision inside.
        preprocessing: the normalisation that ``images`` needs.
        embedding: ``uint8``, ``normalize``, or ``none``, which leaves the input unchanged.
        outputs: a subset of ``logits``, ``probabilities`` and ``top5``. ``probabilities``
            is ``(batch, K)`` float32: the softmax, or the activation of ``task``; ``top5``
            adds ``top5_classes`` int64 and ``top5_probabilities`` float32, both
            ``(batch, min(5, K))`` in descending order.
        task: determines the activation of the probabilities.

    Raises:
        ConversionError: the outputs of the graph are not logits.
    """
    if [value.name for value in model.graph.output] != [OUTPUT_NAME]:
        names = ", ".join(f"'{value.name}'" for value in model.graph.output)
        raise ConversionError(
            f"Preprocessing cannot be embedded: the graph outputs {names}, not '{OUTPUT_NAME}'.",
            "Use the bundle's plain graph of a classifier.",
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
    """Insert the normalisation before the network's input."""
    graph, nodes = model.graph, list[NodeProto]()
    images = graph.input[0]
    batch, channels, height, width = _shape(images)
    dtype, shape, value = TensorProto.FLOAT, [batch, channels, height, width], PIXELS_NAME
    if embedding == "uint8":
        dtype, shape = TensorProto.UINT8, [batch, height, width, channels]
        value = _node(nodes, "Cast", [value], "preprocess.float", to=TensorProto.FLOAT)
        value = _node(nodes, "Transpose", [value], "preprocess.channels_first", perm=[0, 3, 1, 2])
        _store_(model, "preprocess.255", np.array(255, np.float32))
        value = _node(nodes, "Div", [value, "preprocess.255"], "preprocess.unit")
    for step, operator in (("mean", "Sub"), ("std", "Div")):
        constant = np.array(getattr(preprocessing, step), np.float32).reshape(1, -1, 1, 1)
        _store_(model, f"preprocess.{step}", constant)
        value = _node(nodes, operator, [value, f"preprocess.{step}"], f"preprocess.by_{step}")
    nodes[-1].output[0] = images.name
    nodes += graph.node
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.value_info.append(images)
    images.CopyFrom(helper.make_tensor_value_info(PIXELS_NAME, dtype, shape))


def _append_(model: ModelProto, outputs: Sequence[str], task: Task) -> None:
    """Append probabilities and the top-k classes to the network."""
    graph, nodes = model.graph, list[NodeProto]()
    logits = ValueInfoProto()
    logits.CopyFrom(graph.output[0])
    batch, classes = _shape(logits)
    if task is Task.SINGLE_LABEL:
        _node(nodes, "Softmax", [OUTPUT_NAME], PROBABILITIES, axis=1)
    else:
        activation = "Identity" if task is Task.REGRESSION else "Sigmoid"
        _node(nodes, activation, [OUTPUT_NAME], PROBABILITIES)
    top = min(TOP, int(classes))
    if "top5" in outputs:  # of the logits: a saturated softmax has ties
        _store_(model, "answer.k", np.array([top], np.int64))
        _node(nodes, "TopK", [OUTPUT_NAME, "answer.k"], "answer.top_logits", TOP_CLASSES, axis=1)
        _node(nodes, "GatherElements", [PROBABILITIES, TOP_CLASSES], TOP_PROBABILITIES, axis=1)
    graph.node.extend(nodes)
    info, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    values = {
        "logits": [logits],
        "probabilities": [info(PROBABILITIES, floats, [batch, classes])],
        "top5": [
            info(TOP_CLASSES, TensorProto.INT64, [batch, top]),
            info(TOP_PROBABILITIES, floats, [batch, top]),
        ],
    }
    graph.ClearField("output")
    graph.output.extend(value for name in outputs for value in values[name])


def _node(
    nodes: list[NodeProto], operator: str, inputs: list[str], *outputs: str, **attributes: Any
) -> str:
    """Append a node named after its first output; return that name."""
    nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
    return outputs[0]


def _store_(model: ModelProto, name: str, values: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(values, name))


def _shape(value: ValueInfoProto) -> list[int | str]:
    """Return the dimensions of a value; dynamic dimensions are names."""
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
