"""What an artefact of a precision may differ, derived from PyTorch's own noise.

The noise is measured in the run that judges: PyTorch in float32 against itself
in float64, on the same images. A precision with fewer bits may be noisier by
the ratio of the unit roundoffs; the profile's margin is added to that. Every
limit can be set in the recipe's ``[gates]`` instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from van_deploy.config import GateProfile
from van_deploy.metrics import Array, Comparison, compare, decision_margins

__all__ = [
    "ROUNDOFF_DB",
    "Flip",
    "Limits",
    "Noise",
    "find_flips",
    "judge",
    "limits_from_noise",
    "measure_noise",
]

ROUNDOFF_DB: Mapping[str, float] = {
    "fp32": 0.0,
    "fp16": 20 * math.log10(2**13),  # 2^-11 against 2^-24
    "int8": 20 * math.log10(2**16),  # half a step of 1/128, 2^-8, against 2^-24
}
"""How much noisier than float32 each precision may be, in dB."""

QUIETEST_DB = 144.5
"""20 log10(2^24). Float32 noise below its own roundoff is luck, and no reason to ask for more."""

FLIP_SIGMAS = 4.0
"""A flip is a fault where the margin was more than so many standard deviations of the
difference of two logits at the largest noise allowed: one in 30,000 by chance."""

WORST_ROW = 10.0
"""One image may have so many times the mean noise power (cosine is the worst image's)."""

WORST_VALUE = 2.0
"""The largest error is of one value, and moves more than a mean."""

LARGEST_ROW_RELATIVE = 0.05
"""Whatever the precision, an image in a batch is the same image."""


@dataclass(frozen=True)
class Noise:
    """PyTorch in float32 against itself in float64.

    Attributes:
        comparison: the figures.
        largest: ``max|logit|``.
    """

    comparison: Comparison
    largest: float

    def as_dict(self) -> dict[str, object]:
        """Return the figures, ready for JSON."""
        return {**self.comparison.as_dict(), "largest_logit": self.largest}


@dataclass(frozen=True)
class Limits:
    """What is asked of one artefact; the attributes are those of a ``GateProfile``, filled in."""

    sqnr_db: float
    relative: float
    cosine: float
    kl: float
    row_relative: float
    flip_margin: float
    module_db: float
    top1_drop: float

    def as_dict(self) -> dict[str, float]:
        """Return the limits by name."""
        return asdict(self)


@dataclass(frozen=True)
class Flip:
    """A prediction that changed.

    Attributes:
        image: which of the images, from 0.
        expected: PyTorch's first class.
        found: the artefact's.
        margin: how far PyTorch's first logit was ahead of its second, in RMS logits.
        fault: whether that is more than noise explains.
    """

    image: int
    expected: int
    found: int
    margin: float
    fault: bool


def measure_noise(float64: Array, float32: Array) -> Noise:
    """Return the noise between two runs of PyTorch over the same images, both ``(N, K)``."""
    return Noise(compare(float64, float32), float(np.abs(float64).max()))


def limits_from_noise(noise: Noise, precision: str, profile: GateProfile) -> Limits:
    """Return the limits for ``precision``: the profile's, and derived where it has none.

    Args:
        noise: measured on the images that are judged.
        precision: ``fp32``, ``fp16`` or ``int8``.
        profile: from :meth:`van_deploy.recipe.GateSettings.of`.
    """
    room_db = ROUNDOFF_DB[precision] + float(profile.margin_db or 0.0)
    quietest = 10 ** (-QUIETEST_DB / 20)
    sqnr = _given(profile.sqnr_db, min(noise.comparison.sqnr_db, QUIETEST_DB) - room_db)
    error = max(noise.comparison.relative, quietest) * 10 ** (room_db / 20)
    relative = _given(profile.relative, WORST_VALUE * error)
    share = 10 ** (-sqnr / 20)  # noise over signal, RMS
    return Limits(
        sqnr_db=sqnr,
        relative=relative,
        cosine=_given(profile.cosine, max(0.0, 1 - WORST_ROW * share**2 / 2)),
        kl=_given(profile.kl, (relative * noise.largest) ** 2 / 2),
        row_relative=_given(profile.row_relative, min(relative, LARGEST_ROW_RELATIVE)),
        flip_margin=_given(profile.flip_margin, FLIP_SIGMAS * math.sqrt(2) * share),
        module_db=float(profile.module_db or 0.0),
        top1_drop=float(profile.top1_drop or 0.0),
    )


def find_flips(expected: Array, found: Array, flip_margin: float) -> list[Flip]:
    """Return the rows whose first class changed, the widest margin first.

    A row with a NaN is a flip, too, and always a fault.
    """
    margins = decision_margins(expected) / math.sqrt(float(np.square(expected).mean()))
    finite = [bool(np.isfinite(row).all()) for row in found]
    before, after = expected.argmax(axis=1), found.argmax(axis=1)
    rows = np.flatnonzero((before != after) | ~np.array(finite))
    flips = [
        Flip(
            image=int(row),
            expected=int(before[row]),
            found=int(after[row]),
            margin=float(margins[row]),
            fault=bool(margins[row] > flip_margin) or not finite[row],
        )
        for row in rows
    ]
    return sorted(flips, key=lambda flip: -flip.margin)


def judge(comparison: Comparison, faults: int, limits: Limits) -> list[str]:
    """Return a sentence for each limit that is passed; NaN passes none."""
    return list(_failures(comparison, faults, limits))


def _failures(figures: Comparison, faults: int, limits: Limits) -> Iterator[str]:
    if not figures.sqnr_db >= limits.sqnr_db:
        yield f"SQNR {figures.sqnr_db:.1f} dB is below {limits.sqnr_db:.1f} dB"
    if not figures.relative <= limits.relative:
        yield f"relative error {figures.relative:.1e} is above {limits.relative:.1e}"
    if not figures.cosine >= limits.cosine:
        yield f"cosine {figures.cosine:.9f} is below {limits.cosine:.9f}"
    if not figures.kl <= limits.kl:
        yield f"KL divergence {figures.kl:.1e} is above {limits.kl:.1e}"
    if faults:
        noun = "prediction" if faults == 1 else "predictions"
        yield f"{faults} {noun} changed where PyTorch had clearly decided"


def _given(value: float | None, derived: float) -> float:
    return derived if value is None else value
