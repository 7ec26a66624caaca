"""Histograms and the scales read from them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from van_deploy.precision.histogram import BINS, Histogram, bin_centres, bin_edges
from van_deploy.precision.plan import SMALLEST_SCALE, storable_scales
from van_deploy.precision.scales import (
    AffineScale,
    Method,
    affine_scale,
    clip_magnitude,
    symmetric_scale,
)
from van_deploy.precision.tensor_range import TensorRange

Floats = npt.NDArray[np.float32]

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FLOATS = st.floats(-(2.0**30), 2.0**30, width=32, allow_nan=False)
TENSORS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=40), elements=FLOATS
)


def recorded(values: Floats) -> TensorRange:
    record = TensorRange(histogram=Histogram())
    record.add_(values)
    return record


def gelu_like(count: int = 200_000, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return heavy-tailed values with a floor at -0.17, as GELU makes them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, count) - 1.0
    return np.where(values > 0, values, -0.17 * rng.random(count)).astype(np.float32)[None]


class TestHistogram:
    @given(TENSORS)
    @QUICK
    def test_it_counts_every_value_and_keeps_the_extremes_exactly(self, values: Floats) -> None:
        histogram = Histogram()
        histogram.add_(values)
        assert histogram.count == values.size
        assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
        assert histogram.largest == max(values.max(), -values.min(), 0)

    def test_a_value_lies_in_the_bin_its_magnitude_says(self) -> None:
        edges = bin_edges()
        rng = np.random.default_rng(1)
        for value in (1.0, -1.0, 0.1234, -777.5, *rng.normal(size=50)):
            histogram = Histogram()
            histogram.add_(np.array([value], np.float32))
            side = histogram.positive if value > 0 else histogram.negative
            (index,) = np.flatnonzero(side)
            assert edges[index] <= abs(np.float32(value)) < edges[index + 1]

    def test_bins_are_at_most_a_five_hundredth_wide(self) -> None:
        edges = bin_edges()
        assert len(edges) == BINS + 1
        assert np.max(np.diff(edges) / edges[:-1]) <= 1 / 512
        assert ((edges[:-1] < bin_centres()) & (bin_centres() < edges[1:])).all()

    def test_small_and_huge_values_are_counted_too(self) -> None:
        histogram = Histogram()
        histogram.add_(np.array([0.0, 1e-30, -1e-10, 3e38, -2e12], np.float32))
        assert histogram.tiny == 3
        assert histogram.positive[-1] == 1
        assert histogram.negative[-1] == 1

    def test_its_size_does_not_grow_with_the_data(self) -> None:
        histogram = Histogram()
        before = histogram.positive.nbytes + histogram.negative.nbytes
        for seed in range(3):
            histogram.add_(np.random.default_rng(seed).normal(size=3_000_000).astype(np.float32))
        assert histogram.positive.nbytes + histogram.negative.nbytes == before == 16 * BINS
        assert histogram.count == 9_000_000

    def test_two_halves_merge_into_the_whole(self) -> None:
        values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
        whole, first, second = Histogram(), Histogram(), Histogram()
        whole.add_(values)
        first.add_(values[:300])
        second.add_(values[300:])
        merged = first.merged(second)
        assert np.array_equal(merged.positive, whole.positive)
        assert np.array_equal(merged.negative, whole.negative)
        assert (merged.minimum, merged.maximum) == (whole.minimum, whole.maximum)

    @pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
    def test_a_percentile_is_numpys_within_a_bin(self, share: float) -> None:
        values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
        histogram = Histogram()
        histogram.add_(values)
        exact = np.quantile(np.abs(values), share, method="inverted_cdf")
        assert exact <= histogram.magnitude_at(share) <= exact * 1.002
        assert histogram.share_below(exact) == pytest.approx(share, abs=2e-3)


class TestStorableScales:
    @given(hnp.arrays(np.float64, 20, elements=st.floats(0, 60000)))
    @QUICK
    def test_fp16_holds_them_and_they_still_cover(self, wanted: npt.NDArray[np.float64]) -> None:
        scales = storable_scales(wanted)
        assert (scales.astype(np.float16).astype(np.float32) == scales).all()
        assert (scales >= wanted).all()
        assert (scales >= SMALLEST_SCALE).all()
        assert (scales <= np.maximum(wanted, SMALLEST_SCALE) * 1.001).all()


class TestSymmetricScales:
    @given(TENSORS, st.sampled_from(list(Method)))
    @QUICK
    def test_every_method_gives_a_positive_finite_scale_that_fp16_holds(
        self, values: Floats, method: Method
    ) -> None:
        scale = symmetric_scale(recorded(values), method)
        assert SMALLEST_SCALE <= scale <= 65504
        assert float(np.float16(scale)) == scale

    @given(TENSORS)
    @QUICK
    def test_minmax_covers_everything(self, values: Floats) -> None:
        record = recorded(values)
        scale = symmetric_scale(record, Method.MINMAX)
        assert scale * 127 >= min(record.largest, 65504 * 127)

    @given(TENSORS)
    @QUICK
    def test_average_covers_the_mean_of_the_images_extremes(self, values: Floats) -> None:
        rows = values.reshape(len(values), -1)
        expected = max(
            rows.max(axis=1).mean(dtype=np.float64), -rows.min(axis=1).mean(dtype=np.float64)
        )
        scale = symmetric_scale(recorded(values), Method.AVERAGE)
        assert scale * 127 * 1.0001 >= min(expected, 65504 * 127)

    @given(TENSORS, st.floats(0.6, 1.0))
    @QUICK
    def test_percentile_covers_its_share_of_the_values(self, values: Floats, share: float) -> None:
        clip = clip_magnitude(recorded(values), Method.PERCENTILE, share)
        covered = np.mean((np.abs(values) <= clip) | (np.abs(values) < 2.0**-24))
        assert covered >= share - 1e-9

    @given(TENSORS, st.sampled_from([Method.MSE, Method.ENTROPY]))
    @QUICK
    def test_searched_clips_lie_within_the_range(self, values: Floats, method: Method) -> None:
        record = recorded(values)
        assert 0 <= clip_magnitude(record, method) <= record.largest * 1.0001

    def test_mse_is_the_least_over_all_the_values(self) -> None:
        values = gelu_like()
        record = recorded(values)
        chosen = symmetric_scale(record, Method.MSE)

        def error(scale: float) -> float:
            rounded = np.clip(np.rint(values / scale), -127, 127) * scale
            return float(np.square(rounded - values, dtype=np.float64).mean())

        others = np.geomspace(record.largest / 127 / 100, record.largest / 127, 400)
        assert error(chosen) <= 1.01 * min(error(float(scale)) for scale in others)
        assert error(chosen) < 0.97 * error(symmetric_scale(record, Method.MINMAX))

    def test_entropy_of_a_uniform_tensor_clips_nothing_much(self) -> None:
        values = np.random.default_rng(0).uniform(-3, 3, (1, 400_000)).astype(np.float32)
        assert clip_magnitude(recorded(values), Method.ENTROPY) > 2.8

    def test_a_tensor_of_zeros_has_the_smallest_scale(self) -> None:
        record = recorded(np.zeros((2, 5), np.float32))
        for method in Method:
            assert symmetric_scale(record, method) == SMALLEST_SCALE


class TestAffineScales:
    @given(TENSORS, st.sampled_from(list(Method)))
    @QUICK
    def test_zero_is_exact_and_the_scale_is_positive(self, values: Floats, method: Method) -> None:
        chosen = affine_scale(recorded(values), method)
        assert chosen.scale > 0
        assert np.isfinite(chosen.scale)
        assert 0 <= chosen.zero_point <= 255

    def test_minmax_covers_both_ends(self) -> None:
        record = recorded(np.array([[-1.0, 3.0]], np.float32))
        assert affine_scale(record, Method.MINMAX) == AffineScale(4 / 255, 64)

    def test_mse_uses_the_floor_of_gelu(self) -> None:
        values = gelu_like()
        chosen = affine_scale(recorded(values), Method.MSE)
        integers = np.clip(np.rint(values / chosen.scale) + chosen.zero_point, 0, 255)
        error = np.square((integers - chosen.zero_point) * chosen.scale - values).mean()
        scale = symmetric_scale(recorded(values), Method.MSE)
        symmetric = np.square(np.clip(np.rint(values / scale), -127, 127) * scale - values).mean()
        assert error < 0.5 * symmetric
