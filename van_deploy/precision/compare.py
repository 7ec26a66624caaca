"""FP32, FP16 and INT8 side by side, on images none of them was calibrated on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.data import ImageSet, decoded_batches
from van_deploy.errors import ImageError
from van_deploy.model.preprocess import Preprocessing
from van_deploy.precision.job_images import MOST_UNREADABLE
from van_deploy.precision.session import logits_session
from van_deploy.precision.verdict import PrecisionRow, precision_row

__all__ = ["Candidate", "compare_precisions", "interleaved_ms"]

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """One graph to compare.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``.
        model: the graph.
        size_bytes: of its file.
        fuse: let ONNX Runtime fuse Q/DQ pairs into integer kernels, as on a CPU
            target; otherwise every pair is computed as written, as TensorRT does.
    """

    precision: str
    model: ModelProto
    size_bytes: int
    fuse: bool = False


def compare_precisions(
    candidates: list[Candidate],
    chosen: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch: int,
    timed: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[PrecisionRow, ...]:
    """Return one line for each candidate; the first one, FP32, is the reference.

    Args:
        candidates: the graphs, FP32 first.
        chosen: the images, with their labels if these are known.
        preprocessing: of the network.
        batch: images at a time.
        timed: also measure the time an image takes on this CPU.
        threads: of ONNX Runtime.
        progress: called after each batch with the images seen so far.

    Raises:
        ImageError: no image could be read, or too many could not.
    """
    runs = [
        logits_session(c.model, fuse=c.fuse, threads=threads, in_turns=timed) for c in candidates
    ]
    collected: list[list[Logits]] = [[] for _ in runs]
    numbers: list[int] = []
    first: Images | None = None
    for part in decoded_batches(
        chosen.items, preprocessing, batch, most_unreadable=MOST_UNREADABLE
    ):
        if not part.indices:
            continue
        images = part.inputs
        first = images if first is None else first
        for run, pieces in zip(runs, collected, strict=True):
            pieces.append(run(images))
        numbers += part.indices
        if progress is not None:
            progress(len(numbers))
    if first is None:
        raise ImageError("There is no image to compare on.", "Pass a folder with --eval DIR.")
    logits = [np.concatenate(pieces) for pieces in collected]
    labels = None if chosen.labels is None else chosen.labels[numbers]
    times = interleaved_ms(runs, first) if timed else [None] * len(runs)
    return tuple(
        precision_row(
            candidate.precision,
            candidate.size_bytes,
            logits[0],
            found,
            labels,
            ms,
            reference=number == 0,
        )
        for number, (candidate, found, ms) in enumerate(zip(candidates, logits, times, strict=True))
    )


def interleaved_ms(
    runs: list[Callable[[Images], Logits]], images: Images, *, rounds: int = 11
) -> list[float]:
    """Return each function's median time an image in milliseconds, measured in turns.

    Turn about, so that what else the machine does falls on all of them alike.
    """
    one = images[:1]
    for run in runs:
        run(one)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(one)
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
