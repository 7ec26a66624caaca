"""Ratios of speed from paired rounds: what the machine does to both cancels."""

from __future__ import annotations

import itertools

import pytest

from van_deploy.checks.figures import Figure, figures_from_speed
from van_deploy.checks.speed import SpeedRatio, paired_ratio


def test_the_ratio_survives_a_machine_that_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    slowness, clock = itertools.count(), [0.0]
    monkeypatch.setattr("van_deploy.checks.speed.time.perf_counter", lambda: clock[0])

    def work(seconds: float) -> None:
        # Each call finds a slower machine; a ratio of the two sums would still be near.
        clock[0] += seconds * (1 + 0.02 * next(slowness))

    found = paired_ratio(lambda: work(0.0012), lambda: work(0.0004), rounds=15)
    assert found.ratio == pytest.approx(3.0, rel=0.05)
    assert found.low <= found.ratio <= found.high
    assert found.spread >= found.high - found.ratio


@pytest.mark.parametrize(
    ("now", "spread", "fails"),
    [(1.95, 0.0, False), (1.5, 0.0, True), (1.5, 0.2, False), (1.2, 0.2, True), (2.5, 0.0, False)],
)
def test_it_fails_beyond_slack_and_both_spreads(now: float, spread: float, fails: bool) -> None:
    (then,) = figures_from_speed({"fp32": SpeedRatio(2.0, 1.9, 2.05)})
    assert then.slack == pytest.approx(0.2)
    assert then.spread == pytest.approx(0.1)
    figure = Figure(then.name, now, "higher", 0.1 * now, spread)
    assert (then.worse_by(now) > then.room_for(figure)) is fails
