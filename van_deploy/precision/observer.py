"""Every tensor inside a graph, for batch after batch, in memory that is used again."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, load_model

from van_deploy.runners.onnxruntime import require_onnxruntime

__all__ = ["Observer", "float_tensors", "with_outputs"]

CHANNEL_BLOCK = 16
"""The most channels ONNX Runtime puts into a block (MLAS: 8 or 16)."""

Images = npt.NDArray[np.float32]


def float_tensors(model: ModelProto) -> tuple[str, ...]:
    """Return the names of the input and of every tensor a node makes, in the graph's order."""
    made = [name for node in model.graph.node for name in node.output if name]
    return (*(value.name for value in model.graph.input), *made)


def with_outputs(model: ModelProto, names: Collection[str]) -> ModelProto:
    """Return ``model`` with only ``names``, tensors inside it, as its outputs."""
    observed = ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    return observed


class Observer:
    """One ONNX Runtime session that gives the values of the tensors ``names`` of a graph.

    On most processors ONNX Runtime's convolutions keep their tensors in blocks of channels,
    and handing one out in the usual order takes a copy. Which values there are does not
    depend on their order, so a tensor may be given as it lies: of the shape ``(N, C, H, W)``,
    each image's values its own, in any order within the image.

    Args:
        model: an FP32 graph.
        names: of tensors that its nodes make.
        threads: of one call. Several calls may run at the same time.
        whole: the tensors whose order matters.
    """

    def __init__(
        self,
        model: ModelProto,
        names: Collection[str],
        threads: int,
        whole: Collection[str] = (),
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="van-deploy-") as folder:
            optimized = Path(folder) / "optimized.onnx"
            _session(with_outputs(model, names), threads, optimized)
            laid_out = load_model(optimized)
        given = _without_last_copies(laid_out, set(whole))
        self._names = [given.get(name, name) for name in names]
        self._session = _session(laid_out, threads)

    def run_in_own_memory(self) -> Callable[[Images], list[Images]]:
        """Return a function that gives the tensors of a batch, for one thread.

        What it gave is overwritten by its next call: the memory of a batch is used again,
        since to be given new pages takes longer than the network itself.
        """
        source = self._session.get_inputs()[0].name
        kept: list[Images] = []

        def run(images: Images) -> list[Images]:
            if not kept or len(kept[0]) != len(images):  # the first, or a smaller last one
                found: list[Images] = self._session.run(self._names, {source: images})
                if not kept:
                    kept.extend(found)
                return found
            binding = self._session.io_binding()
            binding.bind_cpu_input(source, images)
            for name, buffer in zip(self._names, kept, strict=True):
                binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
            self._session.run_with_iobinding(binding)
            return kept

        return run


def _session(model: ModelProto, threads: int, save_to: Path | None = None) -> Any:
    """Return a session; a graph that is saved is optimised first, any other runs as it is.

    Raises:
        OSError: the disk is too full to save it.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # the last batch may be smaller
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model.SerializeToString()
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception:
        if save_to is not None and shutil.disk_usage(save_to.parent).free < len(content):
            # ONNX Runtime only says that "Protobuf serialization failed"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(save_to)) from None
        raise


def _without_last_copies(model: ModelProto, whole: Collection[str]) -> dict[str, str]:
    """Take away the copies into the usual order that only outputs need.

    Returns:
        For each output that lost its copy, the tensor that is given instead.
    """
    read = {name for node in model.graph.node for name in node.input}
    given = {}
    for node in list(model.graph.node):
        output = node.output[0]
        if node.op_type == "ReorderOutput" and output not in read and output not in whole:
            channels = next(a.i for a in node.attribute if a.name == "channels")
            if channels % CHANNEL_BLOCK == 0:  # else there are zeros behind the last channel
                given[output] = node.input[0]
                model.graph.node.remove(node)
    for value in model.graph.output:
        value.name = given.get(value.name, value.name)
    del model.graph.value_info[:]
    return given
