"""FP16 tensors that hold more than FP16 can.

A run time may hide it: ONNX Runtime's CPU kernels compute FP16 in FP32 and drop the
casts between two operators, so the same file is right there and wrong on a GPU. Here
every FP16 tensor is asked for as an output, which no run time can skip.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from van_deploy.checks.isolate import tensor_types, with_taps
from van_deploy.checks.parts import quiet_session
from van_deploy.graph.names import INPUT_NAME
from van_deploy.runners.base import Images

__all__ = ["overflows_of_graph"]

LARGEST = 65504


def overflows_of_graph(model: ModelProto, images: Images) -> dict[str, str]:
    """Return what overflows, by the node that makes it; only where an overflow begins.

    Args:
        model: a graph that takes normalised images.
        images: ``(N, C, S, S)`` normalised; one at a time is fed.
    """
    types = tensor_types(model)
    made = [name for node in model.graph.node for name in node.output if name]
    halves = [name for name in made if types[name] == TensorProto.FLOAT16]
    if not halves:
        return {}
    bad: set[str] = set()
    try:
        session = quiet_session(with_taps(model, halves))
        kind = np.float16 if "16" in session.get_inputs()[0].type else np.float32
        for index in range(len(images)):
            values = session.run(halves, {INPUT_NAME: images[index : index + 1].astype(kind)})
            bad |= {n for n, v in zip(halves, values, strict=True) if not np.isfinite(v).all()}
    except Exception:  # ONNX Runtime raises its own bare types; verify tells that it does not run
        return {}
    return {
        node.name: f"'{node.name}' passes {LARGEST}, the largest number of FP16"
        for node in model.graph.node
        if bad.intersection(node.output) and not bad.intersection(node.input)
    }
