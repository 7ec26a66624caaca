"""The range of every tensor on real images, in one pass over them.

One ONNX Runtime session gives every tensor of a batch at once; each goes into
its fixed-size record and is dropped. Two workers do that side by side, each with
every second batch and with records of its own, which are put together in the end:
so no core waits for another. The memory needed is that of two batches and of the
records, whatever the number of images.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.environment.hardware import cpu
from van_deploy.errors import ConversionError, ImageError
from van_deploy.precision.histogram import Histogram
from van_deploy.precision.observer import Images, Observer, float_tensors
from van_deploy.precision.plan import weighted_nodes
from van_deploy.precision.tensor_range import TensorRange
from van_deploy.runners.pytorch import one_torch_thread

__all__ = ["Ranges", "lean_batch", "record_ranges"]

BATCH_BYTES = 192 << 20
"""Memory that one batch's tensors may take while ranges are recorded."""

WORKERS = 2
"""Batches that are looked at at the same time."""


@dataclass(frozen=True)
class Ranges:
    """The ranges of a graph's tensors on one set of images.

    Attributes:
        tensors: by name, in the graph's order.
        images: how many images they were recorded on.
        facts: where they came from, for ``ranges.json``.
    """

    tensors: Mapping[str, TensorRange]
    images: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def lean_batch(model: ModelProto, budget_bytes: int = BATCH_BYTES) -> int:
    """Return how many images, at most 32, have all tensors of ``model`` in ``budget_bytes``."""
    from onnx.shape_inference import infer_shapes

    values = 0
    for value in infer_shapes(model).graph.value_info:
        sides = [d.dim_value for d in value.type.tensor_type.shape.dim[1:]]
        values += int(np.prod(sides))
    return int(np.clip(budget_bytes // max(4 * values, 1), 1, 32))


def record_ranges(
    model: ModelProto,
    batches: Iterable[Images],
    *,
    histograms: Collection[str] | None = None,
    channels: Collection[str] = (),
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ranges:
    """Return the range of every tensor of ``model``, recorded in one pass over ``batches``.

    Args:
        model: an FP32 graph.
        batches: normalised images ``(N, C, S, S)`` float32, a batch at a time.
        histograms: tensors that get a full histogram; by default the inputs of
            every Conv and Gemm.
        channels: tensors of which each channel's extremes are recorded too.
        threads: how many may work; None for as many as there are cores.
        progress: called after each batch with the images seen so far.

    Raises:
        ImageError: there was no image.
        ConversionError: a tensor became infinite or NaN.
    """
    names = float_tensors(model)
    wanted = (
        {node.input[0] for node in weighted_nodes(model).values()}
        if histograms is None
        else set(histograms)
    )
    threads = threads or cpu().cores_allowed
    workers = min(WORKERS, threads)
    observer = Observer(model, names[1:], threads // workers, whole=channels)
    recorders = [_Recorder(observer, names, wanted, channels) for _ in range(workers)]
    seen = 0
    for count in _in_turns(recorders, batches):
        seen += count
        if progress is not None:
            progress(seen)
    if not seen:
        raise ImageError(
            "There is no image to record ranges on.", "Pass a folder with --images DIR."
        )
    records = {
        name: functools.reduce(TensorRange.merged, [r.records[name] for r in recorders])
        for name in names
    }
    for record in records.values():
        record.close_()
    return Ranges(records, seen)


class _Recorder:
    """One worker: the records of every tensor in the batches that are its turn."""

    def __init__(
        self,
        observer: Observer,
        names: Sequence[str],
        histograms: Collection[str],
        channels: Collection[str],
    ) -> None:
        self.run = observer.run_in_own_memory()
        self.bins = np.empty(0, np.uint32)
        self.records = {
            name: TensorRange(
                histogram=Histogram() if name in histograms else None, channels=name in channels
            )
            for name in names
        }

    def take_(self, images: Images) -> int:
        """Take in one batch, and return how many images it holds."""
        found = (images, *self.run(images))
        largest = max(values.size for values in found)
        if self.bins.size < largest:
            self.bins = np.empty(largest, np.uint32)
        for name, values in zip(self.records, found, strict=True):
            if not self.records[name].add_(values, self.bins):
                raise _not_finite(name, values)
        return len(images)


def _in_turns(recorders: Sequence[_Recorder], batches: Iterable[Images]) -> Iterator[int]:
    """Yield how many images each batch held, in order; batch ``i`` goes to worker ``i % n``.

    So which worker sees which batch, and with it every last digit, is always the same.
    """
    with one_torch_thread(), ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in recorders]
        waiting: deque[Future[int]] = deque()
        for number, images in enumerate(batches):
            if len(waiting) == len(recorders):
                yield waiting.popleft().result()
            turn = number % len(recorders)
            waiting.append(pools[turn].submit(recorders[turn].take_, images))
        while waiting:
            yield waiting.popleft().result()


def _not_finite(name: str, values: npt.NDArray[np.float32]) -> ConversionError:
    share = np.count_nonzero(~np.isfinite(values)) / values.size
    return ConversionError(
        f"The tensor '{name}' is infinite or NaN on the calibration images "
        f"({100 * share:.3g} % of its values in one batch).",
        "Check the weights with `van-deploy inspect`, and the images' preprocessing.",
    )
