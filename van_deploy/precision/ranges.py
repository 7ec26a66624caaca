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
from van_deploy.precision.histogram import CHUNK, Histogram
from van_deploy.precision.observer import Images, Observer, float_tensors
from van_deploy.precision.plan import weighted_nodes
from van_deploy.runners.pytorch import one_torch_thread

__all__ = ["Ranges", "TensorRange", "lean_batch", "record_ranges"]

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_SMALLEST = 2.0**-25  # rounds to the smallest FP16 number; below it, to zero

BATCH_BYTES = 192 << 20
"""Memory that one batch's tensors may take while ranges are recorded."""

WORKERS = 2
"""Batches that are looked at at the same time."""

Extremes = npt.NDArray[np.float32]
_FEW = 1 << 17  # values compared together, few enough for a core's own cache


@dataclass
class TensorRange:
    """What one tensor's values were, over every image.

    Attributes:
        minimum: smallest value.
        maximum: largest value.
        images: how many images were seen.
        mean_minimum: mean over the images of each one's smallest value.
        mean_maximum: mean over the images of each one's largest value.
        smallest: smallest magnitude that is not zero; ``inf`` if all are.
        channels: whether each channel's extremes are recorded as well.
        channel_minimum: ``(C,)`` smallest value along the second axis, for those tensors.
        channel_maximum: ``(C,)`` likewise the largest.
        count: how many values.
        subnormal: how many non-zero values are below FP16's normal numbers (6.1e-5).
        vanishing: how many non-zero values FP16 rounds to zero. With a histogram, these
            three are known once :meth:`close_` was called.
        histogram: of all values, for the tensors it was asked for.
    """

    minimum: float = np.inf
    maximum: float = -np.inf
    images: int = 0
    mean_minimum: float = 0.0
    mean_maximum: float = 0.0
    smallest: float = np.inf
    channels: bool = False
    channel_minimum: Extremes = field(default_factory=lambda: np.array(np.inf, np.float32))
    channel_maximum: Extremes = field(default_factory=lambda: np.array(-np.inf, np.float32))
    count: int = 0
    subnormal: int = 0
    vanishing: int = 0
    histogram: Histogram | None = None

    @property
    def largest(self) -> float:
        """The largest magnitude; 0 where nothing was seen."""
        return max(self.maximum, -self.minimum, 0.0)

    def add_(self, values: npt.NDArray[np.float32]) -> bool:
        """Take in one batch ``(N, ...)``; return whether all of it was finite."""
        rows = values.reshape(len(values), -1)
        together = max(1, CHUNK // max(rows.shape[1], 1))  # while they are in the cache
        for start in range(0, len(rows), together):
            if not self._add_rows_(rows[start : start + together]):
                return False
        if self.channels:
            flat = values.reshape(len(values), values.shape[1], -1)  # (N, C, rest)
            self.channel_minimum = np.minimum(self.channel_minimum, flat.min(axis=(0, 2)))
            self.channel_maximum = np.maximum(self.channel_maximum, flat.max(axis=(0, 2)))
        return True

    def _add_rows_(self, rows: npt.NDArray[np.float32]) -> bool:
        """Take in some images ``(N, values)``; return whether all of it was finite."""
        low, high = rows.min(axis=1), rows.max(axis=1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):  # NaN is passed on by both
            return False
        self.minimum = min(self.minimum, float(low.min()))
        self.maximum = max(self.maximum, float(high.max()))
        before, self.images = self.images, self.images + len(low)
        self.mean_minimum = (self.mean_minimum * before + float(low.sum())) / self.images
        self.mean_maximum = (self.mean_maximum * before + float(high.sum())) / self.images
        self.count += rows.size
        if self.histogram is None:
            self._add_small_(rows.reshape(-1))
        else:
            self.histogram.minimum, self.histogram.maximum = self.minimum, self.maximum
            self.histogram.count_(rows.reshape(-1))
        return True

    def _add_small_(self, flat: npt.NDArray[np.float32]) -> None:
        """Count the small magnitudes of a tensor without a histogram."""
        for start in range(0, flat.size, _FEW):
            magnitude = np.abs(flat[start : start + _FEW])
            least = float(magnitude.min())
            if least < FP16_SMALLEST_NORMAL:
                small = magnitude[magnitude < FP16_SMALLEST_NORMAL]
                small = small[small > 0]
                self.subnormal += small.size
                self.vanishing += int(np.count_nonzero(small <= FP16_SMALLEST))
                least = float(
                    (small if small.size else magnitude[magnitude > 0]).min(initial=np.inf)
                )
            self.smallest = min(self.smallest, least)

    def merged(self, other: TensorRange) -> TensorRange:
        """Return the range of both sets of images."""
        images = max(self.images + other.images, 1)
        ours, theirs = self.images / images, other.images / images
        histogram = self.histogram
        if histogram is not None and other.histogram is not None:
            histogram = histogram.merged(other.histogram)
        return TensorRange(
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            images=self.images + other.images,
            mean_minimum=self.mean_minimum * ours + other.mean_minimum * theirs,
            mean_maximum=self.mean_maximum * ours + other.mean_maximum * theirs,
            smallest=min(self.smallest, other.smallest),
            channels=self.channels,
            channel_minimum=np.minimum(self.channel_minimum, other.channel_minimum),
            channel_maximum=np.maximum(self.channel_maximum, other.channel_maximum),
            count=self.count + other.count,
            subnormal=self.subnormal + other.subnormal,
            vanishing=self.vanishing + other.vanishing,
            histogram=histogram,
        )

    def close_(self) -> None:
        """Take the counts of small magnitudes from the histogram, whose bins end at them."""
        histogram = self.histogram
        if histogram is None:
            return
        self.subnormal = histogram.below(FP16_SMALLEST_NORMAL) - histogram.zeros
        self.vanishing = histogram.below(FP16_SMALLEST) - histogram.zeros
        self.smallest = histogram.smallest


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
        self.records = {
            name: TensorRange(
                histogram=Histogram() if name in histograms else None, channels=name in channels
            )
            for name in names
        }

    def take_(self, images: Images) -> int:
        """Take in one batch, and return how many images it holds."""
        values_of = zip(self.records, (images, *self.run(images)), strict=True)
        for name, values in values_of:
            if not self.records[name].add_(values):
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
