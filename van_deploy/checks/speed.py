"""How many times faster than PyTorch each artefact is, round by round.

For the gate only: a ratio within one run on one machine is all that can be
compared between runs. Each round times both, one right after the other, so that
what slows the machine slows both; the spread of the rounds says how much a single
ratio is worth. `van-deploy bench` measures properly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.checks.opened import ON_CPU, Execution, NotRun, open_artefact
from van_deploy.data import CheckImages
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.runners.pytorch import TorchRunner, one_torch_thread

__all__ = ["ROUNDS", "SpeedRatio", "paired_ratio", "speed_ratios"]

WARM_UPS, ROUNDS = 2, 25
SPREAD = (5.0, 95.0)  # percentiles of the rounds


@dataclass(frozen=True)
class SpeedRatio:
    """PyTorch's time over an artefact's.

    Attributes:
        ratio: the median of the rounds; above 1 the artefact is faster.
        low: their 5th percentile.
        high: their 95th percentile.
    """

    ratio: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The farther end from the median."""
        return max(self.ratio - self.low, self.high - self.ratio)


def speed_ratios(
    bundle: Bundle, loaded: LoadedVan, pictures: CheckImages, *, execution: Execution = ON_CPU
) -> dict[str, SpeedRatio]:
    """Return PyTorch's time over each artefact's, at the bundle's optimal batch.

    One thread each, in paired rounds. What does not run here is left out.
    The pixels are normalised outside PyTorch's time, inside an artefact's.
    """
    size = min(bundle.manifest.batch.opt, len(pictures))
    with one_torch_thread():
        return _ratios(bundle, loaded, pictures, execution, size)


def _ratios(
    bundle: Bundle, loaded: LoadedVan, pictures: CheckImages, execution: Execution, size: int
) -> dict[str, SpeedRatio]:
    pixels, images = pictures.values[:size], pictures.inputs[:size]
    ratios = {}
    for name in bundle.artefacts:
        opened = open_artefact(bundle, name, execution, threads=1, spin=False)
        if isinstance(opened, NotRun):
            continue
        with opened, TorchRunner(loaded.model) as original:
            ratios[name] = paired_ratio(
                partial(original.run, images), partial(opened.logits, pixels)
            )
    return ratios


def paired_ratio(
    slow: Callable[[], object], fast: Callable[[], object], rounds: int = ROUNDS
) -> SpeedRatio:
    """Return how many times longer ``slow`` takes than ``fast``, over paired rounds.

    Who begins alternates, so that neither always runs in what the other left in the caches.
    """
    for _ in range(WARM_UPS):
        slow()
        fast()
    ratios = []
    for number in range(rounds):
        first, second = (slow, fast) if number % 2 else (fast, slow)
        times = _seconds(first), _seconds(second)
        ratios.append(times[0] / times[1] if number % 2 else times[1] / times[0])
    low, middle, high = np.percentile(ratios, (SPREAD[0], 50.0, SPREAD[1]))
    return SpeedRatio(float(middle), float(low), float(high))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
