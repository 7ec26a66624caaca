"""What FP16 cannot hold of a graph, by the ranges of real images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from van_deploy.errors import GateFailed
from van_deploy.precision.observers import ChannelRange
from van_deploy.precision.scales import FP16_LARGEST

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_SMALLEST = 2.0**-25  # rounds to the smallest FP16 number; below it, to zero

HEADROOM = 2.0
"""Images not seen in the audit may reach further: what passes half of 65504 is kept in FP32."""

LOST_ENERGY = 1e-3
"""Largest share of a weight's sum of squares that may vanish in FP16."""


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
        """Return the audit and its advice, ready for JSON."""
        return {**asdict(self), "advice": self.advice}

    @property
    def advice(self) -> str:
        """What to make instead where FP16 does not hold everything; "" where it does."""
        if not self.problems:
            return ""
        what = "tensor or weight" if len(self.problems) == 1 else "tensors and weights"
        return (
            f"FP16 cannot hold {len(self.problems)} {what}, and BF16 can, with FP32's own range: "
            "compare with `van-deploy quantize --precision bf16`"
        )

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
            "Name the modules with --keep, leave out --strict to have them kept in FP32, or make "
            "bf16, which has FP32's own range.",
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
    made = [value for node in graph for value in node.outputs]
    stored = [v for v in graph.initializers.values() if v.dtype is ir.DataType.FLOAT]
    problems: list[RangeProblem] = []
    reasons: dict[str, str] = {}
    for value in (*graph.inputs, *made, *stored):
        nodes = [node for node, _ in value.uses()] + [value.producer()]
        concerned = {str(node.name) for node in nodes if node is not None} - set(kept)
        name = str(value.name)
        found = _problem(name, value.const_value, largest.get(name, 0.0))
        if concerned and found is not None:
            problems.append(found)
            reasons |= dict.fromkeys(concerned, f"'{name}' {found.problem}")
    filled = [(name, size) for name, size in largest.items() if size > 0]
    return RangeAudit(
        images=images,
        headroom=HEADROOM,
        largest_activation=max(filled, key=lambda item: item[1]),
        smallest_activation=min(filled, key=lambda item: item[1]),
        problems=tuple(problems),
        kept={str(n.name): reasons[str(n.name)] for n in graph if n.name in reasons},
    )


def _problem(name: str, stored: ir.TensorProtocol | None, largest: float) -> RangeProblem | None:
    """Return what is wrong with a weight, or with a tensor of this largest magnitude, if anything.

    A weight fails where what FP16 rounds to zero matters; a tensor where it leaves FP16's range.
    """
    why = ""
    if stored is not None:
        magnitude = np.abs(stored.numpy().astype(np.float64)).ravel()
        filled, largest = magnitude[magnitude > 0], float(magnitude.max(initial=0.0))
        vanishing = filled[filled <= FP16_SMALLEST]
        if largest > FP16_LARGEST:
            why = f"holds {largest:g}, beyond FP16's 65504"
        elif np.square(vanishing).sum() > LOST_ENERGY * np.square(filled).sum():
            why = f"loses {vanishing.size} of its {filled.size} values, which FP16 rounds to zero"
    elif largest * HEADROOM > FP16_LARGEST:
        why = f"reaches {largest:g}, beyond half of FP16's 65504"
    elif 0 < largest < FP16_SMALLEST_NORMAL:
        why = f"never passes {largest:g}, below FP16's smallest normal number 6.1e-5"
    return RangeProblem(name, largest, why) if why else None
