"""FP16 written into the graph: types in the file, casts only where the type changes.

LayerNorm, the mean over tokens and the head stay FP32: they cost nothing, and LayerNorm's
overflow is the best-known failure of FP16 (NVIDIA/TensorRT issues 2564 and 4493). What else
has to stay is read from the ranges of real images (:func:`audit_ranges`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from van_deploy.errors import GateFailed, UsageError
from van_deploy.precision.observers import ChannelRange
from van_deploy.precision.scales import FP16_LARGEST

__all__ = [
    "DEFAULT_KEEP",
    "HEADROOM",
    "RangeAudit",
    "RangeProblem",
    "audit_ranges",
    "fp16_from_fp32",
    "kept_nodes",
]

DEFAULT_KEEP = ("norm1", "norm2", "norm3", "norm4", "head")
"""Modules that stay FP32: the stages' LayerNorms, the mean behind the last, and the head."""

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_SMALLEST = 2.0**-25  # rounds to the smallest FP16 number; below it, to zero

HEADROOM = 2.0
"""Images not seen in the audit may reach further: what passes half of 65504 is kept in FP32."""

LOST_ENERGY = 1e-3
"""Largest share of a weight's sum of squares that may vanish in FP16."""

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


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
                    "Name modules as `van-deploy inspect` does, for instance block1.0.mlp.",
                ) from error
            matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            raise UsageError(
                f"There is nothing called '{entry}' to keep in FP32.",
                f"Modules are called like '{names[len(names) // 2]}', or a part before a dot.",
            )
        found |= dict.fromkeys(matched, f"'{entry}' is kept")
    return found


# --- what FP16 cannot hold -----------------------------------------------------------------


@dataclass(frozen=True)
class RangeProblem:
    """A tensor or a weight that FP16 cannot hold.

    Attributes:
        name: of the tensor.
        largest: its largest magnitude.
        problem: why, after its name.
    """

    name: str
    largest: float
    problem: str


