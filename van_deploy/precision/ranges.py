"""The range of every tensor on real images, in one pass over them.

One ONNX Runtime session gives every tensor of a batch at once; each goes into
its fixed-size record and is dropped. The memory needed is that of two batches
and of the records, whatever the number of images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper

from van_deploy.errors import ConversionError, ImageError
from van_deploy.precision.histogram import Histogram
from van_deploy.precision.plan import weighted_nodes
from van_deploy.runners.onnxruntime import require_onnxruntime

__all__ = [
    "Ranges",
    "TensorRange",
    "float_tensors",
    "lean_batch",
    "record_ranges",
    "with_outputs",
]

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_SMALLEST = 2.0**-25  # rounds to the smallest FP16 number; below it, to zero

BATCH_BYTES = 192 << 20
"""Memory that one batch's tensors may take while ranges are recorded; two are held."""

Images = npt.NDArray[np.float32]
Extremes = npt.NDArray[np.float32]
_Run = Callable[[Images], list[Images]]
_CHUNK = 1 << 18  # values looked at together, few enough for a core's own cache


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
        low, high = rows.min(axis=1), rows.max(axis=1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):  # NaN is passed on by both
            return False
        self.minimum = min(self.minimum, float(low.min()))
        self.maximum = max(self.maximum, float(high.max()))
        if self.channels:
            flat = values.reshape(len(values), values.shape[1], -1)  # (N, C, rest)
            self.channel_minimum = np.minimum(self.channel_minimum, flat.min(axis=(0, 2)))
            self.channel_maximum = np.maximum(self.channel_maximum, flat.max(axis=(0, 2)))
        before, self.images = self.images, self.images + len(low)
        self.mean_minimum = (self.mean_minimum * before + float(low.sum())) / self.images
        self.mean_maximum = (self.mean_maximum * before + float(high.sum())) / self.images
        self.count += values.size
        if self.histogram is None:
            self._add_small_(values.reshape(-1))
        else:
            self.histogram.minimum, self.histogram.maximum = self.minimum, self.maximum
            self.histogram.count_(values.reshape(-1))
        return True

    def _add_small_(self, flat: npt.NDArray[np.float32]) -> None:
        """Count the small magnitudes of a tensor without a histogram."""
        for start in range(0, flat.size, _CHUNK):
            magnitude = np.abs(flat[start : start + _CHUNK])
            least = float(magnitude.min())
            if least > 0.0:
                self.smallest = min(self.smallest, least)
            if least >= FP16_SMALLEST_NORMAL:
                continue
            small = magnitude[magnitude < FP16_SMALLEST_NORMAL]
            small = small[small > 0]
            if small.size:
                self.subnormal += small.size
                self.vanishing += int(np.count_nonzero(small <= FP16_SMALLEST))
                self.smallest = min(self.smallest, float(small.min()))

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


def float_tensors(model: ModelProto) -> tuple[str, ...]:
    """Return the names of the input and of every tensor a node makes, in the graph's order."""
    made = [name for node in model.graph.node for name in node.output if name]
    return (*(value.name for value in model.graph.input), *made)


def lean_batch(model: ModelProto, budget_bytes: int = BATCH_BYTES) -> int:
    """Return how many images, at most 32, have all tensors of ``model`` in ``budget_bytes``."""
    from onnx.shape_inference import infer_shapes

    values = 0
    for value in infer_shapes(model).graph.value_info:
        sides = [d.dim_value for d in value.type.tensor_type.shape.dim[1:]]
        values += int(np.prod(sides))
    return int(np.clip(budget_bytes // max(4 * values, 1), 1, 32))


def with_outputs(model: ModelProto, names: Collection[str]) -> ModelProto:
    """Return ``model`` with only ``names``, tensors inside it, as its outputs."""
    observed = ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    return observed


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
        threads: of ONNX Runtime; None lets it choose.
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
    records = {
        name: TensorRange(
            histogram=Histogram() if name in wanted else None, channels=name in channels
        )
        for name in names
    }
    run = _observer(model, names[1:], threads)
    seen = 0
    for images, found in _ahead(run, batches):
        for name, values in zip(names, (images, *found), strict=True):
            if not records[name].add_(values):
                raise _not_finite(name, values)
        seen += len(images)
        if progress is not None:
            progress(seen)
    for record in records.values():
        record.close_()
    if not seen:
        raise ImageError(
            "There is no image to record ranges on.", "Pass a folder with --images DIR."
        )
    return Ranges(records, seen)


def _ahead(run: _Run, batches: Iterable[Images]) -> Iterator[tuple[Images, list[Images]]]:
    """Yield each batch with its tensors, the next one already being computed meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending: tuple[Images, Future[list[Images]]] | None = None
        for images in batches:
            following = (images, pool.submit(run, images))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


def _observer(model: ModelProto, names: Collection[str], threads: int | None) -> _Run:
    """Return a function that gives the tensors ``names`` for a batch.

    What it gave is overwritten two calls later: the memory of a batch is used again,
    since to be given new pages takes longer than the network itself.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # the last batch may be smaller
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        with_outputs(model, names).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    source = session.get_inputs()[0].name
    kept: list[list[Images]] = []
    turn = itertools.cycle((0, 1))

    def run(images: Images) -> list[Images]:
        other_size = bool(kept) and len(kept[0][0]) != len(images)  # the last batch
        if other_size or len(kept) < 2:
            found: list[Images] = session.run(list(names), {source: images})
            if not other_size:
                kept.append(found)
            return found
        buffers = kept[next(turn)]
        binding = session.io_binding()
        binding.bind_cpu_input(source, images)
        for name, buffer in zip(names, buffers, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        session.run_with_iobinding(binding)
        return buffers

    return run


def _not_finite(name: str, values: npt.NDArray[np.float32]) -> ConversionError:
    share = np.count_nonzero(~np.isfinite(values)) / values.size
    return ConversionError(
        f"The tensor '{name}' is infinite or NaN on the calibration images "
        f"({100 * share:.3g} % of its values in one batch).",
        "Check the weights with `van-deploy inspect`, and the images' preprocessing.",
    )
