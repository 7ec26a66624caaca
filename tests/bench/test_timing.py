"""Percentiles, spread and paired ratios, against NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.each import each
from van_deploy.bench.timing import latency_of, percentile, ratio_of
from van_deploy.bench.worker import timed_calls


@each("count", [1, 2, 5, 99, 100, 101, 1000])
@each("share", [0.5, 0.9, 0.99, 1.0])
def test_percentile_is_numpys_inverted_cdf(count: int, share: float) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    expected = float(np.quantile(values, share, method="inverted_cdf"))
    assert percentile(list(values), share) == expected


def test_latency_of_known_calls() -> None:
    latency = latency_of([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (latency.calls, latency.p50_ms, latency.p90_ms, latency.p99_ms) == (5, 3.0, 10.0, 10.0)
    assert latency.mean_ms == pytest.approx(4.0)
    assert latency.cv_percent == pytest.approx(100 * np.std([1, 2, 3, 4, 10]) / 4)


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was three times slower in the second round, for both.
    ratio = ratio_of([2.0, 2.0, 2.0])
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.most, ratio.rounds) == (2.0, 2.0, 2.0, 3)


def test_without_a_common_round_there_is_no_ratio() -> None:
    assert ratio_of([]) is None


@each("count", [6, 9, 20, 41, 100])
def test_the_interval_holds_the_true_median_in_95_of_100_races(count: int) -> None:
    rng = np.random.default_rng(count)
    races = [ratio_of([*rng.lognormal(sigma=0.3, size=count)]) for _ in range(2000)]
    held = [ratio.low <= 1.0 <= ratio.high for ratio in races if ratio]
    assert 0.94 <= np.mean(held) <= 0.99
    assert len(held) == 2000


def test_the_interval_narrows_with_the_rounds_and_leaves_single_outliers_out() -> None:
    steady = [2.0 + 0.001 * i for i in range(30)]
    ratio = ratio_of([*steady[:-1], 9.0])
    assert ratio is not None
    assert ratio.most == 9.0
    assert ratio.high < 2.03
    assert ratio.uncertainty_percent < 1.0
    assert ratio.is_within(1.0)
    few = ratio_of(steady[:5])
    assert few is not None
    assert not few.is_within(50.0), "five rounds have no 95 % interval"


def test_calls_are_timed_until_time_and_count_are_both_reached() -> None:
    made: list[int] = []
    assert len(timed_calls(lambda: made.append(1), seconds=0.0, calls=7, limit_s=9.0)) == 7
    assert len(made) == 7
    assert len(timed_calls(lambda: None, seconds=0.01, calls=1, limit_s=9.0)) > 1


def test_the_limit_ends_the_calls_but_never_before_the_first() -> None:
    assert len(timed_calls(lambda: None, seconds=9.0, calls=10**9, limit_s=0.0)) == 1