@dataclass(frozen=True)
class RangeAudit:
    """Every tensor and weight of a graph against FP16.

    Attributes:
        images: how many images the activations were seen on.
        headroom: how much further than seen an activation must be able to reach.
        largest_activation: the tensor that reaches furthest, and how far.
        smallest_activation: the tensor whose largest magnitude is least, and how large.
        problems: what FP16 cannot hold of what would be FP16.
        kept: nodes that have to stay FP32 because of that, and why.
    """

    images: int
    headroom: float
    largest_activation: tuple[str, float]
    smallest_activation: tuple[str, float]
    problems: tuple[RangeProblem, ...]
    kept: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the audit, ready for JSON."""
        return asdict(self)

    def require_passed(self) -> None:
        """Do nothing if FP16 holds everything.

        Raises:
            GateFailed: something would have to stay FP32 that nobody asked to keep.
        """
        if not self.problems:
            return
        reasons = [f"'{found.name}' {found.problem}" for found in self.problems]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise GateFailed(
            f"FP16 cannot hold everything: {'; '.join(reasons[:3])}{more}.",
            "Name the modules with --keep, or leave out --strict to have them kept in FP32.",
        )


def audit_ranges(
    model: ModelProto, ranges: Mapping[str, ChannelRange], kept: Collection[str], images: int
) -> RangeAudit:
    """Return what FP16 cannot hold of ``model``.

    Args:
        model: the FP32 graph.
        ranges: of its tensors, on real images.
        kept: nodes that stay FP32 anyway; their own weights, and tensors between two of
            them, are no problem.
        images: how many images the ranges are of.
    """
    graph = ir.from_proto(model).graph
    largest = {name: record.largest for name, record in ranges.items()}
    problems: list[RangeProblem] = []
    reasons: dict[str, str] = {}
    for value in _values(graph):
        name = str(value.name)
        nodes = [node for node, _ in value.uses()] + [value.producer()]
        concerned = {str(node.name) for node in nodes if node is not None} - set(kept)
        if not concerned:
            continue
        if value.const_value is not None:
            found = _weight_problem(name, value.const_value)
        else:
            found = _activation_problem(name, largest.get(name, 0.0))
        if found is not None:
            problems.append(found)
            reasons |= dict.fromkeys(concerned, f"'{name}' {found.problem}")
    filled = {name: size for name, size in largest.items() if size > 0}
    return RangeAudit(
        images,
        HEADROOM,
        max(filled.items(), key=lambda item: item[1]),
        min(filled.items(), key=lambda item: item[1]),
        tuple(problems),
        {str(n.name): reasons[str(n.name)] for n in graph if n.name in reasons},
    )


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in graph for value in node.outputs]
    stored = [v for v in graph.initializers.values() if v.dtype is FLOAT]
    return [*graph.inputs, *made, *stored]


def _activation_problem(name: str, largest: float) -> RangeProblem | None:
    if largest * HEADROOM > FP16_LARGEST:
        return RangeProblem(name, largest, f"reaches {largest:g}, beyond half of FP16's 65504")
    if 0 < largest < FP16_SMALLEST_NORMAL:
        why = f"never passes {largest:g}, below FP16's smallest normal number 6.1e-5"
        return RangeProblem(name, largest, why)
    return None


def _weight_problem(name: str, tensor: ir.TensorProtocol) -> RangeProblem | None:
    magnitude = np.abs(tensor.numpy().astype(np.float64)).ravel()
    filled, largest = magnitude[magnitude > 0], float(magnitude.max(initial=0.0))
    vanishing = filled[filled <= FP16_SMALLEST]
    if largest > FP16_LARGEST:
        return RangeProblem(name, largest, f"holds {largest:g}, beyond FP16's 65504")
    if np.square(vanishing).sum() > LOST_ENERGY * np.square(filled).sum():
        why = f"loses {vanishing.size} of its {filled.size} values, which FP16 rounds to zero"
        return RangeProblem(name, largest, why)
    return None


# --- the conversion ------------------------------------------------------------------------


def fp16_from_fp32(
    model: ModelProto, kept: Collection[str] = (), *, half_io: bool = False
) -> ModelProto:
    """Return ``model`` in FP16, but for some nodes.

    Args:
        model: an FP32 graph; it is not changed.
        kept: names of nodes that stay FP32.
        half_io: make the graph's input and output FP16 too.
    """
    result = ir.from_proto(model)
    graph = result.graph
    edge = FLOAT16 if half_io else FLOAT
    for value in graph.inputs:
        value.dtype = edge
    converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        wanted = FLOAT if node.name in kept else FLOAT16
        for place, given in enumerate(node.inputs):
            value = cast("ir.Value", given)  # VAN's operators leave no input out
            if value.dtype not in {FLOAT, FLOAT16} or value.dtype is wanted:
                continue  # the right type, or integers such as axes
            if value.is_initializer() and not any(n.name in kept for n, _ in value.uses()):
                _store_as_fp16_(value)
                continue
            if (value, wanted) not in converted:
                converted[value, wanted] = _converted(graph, node, value, wanted)
            node.replace_input_with(place, converted[value, wanted])
        for value in node.outputs:
            value.dtype = wanted
    for value in graph.outputs:
        if value.dtype is not edge:
            _cast_output_(graph, value, edge)
    return ir.to_proto(result)


def _store_as_fp16_(value: ir.Value) -> None:
    stored = value.const_value
    if stored is not None:
        value.const_value = ir.tensor(stored.numpy().astype(np.float16), name=value.name)
        value.dtype = FLOAT16


def _converted(graph: ir.Graph, node: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """Return ``value`` as ``kind``: a stored copy, or a Cast put before ``node``."""
    name = f"{value.name}.{'fp16' if kind is FLOAT16 else 'fp32'}"
    if value.is_initializer():
        copy = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(FLOAT), const_value=value.const_value
        )
        _store_as_fp16_(copy)
        graph.register_initializer(copy)
        return copy
    cast = ir.node("Cast", [value], {"to": kind}, name=f"{name}.cast")
    _describe_(cast.outputs[0], name, kind, value.shape)
    graph.insert_before(node, cast)
    return cast.outputs[0]


def _cast_output_(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> None:
    """Make an output of the graph ``kind``, under its own name."""
    producer, name = value.producer(), value.name
    value.name = f"{name}.{'fp16' if value.dtype is FLOAT16 else 'fp32'}"
    cast = ir.node("Cast", [value], {"to": kind}, name=f"{name}.cast")
    _describe_(cast.outputs[0], str(name), kind, value.shape)
    if producer is not None:
        graph.insert_after(producer, cast)
    graph.outputs[graph.outputs.index(value)] = cast.outputs[0]


def _describe_(value: ir.Value, name: str, kind: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.dtype, value.shape = name, kind, shape
