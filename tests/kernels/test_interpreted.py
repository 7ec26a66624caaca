"""The kernels in Triton's interpreter on the CPU, compared with float64 PyTorch.

The interpreter is selected before Triton is imported, so the tests run this file as a script; it
fails with the cases whose error exceeds the limit of its type. Every input is surrounded by NaN,
and every output is NaN before it is written, so that reads out of bounds and missing writes give
an error of NaN.

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/kernels/test_interpreted.py [--slow]
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from van_deploy.errors import UsageError
from van_deploy.graph.fold import fold_van
from van_deploy.kernels import ops, reference
from van_deploy.kernels.launch import TILES
from van_deploy.kernels.network import fuse_van
from van_deploy.model.van import random_van, smooth_images
from van_deploy.model.variants import VanConfig

HALF, BRAIN = torch.float16, torch.bfloat16
LIMITS = {torch.float32: 2e-6, HALF: 2e-3, BRAIN: 1.6e-2}
TINY = VanConfig((16, 20, 32, 48), (1, 2, 1, 1), (2, 2, 2, 2), num_classes=10)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random numbers surrounded by NaN in memory."""
    flat = torch.full((math.prod(shape) + 256,), math.nan, dtype=dtype)
    flat[128:-128] = torch.randn(math.prod(shape)).to(dtype)
    return flat[128:-128].view(shape)


def fill_allocations_with_nan() -> None:
    """Fill the tensors that kernels allocate with NaN."""
    empty, like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(math.nan)
    torch.empty_like = lambda *a, **k: like(*a, **k).fill_(math.nan)


