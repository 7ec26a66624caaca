"""What the tensors of an ONNX graph say: FP16 that overflows, and INT8 scales.

A graph is opened in two ways:

* :func:`with_taps` returns tensors beside the logits: the error *so far*, with everything
  before it included;
* :func:`isolated` cuts the graph there. Each part reads the reference's tensor where it read
  its predecessor's, so what comes out is the error the part adds by itself.

A quantiser that is wrong from birth writes wrong scales and a consistent record of them, and
the logits hardly show a scale that is twice too large: it costs one bit in one layer. So the
scales are judged without the quantiser's records:

* The graph with its *activation rounding taken out* has to give the network's logits. Its
  tensors on the golden images then are the ranges that the scales must fit, equalised or not.
* Each activation's scale is compared with the one of least squared error on these images.
  One tensor's may be off, since calibration met other images; their median may not, and few
  may be far from it (ranges of another layer).
* The integers of each channel's weights must reach the end of the range, and not pile up there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from van_deploy.checks import gates
from van_deploy.checks.gates import Finding, Limit, check_minimum, pass_or_fail
from van_deploy.checks.golden import Samples
from van_deploy.data.samples import GENERIC
from van_deploy.graph.names import INPUT_NAME, make_batch_dynamic_
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import DTYPES, create_session, require_onnxruntime

Array = npt.NDArray[Any]
Fault = tuple[str, str]
"""A module or node, and what is wrong with it beside its error."""

FED = ".reference"  # suffix of the input that stands for a cut tensor
LARGEST_FP16 = 65504
IMAGES_AT_ONCE = 4
VALUES_AN_IMAGE = 4096  # of each tensor: evenly spread, and its two extremes
CANDIDATES = 24  # scales tried, from a 24th of the range to all of it, then 8 around the best
_OWN = "`export --images DIR --force` takes yours, then quantise again"
SMALLEST_SCALE = 2.0**-14  # the smallest normal FP16 number: scales are not made smaller


def with_taps(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` with ``tensors`` as its outputs, in that order.

    A static batch becomes dynamic: nothing inside a graph depends on it.
    """
    types, tapped = tensor_types(model), ModelProto()
    tapped.CopyFrom(model)
    make_batch_dynamic_(tapped)
    del tapped.graph.output[:]
    values = (helper.make_tensor_value_info(name, types[name], None) for name in tensors)
    tapped.graph.output.extend(values)
    return tapped


