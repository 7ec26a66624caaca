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

from van_deploy.checks import gates
from van_deploy.checks.gates import Finding, Limit, held
from van_deploy.checks.graphs import quiet_session, run_taps, with_taps
from van_deploy.checks.rules import at_least
from van_deploy.checks.samples import Samples
from van_deploy.graph.names import INPUT_NAME

Array = npt.NDArray[Any]
Stored = Mapping[str, Array]

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

    @property
    def ratio(self) -> float:
        """The scale over the one of least squared error on the values, the zero-point as it is."""
        values = np.concatenate(self.values)
        reach = max(
            float(values.max()) / max(self.ends[1] - self.zero, 1),
            float(values.min()) / min(self.ends[0] - self.zero, -1),
            SMALLEST_SCALE,
        )
        grid = np.geomspace(reach / CANDIDATES, reach * 1.05, CANDIDATES)
        best = self._best(values, grid)
        ends = grid[max(best - 1, 0)], grid[min(best + 1, CANDIDATES - 1)]
        around = np.geomspace(*ends, 9)
        return self.scale / float(around[self._best(values, around)])

    def _best(self, values: Array, scales: Array) -> int:
        """Return which of some scales rounds values with the least squared error."""
        errors = []
        for scale in scales:
            codes = np.clip(np.rint(values / scale) + self.zero, *self.ends)
            errors.append(np.square(values - (codes - self.zero) * scale).sum())
        return int(np.argmin(errors))


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
    readers: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = (*readers.get(name, ()), node.name)
    bare, pairs = _without_activation_rounding(model, stored, readers)
    if not pairs:
        return [], ()
    sqnr = samples.outputs.sqnr_db(samples.logits, _watch_(bare, pairs, samples))
    for_cpus = any(pair.ends[0] == 0 for pair in pairs)  # unsigned activations
    weights = tuple(_weights(model, stored, readers, for_cpus=for_cpus))
    rows, findings = _activations(pairs, method, for_cpus=for_cpus)
    return [
        at_least("SQNR without activation rounding", sqnr, floor),
        *findings,
        _together("weight scales", weights),
    ], (*rows, *weights)


def _without_activation_rounding(
    model: ModelProto, stored: Stored, readers: Mapping[str, tuple[str, ...]]
) -> tuple[ModelProto, list[_Pair]]:
    """Return the graph with every reader of a rounded activation reading it unrounded.

    Args:
        model: a Q/DQ graph.
        stored: its initialisers by name.
        readers: the nodes that read each tensor.

    Returns:
        The graph, and the pairs that were taken out.
    """
    bare = ModelProto()
    bare.CopyFrom(model)
    makers = {node.output[0]: node for node in model.graph.node}
    unrounded: dict[str, str] = {}
    pairs = []
    for node in model.graph.node:
        quantize = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        tensor, scale, zero = quantize.input
        info = np.iinfo(stored[zero].dtype)
        unrounded[node.output[0]] = tensor
        pairs.append(
            _Pair(
                tensor,
                float(stored[scale]),
                int(stored[zero]),
                (max(info.min, -info.max), info.max),
                readers.get(node.output[0], ()),
            )
        )
    for node in bare.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = unrounded.get(name, name)
    return bare, pairs


