"""How many times faster than a reference each artifact is, round by round.

For the gate only: a ratio within one run on one machine is all that can be
compared between runs. Each round times both, one right after the other, so that
what slows the machine slows both. `van-deploy bench` measures properly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.checks.baseline import SpeedFigures
from van_deploy.checks.gates import SPEED_WITHIN
from van_deploy.checks.opened import NotRun, given_to, open_artefact
from van_deploy.checks.samples import Samples
from van_deploy.config import RunnerSettings
from van_deploy.intervals import median_interval

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

WARM_UPS = 2
ROUNDS = (25, 200)  # at least, and at most where the interval stays wide


def speed_ratios(
    bundle: Bundle, loaded: LoadedVan, samples: Samples, asked: RunnerSettings
) -> dict[str, SpeedFigures]:
    """Return PyTorch's time over each artifact's, at the bundle's optimal batch.

    One thread each, in paired rounds. What does not run here is left out.
    """
    from van_deploy.runners.pytorch import TorchRunner, one_torch_thread

    few, ratios = samples.first(bundle.manifest.batch.opt), {}
    with one_torch_thread():
        for name in bundle.artefacts:
            opened = open_artefact(bundle, name, asked, threads=1, spin=False)
            if isinstance(opened, NotRun):
                continue
            with opened, TorchRunner(loaded.model) as original:
                given = given_to(opened, few.inputs, few.pixels)
                ratios[name] = paired_ratio(
                    partial(original.run, few.inputs), partial(opened.run, given)
                )
    return ratios


def paired_ratio(slow: Callable[[], object], fast: Callable[[], object]) -> SpeedFigures:
    """Return how many times longer ``slow`` takes than ``fast``, over paired rounds.

    Who begins alternates, so that neither always runs in what the other left in the caches.
    Rounds go on until the median's interval is within :data:`SPEED_WITHIN`, or are too many.
    """
    for _ in range(WARM_UPS):
        slow()
        fast()
    ratios: list[float] = []
    least, most = ROUNDS
    low, high, middle = 0.0, 1.0, 0.0
    while len(ratios) < least or (len(ratios) < most and high - low > 2 * SPEED_WITHIN * middle):
        if len(ratios) % 2:
            one, other = _seconds(slow), _seconds(fast)
        else:
            other, one = _seconds(fast), _seconds(slow)
        ratios.append(one / other)
        (low, high), middle = median_interval(ratios), statistics.median(ratios)
    return SpeedFigures(ratio=middle, low=low, high=high)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
