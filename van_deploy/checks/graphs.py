"""An ONNX graph opened at the modules' results.

Two forms of one graph:

* :func:`with_taps` returns every module's result beside the logits: the error *so far*,
  with everything before it included;
* :func:`isolated` cuts the graph there. Each part reads the reference's tensor where it read
  its predecessor's, so what comes out is the error the part adds by itself.

Tensors are named after PyTorch modules (:mod:`van_deploy.graph.export`), and the precision
passes keep those names, so the same cuts fit every artifact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper, shape_inference

from van_deploy.errors import UsageError
from van_deploy.graph.names import module_of
from van_deploy.graph.shapes import with_dynamic_batch_
from van_deploy.runners.onnxruntime import inference_session, require_onnxruntime

__all__ = [
    "Cut",
    "Level",
    "cuts_of",
    "isolated",
    "part_name",
    "quiet_session",
    "run_taps",
    "tensor_types",
    "with_taps",
]

Level = Literal["stage", "block", "module"]
LEVELS: tuple[Level, ...] = ("stage", "block", "module")
FED = ".reference"  # suffix of the input that stands for a cut tensor

_UNIT = re.compile(r"(patch_embed(?P<embed>\d)|block(?P<block>\d)\.\d+|norm(?P<norm>\d)|head)\b")


@dataclass(frozen=True)
class Cut:
    """A place where a graph can be opened.

    Attributes:
        name: the PyTorch module (or stage) whose result passes there.
        tensor: the tensor's name in the graph.
    """

    name: str
    tensor: str


def cuts_of(model: ModelProto, level: Level, modules: Iterable[str]) -> list[Cut]:
    """Return where to open a graph, in order, so that each part is a stage, block or module.

    Args:
        model: the FP32 graph, whose nodes are named after modules.
        level: how fine.
        modules: paths of the modules whose reference result is known.

    Raises:
        UsageError: the graph's nodes carry no module names.
    """
    known = set(modules)
    last: dict[str, str] = {}  # the last tensor of each part, in the graph's order
    for node in model.graph.node:
        tensor = node.output[0]
        module = module_of(tensor)
        if module not in known:
            continue
        name = module if level == "module" else _unit(node.name or module, level)
        if name:
            last.pop(name, None)
            last[name] = tensor
    if not last:
        raise UsageError(
            "The graph's nodes are not named after PyTorch modules, so drift cannot be placed.",
            "Export the network with van-deploy, which names them.",
        )
    return [Cut(name, tensor) for name, tensor in last.items()]


def _unit(node: str, level: Level) -> str:
    """Return the block or stage that a node belongs to ("" for none)."""
    unit = _UNIT.match(node)
    if unit is None:
        return ""
    stage = unit["embed"] or unit["block"] or unit["norm"]
    return f"stage{stage}" if level == "stage" and stage else unit[0]


def part_name(module: str, level: Level, parts: Iterable[str]) -> str:
    """Return the part that a module is in: the longest of the names it begins with, or "".

    >>> part_name("block1.0.mlp.fc2", "block", ["block1.0", "block1.1"])
    'block1.0'
    >>> part_name("block1.0.mlp.fc2", "stage", ["stage1"])
    'stage1'
    """
    if level == "stage":
        return _unit(module, level)
    around = [part for part in parts if f"{module}.".startswith(f"{part}.")]
    return max(around, key=len, default="")


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
    types = tensor_types(model)
    cut = with_taps(model, tensors)
    inside, read = set(tensors), set()
    for node in cut.graph.node:
        for index, name in enumerate(node.input):
            if name in inside:
                node.input[index] = f"{name}{FED}"
                read.add(name)
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
    ort = require_onnxruntime()
    options = ort.SessionOptions()
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
        value.name: feeds[value.name].astype(_NUMPY[value.type]) for value in session.get_inputs()
    }
    names = [value.name for value in session.get_outputs()]
    for name, value in zip(names, session.run(names, given), strict=True):
        yield name, value.astype(np.float64)


_NUMPY: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
