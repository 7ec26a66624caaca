"""How many times faster than a reference each artifact is, round by round.

For the gate only: a ratio within one run on one machine is all that can be
compared between runs. Each round times both, one right after the other, so that
what slows the machine slows both. `van-deploy bench` measures properly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.checks.gates import SPEED_WITHIN
from van_deploy.checks.opened import ON_CPU, Execution, NotRun, given_to, open_artefact
from van_deploy.checks.samples import Samples
from van_deploy.intervals import Interval, median_interval

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan


__all__ = ["SpeedRatio", "paired_ratio", "speed_ratios"]

WARM_UPS = 2
ROUNDS = (25, 200)  # at least, and at most where the interval stays wide


@dataclass(frozen=True)
class SpeedRatio:
    """The original network's time over an artifact's.

    Attributes:
        ratio: the median of the rounds; above 1 the artifact is faster.
        interval: 95 % interval of that median.
        rounds: how many there were.
    """

    ratio: float
    interval: Interval
    rounds: int


def speed_ratios(
    bundle: Bundle, loaded: LoadedVan, samples: Samples, *, execution: Execution = ON_CPU
) -> dict[str, SpeedRatio]:
    """Return PyTorch's time over each artifact's, at the bundle's optimal batch.

    One thread each, in paired rounds. What does not run here is left out.
    """
    from van_deploy.runners.pytorch import TorchRunner, one_torch_thread

    size = min(bundle.manifest.batch.opt, len(samples))
    inputs = samples.inputs[:size]
    pixels = None if samples.pixels is None else samples.pixels[:size]
    one = replace(execution, threads=1)
    ratios = {}
    with one_torch_thread():
        for name in bundle.artefacts:
            opened = open_artefact(bundle, name, one, spin=False)
            if isinstance(opened, NotRun):
                continue
            with opened, TorchRunner(loaded.model) as original:
                given = given_to(opened, inputs, pixels)
                ratios[name] = paired_ratio(
                    partial(original.run, inputs), partial(opened.run, given)
                )
    return ratios


def paired_ratio(slow: Callable[[], object], fast: Callable[[], object]) -> SpeedRatio:
    """Return how many times longer ``slow`` takes than ``fast``, over paired rounds.

    Who begins alternates, so that neither always runs in what the other left in the caches.
    Rounds go on until the median's interval is within :data:`SPEED_WITHIN`, or are too many.
    """
    for _ in range(WARM_UPS):
        slow()
        fast()
    ratios: list[float] = []
    least, most = ROUNDS
    while True:
        first, second = (slow, fast) if len(ratios) % 2 else (fast, slow)
        one, other = _seconds(first), _seconds(second)
        ratios.append(one / other if len(ratios) % 2 else other / one)
        if len(ratios) < least:
            continue
        low, high = median_interval(ratios)
        middle = statistics.median(ratios)
        if len(ratios) >= most or (high - low) / 2 <= SPEED_WITHIN * middle:
            return SpeedRatio(middle, (low, high), len(ratios))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
