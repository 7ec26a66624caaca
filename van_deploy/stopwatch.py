"""Which stage a long command is in, and how long each one took."""

from __future__ import annotations

import time
from typing import Protocol


class Progress(Protocol):
    """What is told how far the work is."""

    def __call__(self, text: str, done: int = 0, total: int | None = None, /) -> None:
        """Take what is being done, and how much of it is done where that is known."""


def no_progress(text: str, done: int = 0, total: int | None = None, /) -> None:
    """Say nothing: the progress of who wants none."""


class Stopwatch:
    """Says what is being done, and keeps the time of every stage.

    Args:
        say: told of each stage, and how far it is.

    Attributes:
        seconds: time of each stage that ended.
    """

    def __init__(self, say: Progress | None = None) -> None:
        """Start in no stage."""
        self.say = say or no_progress
        self.seconds: dict[str, float] = {}
        self._stage, self._started = "", 0.0

    def begin(self, stage: str) -> None:
        """End the present stage and begin another; "" for none."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = round(now - self._started, 3)
        self._stage, self._started = stage, now
        if stage:
            self.say(stage)

    def reached(self, done: int, total: int) -> None:
        """Say how far the present stage is."""
        self.say(self._stage, done, total)
