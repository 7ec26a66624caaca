"""An ONNX graph opened at its tensors.

Two forms of one graph:

* :func:`with_taps` returns tensors beside the logits: the error *so far*, with everything
  before it included;
* :func:`isolated` cuts the graph there. Each part reads the reference's tensor where it read
  its predecessor's, so what comes out is the error the part adds by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper, shape_inference

from van_deploy.graph.names import with_dynamic_batch_
from van_deploy.runners.onnxruntime import inference_session, require_onnxruntime

FED = ".reference"  # suffix of the input that stands for a cut tensor
NUMPY: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


def with_taps(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` with ``tensors`` as its outputs, in that order.

    A static batch becomes dynamic: nothing inside a graph depends on it.
    """
    types = tensor_types(model)
    tapped = ModelProto()
    tapped.CopyFrom(model)
    with_dynamic_batch_(tapped)
    del tapped.graph.output[:]
    tapped.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None) for name in tensors
    )
    return tapped


def isolated(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` cut at ``tensors``: they are outputs, and inputs of what follows.

    The input that replaces tensor ``t`` is ``t.reference``, of ``t``'s type;
    those that nothing reads are left out.
    """
    cut, inside = with_taps(model, tensors), set(tensors)
    read = inside.intersection(name for node in cut.graph.node for name in node.input)
    for node in cut.graph.node:
        for index, name in enumerate(node.input):
            if name in inside:
                node.input[index] = f"{name}{FED}"
    types = {value.name: value.type.tensor_type.elem_type for value in cut.graph.output}
    cut.graph.input.extend(
        helper.make_tensor_value_info(f"{name}{FED}", types[name], None)
        for name in tensors
        if name in read
    )
    return cut


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Return the element type of every tensor, as ONNX's own inference finds it."""
    graph = shape_inference.infer_shapes(model).graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def quiet_session(model: ModelProto) -> Any:
    """Return an ONNX Runtime session on the CPU that prints nothing of its failures.

    BF16 is emulated in it, with the same names.
    """
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = 4  # failures are reported by who asked, not on the screen
    return inference_session(model, options, ["CPUExecutionProvider"])[0]


def run_taps(
    session: Any, feeds: Mapping[str, npt.NDArray[Any]]
) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    """Yield each output's name and float64 value, feeding what the graph asks for.

    Args:
        session: an ONNX Runtime session.
        feeds: values by input name, and reference tensors by ``t.reference``;
            each is cast to the input's own type.
    """
    given = {
        value.name: feeds[value.name].astype(NUMPY[value.type]) for value in session.get_inputs()
    }
    names = [value.name for value in session.get_outputs()]
    for name, value in zip(names, session.run(names, given), strict=True):
        yield name, value.astype(np.float64)


def one_line(error: Exception) -> str:
    """Return what a runtime's error says, in one line of at most 600 characters."""
    return " ".join(str(error).split())[:600]
