"""Checks of an ONNX graph's tensors: FP16 overflows and INT8 scales.

A graph is instrumented in two ways:

* :func:`with_taps` makes tensors outputs: their accumulated error, including all nodes before;
* :func:`isolated` cuts the graph at the tensors. Each part reads the reference's tensor instead
  of its predecessor's, so its output has only the error of the part itself.

A faulty quantiser writes wrong scales and a consistent record of them, and the logits hardly show
a scale that is twice too large: it costs one bit in one layer. So the scales are checked without
the quantiser's records:

* The graph *without activation rounding* must give the network's logits. Its tensors on the
  golden images then are the ranges that the scales must fit, equalised or not.
* Each activation's scale is compared with the scale of least squared error on these images.
  Single scales may differ, because calibration used other images; the median must be close,
  and only few scales may be far from it (ranges of another layer).
* The integers of each channel's weights must reach the end of the range without saturating.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from van_deploy.checks import gates
from van_deploy.checks.gates import Finding, Limit, check_minimum, pass_or_fail
from van_deploy.checks.golden import Samples
from van_deploy.data.samples import GENERIC
from van_deploy.documents import limit_lines
from van_deploy.graph.names import INPUT_NAME, make_batch_dynamic_
from van_deploy.metrics import Array
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import DTYPES, create_session, require_onnxruntime

# Name of a module or node, and a description of its fault.
Fault = tuple[str, str]

FED = ".reference"  # suffix of the input that replaces a cut tensor
LARGEST_FP16 = 65504
IMAGES_AT_ONCE = 4
VALUES_PER_IMAGE = 4096  # of each tensor: evenly spaced, plus minimum and maximum
CANDIDATES = 24  # scales, from 1/24 of the range to the range, then 9 around the best
USE_OWN_IMAGES = "run `van-deploy export --images DIR --force` with your images and quantise again"
SMALLEST_SCALE = 2.0**-14  # the smallest normal FP16 number, the quantiser's minimum


def with_taps(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` with ``tensors`` as its outputs, in that order.

    A static batch becomes dynamic; no node depends on it.
    """
    types, tapped = tensor_types(model), ModelProto()
    tapped.CopyFrom(model)
    make_batch_dynamic_(tapped)
    del tapped.graph.output[:]
    values = (helper.make_tensor_value_info(name, types[name], None) for name in tensors)
    tapped.graph.output.extend(values)
    return tapped