def isolated(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy of ``model`` cut at ``tensors``: they are outputs, and inputs of what follows.

    The input that replaces tensor ``t`` is ``t.reference``, of ``t``'s type;
    those that nothing reads are left out.
    """
    cut, read = with_taps(model, tensors), set[str]()
    for node in cut.graph.node:
        read |= set(tensors).intersection(node.input)
        node.input[:] = [f"{name}{FED}" if name in tensors else name for name in node.input]
    for value in cut.graph.output:
        if value.name in read:
            kind = value.type.tensor_type.elem_type
            given = helper.make_tensor_value_info(f"{value.name}{FED}", kind, None)
            cut.graph.input.append(given)
    return cut


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Return the element type of every tensor, as ONNX's own inference finds it."""
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def quiet_session(model: ModelProto) -> Any:
    """Return an ONNX Runtime session on the CPU that prints nothing of its failures.

    BF16 is emulated in it, with the same names.
    """
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = 4  # failures are reported by who asked, not on the screen
    return create_session(model, options, ["CPUExecutionProvider"])[0]


def run_taps(session: Any, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield each output's name and float64 value, feeding what the graph asks for.

    Args:
        session: an ONNX Runtime session.
        feeds: values by input name, and reference tensors by ``t.reference``;
            each is cast to the input's own type.
    """
    given = {v.name: feeds[v.name].astype(DTYPES[v.type]) for v in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    for name, value in zip(names, session.run(names, given), strict=True):
        yield name, value.astype(np.float64)


def one_line(error: Exception) -> str:
    """Return what a runtime's error says, in one line of at most 600 characters."""
    return " ".join(str(error).split())[:600]


def overflows_of_graph(model: ModelProto, images: Images) -> list[Fault]:
    """Return what passes FP16's largest number, by the node that makes it; only where it begins.

    A runtime may hide it: ONNX Runtime's CPU kernels compute FP16 in FP32 and drop the casts
    between two operators, so the same file is right there and wrong on a GPU. Here every FP16
    tensor is asked for as an output, which no runtime can skip.

    Args:
        model: a graph that takes normalised images.
        images: ``(N, C, S, S)`` normalised; one at a time is fed.

    Raises:
        Exception: ONNX Runtime's own, where the graph does not run.
    """
    types, bad = tensor_types(model), set[str]()
    made = (name for node in model.graph.node for name in node.output)
    halves = [name for name in made if types.get(name) == TensorProto.FLOAT16]
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
    """Return the findings on a Q/DQ graph's scales, and each wrong one by the modules it is for.

    On sample images, which may be of another kind than those it was calibrated on, one scale
    beyond its bound decides nothing: it is INCONCLUSIVE. The median and the spread of all decide.

    Args:
        model: the graph, which takes normalised images. Another graph has no findings.
        samples: the golden images, with the original network's logits.
        floor: least SQNR of the logits of INT8.
        method: of calibration, as the manifest names it.

    Raises:
        Exception: ONNX Runtime's own, where the graph does not run.
    """
    nodes, makers = model.graph.node, {node.output[0]: node for node in model.graph.node}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rounded: dict[str, NodeProto] = {}  # what makes an activation's integers, by their float
    held_as: dict[str, NodeProto] = {}  # what makes a weight's float of its integers, likewise
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in makers:
            rounded[node.output[0]] = makers[node.input[0]]
        elif node.op_type == "DequantizeLinear" and stored[node.input[0]].dtype == np.int8:
            held_as[node.output[0]] = node
    if not rounded:
        return [], []
    for_cpus = any(stored[quantize.input[2]].dtype == np.uint8 for quantize in rounded.values())
    seen, rows = _unrounded(model, rounded, samples)
    scales = {name: _over_the_best(q, stored, seen[q.input[0]]) for name, q in rounded.items()}
    findings, wrong = _activations(scales, rounded, method, for_cpus)
    weights = {name: _code_fault(node, stored, for_cpus) for name, node in held_as.items()}
    faults = [
        (node.name, fault)
        for name, fault in (*wrong.items(), *weights.items())
        for node in nodes
        if fault and name in node.input
    ]
    sqnr = samples.outputs.sqnr_db(samples.logits, rows)
    apart = _together("activation scales", wrong)
    if apart.outcome is gates.Outcome.FAIL and any(kind in samples.description for kind in GENERIC):
        said = f"{apart.message}. The golden samples are sample images: {_OWN}"
        apart = replace(apart, outcome=gates.Outcome.INCONCLUSIVE, message=said)
    return [
        check_minimum("SQNR without activation rounding", sqnr, floor),
        *findings,
        apart,
        _together("weight scales", weights),
    ], faults


def _unrounded(
    model: ModelProto, rounded: Mapping[str, NodeProto], samples: Samples
) -> tuple[dict[str, Array], Array]:
    """Return a graph's values and its outputs' rows ``(N, K)`` without rounding of activations.

    Args:
        model: the graph.
        rounded: what makes an activation's integers, by their float.
        samples: the golden images.
    """
    bare, tensors = ModelProto(), dict.fromkeys(q.input[0] for q in rounded.values())
    bare.CopyFrom(model)
    for node in bare.graph.node:  # every reader of a rounded activation reads it unrounded
        node.input[:] = [rounded[n].input[0] if n in rounded else n for n in node.input]
    inside = dict.fromkeys([*tensors, *(value.name for value in bare.graph.output)])
    session = quiet_session(with_taps(bare, [name for name in inside if name != INPUT_NAME]))
    rows, met = [], {tensor: list[Array]() for tensor in tensors}
    for start in range(0, len(samples), IMAGES_AT_ONCE):
        batch = samples.inputs[start : start + IMAGES_AT_ONCE]
        values: dict[str, Array] = {INPUT_NAME: batch}
        values |= run_taps(session, {INPUT_NAME: batch})
        rows.append(samples.outputs.rows(values))
        for tensor, pieces in met.items():
            flat = values[tensor].reshape(-1)
            # Odd, so that it is no grid's own period.
            stride = max(1, flat.size // (VALUES_AN_IMAGE * len(batch))) | 1
            pieces.append(np.append(flat[::stride], [flat.min(), flat.max()]))
    seen = {tensor: np.concatenate(pieces) for tensor, pieces in met.items()}
    return seen, np.concatenate(rows)


def _over_the_best(quantize: NodeProto, stored: Mapping[str, Array], values: Array) -> float:
    """Return a scale over the one of least squared error on values, the zero-point as it is."""
    scale, zero = (stored[name] for name in quantize.input[1:])
    info, middle = np.iinfo(zero.dtype), int(zero)
    ends = (max(info.min, -info.max), info.max)

    def best(candidates: Array) -> int:
        errors = []
        for one in candidates:
            codes = np.clip(np.rint(values / one) + middle, *ends)
            errors.append(np.square(values - (codes - middle) * one).sum())
        return int(np.argmin(errors))

    above = float(values.max()) / max(ends[1] - middle, 1)
    below = float(values.min()) / min(ends[0] - middle, -1)
    reach = max(above, below, SMALLEST_SCALE)
    grid = np.geomspace(reach / CANDIDATES, reach * 1.05, CANDIDATES)
    place = best(grid)
    around = np.geomspace(grid[max(place - 1, 0)], grid[min(place + 1, CANDIDATES - 1)], 9)
    return float(scale) / float(around[best(around)])


def _activations(
    scales: Mapping[str, float], rounded: Mapping[str, NodeProto], method: str, for_cpus: bool
) -> tuple[list[Finding], dict[str, str]]:
    """Return the findings on all scales over the best ones, and what is wrong with each."""
    centre, largest = gates.SCALE_BOUNDS.get(method, gates.SCALE_BOUNDS["mse"])
    least, (factor, most) = gates.MIN_SCALE_RATIO, gates.SCALE_SPREAD
    if for_cpus:  # unsigned activations
        least, (factor, most) = gates.MIN_UNSIGNED_SCALE_RATIO, gates.UNSIGNED_SPREAD
    wrong = {
        output: (
            f"the scale of '{rounded[output].input[0]}' is {ratio:.2f} times the one of least "
            f"error on the golden images; {least:.2f} to {largest:g} is allowed"
        )
        * (not least <= ratio <= largest)
        for output, ratio in scales.items()
    }
    ratios = np.array(list(scales.values()))
    median = float(np.median(ratios))
    far = float(np.mean(np.abs(np.log(ratios / median)) > np.log(factor)))
    slack = gates.SCALE_MEDIAN_FACTOR
    origin = f"right scales of '{method}' are {centre:g} times the best, to a factor of {slack:g}"
    ratio_is = f"activation scales are {median:.2f} times the best on the golden images; {origin}"
    limit_is = f"at most {100 * most:.0f} % may be"
    share_is = f"{100 * far:.0f} % of them are off the median by over {factor:g} times, {limit_is}"
    off = max(median / centre, centre / median) > slack
    wide, limit = far > most, Limit(most, "floor for int8")
    return [
        pass_or_fail("median scale", ratio_is * off, median, Limit(centre, origin), shown=ratio_is),
        pass_or_fail("spread of scales", share_is * wide, far, limit, shown=share_is),
    ], wrong


def _together(rule: str, faults: Mapping[str, str]) -> Finding:
    wrong = [fault for fault in faults.values() if fault]
    more = [f"and {len(wrong) - 2} more"] * (len(wrong) > 2)
    return pass_or_fail(
        rule, "; ".join([*wrong[:2], *more]), shown=f"{len(faults)} within their bounds"
    )


def _code_fault(node: NodeProto, stored: Mapping[str, Array], for_cpus: bool) -> str:
    """Return what is wrong with the integers of a weight, or "".

    For CPUs a channel is as fine as can be where two integers that are multiplied side by side
    sum to 127 (x86 without VNNI adds two products in 16 bits): kernel row, column, input channel
    of ``(O, I, H, W)``.
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
