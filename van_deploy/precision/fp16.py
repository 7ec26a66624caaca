"""FP16 and BF16 written into the graph: types in the file, casts only where the type changes.

LayerNorm, the mean over tokens and the head stay FP32: they cost nothing, and LayerNorm's
overflow is the best-known failure of FP16 (NVIDIA/TensorRT issues 2564 and 4493). What else
has to stay in FP32 beside FP16 is read from the ranges of real images
(:mod:`van_deploy.precision.range_audit`); BF16 has FP32's own range, and 8 bits of precision
where FP16 has 11.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import cast

import onnx_ir as ir
from onnx import ModelProto
from onnx.helper import find_min_ir_version_for

from van_deploy.errors import ConversionError, UsageError

DEFAULT_KEEP = ("norm1", "norm2", "norm3", "norm4", "head")
"""Modules that stay FP32: the stages' LayerNorms, the mean behind the last, and the head."""

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_SUFFIXES = {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}

BF16_OPSET = 22
"""The first whose Conv takes BF16."""

OLDEST_RAISED = 18
"""From here to :data:`BF16_OPSET` no operator of a VAN changes its meaning."""


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
        wrong = ""
        try:
            matched = matched or [name for name in names if re.fullmatch(entry, name)]
        except re.error as error:
            wrong = f", and as a regular expression it is wrong: {error}"
        if not matched:
            raise UsageError(
                f"There is nothing called '{entry}' to keep in FP32{wrong}.",
                "Name modules as `van-deploy inspect` does, for instance "
                f"'{names[len(names) // 2]}' or a part before a dot.",
            )
        found |= dict.fromkeys(matched, f"'{entry}' is kept")
    return found


def usually_kept(model: ModelProto) -> dict[str, str]:
    """Return the nodes of :data:`DEFAULT_KEEP`; a backbone has no head, and may end early."""
    roots = {node.name.split(".")[0] for node in model.graph.node}
    return kept_nodes(model, [name for name in DEFAULT_KEEP if name in roots])


def fp16_from_fp32(
    model: ModelProto, kept: Collection[str] = (), *, half_io: bool = False
) -> ModelProto:
    """Return ``model`` in FP16, but for some nodes.

    Args:
        model: an FP32 graph; it is not changed.
        kept: names of nodes that stay FP32.
        half_io: make the graph's input and output FP16 too.
    """
    return _Halving(model, FLOAT16, kept, FLOAT16 if half_io else FLOAT).converted()


def bf16_from_fp32(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """Return ``model`` in BF16, but for some nodes and its input and output.

    The result has opset :data:`BF16_OPSET`.

    Args:
        model: an FP32 graph; it is not changed.
        kept: names of nodes that stay FP32.

    Raises:
        ConversionError: the graph's opset is too old to be raised by its number alone.
    """
    opset = next(o for o in model.opset_import if o.domain in {"", "ai.onnx"})
    if opset.version < OLDEST_RAISED:
        raise ConversionError(
            f"The graph has opset {opset.version}; BF16 convolutions need {BF16_OPSET}, and only "
            f"graphs from {OLDEST_RAISED} on can be raised to it.",
            "Export it again with --opset 20.",
        )
    half = _Halving(model, BFLOAT16, kept, FLOAT).converted()
    for entry in half.opset_import:
        if entry.domain in {"", "ai.onnx"}:
            entry.version = max(entry.version, BF16_OPSET)
    half.ir_version = max(half.ir_version, find_min_ir_version_for(half.opset_import))
    return half


class _Halving:
    """One conversion of a graph to a 16-bit type.

    Args:
        model: FP32; it is not changed.
        kind: the 16-bit type.
        kept: names of nodes that stay FP32.
        edge: type of the graph's input and outputs.
    """

    def __init__(
        self, model: ModelProto, kind: ir.DataType, kept: Collection[str], edge: ir.DataType
    ) -> None:
        self.model, self.kind, self.kept, self.edge = ir.from_proto(model), kind, kept, edge
        self.graph = self.model.graph
        self.copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def converted(self) -> ModelProto:
        """Return the graph; call it once."""
        for value in self.graph.inputs:
            value.dtype = self.edge
        for node in list(self.graph):
            wanted = FLOAT if node.name in self.kept else self.kind
            for place, given in enumerate(node.inputs):
                value = cast("ir.Value", given)  # VAN's operators leave no input out
                if value.dtype in {FLOAT, self.kind} and value.dtype is not wanted:
                    self._convert_(node, place, value, wanted)  # no integers, such as axes
            for value in node.outputs:
                value.dtype = wanted
        for value in list(self.graph.outputs):
            if value.dtype is not self.edge:
                self._cast_output_(value)
        return ir.to_proto(self.model)

    def _convert_(self, node: ir.Node, place: int, value: ir.Value, wanted: ir.DataType) -> None:
        if value.is_initializer() and not any(n.name in self.kept for n, _ in value.uses()):
            value.const_value, value.dtype = _stored(value, str(value.name), wanted), wanted
            return
        if (value, wanted) not in self.copies:
            self.copies[value, wanted] = self._copy(node, value, wanted)
        node.replace_input_with(place, self.copies[value, wanted])

    def _copy(self, node: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """Return ``value`` as ``kind``: a stored copy, or a Cast put before ``node``."""
        name = f"{value.name}.{_SUFFIXES[kind]}"
        if value.is_initializer():
            copy = ir.val(name, const_value=_stored(value, name, kind))
            self.graph.register_initializer(copy)
            return copy
        cast_ = _cast(value, name, kind)
        self.graph.insert_before(node, cast_)
        return cast_.outputs[0]

    def _cast_output_(self, value: ir.Value) -> None:
        """Make an output of the graph of the edge's type, under its own name."""
        producer, name = value.producer(), str(value.name)
        value.name = f"{name}.{_SUFFIXES[cast('ir.DataType', value.dtype)]}"
        cast_ = _cast(value, name, self.edge)
        if producer is not None:
            self.graph.insert_after(producer, cast_)
        self.graph.outputs[self.graph.outputs.index(value)] = cast_.outputs[0]


def _stored(value: ir.Value, name: str, kind: ir.DataType) -> ir.TensorProtocol:
    """Return a stored value's numbers as ``kind``."""
    numbers = cast("ir.TensorProtocol", value.const_value).numpy()
    return ir.tensor(numbers.astype(kind.numpy()), name=name)


def _cast(value: ir.Value, name: str, kind: ir.DataType) -> ir.Node:
    """Return a Cast of ``value`` to ``kind``, whose output is called ``name``."""
    made = ir.val(name, kind, value.shape)
    return ir.node("Cast", [value], {"to": kind}, outputs=[made], name=f"{name}.cast")
