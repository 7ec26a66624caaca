"""An ONNX graph opened at the modules' outputs, to see what each part adds by itself.

Two forms of one graph:

* :func:`with_taps` returns every module's output beside the logits: the error
  *so far*, with everything before it included;
* :func:`isolated` cuts the graph there. Each part reads the reference's tensor
  where it read its predecessor's, so what comes out is the error the part *adds*.

Tensors are named after PyTorch modules (:mod:`van_deploy.graph.export`), and the
precision passes keep those names, so the same cuts fit every artefact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from van_deploy.errors import UsageError
from van_deploy.graph.names import OUTPUT_NAME

__all__ = [
    "LEVELS",
    "Cut",
    "Level",
    "cuts_of",
    "isolated",
    "part_name",
    "part_of",
    "run_taps",
    "tensor_types",
    "with_taps",
]

Level = Literal["stage", "block", "module"]
LEVELS: tuple[Level, ...] = ("stage", "block", "module")

_UNIT = re.compile(r"(patch_embed(?P<embed>\d)|block(?P<block>\d)\.\d+|norm(?P<norm>\d)|head)\b")
FED = ".reference"  # suffix of the input that stands for a cut tensor


@dataclass(frozen=True)
class Cut:
    """A place where the graph can be opened.

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
        modules: paths of the network's modules, whose reference output is known.

    Raises:
        UsageError: the graph's nodes carry no module names.
    """
    known = set(modules)
    last: dict[str, str] = {}  # the last tensor of each part, in the graph's order
    for node in model.graph.node:
        tensor = node.output[0]
        module = "head" if tensor == OUTPUT_NAME else tensor
        name = _part(node.name, module, level, known)
        if name and (level != "module" or module in known):
            last.pop(name, None)
            last[name] = tensor
    cuts = [Cut(name, tensor) for name, tensor in last.items()]
    cuts = [cut for cut in cuts if cut.tensor == OUTPUT_NAME or cut.tensor in known]
    if not cuts:
        raise UsageError(
            "The graph's nodes are not named after PyTorch modules, so drift cannot be placed.",
            "Export the network with van-deploy, which names them.",
        )
    return cuts


def _part(node: str, module: str, level: Level, known: set[str]) -> str:
    """Return which part a node belongs to ("" for none)."""
    if level == "module":
        return module if module in known else ""
    unit = _UNIT.match(node if node else module)
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
        return _part(module, module, level, set())
    around = [part for part in parts if f"{module}.".startswith(f"{part}.")]
    return max(around, key=len, default="")


def with_taps(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` with ``tensors`` as its outputs, in that order."""
    tapped = ModelProto()
    tapped.CopyFrom(model)
    _set_outputs_(tapped, tensors)
    return tapped


def isolated(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` cut at ``tensors``: they are outputs, and inputs of what follows.

    The input that replaces tensor ``t`` is ``t.reference``, of ``t``'s type;
    those that nothing reads are left out.
    """
    cut = with_taps(model, tensors)
    graph = cut.graph
    types = tensor_types(cut)
    inside = set(tensors)
    read = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in inside:
                node.input[index] = f"{name}{FED}"
                read.add(name)
    graph.input.extend(
        helper.make_tensor_value_info(f"{name}{FED}", types[name], None)
        for name in tensors
        if name in read
    )
    return cut


def part_of(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return only what a graph needs to make some of its tensors, which are its outputs."""
    part = with_taps(model, tensors)
    wanted: set[str] = set(tensors)
    nodes: list[NodeProto] = []
    for node in reversed(part.graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(NodeProto.FromString(node.SerializeToString()))
    inputs = [value for value in model.graph.input if value.name in wanted]
    stored = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    for field in (part.graph.node, part.graph.input, part.graph.initializer):
        del field[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.input.extend(inputs)
    part.graph.initializer.extend(stored)
    return part


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


def _set_outputs_(model: ModelProto, tensors: Sequence[str]) -> None:
    types = tensor_types(model)
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None) for name in tensors
    )


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Return the element type of every float tensor, by following the graph's own types."""
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        kind = _output_type(node, types)
        types |= dict.fromkeys(node.output, kind)
    return types


def _output_type(node: NodeProto, types: Mapping[str, int]) -> int:
    if node.op_type in {"Cast", "Constant"}:
        for attribute in node.attribute:
            if attribute.name == "to":
                return int(attribute.i)
            if attribute.name == "value":
                return int(attribute.t.data_type)
    if node.op_type == "QuantizeLinear":
        return types.get(node.input[2], TensorProto.UINT8) if len(node.input) > 2 else 2
    if node.op_type == "DequantizeLinear":
        return types[node.input[1]]
    return next((types[name] for name in node.input if name in types), TensorProto.FLOAT)
