"""Whether the scales of an INT8 graph suit what they round, whoever chose them.

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
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from van_deploy.checks.gates import (
    LEAST_CODE,
    MOST_SATURATED,
    SCALE_BOUNDS,
    SCALE_MEDIAN_FACTOR,
    SCALE_SPREAD,
    UNSIGNED_LEAST,
    UNSIGNED_SPREAD,
    Finding,
    Limit,
    Outcome,
    ScaleBounds,
    failed,
)
from van_deploy.checks.graphs import quiet_session, run_taps, with_taps
from van_deploy.checks.rules import at_least
from van_deploy.checks.samples import Samples
from van_deploy.graph.names import INPUT_NAME

__all__ = ["ScaleRow", "judge_scales", "scale_faults", "without_activation_rounding"]

Array = npt.NDArray[Any]

IMAGES_AT_ONCE = 4
VALUES_AN_IMAGE = 4096  # of each tensor: evenly spread, and its two extremes
CANDIDATES = 24  # scales tried, from a 24th of the range to all of it, then 8 around the best
SMALLEST_SCALE = 2.0**-14  # the smallest normal FP16 number: scales are not made smaller


@dataclass(frozen=True)
class ScaleRow:
    """One rounded tensor.

    Attributes:
        tensor: its name in the graph.
        modules: those that read it.
        scale: of the activation; the largest channel's for weights.
        ratio: the scale over the best one on the golden images; None for weights.
        fault: what is wrong with it, or "".
    """

    tensor: str
    modules: tuple[str, ...]
    scale: float
    ratio: float | None = None
    fault: str = ""


@dataclass
class _Pair:
    """A QuantizeLinear with its DequantizeLinear, and the values it met."""

    tensor: str
    scale: float
    zero: int
    ends: tuple[int, int]
    modules: tuple[str, ...]
    values: list[Array] = field(default_factory=list)


def judge_scales(
    model: ModelProto, samples: Samples, floor: Limit, method: str = "mse"
) -> tuple[list[Finding], tuple[ScaleRow, ...]]:
    """Return the findings on a Q/DQ graph's scales, and every scale; nothing for another graph.

    Args:
        model: the graph, which takes normalised images.
        samples: the golden images, with the original network's logits.
        floor: least SQNR of the logits of INT8.
        method: of calibration, as the manifest names it.

    Raises:
        Exception: ONNX Runtime's own, where the graph does not run.
    """
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    bare, pairs = without_activation_rounding(model, stored)
    if not pairs:
        return [], ()
    found = _watch_(bare, pairs, samples)
    alike = at_least(
        "SQNR without activation rounding", samples.outputs.sqnr_db(samples.logits, found), floor
    )
    weights = tuple(_weights(model, stored))
    rows, findings = _activations(pairs, method)
    return [alike, *findings, _together("weight scales", weights)], (*rows, *weights)


def scale_faults(rows: Sequence[ScaleRow]) -> dict[str, str]:
    """Return what is wrong with the scales, by the module that reads each."""
    found: dict[str, str] = {}
    for row in rows:
        for module in row.modules if row.fault else ():
            found[module] = "; ".join(filter(None, (found.get(module), row.fault)))
    return found


def without_activation_rounding(
    model: ModelProto, stored: Mapping[str, Array]
) -> tuple[ModelProto, list[_Pair]]:
    """Return the graph with every reader of a rounded activation reading it unrounded.

    Args:
        model: a Q/DQ graph.
        stored: its initialisers by name.

    Returns:
        The graph, and the pairs that were taken out.
    """
    bare = ModelProto()
    bare.CopyFrom(model)
    makers = {node.output[0]: node for node in model.graph.node}
    readers = _readers(model)
    unrounded: dict[str, str] = {}
    pairs = []
    for node in model.graph.node:
        quantize = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        zero = stored[quantize.input[2]]
        info = np.iinfo(zero.dtype)
        unrounded[node.output[0]] = quantize.input[0]
        ends = (max(info.min, -info.max), info.max)
        modules = readers.get(node.output[0], ())
        scale = float(stored[quantize.input[1]])
        pairs.append(_Pair(quantize.input[0], scale, int(zero), ends, modules))
    for node in bare.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = unrounded.get(name, name)
    return bare, pairs


def _readers(model: ModelProto) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node.name)
    return {name: tuple(nodes) for name, nodes in found.items()}


def _watch_(bare: ModelProto, pairs: Sequence[_Pair], samples: Samples) -> Array:
    """Give every pair some of the values it meets; return the answers."""
    outputs = [value.name for value in bare.graph.output]
    inside = dict.fromkeys([*(pair.tensor for pair in pairs), *outputs])
    session = quiet_session(with_taps(bare, [name for name in inside if name != INPUT_NAME]))
    logits = []
    for start in range(0, len(samples), IMAGES_AT_ONCE):
        batch = samples.inputs[start : start + IMAGES_AT_ONCE]
        values: dict[str, Array] = dict(run_taps(session, {INPUT_NAME: batch}))
        values[INPUT_NAME] = batch
        logits.append(samples.outputs.rows(values))
        for pair in pairs:
            pair.values.append(_some(values[pair.tensor]))
    return np.concatenate(logits)


def _some(values: Array) -> Array:
    """Return some of the values, evenly spread, and the two extremes."""
    flat = values.reshape(-1)
    stride = max(1, flat.size // (VALUES_AN_IMAGE * len(values))) | 1  # odd: no grid's own period
    return np.append(flat[::stride], [flat.min(), flat.max()])


def _activations(pairs: Sequence[_Pair], method: str) -> tuple[list[ScaleRow], list[Finding]]:
    bounds = SCALE_BOUNDS.get(method, SCALE_BOUNDS["mse"])
    factor, most = SCALE_SPREAD
    if any(pair.ends[0] == 0 for pair in pairs):  # unsigned: for CPUs
        bounds, (factor, most) = replace(bounds, least=UNSIGNED_LEAST), UNSIGNED_SPREAD
    ratios = [pair.scale / _best_scale(pair) for pair in pairs]
    rows = [
        ScaleRow(p.tensor, p.modules, p.scale, ratio, _ratio_fault(p.tensor, ratio, bounds))
        for p, ratio in zip(pairs, ratios, strict=True)
    ]
    median = float(np.median(ratios))
    far = float(np.mean(np.abs(np.log(np.array(ratios) / median)) > np.log(factor)))
    off = max(median / bounds.centre, bounds.centre / median)
    origin = f"right scales of '{method}' are {bounds.centre:g} times the best ones"
    findings = [
        Finding(
            "median scale",
            Outcome.PASS if off <= SCALE_MEDIAN_FACTOR else Outcome.FAIL,
            f"activation scales are {median:.2f} times those of least error on the golden "
            f"images; {origin}, up to a factor of {SCALE_MEDIAN_FACTOR:g}",
            median,
            Limit(bounds.centre, origin),
        ),
        Finding(
            "spread of scales",
            Outcome.PASS if far <= most else Outcome.FAIL,
            f"{100 * far:.0f} % of the activation scales are off their median by more than a "
            f"factor of {factor:g}, at most {100 * most:.0f} % may be",
            far,
            Limit(most, "floor for int8"),
        ),
        _together("activation scales", rows),
    ]
    return rows, findings


def _ratio_fault(tensor: str, ratio: float, bounds: ScaleBounds) -> str:
    if bounds.least <= ratio <= bounds.most:
        return ""
    return (
        f"the scale of '{tensor}' is {ratio:.2f} times the one of least error on the golden "
        f"images; {bounds.least:.2f} to {bounds.most:g} is allowed"
    )


def _together(rule: str, rows: Sequence[ScaleRow]) -> Finding:
    faults = [row.fault for row in rows if row.fault]
    if not faults:
        return Finding(rule, Outcome.PASS, f"{len(rows)} within their bounds")
    more = f"; and {len(faults) - 2} more" if len(faults) > 2 else ""
    return failed(rule, "; ".join(faults[:2]) + more)


def _best_scale(pair: _Pair) -> float:
    """Return the scale with the least squared error on the values, the zero-point as it is."""
    values = np.concatenate(pair.values)
    reach = max(
        float(values.max()) / max(pair.ends[1] - pair.zero, 1),
        float(values.min()) / min(pair.ends[0] - pair.zero, -1),
        SMALLEST_SCALE,
    )
    grid = np.geomspace(reach / CANDIDATES, reach * 1.05, CANDIDATES)
    best = int(np.argmin([_error(values, scale, pair) for scale in grid]))
    around = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, CANDIDATES - 1)], 9)
    return float(around[int(np.argmin([_error(values, scale, pair) for scale in around]))])


def _error(values: Array, scale: float, pair: _Pair) -> float:
    """Return the squared error of rounding ``values`` with ``scale``."""
    codes = np.clip(np.rint(values / scale) + pair.zero, *pair.ends)
    return float(np.square(values - (codes - pair.zero) * scale).sum())


def _weights(model: ModelProto, stored: Mapping[str, Array]) -> Iterator[ScaleRow]:
    readers = _readers(model)
    for_cpus = any(  # unsigned activations: two products side by side may be what limits a scale
        node.op_type == "QuantizeLinear" and stored[node.input[2]].dtype == np.uint8
        for node in model.graph.node
    )
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        codes, scales = stored[node.input[0]], np.atleast_1d(stored[node.input[1]])
        if codes.dtype == np.int8:
            yield ScaleRow(
                tensor=node.input[0],
                modules=readers.get(node.output[0], ()),
                scale=float(scales.max()),
                fault=_code_fault(node, codes, scales.astype(np.float64), for_cpus=for_cpus),
            )


def _pair_sums(codes: Array) -> Array:
    """Return the largest ``|a + b|`` of neighbours in each channel of ``(O, I, H, W)``.

    Neighbours as ONNX Runtime multiplies them: kernel row, column, input channel.
    """
    rows = codes.astype(np.int64).transpose(0, 2, 3, 1).reshape(len(codes), -1)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return np.asarray(np.abs(rows[:, ::2] + rows[:, 1::2]).max(axis=1))


def _code_fault(node: NodeProto, codes: Array, scales: Array, *, for_cpus: bool) -> str:
    """Return what is wrong with the integers of a weight, or "".

    For CPUs a channel is as fine as can be where two integers that are multiplied side by side
    sum to 127 (x86 without VNNI adds two products in 16 bits).
    """
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1) if len(scales) > 1 else 0
    rows = np.abs(np.moveaxis(codes, axis, 0).reshape(len(scales), -1).astype(np.int64))
    largest = rows.max(axis=1)
    reached = np.maximum(largest, _pair_sums(codes)) if for_cpus and codes.ndim == 4 else largest
    wasted = (reached < LEAST_CODE) & (scales > SMALLEST_SCALE)
    count, share = MOST_SATURATED
    full = (rows >= np.iinfo(np.int8).max).sum(axis=1)
    clipped = full > max(count, share * rows.shape[1])
    name = node.input[0]
    if wasted.any():
        return (
            f"the scale of '{name}' is too large: the integers of {int(wasted.sum())} of "
            f"{len(rows)} channels end at {int(largest[wasted].min())} of 127 and above, "
            f"below {LEAST_CODE}"
        )
    if clipped.any():
        return (
            f"the scale of '{name}' is too small: up to {int(full[clipped].max())} of "
            f"{rows.shape[1]} integers of {int(clipped.sum())} channels are at the end of the "
            "range"
        )
    return ""
