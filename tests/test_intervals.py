"""Intervals against published examples, scipy and their own definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from tests.each import each
from van_deploy.intervals import (
    bootstrap_interval,
    mcnemar_exact,
    median_interval,
    tango_interval,
    tango_score,
    wilson_interval,
)

COUNTS = st.integers(0, 300)


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilsons_interval_is_scipys(total: int, share: float) -> None:
    hits = round(share * total)
    expected = binomtest(hits, total).proportion_ci(method="wilson")
    found = wilson_interval(hits, total)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found[0] <= hits / total <= found[1] <= 1


@settings(deadline=None)
@given(COUNTS, COUNTS)
def test_mcnemars_p_is_scipys_binomial_test(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar_exact(lost, won) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(lost, won) == mcnemar_exact(won, lost)


def test_tangos_interval_is_the_published_one() -> None:
    """Tango, Statistics in Medicine 17, 1998, 6.2 and 6.1; Fagerland and others, ibid. 33, 2014, V.

    Then the least images without a flip that bound the loss by one point, and by half of one.
    """
    assert tango_interval(9, 3, 32) == pytest.approx((-0.027, 0.390), abs=5e-4)
    assert tango_score(0, 1, 44, -0.1) == pytest.approx(1.709, abs=5e-4)
    assert tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    for images, points in ((381, 1.0), (765, 0.5)):
        assert 100 * tango_interval(0, 0, images)[1] <= points
        assert 100 * tango_interval(0, 0, images - 1)[1] > points
    for lost, won in ((9, 3), (0, 4), (5, 5)):  # no difference: McNemar's statistic
        expected = (lost - won) / math.sqrt(lost + won)
        assert tango_score(lost, won, 50, 0.0) == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1))
def test_tangos_interval_is_where_the_score_test_rejects(
    total: int, one: float, two: float
) -> None:
    lost = round(one * total)
    won = round(two * (total - lost))
    low, high = tango_interval(lost, won, total)
    assert -1 <= low <= (lost - won) / total <= high <= 1
    z = norm.ppf(0.975)
    if low > -1 + 1e-9:
        assert tango_score(lost, won, total, low) == pytest.approx(z, abs=1e-5)
    if high < 1 - 1e-9:
        assert tango_score(lost, won, total, high) == pytest.approx(-z, abs=1e-5)
    assert tango_interval(won, lost, total) == pytest.approx((-high, -low), abs=1e-9)


@each(("lost", "won"), [(0.02, 0.02), (0.05, 0.01), (0.004, 0.001)])
def test_tangos_interval_covers_the_truth(lost: float, won: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(500, [lost, won, 1 - lost - won], size=2000)
    intervals = np.array([tango_interval(b, c, 500) for b, c, _ in draws.tolist()])
    covered = (intervals[:, 0] <= lost - won) & (lost - won <= intervals[:, 1])
    assert covered.mean() > 0.935


@each("count", [6, 7, 25, 60])
def test_the_medians_ranks_are_the_sign_tests(count: int) -> None:
    low, high = median_interval([float(value) for value in range(count)])
    assert low == count - 1 - high
    assert binom.cdf(low, count, 0.5) <= 0.025 < binom.cdf(low + 1, count, 0.5)


def test_the_bootstrap_finds_a_means_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=400)
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), 400)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)


def test_of_few_values_little_is_known_and_of_none_nothing() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert tango_interval(0, 0, 0) == (-1.0, 1.0)
    assert mcnemar_exact(0, 0) == 1.0
