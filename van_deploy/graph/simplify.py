"""A smaller ONNX graph, kept only if it answers as the one before it.

The work is onnxsim's. After the rewrites of :mod:`van_deploy.graph.fold` there
is often nothing left for it to do, and then the graph is left alone; a plain
export loses some nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.graph.shapes import fixed_batch
from van_deploy.metrics import compare

if TYPE_CHECKING:
    from onnx import ModelProto

Floats = npt.NDArray[np.float32]

SIMPLIFY_TOLERANCE = 1e-5
"""Largest relative difference between the graph and its simplification, in float32.

Folding a constant changes the order of additions; on the trained van_b0 that
alone moves the logits by about 1e-6 of their size.
"""

EXTERNAL_LIMIT_BYTES = 2_000_000_000
"""Weights past this go into a file of their own: protobuf ends at 2 GiB."""


def simplify_onnx(
    model: ModelProto,
    images: Floats,
    run: Callable[[ModelProto, Floats], Mapping[str, Floats]],
) -> tuple[ModelProto, dict[str, Any]]:
    """Return ``model`` simplified, if that helps and changes nothing but the size; and the facts.

    The facts, ready for JSON: whether the graph is ``changed``, and the ``reason``; its nodes
    before and after, and the operators that were ``removed``, by type; the ``relative_error``
    ``max|difference| / max|logit|``, or None if there was nothing to compare; the ``tolerance``.

    Args:
        model: an FP32 graph; it is not changed.
        images: ``(N, C, H, W)`` float32 to compare both graphs on, at batch N and 1; of a
            static graph at its batch.
        run: gives a graph's outputs by name for ``n`` images.
    """
    import onnxsim

    before, result, error = Counter(operator_counts(model)), model, None
    reason = "skipped: larger than 2 GB"
    if tensor_bytes(model) <= EXTERNAL_LIMIT_BYTES:
        try:
            simplified, _ = onnxsim.simplify(model)
            reason = "nothing to remove"
            if operator_counts(simplified) != before:
                error = _error(model, simplified, images, run)
                reason = f"kept as exported: the simplified graph differs by {error:.1e}"
                if error <= SIMPLIFY_TOLERANCE:  # not for NaN
                    result, reason = simplified, "simplified"
        except Exception as failure:  # onnxsim raises bare C++ errors; the graph is good without it
            reason = f"kept as exported: onnxsim failed, or what it made does not run ({failure})"
    after = Counter(operator_counts(result))
    return result, {
        "changed": result is not model,
        "reason": reason,
        "nodes_before": before.total(),
        "nodes_after": after.total(),
        "removed": dict(before - after),
        "relative_error": error,
        "tolerance": SIMPLIFY_TOLERANCE,
    }


def _error(
    model: ModelProto,
    simplified: ModelProto,
    images: Floats,
    run: Callable[[ModelProto, Floats], Mapping[str, Floats]],
) -> float:
    """Return the largest relative difference of any output, at every batch size to compare."""
    fixed, errors = fixed_batch(model), []
    for count in (fixed,) if fixed else (len(images), 1):
        batch = np.resize(images, (count, *images.shape[1:]))  # repeats them where they are few
        expected, found = run(model, batch), run(simplified, batch)
        for name, value in expected.items():
            flat = value.reshape(len(value), -1)
            same = compare(flat, found[name].reshape(flat.shape), classes=False)
            errors.append(same.relative)
    return float(np.max(errors))


def operator_counts(model: ModelProto) -> dict[str, int]:
    """Return how many nodes of each operator a graph has, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def tensor_bytes(model: ModelProto) -> int:
    """Return the bytes of all initialisers that are held in memory."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
