"""Whether the steps of an INT8 graph are those that were chosen, and suit what they round.

A scale that is twice too large costs a bit in one layer. The logits hardly show
it, and the layer's error is then just what its step explains. What does show it:

* the step is not the one its maker recorded in the manifest;
* the largest integer of a channel's weights is far from the end of the integers.

Reported, and no gate: by how much half the step would round the tensor better on
the images at hand. A doubled step shows there in most layers, but so does one outlier
that calibration met and these images lack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from van_deploy.bundle import Artefact
from van_deploy.checks.isolate import with_taps
from van_deploy.graph.names import INPUT_NAME
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import require_onnxruntime

__all__ = ["LEAST_CODE", "StepRow", "faults_of", "steps_of_graph"]

Array = npt.NDArray[Any]

IMAGES_AT_ONCE = 2
LEAST_CODE = 90
"""A channel whose largest weight is an integer below this wastes half of them: the right
step makes it 127, and twice that step 64."""

SMALLEST_SCALE = 2.0**-14
"""Steps are not made smaller than this, so there alone few integers may be used."""

RECORDED_WITHIN = 1e-3
"""Recorded steps are written with six digits, and stored as FP16 from there."""


@dataclass(frozen=True)
class StepRow:
    """One rounded tensor.

    Attributes:
        tensor: its name in the graph.
        modules: the modules that read it.
        scale: its step; the largest channel's for weights.
        recorded: what the manifest says it is; None where it does not say.
        halving_gain_db: how much less error half the step would bring, in dB; None for weights.
        largest_code: the smallest channel's largest integer; None for activations.
    """

    tensor: str
    modules: tuple[str, ...]
    scale: float
    recorded: float | None = None
    halving_gain_db: float | None = None
    largest_code: int | None = None

    @property
    def fault(self) -> str:
        """What is wrong with the step, or ""."""
        if self.recorded is not None and abs(self.scale / self.recorded - 1) > RECORDED_WITHIN:
            return (
                f"the step of '{self.tensor}' is {self.scale:.4g}, and {self.recorded:.4g} was "
                "recorded when it was made"
            )
        if self.largest_code is not None and self.largest_code < LEAST_CODE:
            return (
                f"the step of '{self.tensor}' is too large: a channel's integers end at "
                f"{self.largest_code} of 127"
            )
        return ""


def steps_of_graph(
    model: ModelProto, images: Images, artefact: Artefact | None = None
) -> tuple[StepRow, ...]:
    """Return every rounded activation and weight of a Q/DQ graph; none for another graph.

    Args:
        model: the graph, which takes normalised images.
        images: ``(N, C, S, S)`` normalised, to look at the activations of.
        artefact: whose recorded steps are compared, if there are any.
    """
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    pairs = [node for node in pairs if len(node.input) > 2 and node.input[1] in stored]
    readers = _readers(model)
    facts = artefact.quantization if artefact else {}
    gains = _halving_gains(model, images, pairs, stored) if pairs else {}
    recorded = _recorded(facts, pairs, stored)
    activations = [
        StepRow(
            tensor=node.input[0],
            modules=readers.get(node.output[0], ()),
            scale=float(stored[node.input[1]]),
            recorded=recorded.get(node.input[0]),
            halving_gain_db=gains.get(node.output[0]),
        )
        for node in pairs
    ]
    return (*activations, *_weights(model, stored, readers))


def faults_of(rows: Sequence[StepRow]) -> dict[str, str]:
    """Return what is wrong with the steps, by the module that reads each."""
    found: dict[str, str] = {}
    for row in rows:
        for module in row.modules if row.fault else ():
            found[module] = "; ".join(filter(None, (found.get(module), row.fault)))
    return found


def _weights(
    model: ModelProto,
    stored: Mapping[str, Array],
    readers: Mapping[str, tuple[str, ...]],
) -> Iterator[StepRow]:
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        codes, scales = stored[node.input[0]], np.atleast_1d(stored[node.input[1]])
        if codes.dtype != np.int8:
            continue
        rows = codes.reshape(len(scales), -1) if len(scales) > 1 else codes.reshape(1, -1)
        largest = np.abs(rows.astype(np.int64)).max(axis=1)
        free = scales.astype(np.float64) > SMALLEST_SCALE
        yield StepRow(
            tensor=node.input[0],
            modules=readers.get(node.output[0], ()),
            scale=float(scales.max()),
            largest_code=int(largest[free].min()) if free.any() else None,
        )


def _readers(model: ModelProto) -> dict[str, tuple[str, ...]]:
    """Return the modules that read each quantised tensor, behind its DequantizeLinear."""
    behind: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            behind.setdefault(name, []).append(node.name)
    makers = {node.name: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, tuple[str, ...]] = {}
    for node in makers.values():
        modules = tuple(behind.get(node.output[0], ()))
        found[node.output[0]] = modules
        found[node.input[0]] = (*found.get(node.input[0], ()), *modules)
    return found


def _recorded(
    facts: Mapping[str, object],
    pairs: Sequence[NodeProto],
    stored: Mapping[str, Array],
) -> Mapping[str, float]:
    """Return the recorded steps of tensors with one symmetric pair, which those records are of."""
    scales = facts.get("scales")
    names = [node.input[0] for node in pairs if stored[node.input[2]].dtype == np.int8]
    if not isinstance(scales, Mapping):
        return {}
    return {n: float(scales[n]) for n in names if n in scales and names.count(n) == 1}


def _halving_gains(
    model: ModelProto,
    images: Images,
    pairs: Sequence[NodeProto],
    stored: Mapping[str, Array],
) -> dict[str, float]:
    """Return the gain of half a step by the pair's result; none if the graph does not run."""
    tensors = [name for name in dict.fromkeys(p.input[0] for p in pairs) if name != INPUT_NAME]
    errors = {pair.output[0]: [0.0, 0.0] for pair in pairs}
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    try:
        session = require_onnxruntime().InferenceSession(
            with_taps(model, tensors).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        for start in range(0, len(images), IMAGES_AT_ONCE):
            batch = images[start : start + IMAGES_AT_ONCE]
            kind = np.float16 if "16" in session.get_inputs()[0].type else np.float32
            found = session.run(tensors, {INPUT_NAME: batch.astype(kind)})
            values = {INPUT_NAME: batch, **dict(zip(tensors, found, strict=True))}
            for pair in pairs:
                for index, share in enumerate((1.0, 0.5)):
                    error = _error(values[pair.input[0]], pair, stored, share)
                    errors[pair.output[0]][index] += error
    except Exception:  # ONNX Runtime raises its own bare types; verify tells that it does not run
        return {}
    return {name: _decibels(full, half) for name, (full, half) in errors.items()}


def _error(
    values: Array,
    pair: NodeProto,
    stored: Mapping[str, Array],
    share: float,
) -> float:
    """Return the squared error of a pair whose step is that share of its own."""
    scale, zero = float(stored[pair.input[1]]) * share, stored[pair.input[2]]
    ends, exact = np.iinfo(zero.dtype), values.astype(np.float64)
    codes = np.clip(np.rint(exact / scale) + int(zero), ends.min, ends.max)
    return float(np.square(exact - (codes - int(zero)) * scale).sum())


def _decibels(full: float, half: float) -> float:
    if full == 0.0:
        return -math.inf
    return math.inf if half == 0.0 else 10 * math.log10(full / half)
