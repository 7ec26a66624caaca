"""How many times faster than PyTorch each artefact is, taken in turns.

For the gate only: a ratio within one run on one machine is all that can be
compared between runs. `van-deploy bench` measures properly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

from van_deploy.bundle import Bundle
from van_deploy.checks.opened import ON_CPU, Execution, NotRun, open_artefact
from van_deploy.checks.pictures import Pictures
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.pixels import normalised
from van_deploy.runners.pytorch import TorchRunner

__all__ = ["speed_ratios"]

WARM_UPS, ROUNDS = 2, 25


def speed_ratios(
    bundle: Bundle, loaded: LoadedVan, pictures: Pictures, *, execution: Execution = ON_CPU
) -> dict[str, float]:
    """Return PyTorch's time over each artefact's, at the bundle's optimal batch.

    One thread each; the fastest of each, taken in turns. What does not run here is left out.
    The pixels are normalised outside PyTorch's time, inside an artefact's.
    """
    size = min(int(bundle.manifest["batch"]["opt"]), len(pictures.pixels))
    with _one_thread():
        return _ratios(bundle, loaded, pictures, execution, size)


def _ratios(
    bundle: Bundle, loaded: LoadedVan, pictures: Pictures, execution: Execution, size: int
) -> dict[str, float]:
    pixels = pictures.pixels[:size]
    images = normalised(pixels, loaded.preprocessing)
    ratios = {}
    for name in bundle.artefacts:
        opened = open_artefact(bundle, name, execution, threads=1, spin=False)
        if isinstance(opened, NotRun):
            continue
        with opened, TorchRunner(loaded.model) as original:
            ratios[name] = _ratio(partial(original.run, images), partial(opened.logits, pixels))
    return ratios


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread: on a busy machine several wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Return the ratio of the fastest calls, taken in turns: what disturbs only ever adds time."""
    for _ in range(WARM_UPS):
        slow()
        fast()
    times = [(_seconds(slow), _seconds(fast)) for _ in range(ROUNDS)]
    return min(first for first, _ in times) / min(second for _, second in times)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
