"""Which tensors and weights FP16 cannot hold, read from the ranges of real images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, numpy_helper

from van_deploy.errors import GateFailed
from van_deploy.precision.plan import FP16_LARGEST
from van_deploy.precision.ranges import Ranges
from van_deploy.precision.tensor_range import (
    FP16_SMALLEST,
    FP16_SMALLEST_NORMAL,
    TensorRange,
)

__all__ = [
    "HEADROOM",
    "RangeAudit",
    "TensorAudit",
    "audit_ranges",
    "require_no_surprise",
]

HEADROOM = 2.0
"""Images not seen in the audit may reach further: what passes half of 65504 is kept in FP32."""

LOST_ENERGY = 1e-3
"""Largest share of a weight's sum of squares that may vanish in FP16."""


@dataclass(frozen=True)
class TensorAudit:
    """One tensor or weight against FP16.

    Attributes:
        name: of the tensor.
        kind: ``activation`` or ``weight``.
        largest: its largest magnitude.
        smallest: its smallest magnitude that is not zero, or None.
        subnormal_share: which share of its values (0..1) FP16 holds with fewer bits.
        vanishing_share: which share FP16 rounds to zero.
        problem: why FP16 cannot hold it, or "".
    """

    name: str
    kind: str
    largest: float
    smallest: float | None
    subnormal_share: float
    vanishing_share: float
    problem: str


@dataclass(frozen=True)
class RangeAudit:
    """Every tensor and weight of a graph against FP16.

    Attributes:
        tensors: all of them, in the graph's order.
        kept: nodes that have to stay FP32 because of one, and why.
        images: how many images the activations were seen on.
    """

    tensors: tuple[TensorAudit, ...]
    kept: Mapping[str, str]
    images: int

    @property
    def passed(self) -> bool:
        """Whether FP16 holds everything that is to be FP16."""
        return not self.kept

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the extremes and every tensor with a problem, for the manifest."""
        activations = [t for t in self.tensors if t.kind == "activation"]
        weights = [t for t in self.tensors if t.kind == "weight"]
        return {
            "images": self.images,
            "headroom": HEADROOM,
            "largest_activation": _extreme(activations, largest=True),
            "smallest_largest_activation": _extreme(activations, largest=False),
            "largest_weight": _extreme(weights, largest=True),
            "most_vanishing_weight": max(
                ({"name": t.name, "share": t.vanishing_share} for t in weights),
                key=lambda entry: float(str(entry["share"])),
                default=None,
            ),
            "problems": [asdict(t) for t in self.tensors if t.problem],
            "kept": dict(self.kept),
        }


def audit_ranges(model: ModelProto, ranges: Ranges, already_kept: Collection[str]) -> RangeAudit:
    """Return what FP16 cannot hold of ``model``, whose ``ranges`` were recorded.

    Args:
        model: the FP32 graph.
        ranges: of every tensor, on real images.
        already_kept: nodes that stay FP32 anyway; their own weights, and tensors
            between two of them, are no problem.
    """
    audits: list[TensorAudit] = []
    kept: dict[str, str] = {}
    makers = {name: node.name for node in model.graph.node for name in node.output}
    stored = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    for name, record in ranges.tensors.items():
        touching = {*readers.get(name, ()), *filter(None, [makers.get(name)])}
        problem = _activation_problem(record) if touching - set(already_kept) else ""
        audits.append(_activation(name, record, problem))
        if problem:
            kept |= dict.fromkeys(touching - set(already_kept), f"'{name}' {problem}")
    for name, tensor in stored.items():
        using = set(readers.get(name, ())) - set(already_kept)
        audit = _weight(name, numpy_helper.to_array(tensor), relevant=bool(using))
        audits.append(audit)
        if audit.problem:
            kept |= dict.fromkeys(using, f"'{name}' {audit.problem}")
    order = [node.name for node in model.graph.node]
    return RangeAudit(tuple(audits), {n: kept[n] for n in order if n in kept}, ranges.images)


def require_no_surprise(audit: RangeAudit) -> None:
    """Do nothing if FP16 holds everything.

    Raises:
        GateFailed: something would have to stay FP32 that nobody asked to keep.
    """
    if audit:
        return
    reasons = list(dict.fromkeys(audit.kept.values()))
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    raise GateFailed(
        f"FP16 cannot hold everything: {'; '.join(reasons[:3])}{more}.",
        "Name the modules with --keep, or leave out --strict to have them kept in FP32.",
    )


def _activation(name: str, record: TensorRange, problem: str) -> TensorAudit:
    count = max(record.count, 1)
    return TensorAudit(
        name=name,
        kind="activation",
        largest=record.largest,
        smallest=record.smallest if np.isfinite(record.smallest) else None,
        subnormal_share=record.subnormal / count,
        vanishing_share=record.vanishing / count,
        problem=problem,
    )


def _activation_problem(record: TensorRange) -> str:
    if record.largest * HEADROOM > FP16_LARGEST:
        return f"reaches {record.largest:g}, beyond half of FP16's 65504"
    if 0 < record.largest < FP16_SMALLEST_NORMAL:
        return f"never passes {record.largest:g}, below FP16's smallest normal number 6.1e-5"
    return ""


def _weight(name: str, values: npt.NDArray[Any], relevant: bool) -> TensorAudit:
    magnitude = np.abs(values.astype(np.float64)).ravel()
    filled = magnitude[magnitude > 0]
    largest = float(magnitude.max(initial=0.0))
    vanishing = filled[filled <= FP16_SMALLEST]
    problem = ""
    if relevant and largest > FP16_LARGEST:
        problem = f"holds {largest:g}, beyond FP16's 65504"
    elif relevant and np.square(vanishing).sum() > LOST_ENERGY * np.square(filled).sum():
        problem = f"loses {vanishing.size} of its {filled.size} values, which FP16 rounds to zero"
    size = max(magnitude.size, 1)
    return TensorAudit(
        name=name,
        kind="weight",
        largest=largest,
        smallest=float(filled.min()) if filled.size else None,
        subnormal_share=np.count_nonzero(filled < FP16_SMALLEST_NORMAL) / size,
        vanishing_share=vanishing.size / size,
        problem=problem,
    )


def _extreme(audits: list[TensorAudit], *, largest: bool) -> dict[str, Any] | None:
    found = [t for t in audits if t.largest > 0]
    if not found:
        return None
    chosen = (max if largest else min)(found, key=lambda t: t.largest)
    return {"name": chosen.name, "largest": chosen.largest}
