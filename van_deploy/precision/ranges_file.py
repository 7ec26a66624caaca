"""Recorded ranges as files: a readable summary, and the whole record for another method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.data.arrays import DAMAGE, opened_arrays
from van_deploy.documents import json_from
from van_deploy.errors import InputError
from van_deploy.precision.histogram import Histogram
from van_deploy.precision.ranges import Ranges
from van_deploy.precision.tensor_range import TensorRange

__all__ = ["ranges_from_file", "ranges_summary", "write_ranges"]

PERCENTILES = (0.5, 0.99, 0.999, 0.9999, 0.99999)


def ranges_summary(ranges: Ranges) -> dict[str, Any]:
    """Return the ranges as ``ranges.json`` holds them: short numbers, one entry a tensor."""
    return {
        "schema": "van-deploy/ranges/1",
        **ranges.facts,
        "images": ranges.images,
        "tensors": {name: _summary(record) for name, record in ranges.tensors.items()},
    }


def _summary(record: TensorRange) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "minimum": _short(record.minimum),
        "maximum": _short(record.maximum),
        "mean_minimum": _short(record.mean_minimum),
        "mean_maximum": _short(record.mean_maximum),
        "smallest_magnitude": _short(record.smallest) if np.isfinite(record.smallest) else None,
        "below_fp16_normal": _short(record.subnormal / max(record.count, 1)),
        "vanish_in_fp16": _short(record.vanishing / max(record.count, 1)),
    }
    if record.histogram is not None:
        entry["magnitude_at"] = {
            f"{100 * share:g}%": _short(record.histogram.magnitude_at(share))
            for share in PERCENTILES
        }
    return entry


def _short(value: float) -> float:
    """Return ``value`` with six significant digits, so that files can be compared by eye."""
    return float(f"{value:.6g}")


def write_ranges(path: Path, ranges: Ranges) -> None:
    """Write the whole record to ``path``, a compressed ``.npz``: what a later method needs."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    names = list(ranges.tensors)
    scalars = ("minimum", "maximum", "mean_minimum", "mean_maximum", "smallest")
    counts = ("images", "count", "subnormal", "vanishing")
    for key in scalars:
        arrays[key] = np.array([getattr(ranges.tensors[n], key) for n in names], np.float64)
    for key in counts:
        arrays[key] = np.array([getattr(ranges.tensors[n], key) for n in names], np.int64)
    for number, name in enumerate(names):
        record = ranges.tensors[name]
        if record.channels:
            ends = [record.channel_minimum, record.channel_maximum]
            arrays[f"channels_{number}"] = np.stack(ends)
        histogram = record.histogram
        if histogram is None:
            continue
        for sign in ("positive", "negative"):
            filled = np.flatnonzero(getattr(histogram, sign))
            arrays[f"{sign}_bins_{number}"] = filled.astype(np.int32)
            arrays[f"{sign}_counts_{number}"] = getattr(histogram, sign)[filled]
        arrays[f"tiny_{number}"] = np.array([histogram.tiny, histogram.zeros], np.int64)
    header = {"names": names, "images": ranges.images, "facts": dict(ranges.facts)}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def ranges_from_file(path: Path) -> Ranges:
    """Return the record :func:`write_ranges` wrote.

    Raises:
        InputError: the file cannot be read, is damaged, or lacks a part.
    """
    try:
        with opened_arrays(path) as stored:
            header = json_from(stored["header"].tobytes())
            tensors = {
                name: _stored_range(stored, number) for number, name in enumerate(header["names"])
            }
        return Ranges(tensors, int(header["images"]), dict(header["facts"]))
    except (*DAMAGE, OSError) as error:
        raise InputError(
            f"The recorded ranges '{path}' cannot be used: {type(error).__name__}: {error}.",
            "Remove the file, or record them anew with `van-deploy quantize --force`.",
        ) from error


def _stored_range(stored: Any, number: int) -> TensorRange:
    record = TensorRange(
        minimum=float(stored["minimum"][number]),
        maximum=float(stored["maximum"][number]),
        images=int(stored["images"][number]),
        mean_minimum=float(stored["mean_minimum"][number]),
        mean_maximum=float(stored["mean_maximum"][number]),
        smallest=float(stored["smallest"][number]),
        count=int(stored["count"][number]),
        subnormal=int(stored["subnormal"][number]),
        vanishing=int(stored["vanishing"][number]),
    )
    if f"channels_{number}" in stored:
        record.channels = True
        record.channel_minimum, record.channel_maximum = stored[f"channels_{number}"]
    if f"tiny_{number}" in stored:
        tiny, zeros = (int(count) for count in stored[f"tiny_{number}"])
        histogram = Histogram(
            tiny=tiny, zeros=zeros, minimum=record.minimum, maximum=record.maximum
        )
        for sign in ("positive", "negative"):
            counts = getattr(histogram, sign)
            counts[stored[f"{sign}_bins_{number}"]] = stored[f"{sign}_counts_{number}"]
        record.histogram = histogram
    return record