def isolated(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` cut at ``tensors``: outputs, and inputs of the following nodes.

    The input that replaces tensor ``t`` is ``t.reference``, with the type of ``t``; unused inputs
    are left out.
    """
    cut, read = with_taps(model, tensors), set[str]()
    for node in cut.graph.node:
        read |= set(tensors).intersection(node.input)
        node.input[:] = [f"{name}{FED}" if name in tensors else name for name in node.input]
    for value in cut.graph.output:
        if value.name in read:
            kind = value.type.tensor_type.elem_type
            feed = helper.make_tensor_value_info(f"{value.name}{FED}", kind, None)
            cut.graph.input.append(feed)
    return cut


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Return the element type of every tensor from ONNX shape inference."""
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def quiet_session(model: ModelProto) -> Any:
    """Return an ONNX Runtime session on the CPU that logs no errors.

    BF16 is emulated, with the same tensor names.
    """
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = 4  # the caller reports failures
    return create_session(model, options, ["CPUExecutionProvider"])[0]


def run_taps(session: Any, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Run a session and yield each output's name and float64 value.

    Args:
        session: an ONNX Runtime session.
        feeds: values by input name, and reference tensors by ``t.reference``, which are cast to
            the type of the input; others than the session's inputs are ignored.
    """
    inputs = {v.name: feeds[v.name].astype(DTYPES[v.type]) for v in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    for name, value in zip(names, session.run(names, inputs), strict=True):
        yield name, value.astype(np.float64)


def one_line(error: Exception) -> str:
    """Return an error's message in one line of at most 600 characters."""
    return " ".join(str(error).split())[:600]


def overflows_of_graph(model: ModelProto, images: Images) -> list[Fault]:
    """Return the nodes where FP16 values begin to overflow.

    ONNX Runtime's CPU kernels compute FP16 in FP32 and drop the casts between operators, so the
    same file may be correct on a CPU and overflow on a GPU. Here every FP16 tensor is an output,
    so that its cast cannot be dropped.

    Args:
        model: a graph whose input is normalised images.
        images: ``(N, C, S, S)`` normalised; run one at a time.

    Raises:
        Exception: ONNX Runtime's own, if the graph does not run.
    """
    types, bad = tensor_types(model), set[str]()
    names = (name for node in model.graph.node for name in node.output)
    halves = [name for name in names if types.get(name) == TensorProto.FLOAT16]
    if not halves:
        return []
    session = quiet_session(with_taps(model, halves))
    for image in images:
        taps = run_taps(session, {session.get_inputs()[0].name: image[None]})
        bad |= {name for name, value in taps if not np.isfinite(value).all()}
    return [
        (node.name, f"'{node.name}' passes {LARGEST_FP16}, the largest number of FP16")
        for node in model.graph.node
        if bad.intersection(node.output) and not bad.intersection(node.input)
    ]


# --- scales ----------------------------------------------------------------------------------


def check_scales(
    model: ModelProto, samples: Samples, floor: Limit, method: str = "mse"
) -> tuple[list[Finding], list[Fault]]:
    """Return the findings on a Q/DQ graph's scales, and each faulty scale with its modules.

    Sample photographs may differ from the calibration images, so with them a single scale out of
    its bounds is INCONCLUSIVE; the median and the spread of all scales decide.

    Args:
        model: the graph; its input is normalised images. A graph without Q/DQ has no findings.
        samples: the golden images, with the original network's logits.
        floor: minimum SQNR of the logits of INT8.
        method: calibration method, as in the manifest.

    Raises:
        Exception: ONNX Runtime's own, if the graph does not run.
    """
    nodes, makers = model.graph.node, {node.output[0]: node for node in model.graph.node}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rounded: dict[str, NodeProto] = {}  # QuantizeLinear nodes by the dequantised activation
    weights_dq: dict[str, NodeProto] = {}  # DequantizeLinear nodes by the dequantised weight
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in makers:
            rounded[node.output[0]] = makers[node.input[0]]
        elif node.op_type == "DequantizeLinear" and stored[node.input[0]].dtype == np.int8:
            weights_dq[node.output[0]] = node
    if not rounded:
        return [], []
    for_cpus = any(stored[quantize.input[2]].dtype == np.uint8 for quantize in rounded.values())
    values, rows = _run_without_rounding(model, rounded, samples)
    ratios = {name: _scale_ratio(q, stored, values[q.input[0]]) for name, q in rounded.items()}
    findings, activations = _check_activation_scales(ratios, rounded, method, for_cpus)
    weights = {name: _weight_fault(node, stored, for_cpus) for name, node in weights_dq.items()}
    faults = [
        (node.name, fault)
        for name, fault in (*activations.items(), *weights.items())
        for node in nodes
        if fault and name in node.input
    ]
    sqnr = samples.outputs.sqnr_db(samples.logits, rows)
    each = _combined_finding("activation scales", activations)
    if each.outcome is gates.Outcome.FAIL and any(kind in samples.description for kind in GENERIC):
        message = f"{each.message}. The golden samples are sample images: {USE_OWN_IMAGES}"
        each = replace(each, outcome=gates.Outcome.INCONCLUSIVE, message=message)
    return [
        check_minimum("SQNR without activation rounding", sqnr, floor),
        *findings,
        each,
        _combined_finding("weight scales", weights),
    ], faults


def _run_without_rounding(
    model: ModelProto, rounded: Mapping[str, NodeProto], samples: Samples
) -> tuple[dict[str, Array], Array]:
    """Return the activations and the output rows ``(N, K)`` of a graph without activation rounding.

    Args:
        model: the graph.
        rounded: QuantizeLinear nodes by the dequantised activation.
        samples: the golden images.
    """
    bare, tensors = ModelProto(), dict.fromkeys(q.input[0] for q in rounded.values())
    bare.CopyFrom(model)
    for node in bare.graph.node:  # read the activation itself instead of the dequantised one
        node.input[:] = [rounded[n].input[0] if n in rounded else n for n in node.input]
    taps = dict.fromkeys([*tensors, *(value.name for value in bare.graph.output)])
    session = quiet_session(with_taps(bare, [name for name in taps if name != INPUT_NAME]))
    rows, pieces_of = [], {tensor: list[Array]() for tensor in tensors}
    for start in range(0, len(samples), IMAGES_AT_ONCE):
        batch = samples.inputs[start : start + IMAGES_AT_ONCE]
        values = {INPUT_NAME: batch, **dict(run_taps(session, {INPUT_NAME: batch}))}
        rows.append(samples.outputs.rows(values))
        for tensor, pieces in pieces_of.items():
            flat = values[tensor].reshape(-1)
            # Odd, so that it is not the period of an image row.
            stride = max(1, flat.size // (VALUES_PER_IMAGE * len(batch))) | 1
            pieces.append(np.append(flat[::stride], [flat.min(), flat.max()]))
    activations = {tensor: np.concatenate(pieces) for tensor, pieces in pieces_of.items()}
    return activations, np.concatenate(rows)


def _scale_ratio(quantize: NodeProto, stored: Mapping[str, Array], values: Array) -> float:
    """Return a scale's ratio to the scale of least squared error, with the same zero-point."""
    scale, zero = (stored[name] for name in quantize.input[1:])
    info, middle = np.iinfo(zero.dtype), int(zero)
    ends = (max(info.min, -info.max), info.max)

    def error(candidate: float) -> float:
        codes = np.clip(np.rint(values / candidate) + middle, *ends)
        return float(np.square(values - (codes - middle) * candidate).sum())

    above = float(values.max()) / max(ends[1] - middle, 1)
    below = float(values.min()) / min(ends[0] - middle, -1)
    reach = max(above, below, SMALLEST_SCALE)
    grid = np.geomspace(reach / CANDIDATES, reach * 1.05, CANDIDATES)
    index = int(np.argmin([*map(error, grid)]))
    around = np.geomspace(grid[max(index - 1, 0)], grid[min(index + 1, CANDIDATES - 1)], 9)
    return float(scale) / float(min(around, key=error))


def _check_activation_scales(
    ratios: Mapping[str, float], rounded: Mapping[str, NodeProto], method: str, for_cpus: bool
) -> tuple[list[Finding], dict[str, str]]:
    """Return the findings on all ratios of scales, and the fault of each scale or ""."""
    centre, largest = gates.SCALE_BOUNDS.get(method, gates.SCALE_BOUNDS["mse"])
    smallest, max_share = gates.UNSIGNED_SCALES if for_cpus else gates.SIGNED_SCALES
    faults = {
        output: (
            f"the scale of '{rounded[output].input[0]}' is {ratio:.2f} times the scale of least "
            f"error on the golden images; {smallest:.2f} to {largest:g} is allowed"
        )
        * (not smallest <= ratio <= largest)
        for output, ratio in ratios.items()
    }
    values = np.array(list(ratios.values()))
    median = float(np.median(values))
    share = float(np.mean(np.abs(np.log(values / median)) > np.log(gates.SCALE_SPREAD_FACTOR)))
    slack = gates.SCALE_MEDIAN_FACTOR
    origin = f"expected for '{method}': {centre:g}, to a factor of {slack:g}"
    median_text = f"the median activation scale is {median:.2f} times the optimal scale; {origin}"
    excess = f"a factor over {gates.SCALE_SPREAD_FACTOR:g}; at most {100 * max_share:.0f} % may"
    share_text = f"{100 * share:.0f} % of the scales differ from the median by {excess}"
    is_off, is_wide = max(median / centre, centre / median) > slack, share > max_share
    centre_limit, share_limit = Limit(centre, origin), Limit(max_share, "floor for int8")
    return [
        pass_or_fail("median scale", median_text * is_off, median, centre_limit, median_text),
        pass_or_fail("spread of scales", share_text * is_wide, share, share_limit, share_text),
    ], faults


def _combined_finding(rule: str, faults: Mapping[str, str]) -> Finding:
    messages = [fault for fault in faults.values() if fault]
    shown = f"{len(faults)} within their bounds"
    return pass_or_fail(rule, "; ".join(limit_lines(messages, 2)), shown=shown)


def _weight_fault(node: NodeProto, stored: Mapping[str, Array], for_cpus: bool) -> str:
    """Return the fault of a weight's scale according to its integers, or "".

    For CPUs a channel has the finest scale if two integers that are multiplied together sum to 127
    (x86 without VNNI adds two products in 16 bits). Pairs are adjacent in the order kernel row,
    column, input channel of ``(O, I, H, W)``.
    """
    codes, scales = stored[node.input[0]], np.atleast_1d(stored[node.input[1]])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1) if len(scales) > 1 else 0
    rows = np.abs(np.moveaxis(codes, axis, 0).reshape(len(scales), -1).astype(np.int64))
    reached = largest = rows.max(axis=1)
    if for_cpus and codes.ndim == 4:
        pairs = codes.astype(np.int64).transpose(0, 2, 3, 1).reshape(len(codes), -1)
        pairs = np.pad(pairs, ((0, 0), (0, pairs.shape[1] % 2)))
        reached = np.maximum(largest, np.abs(pairs[:, ::2] + pairs[:, 1::2]).max(axis=1))
    wasted = (reached < gates.MIN_LARGEST_CODE) & (scales > SMALLEST_SCALE)
    count, share = gates.MAX_SATURATED
    full = (rows >= np.iinfo(np.int8).max).sum(axis=1)
    clipped = full > max(count, share * rows.shape[1])
    if wasted.any():
        return (
            f"the scale of '{node.input[0]}' is too large: {int(wasted.sum())} of {len(rows)} "
            f"channels end at {int(largest[wasted].min())} of 127 and above, below "
            f"{gates.MIN_LARGEST_CODE}"
        )
    if clipped.any():
        return (
            f"the scale of '{node.input[0]}' is too small: {int(clipped.sum())} channels have "
            f"up to {int(full[clipped].max())} of {rows.shape[1]} integers at the end of the range"
        )
    return ""
