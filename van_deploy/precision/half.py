"""FP16 written into the graph: types in the file, casts only where the type changes.

LayerNorm, the mean over tokens and the head stay FP32: they cost nothing, and
LayerNorm's overflow is the best-known failure of FP16 (NVIDIA/TensorRT issues
2564 and 4493). What else has to stay is read from the ranges of real images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from van_deploy.errors import UsageError

__all__ = ["DEFAULT_KEEP", "HalfGraph", "half_from_fp32", "kept_nodes"]

DEFAULT_KEEP = ("norm1", "norm2", "norm3", "norm4", "head")
"""Modules that stay FP32: the stages' LayerNorms, the mean behind the last, and the head."""

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


@dataclass(frozen=True)
class HalfGraph:
    """A graph in FP16, but for what was kept.

    Attributes:
        model: the graph; its input and output are FP32 unless asked otherwise.
        kept: nodes that stayed FP32, and why.
        casts: how many Cast nodes stand between the two types.
    """

    model: ModelProto
    kept: Mapping[str, str]
    casts: int


def kept_nodes(model: ModelProto, keep: Sequence[str]) -> dict[str, str]:
    """Return the nodes that the names in ``keep`` mean, each with the name that matched.

    A name is a module's path, and means all below it; otherwise it is a regular
    expression for the whole of a node's name.

    Raises:
        UsageError: one is no expression, or means no node.
    """
    found: dict[str, str] = {}
    names = [node.name for node in model.graph.node]
    for entry in keep:
        matched = [name for name in names if name == entry or name.startswith(f"{entry}.")]
        if not matched:
            try:
                pattern = re.compile(entry)
            except re.error as error:
                raise UsageError(
                    f"'{entry}' is neither a module nor a regular expression: {error}.",
                    "Name modules as `van-deploy inspect` lists them, such as block1.0.mlp.",
                ) from error
            matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            raise UsageError(
                f"There is no module '{entry}' to keep in FP32.",
                f"Modules are named like '{names[len(names) // 2]}'; "
                "`van-deploy inspect` lists them.",
            )
        found |= dict.fromkeys(matched, f"'{entry}' is kept")
    return found


def half_from_fp32(
    model: ModelProto, kept: Mapping[str, str], *, half_io: bool = False
) -> HalfGraph:
    """Return ``model`` in FP16 but for the nodes in ``kept``.

    Args:
        model: an FP32 graph, not changed.
        kept: names of nodes that stay FP32, and why.
        half_io: make the graph's input and output FP16 as well.
    """
    converter = _Converter(model, set(kept), half_io)
    return HalfGraph(converter.converted(), dict(kept), converter.casts)


class _Converter:
    """Walks a graph in order, giving each node inputs of its own type."""

    def __init__(self, model: ModelProto, kept: set[str], half_io: bool) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.kept = kept
        self.half_io = half_io
        self.casts = 0
        graph = self.model.graph
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.types: dict[str, int] = {}  # of the tensors nodes make, and of the inputs
        self.renamed: dict[tuple[str, int], str] = {}  # what a tensor is called as another type
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, TensorProto] = {}

    def converted(self) -> ModelProto:
        graph = self.model.graph
        for value in graph.input:
            if value.type.tensor_type.elem_type == FLOAT:
                if self.half_io:
                    value.type.tensor_type.elem_type = FLOAT16
                self.types[value.name] = value.type.tensor_type.elem_type
        for node in list(graph.node):
            self._convert(node)
        self._restore_outputs()
        copied = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        weights = [TensorProto.FromString(t.SerializeToString()) for t in self.weights.values()]
        for field in (graph.node, graph.initializer, graph.value_info):
            del field[:]
        graph.node.extend(copied)
        graph.initializer.extend(weights)
        return self.model

    def _convert(self, node: NodeProto) -> None:
        wanted = FLOAT if node.name in self.kept else FLOAT16
        for index, name in enumerate(node.input):
            if name in self.stored:
                node.input[index] = self._weight(name, wanted)
            elif name in self.types:
                node.input[index] = self._cast(name, wanted)
        for name in node.output:
            self.types[name] = wanted
        self.nodes.append(node)

    def _weight(self, name: str, wanted: int) -> str:
        """Return the name of a stored tensor in the type ``wanted``; other types stay."""
        tensor = self.stored[name]
        if tensor.data_type != FLOAT:
            self.weights[name] = tensor
            return name
        taken = self.weights.get(name)
        called = name if taken is None or taken.data_type == wanted else f"{name}.{_word(wanted)}"
        if called not in self.weights:
            values = numpy_helper.to_array(tensor)
            values = values.astype(np.float16) if wanted == FLOAT16 else values
            self.weights[called] = numpy_helper.from_array(values, called)
        return called

    def _cast(self, name: str, wanted: int) -> str:
        """Return what tensor ``name`` is called as ``wanted``, cast once for all its readers."""
        if self.types[name] == wanted:
            return name
        if (name, wanted) not in self.renamed:
            cast = f"{name}.{_word(wanted)}"
            self.nodes.append(helper.make_node("Cast", [name], [cast], f"{cast}.cast", to=wanted))
            self.renamed[name, wanted] = cast
            self.casts += 1
        return self.renamed[name, wanted]

    def _restore_outputs(self) -> None:
        """Give the graph's outputs the type asked for, under their own names."""
        wanted = FLOAT16 if self.half_io else FLOAT
        for value in self.model.graph.output:
            made = self.types.get(value.name, wanted)
            if made != wanted:
                inner = f"{value.name}.{_word(made)}"
                for node in self.nodes:
                    _rename(node.output, value.name, inner)
                    _rename(node.input, value.name, inner)
                self.nodes.append(
                    helper.make_node("Cast", [inner], [value.name], f"{value.name}.cast", to=wanted)
                )
                self.casts += 1
            value.type.tensor_type.elem_type = wanted


def _rename(names: MutableSequence[str], old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new


def _word(kind: int) -> str:
    return "fp16" if kind == FLOAT16 else "fp32"
