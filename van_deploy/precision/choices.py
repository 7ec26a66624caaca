"""How to centre and re-scale one tensor's channels: the candidates, and the error of each.

``c`` and ``d`` are chosen by error, not by maximum: for each channel the step
with the least squared error, clipping included, then the exponent of these
steps with the least predicted error at the output of the convolutions that
read the tensor, their own rounded weights included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from van_deploy.precision.channels import (
    ChannelHistogram,
    ChannelMoments,
    best_steps,
    rounding_error,
)
from van_deploy.precision.plan import INT8_LIMIT

__all__ = ["SCALE_LIMIT", "Choice", "Floats", "choices_of"]

SCALE_LIMIT = 64.0
"""Largest factor, either way, by which a channel is re-scaled: FP16 must hold the result."""

_EXPONENTS = (0.5, 0.75, 1.0)
_CLIPS = np.geomspace(0.15, 1.0, 16)
_INDIFFERENT = 0.98  # a centre must bring 2 % less error to be preferred to none

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A candidate.

    Attributes:
        centre: ``c``, ``(C,)``.
        scale: ``d``, ``(C,)``.
        exponent: of the channels' own best steps in ``d``; 0 where no channel is re-scaled.
        error: squared, that it is predicted to leave at the readers' outputs.
    """

    centre: Floats
    scale: Floats
    exponent: float
    error: float


def choices_of(
    histogram: ChannelHistogram, weights: Sequence[Floats], *, divide: bool, centre: bool
) -> list[Choice]:
    """Return every candidate for one tensor; the first is to leave it as it is.

    Args:
        histogram: of its channels.
        weights: ``(O, I/groups, kh, kw)`` of each quantised convolution that reads it.
        divide: whether its channels may be re-scaled.
        centre: whether they may be centred.
    """
    size = len(histogram.minimum)
    gains = np.sum([_input_gains(weight, size) for weight in weights], axis=0)
    filled = histogram.filled()
    zeros, ones = np.zeros(size), np.ones(size)
    variance = rounding_error(filled, histogram.mean, ones)[1]
    choices = []
    for centred in (False, True) if centre else (False,):
        middle = (histogram.maximum + histogram.minimum) / 2 if centred else zeros
        steps = _relative(best_steps(histogram, middle)[0])
        for exponent in (0.0, *_EXPONENTS) if divide else (0.0,):
            scale = steps**exponent
            offset, error = _with_common_step(histogram, filled, scale, gains, centred)
            error += sum(_weight_error(weight, scale, variance) for weight in weights)
            choices.append(Choice(offset, scale, exponent, error))
    return choices


def _relative(steps: Floats) -> Floats:
    """Return ``steps`` over their geometric mean, none more than the limit away from one."""
    floored = np.maximum(steps, steps.max() / SCALE_LIMIT)
    relative = floored / np.exp(np.log(floored).mean())
    return np.asarray(np.clip(relative, 1 / SCALE_LIMIT, SCALE_LIMIT))


def _with_common_step(
    histogram: ChannelHistogram,
    filled: ChannelMoments,
    scale: Floats,
    gains: Floats,
    centred: bool,
) -> tuple[Floats, float]:
    """Return the centres ``(C,)`` and the error of the best step for all channels of ``x / scale``.

    The error is what arrives at the readers' outputs: each channel's times its gain.
    """
    low, high = histogram.minimum, histogram.maximum
    zeros = np.zeros(len(scale))
    reach = np.maximum((high - low) / 2, 0.0) if centred else np.maximum(high, -low)
    best = (zeros, math.inf)
    for step in _CLIPS * max(float((reach / scale).max()), 1e-12) / INT8_LIMIT:
        steps = step * scale
        error, _ = rounding_error(filled, zeros, steps)
        centre, penalised = zeros, error * _INDIFFERENT
        for other in _centres(low, high, steps) if centred else ():
            found, _ = rounding_error(filled, other, steps)
            better = found < penalised
            centre, error = np.where(better, other, centre), np.where(better, found, error)
            penalised = np.where(better, found, penalised)
        total = float((gains * error).sum())
        if total < best[1]:
            best = (centre, total)
    return best


def _centres(low: Floats, high: Floats, steps: Floats) -> tuple[Floats, Floats, Floats]:
    """Return three places for the middle of the integers: mid-range, and clipping one end only."""
    middle, reach = (low + high) / 2, INT8_LIMIT * steps
    return middle, np.minimum(low + reach, middle), np.maximum(high - reach, middle)


def _input_gains(weight: Floats, channels: int) -> Floats:
    """Return the sum of squares of the weights that each input channel meets, ``(C,)``."""
    groups = channels // weight.shape[1]
    grouped = np.square(weight).reshape(groups, -1, *weight.shape[1:])  # (g, O/g, I/g, kh, kw)
    return np.asarray(grouped.sum(axis=(1, 3, 4)).reshape(-1))


def _weight_error(weight: Floats, scale: Floats, variance: Floats) -> float:
    """Return the error that rounding ``weight * scale`` brings at the output.

    Offsets bring none: their part is constant, and corrected in the bias.
    """
    groups = len(scale) // weight.shape[1]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    largest = np.abs(grouped * scale.reshape(groups, 1, -1, 1, 1)).max(axis=(2, 3, 4))  # (g, O/g)
    taps = weight.shape[2] * weight.shape[3]
    power = taps * (variance / np.square(scale)).reshape(groups, -1).sum(axis=1)
    return float((np.square(largest / INT8_LIMIT).sum(axis=1) / 12 * power).sum())
