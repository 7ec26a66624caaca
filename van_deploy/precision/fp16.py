"""Convert an FP32 graph to explicit FP16 or BF16, with a Cast only where the type changes.

LayerNorm, the mean over tokens and the head stay FP32: they cost almost no time, and overflow in
LayerNorm is the best-known failure of FP16 (NVIDIA/TensorRT issues 2564 and 4493). An audit of the
activation ranges on real images finds the other nodes that FP16 cannot represent. BF16 has FP32's
exponent range, and 8 bits of precision instead of FP16's 11.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from onnx import ModelProto
from onnx.helper import find_min_ir_version_for

from van_deploy.errors import GateFailed, UsageError
from van_deploy.graph.files import opset_of
from van_deploy.precision.scales import FP16_LARGEST, ChannelRange

# Modules that stay FP32: the stages' LayerNorms, the mean after the last one, and the head.
DEFAULT_KEEP = ("norm1", "norm2", "norm3", "norm4", "head")

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_SUFFIXES = {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}

BF16_OPSET = 22  # the first with BF16 in Conv

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_ROUNDS_TO_ZERO = 2.0**-25  # magnitudes up to this one become zero in FP16
# Other images may give larger activations: tensors above half of 65504 stay in FP32.
HEADROOM = 2.0
LOST_ENERGY = 1e-3  # largest share of a weight's sum of squares that may become zero in FP16


# --- what stays FP32 -------------------------------------------------------------------------


def fp32_nodes(model: ModelProto, keep: Sequence[str]) -> dict[str, str]:
    """Return the nodes that match ``keep``, each with the reason why it stays FP32.

    An entry is the path of a module, which matches all nodes below it, or a regular
    expression that matches the whole name of a node.

    Raises:
        UsageError: an entry is not a valid expression, or matches no node.
    """
    reasons: dict[str, str] = {}
    names = [node.name for node in model.graph.node]
    for entry in keep:
        matched = [name for name in names if name == entry or name.startswith(f"{entry}.")]
        invalid = ""
        try:
            matched = matched or [name for name in names if re.fullmatch(entry, name)]
        except re.error as error:
            invalid = f", and is not a valid regular expression: {error}"
        if not matched:
            raise UsageError(
                f"'{entry}' matches no module or node to keep in FP32{invalid}.",
                "Use the names that `van-deploy inspect` prints, for instance "
                f"'{names[len(names) // 2]}' or a prefix of it that ends before a dot.",
            )
        reasons |= dict.fromkeys(matched, f"'{entry}' is kept")
    return reasons


def default_fp32_nodes(model: ModelProto) -> dict[str, str]:
    """Return the nodes of :data:`DEFAULT_KEEP` that exist (a backbone has no head)."""
    roots = {node.name.split(".")[0] for node in model.graph.node}
    return fp32_nodes(model, [name for name in DEFAULT_KEEP if name in roots])


def audit_ranges(
    model: ModelProto,
    ranges: Mapping[str, ChannelRange],
    kept: Collection[str],
    *,
    strict: bool = False,
) -> dict[str, Any]:
    """Return the tensors and weights of ``model`` that FP16 cannot represent, for the manifest.

    Keys: ``problems``, each with the ``name`` of a tensor or weight, its ``largest`` magnitude and
    the ``problem``; ``fp32_nodes``, which must stay FP32, each with the reason; and ``advice``, ""
    if there is none.

    Args:
        model: the FP32 graph.
        ranges: of its tensors, on real images.
        kept: nodes that stay FP32 in any case; their weights, and tensors between two of
            them, are not audited.
        strict: fail instead of keeping further nodes in FP32.

    Raises:
        GateFailed: with ``strict``, FP16 cannot represent some tensor or weight.
    """
    graph = ir.from_proto(model).graph
    largest = {name: record.largest for name, record in ranges.items()}
    for node in (node for node in graph if node.op_type == "Transpose"):  # of the same values
        names = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]
        largest |= dict.fromkeys(names, max(largest.get(name, 0.0) for name in names))
    activations = [value for node in graph for value in node.outputs]
    weights = [v for v in graph.initializers.values() if v.dtype is FLOAT]
    problems, reasons = list[dict[str, Any]](), dict[str, str]()
    for value in (*graph.inputs, *activations, *weights):
        nodes = [node for node, _ in value.uses()] + [value.producer()]
        affected = {str(node.name) for node in nodes if node is not None} - set(kept)
        name = str(value.name)
        size, problem = _range_problem(value.const_value, largest.get(name, 0.0))
        if affected and problem:
            problems.append({"name": name, "largest": size, "problem": problem})
            reasons |= dict.fromkeys(affected, f"'{name}' {problem}")
    messages, advice = [f"'{entry['name']}' {entry['problem']}" for entry in problems], ""
    if problems and strict:
        more = f"; and {len(messages) - 3} more" if len(messages) > 3 else ""
        raise GateFailed(
            f"FP16 cannot represent every tensor: {'; '.join(messages[:3])}{more}.",
            "Name the modules with --keep, omit --strict to keep them in FP32, or use "
            "--precision bf16, which has FP32's range.",
        )
    if problems:
        advice = (
            f"FP16 cannot represent {len(problems)} tensor(s), BF16 can (it has FP32's range): "
            "compare with `van-deploy quantize --precision bf16`"
        )
    return {
        "problems": problems,
        "fp32_nodes": {str(n.name): reasons[str(n.name)] for n in graph if n.name in reasons},
        "advice": advice,
    }


def _range_problem(weight: ir.TensorProtocol | None, largest: float) -> tuple[float, str]:
    """Return the largest magnitude of a weight or an activation, and its problem in FP16 or "".

    A weight fails if the values that FP16 rounds to zero matter, an activation if it leaves
    FP16's range.
    """
    if weight is not None:
        magnitude = np.abs(weight.numpy().astype(np.float64)).ravel()
        nonzero, largest = magnitude[magnitude > 0], float(magnitude.max(initial=0.0))
        vanishing = nonzero[nonzero <= FP16_ROUNDS_TO_ZERO]
        if largest > FP16_LARGEST:
            return largest, f"has the value {largest:g}, beyond FP16's 65504"
        if np.square(vanishing).sum() > LOST_ENERGY * np.square(nonzero).sum():
            lost = f"{vanishing.size} of its {nonzero.size} values"
            return largest, f"loses {lost}, which FP16 rounds to zero"
    elif largest * HEADROOM > FP16_LARGEST:
        return largest, f"reaches {largest:g}, beyond half of FP16's 65504"
    elif 0 < largest < FP16_SMALLEST_NORMAL:
        return largest, f"never exceeds {largest:g}, below FP16's smallest normal number 6.1e-5"
    return largest, ""


# --- the graph -------------------------------------------------------------------------------


def fp16_from_fp32(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """Return ``model`` in FP16; its inputs, its outputs and the nodes ``kept`` stay FP32.

    Args:
        model: an FP32 graph, which stays unchanged.
        kept: names of nodes that stay FP32.
    """
    return _to_16_bit(model, FLOAT16, kept)


def bf16_from_fp32(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """Return ``model`` in BF16; its inputs, its outputs and the nodes ``kept`` stay FP32.

    The result has opset :data:`BF16_OPSET` or newer.

    Args:
        model: an FP32 graph from opset 18 on, which stays unchanged. Its operators are the same in
            opset 18 and in :data:`BF16_OPSET`.
        kept: names of nodes that stay FP32.
    """
    half = _to_16_bit(model, BFLOAT16, kept)
    half.opset_import[0].version = max(opset_of(half), BF16_OPSET)
    half.ir_version = max(half.ir_version, find_min_ir_version_for(half.opset_import))
    return half


def _to_16_bit(proto: ModelProto, dtype: ir.DataType, kept: Collection[str]) -> ModelProto:
    """Return an FP32 graph with every node except the ``kept`` ones in a 16-bit type."""
    model = ir.from_proto(proto)
    graph, copies = model.graph, dict[tuple[ir.Value, ir.DataType], ir.Value]()

    def convert(node: ir.Node, value: ir.Value, target: ir.DataType) -> ir.Value:
        """Return ``value`` in another type: converted, a converted copy, or a Cast's output."""
        weight, name = value.is_initializer(), f"{value.name}.{_SUFFIXES[target]}"
        if weight and not any(n.name in kept for n, _ in value.uses()):
            value.const_value, value.dtype = _cast_weight(value, str(value.name), target), target
            return value
        if (value, target) not in copies:
            if weight:
                copy = ir.val(name, const_value=_cast_weight(value, name, target))
                graph.register_initializer(copy)
            else:
                graph.insert_before(node, cast_node := _cast_node(value, name, target))
                copy = cast_node.outputs[0]
            copies[value, target] = copy
        return copies[value, target]

    for value in graph.inputs:
        value.dtype = FLOAT
    for node in list(graph):
        target = FLOAT if node.name in kept else dtype
        for index, operand in enumerate(node.inputs):
            value = cast("ir.Value", operand)  # VAN's operators have no omitted inputs
            if value.dtype in {FLOAT, dtype} and value.dtype is not target:  # skips int64 axes
                node.replace_input_with(index, convert(node, value, target))
        for value in node.outputs:
            value.dtype = target
    for index, value in enumerate(graph.outputs):
        if value.dtype is not FLOAT:  # graph outputs stay FP32 and keep their names
            name, value.name = str(value.name), f"{value.name}.{_SUFFIXES[dtype]}"
            cast_node = _cast_node(value, name, FLOAT)
            graph.insert_after(cast("ir.Node", value.producer()), cast_node)
            graph.outputs[index] = cast_node.outputs[0]
    return ir.to_proto(model)


def _cast_weight(value: ir.Value, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    """Return an initialiser's values as ``dtype``."""
    array = cast("ir.TensorProtocol", value.const_value).numpy()
    return ir.tensor(array.astype(dtype.numpy()), name=name)


def _cast_node(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Node:
    """Return a Cast of ``value`` to ``dtype`` with the output ``name``."""
    output = ir.val(name, dtype, value.shape)
    return ir.node("Cast", [value], {"to": dtype}, outputs=[output], name=f"{name}.cast")
