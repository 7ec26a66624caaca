"""Ratios of speed from paired rounds: what the machine does to both cancels."""

from __future__ import annotations

import itertools

import pytest

from van_deploy.checks.speed import ROUNDS, paired_ratio


class Clock:
    """Time that passes only inside the two networks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("van_deploy.checks.speed.time.perf_counter", lambda: self.now)

    def takes(self, seconds: itertools.cycle[float]) -> None:
        self.now += next(seconds)


def test_a_steady_machine_needs_the_least_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow, fast = itertools.cycle([6.0]), itertools.cycle([2.0])
    found = paired_ratio(lambda: clock.takes(slow), lambda: clock.takes(fast))
    assert (found.ratio, found.interval, found.rounds) == (3.0, (3.0, 3.0), ROUNDS[0])


def test_a_restless_machine_gets_more_rounds_and_a_wide_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    slow, fast = itertools.cycle([4.0, 6.0, 9.0]), itertools.cycle([2.0])
    found = paired_ratio(lambda: clock.takes(slow), lambda: clock.takes(fast))
    assert found.ratio == 3.0
    assert found.interval[0] <= 3.0 <= found.interval[1]
    assert found.rounds > ROUNDS[0]
