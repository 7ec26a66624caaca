"""What the machine can do at best, measured: large matrix products and a large copy.

Run in a worker, with the same number of threads as the contenders of that run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from van_deploy.environment.hardware import cpu
from van_deploy.errors import MissingDependency

__all__ = ["Ceilings", "measured_ceilings"]

SIDE = 1536  # of the square matrices: 27 MB in float32, past the caches of most cores
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Ceilings:
    """A device's limits.

    Attributes:
        ops_per_s: operations a second (a multiply-add is two) of large matrix
            products, by precision; what was not measured is absent.
        vector_ops_per_s: operations a second outside matrix products, or None
            where it is the same silicon (CPUs: float32's figure is used).
        bytes_per_s: memory traffic a second of a large copy, reads and writes both counted.
        source: ``measured``, or where figures on paper come from.
        how: what was run for each figure, or the remark that belongs to a paper one.
    """

    ops_per_s: dict[str, float]
    bytes_per_s: float
    source: str
    how: dict[str, str]
    vector_ops_per_s: float | None = None


def measured_ceilings(threads: int, seconds: float = 0.5) -> Ceilings:
    """Return this processor's limits with ``threads`` threads.

    Of two libraries' products the faster counts. Every figure is the best of
    repeated runs during ``seconds``. bfloat16 is measured where the processor has
    instructions for it: elsewhere nothing runs in it, and one product takes seconds.
    """
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.rand(SIDE, SIDE) for _ in range(2))
    operations = 2.0 * SIDE**3
    how = {"fp32": f"torch.mm {SIDE}^3"}
    rates = {"fp32": operations / _best_s(lambda: torch.mm(a, b), seconds)}
    if cpu().has_bfloat16:
        half_a, half_b = a.bfloat16(), b.bfloat16()
        how["bf16"] = f"torch.mm {SIDE}^3 in bfloat16"
        rates["bf16"] = operations / _best_s(lambda: torch.mm(half_a, half_b), seconds)
    for precision, (call, words) in _onnxruntime_products(threads).items():
        rate = operations / _best_s(call, seconds)
        if rate > rates.get(precision, 0.0):
            rates[precision], how[precision] = rate, words
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.empty_like(source)
    copied = 2 * COPY_BYTES / _best_s(lambda: target.copy_(source), seconds)
    how["memory"] = f"torch copy of {COPY_BYTES // 2**20} MiB, read and written"
    return Ceilings(rates, copied, "measured", how)


def _best_s(call: Callable[[], object], seconds: float) -> float:
    """Return the seconds of the fastest of repeated calls."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _onnxruntime_products(threads: int) -> dict[str, tuple[Callable[[], object], str]]:
    """Return ONNX Runtime's products by precision; none where it is not installed.

    uint8 times int8 is its fast form on CPUs.
    """
    import numpy as np
    from onnx import TensorProto

    from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

    calls: dict[str, tuple[Callable[[], object], str]] = {}
    forms = (
        ("fp32", "MatMul", TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT, np.float32),
        ("int8", "MatMulInteger", TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, np.uint8),
    )
    for precision, operator, left, right, result, kind in forms:
        runner = OnnxRuntimeRunner(_product(operator, left, right, result), threads=threads)
        try:
            opened = runner.__enter__()
        except MissingDependency:
            return {}
        batch = np.ones((SIDE, SIDE), kind)
        calls[precision] = (
            lambda opened=opened, batch=batch: opened.run(batch),  # type: ignore[misc]
            f"ONNX Runtime {operator} {SIDE}^3",
        )
    return calls


def _product(operator: str, left: int, right: int, result: int) -> Any:
    """Return a graph that multiplies its input by a constant matrix."""
    import numpy as np
    from onnx import helper, numpy_helper

    values = np.ones((SIDE, SIDE), np.float32 if right == 1 else np.int8)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", left, (SIDE, SIDE))],
        [helper.make_tensor_value_info("c", result, (SIDE, SIDE))],
        [numpy_helper.from_array(values, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    return model
