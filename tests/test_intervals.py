"""Intervals against published examples, SciPy and their definitions."""

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
def test_wilson_interval_matches_scipy(total: int, share: float) -> None:
    hits = round(share * total)
    expected = binomtest(hits, total).proportion_ci(method="wilson")
    low, high = wilson_interval(hits, total)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= hits / total <= high <= 1


@settings(deadline=None)
@given(COUNTS, COUNTS)
def test_mcnemar_p_value_matches_scipy(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar_exact(lost, won) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(lost, won) == mcnemar_exact(won, lost)


def test_tango_interval_matches_published_examples() -> None:
    """Tango, Statistics in Medicine 17, 1998, 6.2 and 6.1; Fagerland and others, ibid. 33, 2014, V.

    Also the minimum number of images without a flip that bounds the loss by 1 and by 0.5 points.
    """
    assert tango_interval(9, 3, 32) == pytest.approx((-0.027, 0.390), abs=5e-4)
    assert tango_score(0, 1, 44, -0.1) == pytest.approx(1.709, abs=5e-4)
    assert tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert (tango_interval(0, 0, 0), wilson_interval(0, 0)) == ((-1.0, 1.0), (0.0, 1.0))
    for images, points in ((381, 1.0), (765, 0.5)):
        assert 100 * tango_interval(0, 0, images)[1] <= points
        assert 100 * tango_interval(0, 0, images - 1)[1] > points
    for lost, won in ((9, 3), (0, 4), (5, 5)):  # no difference: McNemar's statistic
        expected = (lost - won) / math.sqrt(lost + won)
        assert tango_score(lost, won, 50, 0.0) == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1))
def test_tango_interval_inverts_the_score_test(total: int, one: float, two: float) -> None:
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


@each("count", [6, 7, 25, 60, 4000])
def test_median_interval_has_the_ranks_of_the_sign_test(count: int) -> None:
    low, high = median_interval([float(value) for value in range(count)])
    assert low == count - 1 - high
    assert binom.cdf(low, count, 0.5) <= 0.025 < binom.cdf(low + 1, count, 0.5)
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(2).normal(size=400)
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), 400)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)