def error_of(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Return the relative error as a multiple of the limit of a type."""
    return float((actual.double() - expected).norm() / expected.norm()) / LIMITS[dtype]


def error(step: str, x: Tensor, *arguments: Any) -> float:
    """Return the error of an operation compared with float64."""
    doubles = [a.double() if isinstance(a, Tensor) else a for a in (x, *arguments)]
    return error_of(getattr(ops, step)(x, *arguments), getattr(reference, step)(*doubles), x.dtype)


def largest(errors: Iterable[float]) -> float:
    """Return the largest error; NaN if there is one, unlike ``max``."""
    return float(torch.tensor([*errors]).max())


def depthwise(
    shape: tuple[int, ...], side: int, dilation: int, dtype: torch.dtype = torch.float32
) -> float:
    """Return the larger error of a depth-wise convolution with and without GELU."""
    weight, bias = tensor(side, side, shape[3]), tensor(shape[3])
    x = tensor(*shape, dtype=dtype)
    return largest(error("depthwise", x, weight, bias, dilation, gelu) for gelu in (False, True))


def gelu_error_beyond_bound() -> float:
    """Return by how much the error of GELU exceeds 5e-6 and float16 rounding, or 0."""
    x = torch.linspace(-9, 9, 1024 * 16).half().view(1, 32, 32, 16)
    actual = ops.depthwise(x, torch.ones(1, 1, 16), torch.zeros(16), 1, True).double()
    expected = torch.nn.functional.gelu(x.double())
    excess = (actual - expected).abs() - 5e-6 - expected.abs() * 2**-11 - 2**-25
    return float(excess.max().clamp(min=0)) / LIMITS[torch.float32]


def pointwise(shape: tuple[int, ...], outer: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest error of the four epilogues."""
    x, bias = tensor(*shape, dtype=dtype), tensor(outer)
    weight = tensor(outer, shape[3], dtype=dtype)
    other = tensor(*shape[:3], outer, dtype=dtype)
    return largest(
        error("pointwise", x, weight, bias, name, other if name in ("multiply", "add") else None)
        for name in ("none", "gelu", "multiply", "add")
    )


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    """Return the error of a LayerNorm."""
    return error("layer_norm", tensor(*shape, dtype=dtype), tensor(shape[3]), tensor(shape[3]))


def patches(shape: tuple[int, ...], side: int, stride: int, outer: int, nhwc: bool) -> float:
    """Return the error of a strided convolution of NCHW or NHWC input."""
    x = tensor(*shape)
    x = x.permute(0, 3, 1, 2) if nhwc else x
    return error("patches", x, tensor(side, side, x.shape[1], outer), tensor(outer), stride)


def network(dtype: torch.dtype, skip_gains: int = 0) -> float:
    """Return the error of a network's logits compared with the original in float64.

    Args:
        dtype: type of the kernels.
        skip_gains: number of multiplications in the residual stream.
    """
    model, x = random_van(TINY), smooth_images(2, 3, 33)
    if skip_gains:
        block: Any = model.get_submodule("block2.0")
        scale = block.norm1.weight / torch.sqrt(block.norm1.running_var + block.norm1.eps)
        block.layer_scale_1.data[3] = 1e-6 / scale[3] - 1 / scale[3]
    assert fold_van(model, x).multiplies_left == skip_gains
    return error_of(fuse_van(model, dtype)(x), model.double()(x.double()), dtype)


def with_tile(key: str, tile: dict[str, int], run: Callable[[], float]) -> float:
    """Return the result of ``run`` with another tile than the default."""
    with mock.patch.dict(TILES, {key: tile}):
        return run()


FAST: dict[str, Callable[[], float]] = {
    "depthwise 3x3, a channel more than a tile": lambda: depthwise((1, 5, 7, 33), 3, 1),
    "depthwise 5x5": lambda: depthwise((2, 6, 5, 16), 5, 1),
    "depthwise, three rows a thread": lambda: with_tile(
        "depthwise/3x1x20/p6", {"ROWS": 3}, lambda: depthwise((1, 7, 5, 20), 3, 1)
    ),
    "depthwise 7x7 d3": lambda: depthwise((1, 13, 6, 32), 7, 3),
    "depthwise 9x9 d4, wider than the map": lambda: depthwise((1, 4, 3, 16), 9, 4),
    "depthwise 7x7 d3, one pixel": lambda: depthwise((1, 1, 1, 16), 7, 3),
    "depthwise float16": lambda: depthwise((1, 6, 5, 16), 3, 1, HALF),
    "GELU": gelu_error_beyond_bound,
    "pointwise, odd sizes": lambda: pointwise((2, 5, 7, 33), 40),
    "pointwise float16": lambda: pointwise((1, 4, 4, 16), 32, HALF),
    "stem": lambda: patches((2, 3, 19, 13), 7, 4, 20, nhwc=False),
    "patch embedding": lambda: patches((1, 9, 7, 32), 3, 2, 40, nhwc=True),
    "layer_norm, odd sizes": lambda: layer_norm((2, 5, 7, 33)),
    "layer_norm float16": lambda: layer_norm((1, 3, 5, 64), HALF),
    "pointwise, two tiles a program": lambda: with_tile(
        "pointwise/1x20x33/p6", {"REPEAT": 2}, lambda: pointwise((1, 7, 9, 20), 33)
    ),
}
SLOW: dict[str, Callable[[], float]] = {
    "network, float32": lambda: network(torch.float32),
    "network, float16": lambda: network(HALF),
    "network, with a skip gain": lambda: network(torch.float32, skip_gains=1),
    "depthwise bfloat16": lambda: depthwise((2, 9, 5, 20), 5, 1, BRAIN),
}


def random_shapes() -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield cases of random sizes."""
    draw = torch.Generator().manual_seed(7)

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    for number in range(4):
        shape = (size(1, 3), size(1, 12), size(1, 12), size(1, 70))
        side, dilation = [(3, 1), (5, 1), (7, 3), (9, 4)][number]
        outer = size(1, 70)
        yield f"random depthwise {shape}", partial(depthwise, shape, side, dilation)
        yield f"random pointwise {shape} {outer}", partial(pointwise, shape, outer)
        yield f"random patches {shape} {outer}", partial(patches, shape, 3, 2, outer, nhwc=True)
        yield f"random layer_norm {shape}", partial(layer_norm, shape)


def check_refused_arguments() -> None:
    """Check the messages for invalid arguments."""
    x, weight, bias = tensor(1, 4, 4, 16), tensor(3, 3, 16), tensor(16)
    integers = torch.ones(1, 3, 8, 8, dtype=torch.int32)
    permuted = x.permute(0, 3, 1, 2)
    calls: dict[str, Callable[[], Any]] = {
        "(4, 4, 16), but the kernel needs 4 dim": lambda: ops.depthwise(x[0], weight, bias),
        "needs shape (3, 3, 16)": lambda: ops.depthwise(x, tensor(2, 2, 16), bias),
        "'x' is not contiguous": lambda: ops.depthwise(permuted, tensor(3, 3, 4), tensor(4)),
        "'x' is torch.float64": lambda: ops.depthwise(x.double(), weight, bias),
        "'bias' is torch.float16": lambda: ops.depthwise(x, weight, bias.half()),
        "'x' has shape (0, 4, 4, 16)": lambda: ops.depthwise(x[:0], weight, bias),
        "epilogue 'add' does": lambda: ops.pointwise(x, tensor(16, 16), bias, "add"),
        "'x' is torch.int32": lambda: ops.patches(integers, tensor(3, 3, 3, 16), bias, 2),
    }
    for words, call in calls.items():
        with pytest.raises(UsageError, match=re.escape(words)):
            call()


def main() -> None:
    """Run the cases; fail with the errors that exceed 1 or are NaN."""
    cases = {**SLOW, **dict(random_shapes())} if "--slow" in sys.argv else FAST
    torch.manual_seed(0)
    fill_allocations_with_nan()
    check_refused_arguments()
    with torch.no_grad():
        errors = {name: run() for name, run in cases.items()}
    failed = {name: error for name, error in errors.items() if not error <= 1}
    sys.exit(str(failed) if failed else 0)


def run_script(*arguments: str) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    words = [sys.executable, __file__, *arguments]
    run = subprocess.run(words, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_kernels_agree_with_float64() -> None:
    run_script()


@pytest.mark.slow
def test_random_shapes_and_whole_networks_agree_with_float64() -> None:
    run_script("--slow")


if __name__ == "__main__":
    main()
