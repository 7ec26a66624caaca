"""A graph of any precision as a function from images to logits, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.errors import ConversionError
from van_deploy.runners.onnxruntime import require_onnxruntime

__all__ = ["logits_session"]

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]


def logits_session(
    model: ModelProto, *, fuse: bool, threads: int | None = None, in_turns: bool = False
) -> Callable[[Images], Logits]:
    """Return a function from images ``(N, C, S, S)`` to float32 logits ``(N, K)``.

    Args:
        model: the graph; FP16 inputs are converted to.
        fuse: let ONNX Runtime fuse Q/DQ pairs into integer kernels, as on a CPU target;
            otherwise every pair is computed as written, as TensorRT does.
        threads: of ONNX Runtime; None lets it choose.
        in_turns: it is timed in turns with others in this process: threads that wait
            sleep. ONNX Runtime's would keep the cores busy for a while, and slow the
            next session down.

    Raises:
        ConversionError: ONNX Runtime refuses the graph.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if in_turns:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ConversionError(
            f"ONNX Runtime refuses the converted graph: {error}",
            "Please report it, with the command and the network's architecture.",
        ) from error
    entry = session.get_inputs()[0]
    kind = np.float16 if entry.type == "tensor(float16)" else np.float32

    def run(images: Images) -> Logits:
        found = session.run(None, {entry.name: images.astype(kind, copy=False)})[0]
        return np.asarray(found, dtype=np.float32)

    return run
