"""A smaller ONNX graph, kept only if it answers as the one before it.

The work is onnxsim's. After the rewrites of :mod:`van_deploy.graph.fold` there
is often nothing left for it to do, and then the graph is left alone; a plain
export loses some nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from van_deploy.graph.shapes import fixed_batch
from van_deploy.metrics import compare

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "EXTERNAL_LIMIT_BYTES",
    "SIMPLIFY_TOLERANCE",
    "SimplifyReport",
    "operator_counts",
    "simplify_onnx",
    "tensor_bytes",
]

Floats = npt.NDArray[np.float32]

SIMPLIFY_TOLERANCE = 1e-5
"""Largest relative difference between the graph and its simplification, in float32.

Folding a constant changes the order of additions; on the trained van_b0 that
alone moves the logits by about 1e-6 of their size.
"""

EXTERNAL_LIMIT_BYTES = 2_000_000_000
"""Weights past this go into a file of their own: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class SimplifyReport:
    """What simplification did.

    Attributes:
        model: the graph to go on with.
        changed: whether that is the simplified one.
        reason: why, in words for the user.
        before: operators by type before.
        after: operators by type in ``model``.
        relative_error: ``max|difference| / max|logit|``, or None if there was
            nothing to compare.
    """

    model: ModelProto
    changed: bool
    reason: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    relative_error: float | None

    @property
    def removed(self) -> dict[str, int]:
        """Operators that are gone, by type."""
        gone = Counter(self.before)
        gone.subtract(self.after)
        return {kind: count for kind, count in gone.items() if count > 0}

    def as_dict(self) -> dict[str, object]:
        """Return the figures, ready for JSON."""
        return {
            "changed": self.changed,
            "reason": self.reason,
            "nodes_before": sum(self.before.values()),
            "nodes_after": sum(self.after.values()),
            "removed": self.removed,
            "relative_error": self.relative_error,
            "tolerance": SIMPLIFY_TOLERANCE,
        }


def simplify_onnx(
    model: ModelProto,
    images: Floats,
    run: Callable[[ModelProto, Floats], Mapping[str, Floats]],
) -> SimplifyReport:
    """Return ``model`` simplified, if that helps and changes nothing but the size.

    Args:
        model: an FP32 graph; it is not changed.
        images: ``(N, C, H, W)`` float32 to compare both graphs on, at batch N and 1; of a
            static graph at its batch.
        run: gives a graph's outputs by name for ``n`` images.
    """
    import onnxsim

    before = operator_counts(model)
    if tensor_bytes(model) > EXTERNAL_LIMIT_BYTES:
        return SimplifyReport(model, False, "skipped: larger than 2 GB", before, before, None)
    try:
        simplified, _ = onnxsim.simplify(model)
    except Exception as failure:  # onnxsim raises bare C++ errors; the graph is good without it
        reason = f"kept as exported: onnxsim failed ({failure})"
        return SimplifyReport(model, False, reason, before, before, None)
    after = operator_counts(simplified)
    if after == before:
        reason = "nothing to remove"
        return SimplifyReport(model, False, reason, before, before, None)
    try:
        fixed = fixed_batch(model)
        rows = [[*range(len(images))], [0]]
        if fixed is not None:
            rows = [[place % len(images) for place in range(fixed)]]
        error = max(_error(run(model, images[r]), run(simplified, images[r])) for r in rows)
    except Exception as failure:
        reason = f"kept as exported: the simplified graph does not run ({failure})"
        return SimplifyReport(model, False, reason, before, before, None)
    if not error <= SIMPLIFY_TOLERANCE:  # also for NaN
        reason = f"kept as exported: the simplified graph differs by {error:.1e}"
        return SimplifyReport(model, False, reason, before, before, error)
    return SimplifyReport(simplified, True, "simplified", before, after, error)


def _error(expected: Mapping[str, Floats], found: Mapping[str, Floats]) -> float:
    """Return the largest relative difference of any output."""
    flat = {name: value.reshape(len(value), -1) for name, value in expected.items()}
    return max(
        compare(value, found[name].reshape(value.shape), classes=False).relative
        for name, value in flat.items()
    )


def operator_counts(model: ModelProto) -> dict[str, int]:
    """Return how many nodes of each operator a graph has, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def tensor_bytes(model: ModelProto) -> int:
    """Return the bytes of all initialisers that are held in memory."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
