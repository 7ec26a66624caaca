"""Progress messages, and the time of every stage of a long command."""

import time
from typing import Protocol


class Progress(Protocol):
    """A function that receives progress."""

    def __call__(self, text: str, done: int = 0, total: int | None = None, /) -> None:
        """Receive the current step, and how much of it is done if that is known."""


def no_progress(text: str, done: int = 0, total: int | None = None, /) -> None:
    """Ignore progress."""


class Stopwatch:
    """Measures every stage, and reports it as progress.

    Args:
        progress: receives the name of each stage.

    Attributes:
        seconds: time of each stage that ended; of all its runs, if it ran several times.

    >>> from unittest import mock
    >>> clock = Stopwatch()
    >>> with mock.patch("time.perf_counter", side_effect=[0, 1, 3, 7]):
    ...     for stage in ("read", "write", "read", ""):
    ...         clock.begin(stage)
    >>> clock.seconds
    {'read': 5.0, 'write': 2.0}
    """

    def __init__(self, progress: Progress = no_progress) -> None:
        """Start without a stage."""
        self.progress, self.seconds = progress, dict[str, float]()
        self._stage, self._started = "", 0.0

    def begin(self, stage: str) -> None:
        """End the current stage and begin another; "" for none."""
        now = time.perf_counter()
        if self._stage:
            total = self.seconds.get(self._stage, 0.0) + now - self._started
            self.seconds[self._stage] = round(total, 3)
        self._stage, self._started = stage, now
        if stage:
            self.progress(stage)

    def update(self, done: int, total: int) -> None:
        """Report how much of the current stage is done."""
        self.progress(self._stage, done, total)
