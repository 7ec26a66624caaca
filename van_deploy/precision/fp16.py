"""FP16 and BF16 written into the graph: types in the file, casts only where the type changes.

LayerNorm, the mean over tokens and the head stay FP32: they cost nothing, and LayerNorm's
overflow is the best-known failure of FP16 (NVIDIA/TensorRT issues 2564 and 4493). What else
has to stay in FP32 beside FP16 is read from the ranges of real images; BF16 has FP32's own
range, and 8 bits of precision where FP16 has 11.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from onnx import ModelProto
from onnx.helper import find_min_ir_version_for

from van_deploy.errors import ConversionError, GateFailed, UsageError
from van_deploy.graph.files import opset_of
from van_deploy.precision.scales import FP16_LARGEST, ChannelRange

# Modules that stay FP32: the stages' LayerNorms, the mean behind the last, and the head.
DEFAULT_KEEP = ("norm1", "norm2", "norm3", "norm4", "head")

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_SUFFIXES = {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}

BF16_OPSET = 22  # the first whose Conv takes BF16
OLDEST_RAISED = 18  # from here to BF16_OPSET no operator of a VAN changes its meaning

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_SMALLEST = 2.0**-25  # rounds to the smallest FP16 number; below it, to zero
# Images not seen in the audit may reach further: what passes half of 65504 is kept in FP32.
HEADROOM = 2.0
LOST_ENERGY = 1e-3  # largest share of a weight's sum of squares that may vanish in FP16


# --- what stays FP32 -------------------------------------------------------------------------


def fp32_nodes(model: ModelProto, keep: Sequence[str]) -> dict[str, str]:
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


def default_fp32_nodes(model: ModelProto) -> dict[str, str]:
    """Return the nodes of :data:`DEFAULT_KEEP`; a backbone has no head, and may end early."""
    roots = {node.name.split(".")[0] for node in model.graph.node}
    return fp32_nodes(model, [name for name in DEFAULT_KEEP if name in roots])


def audit_ranges(
    model: ModelProto,
    ranges: Mapping[str, ChannelRange],
    kept: Collection[str],
    *,
    strict: bool = False,
) -> dict[str, Any]:
    """Return what FP16 cannot hold of ``model``, for the manifest.

    The ``headroom`` that an activation must have; the
    ``largest_activation`` and the ``smallest_activation``, name and magnitude; the ``problems``,
    each with the ``name`` of a tensor or weight, its ``largest`` magnitude and, after its name,
    the ``problem``; the nodes to be ``kept`` in FP32, and why; and ``advice``, "" without any.

    Args:
        model: the FP32 graph.
        ranges: of its tensors, on real images.
        kept: nodes that stay FP32 anyway; their own weights, and tensors between two of
            them, are no problem.
        strict: refuse to keep anything that nobody asked to keep.

    Raises:
        GateFailed: with ``strict``, FP16 cannot hold everything.
    """
    graph = ir.from_proto(model).graph
    largest = {name: record.largest for name, record in ranges.items()}
    made = [value for node in graph for value in node.outputs]
    stored = [v for v in graph.initializers.values() if v.dtype is FLOAT]
    problems, reasons = list[dict[str, Any]](), dict[str, str]()
    for value in (*graph.inputs, *made, *stored):
        nodes = [node for node, _ in value.uses()] + [value.producer()]
        concerned = {str(node.name) for node in nodes if node is not None} - set(kept)
        name = str(value.name)
        size, why = _problem(value.const_value, largest.get(name, 0.0))
        if concerned and why:
            problems.append({"name": name, "largest": size, "problem": why})
            reasons |= dict.fromkeys(concerned, f"'{name}' {why}")
    told, advice = [f"'{found['name']}' {found['problem']}" for found in problems], ""
    if problems and strict:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise GateFailed(
            f"FP16 cannot hold everything: {'; '.join(told[:3])}{more}.",
            "Name the modules with --keep, leave out --strict to have them kept in FP32, or make "
            "bf16, which has FP32's own range.",
        )
    if problems:
        what = "tensor or weight" if len(problems) == 1 else "tensors and weights"
        advice = (
            f"FP16 cannot hold {len(problems)} {what}, and BF16 can, with FP32's own range: "
            "compare with `van-deploy quantize --precision bf16`"
        )
    filled = [(name, size) for name, size in largest.items() if size > 0]
    return {
        "headroom": HEADROOM,
        "largest_activation": max(filled, key=lambda item: item[1]),
        "smallest_activation": min(filled, key=lambda item: item[1]),
        "problems": problems,
        "kept": {str(n.name): reasons[str(n.name)] for n in graph if n.name in reasons},
        "advice": advice,
    }


def _problem(stored: ir.TensorProtocol | None, largest: float) -> tuple[float, str]:
    """Return the largest magnitude of a weight or tensor, and what is wrong with it, if anything.

    A weight fails where what FP16 rounds to zero matters; a tensor where it leaves FP16's range.
    """
    if stored is not None:
        magnitude = np.abs(stored.numpy().astype(np.float64)).ravel()
        filled, largest = magnitude[magnitude > 0], float(magnitude.max(initial=0.0))
        vanishing = filled[filled <= FP16_SMALLEST]
        if largest > FP16_LARGEST:
            return largest, f"holds {largest:g}, beyond FP16's 65504"
        if np.square(vanishing).sum() > LOST_ENERGY * np.square(filled).sum():
            lost = f"{vanishing.size} of its {filled.size} values"
            return largest, f"loses {lost}, which FP16 rounds to zero"
    elif largest * HEADROOM > FP16_LARGEST:
        return largest, f"reaches {largest:g}, beyond half of FP16's 65504"
    elif 0 < largest < FP16_SMALLEST_NORMAL:
        return largest, f"never passes {largest:g}, below FP16's smallest normal number 6.1e-5"
    return largest, ""


# --- the graph -------------------------------------------------------------------------------


def fp16_from_fp32(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """Return ``model`` in FP16, but for its input and output and some nodes.

    Args:
        model: an FP32 graph; it is not changed.
        kept: names of nodes that stay FP32.
    """
    return _halved(model, FLOAT16, kept)


def bf16_from_fp32(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """Return ``model`` in BF16, but for its input and output and some nodes.

    The result has opset :data:`BF16_OPSET`.

    Args:
        model: an FP32 graph; it is not changed.
        kept: names of nodes that stay FP32.

    Raises:
        ConversionError: the graph's opset is too old to be raised by its number alone.
    """
    if opset_of(model) < OLDEST_RAISED:
        raise ConversionError(
            f"The graph has opset {opset_of(model)}; BF16 convolutions need {BF16_OPSET}, and "
            f"only graphs from {OLDEST_RAISED} on can be raised to it.",
            "Export it again with --opset 20.",
        )
    half = _halved(model, BFLOAT16, kept)
    for entry in half.opset_import:
        if entry.domain in {"", "ai.onnx"}:
            entry.version = max(entry.version, BF16_OPSET)
    half.ir_version = max(half.ir_version, find_min_ir_version_for(half.opset_import))
    return half


def _halved(proto: ModelProto, kind: ir.DataType, kept: Collection[str]) -> ModelProto:
    """Return an FP32 graph with every node but the ``kept`` ones in the 16-bit type ``kind``."""
    model = ir.from_proto(proto)
    graph, copies = model.graph, dict[tuple[ir.Value, ir.DataType], ir.Value]()

    def converted(node: ir.Node, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """Return ``value`` as ``wanted``: stored so, a stored copy, or cast before ``node``."""
        stored, name = value.is_initializer(), f"{value.name}.{_SUFFIXES[wanted]}"
        if stored and not any(n.name in kept for n, _ in value.uses()):
            value.const_value, value.dtype = _stored(value, str(value.name), wanted), wanted
            return value
        if (value, wanted) not in copies:
            if stored:
                copy = ir.val(name, const_value=_stored(value, name, wanted))
                graph.register_initializer(copy)
            else:
                graph.insert_before(node, cast_ := _cast(value, name, wanted))
                copy = cast_.outputs[0]
            copies[value, wanted] = copy
        return copies[value, wanted]

    for value in graph.inputs:
        value.dtype = FLOAT
    for node in list(graph):
        wanted = FLOAT if node.name in kept else kind
        for place, given in enumerate(node.inputs):
            value = cast("ir.Value", given)  # VAN's operators leave no input out
            if value.dtype in {FLOAT, kind} and value.dtype is not wanted:  # no axes
                node.replace_input_with(place, converted(node, value, wanted))
        for value in node.outputs:
            value.dtype = wanted
    for place, value in enumerate(graph.outputs):
        if value.dtype is not FLOAT:  # an output of the graph stays FP32, under its own name
            name, value.name = str(value.name), f"{value.name}.{_SUFFIXES[kind]}"
            cast_ = _cast(value, name, FLOAT)
            graph.insert_after(cast("ir.Node", value.producer()), cast_)
            graph.outputs[place] = cast_.outputs[0]
    return ir.to_proto(model)


def _stored(value: ir.Value, name: str, kind: ir.DataType) -> ir.TensorProtocol:
    """Return a stored value's numbers as ``kind``."""
    numbers = cast("ir.TensorProtocol", value.const_value).numpy()
    return ir.tensor(numbers.astype(kind.numpy()), name=name)


def _cast(value: ir.Value, name: str, kind: ir.DataType) -> ir.Node:
    """Return a Cast of ``value`` to ``kind``, whose output is called ``name``."""
    made = ir.val(name, kind, value.shape)
    return ir.node("Cast", [value], {"to": kind}, outputs=[made], name=f"{name}.cast")