def _watch_(bare: ModelProto, pairs: Sequence[_Pair], samples: Samples) -> Array:
    """Give every pair some of the values it meets; return the answers."""
    outputs = [value.name for value in bare.graph.output]
    inside = dict.fromkeys([*(pair.tensor for pair in pairs), *outputs])
    session = quiet_session(with_taps(bare, [name for name in inside if name != INPUT_NAME]))
    logits = []
    for start in range(0, len(samples), IMAGES_AT_ONCE):
        batch = samples.inputs[start : start + IMAGES_AT_ONCE]
        values: dict[str, Array] = {INPUT_NAME: batch}
        values |= run_taps(session, {INPUT_NAME: batch})
        logits.append(samples.outputs.rows(values))
        for pair in pairs:
            flat = values[pair.tensor].reshape(-1)
            # Odd, so that it is no grid's own period.
            stride = max(1, flat.size // (VALUES_AN_IMAGE * len(batch))) | 1
            pair.values.append(np.append(flat[::stride], [flat.min(), flat.max()]))
    return np.concatenate(logits)


def _activations(
    pairs: Sequence[_Pair], method: str, *, for_cpus: bool
) -> tuple[list[ScaleRow], list[Finding]]:
    bounds = gates.SCALE_BOUNDS.get(method, gates.SCALE_BOUNDS["mse"])
    factor, most = gates.SCALE_SPREAD
    if for_cpus:
        bounds, (factor, most) = replace(bounds, least=gates.UNSIGNED_LEAST), gates.UNSIGNED_SPREAD
    ratios = np.array([pair.ratio for pair in pairs])
    rows = []
    for pair, ratio in zip(pairs, ratios.tolist(), strict=True):
        fault = (
            f"the scale of '{pair.tensor}' is {ratio:.2f} times the one of least error on the "
            f"golden images; {bounds.least:.2f} to {bounds.most:g} is allowed"
        )
        holds = bounds.least <= ratio <= bounds.most
        rows.append(ScaleRow(pair.tensor, pair.modules, pair.scale, ratio, fault * (not holds)))
    median = float(np.median(ratios))
    far = float(np.mean(np.abs(np.log(ratios / median)) > np.log(factor)))
    origin = f"right scales of '{method}' are {bounds.centre:g} times the best ones"
    ratio_is = (
        f"activation scales are {median:.2f} times those of least error on the golden images; "
        f"{origin}, up to a factor of {gates.SCALE_MEDIAN_FACTOR:g}"
    )
    share_is = (
        f"{100 * far:.0f} % of the activation scales are off their median by more than a factor "
        f"of {factor:g}, at most {100 * most:.0f} % may be"
    )
    off = max(median / bounds.centre, bounds.centre / median) > gates.SCALE_MEDIAN_FACTOR
    wide, centre = far > most, Limit(bounds.centre, origin)
    limit = Limit(most, "floor for int8")
    return rows, [
        held("median scale", ratio_is * off, median, centre, shown=ratio_is),
        held("spread of scales", share_is * wide, far, limit, shown=share_is),
        _together("activation scales", rows),
    ]


def _together(rule: str, rows: Sequence[ScaleRow]) -> Finding:
    faults = [row.fault for row in rows if row.fault]
    more = [f"and {len(faults) - 2} more"] * (len(faults) > 2)
    return held(rule, "; ".join([*faults[:2], *more]), shown=f"{len(rows)} within their bounds")


def _weights(
    model: ModelProto, stored: Stored, readers: Mapping[str, tuple[str, ...]], *, for_cpus: bool
) -> Iterator[ScaleRow]:
    for node in model.graph.node:
        codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != np.int8:
            continue
        scales = np.atleast_1d(stored[node.input[1]])
        fault = _code_fault(node, codes, scales.astype(np.float64), for_cpus=for_cpus)
        modules = readers.get(node.output[0], ())
        yield ScaleRow(node.input[0], modules, float(scales.max()), fault=fault)


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
    wasted = (reached < gates.LEAST_CODE) & (scales > SMALLEST_SCALE)
    count, share = gates.MOST_SATURATED
    full = (rows >= np.iinfo(np.int8).max).sum(axis=1)
    clipped = full > max(count, share * rows.shape[1])
    name = node.input[0]
    if wasted.any():
        return (
            f"the scale of '{name}' is too large: the integers of {int(wasted.sum())} of "
            f"{len(rows)} channels end at {int(largest[wasted].min())} of 127 and above, "
            f"below {gates.LEAST_CODE}"
        )
    if clipped.any():
        return (
            f"the scale of '{name}' is too small: up to {int(full[clipped].max())} of "
            f"{rows.shape[1]} integers of {int(clipped.sum())} channels are at the end of the "
            "range"
        )
    return ""
