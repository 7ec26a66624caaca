"""Scales against what they are defined by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from van_deploy.precision.observers import ChannelRange, range_of
from van_deploy.precision.scales import (
    FP16_LARGEST,
    INT8_LIMIT,
    PAIR_LIMIT,
    SMALLEST_SCALE,
    ChannelAffine,
    Method,
    Quantizer,
    by_channel,
    cpu_weight_scales,
    pair_sums,
    percentile_range,
    rounded,
    storable_scales,
    symmetric,
    unsigned,
    weight_scales,
)

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def heavy() -> Floats:
    """Values ``(N, 3)`` with heavy tails, of three sizes."""
    values = np.random.default_rng(0).standard_t(3, (40_000, 3)) * [0.1, 1.0, 2.0]
    return values.astype(np.float32)


def record(values: Floats) -> ChannelRange:
    return range_of(torch.from_numpy(values), counted=True)


def error(values: Floats, quantizer: Quantizer) -> float:
    codes = np.clip(np.rint(values / quantizer.scale), *quantizer.limits)
    return float(np.square(values - codes * quantizer.scale).mean())


def test_minmax_clips_nothing(heavy: Floats) -> None:
    found = symmetric(record(heavy), Method.MINMAX)
    assert float(found.scale) * INT8_LIMIT == pytest.approx(np.abs(heavy).max(), rel=1e-3)
    assert found.limits == (-128, 127)


def test_percentile_cuts_off_no_more_than_its_share(heavy: Floats) -> None:
    found = symmetric(record(heavy), Method.PERCENTILE, 99.9)
    clipped = (np.abs(heavy) > 127.5 * float(found.scale)).mean()
    assert 0 < clipped <= 0.002


def test_mse_is_the_least_error(heavy: Floats) -> None:
    found = symmetric(record(heavy), Method.MSE)
    tried = [error(heavy, Quantizer(found.scale * f)) for f in np.geomspace(0.3, 4, 60)]
    assert error(heavy, found) <= 1.02 * min(tried)
    assert error(heavy, found) < 0.8 * error(heavy, symmetric(record(heavy), Method.MINMAX))


def test_an_affine_stands_before_the_rounding(heavy: Floats) -> None:
    affine = ChannelAffine(np.array([0.1, 0.0, -1.0]), np.array([0.1, 1.0, 2.0]))
    changed = affine.of(heavy).astype(np.float32)
    found = symmetric(record(heavy), Method.MSE, affine=affine)
    direct = symmetric(record(changed), Method.MSE)
    assert float(found.scale) == pytest.approx(float(direct.scale), rel=0.1)
    multiplier, offset = affine.multiply_add()
    assert np.allclose(heavy * multiplier + offset, changed, atol=1e-5)


@pytest.mark.parametrize("method", list(Method))
def test_unsigned_represents_zero_and_never_reaches_beyond_the_data(
    heavy: Floats, method: Method
) -> None:
    values = np.maximum(heavy, -0.17)
    found = unsigned(record(values), method)
    low, high = (limit * float(found.scale) for limit in found.limits)
    assert found.limits[0] == -found.zero_point <= 0
    assert low >= values.min() - 2 * float(found.scale)
    assert high <= values.max() + 2 * float(found.scale)


def test_a_lower_end_spends_no_integers_below_it(heavy: Floats) -> None:
    found = unsigned(record(heavy), Method.MSE, lowest=-0.5)
    assert found.limits[0] * float(found.scale) >= -0.5 - float(found.scale)


def test_a_tensor_of_zeros_has_the_smallest_scale() -> None:
    zeros = record(np.zeros((10, 2), np.float32))
    for method in Method:
        assert float(symmetric(zeros, method).scale) == SMALLEST_SCALE
        assert float(unsigned(zeros, method).scale) == SMALLEST_SCALE


def test_one_scale_a_channel_clips_nothing(heavy: Floats) -> None:
    found = by_channel(record(heavy))
    assert found.scale.shape == (3,)
    assert (np.abs(heavy) <= 127.01 * found.scale).all()
    assert found.zero_point == 128


def test_percentile_ranges_are_of_each_channel(heavy: Floats) -> None:
    low, high = percentile_range(record(heavy), 99.0)
    inside = ((heavy >= 1.07 * low) & (heavy <= 1.07 * high)).mean(axis=0)
    assert (inside > 0.97).all()
    assert high[0] < high[1] < high[2]


def test_storable_scales_are_rounded_up_and_kept_in_fp16() -> None:
    wanted = np.array([0.0, 1e-9, 0.1, 1.2345, 1e9])
    found = storable_scales(wanted)
    assert (found.astype(np.float16).astype(np.float32) == found).all()
    assert found[0] == found[1] == SMALLEST_SCALE
    assert (found[2:4] >= wanted[2:4]).all()
    assert found[4] == FP16_LARGEST


def test_weights_use_all_integers_of_each_row() -> None:
    weight = np.random.default_rng(1).normal(size=(5, 7, 1, 1)).astype(np.float32)
    weight[2] *= 1000
    scales = weight_scales(weight)
    integers = rounded(weight, scales)
    assert np.abs(integers).reshape(5, -1).max(axis=1).tolist() == [127] * 5
    assert np.abs(integers * scales.reshape(-1, 1, 1, 1) - weight).max() <= scales.max() / 2


def test_neighbouring_products_fit_into_16_bits() -> None:
    weight = np.ones((3, 8, 1, 1), np.float32)
    weight[1, 0] = 7.3
    weight[2] *= -1
    scales = cpu_weight_scales(weight, np.zeros(3), np.array(0.1))
    assert (pair_sums(rounded(weight, scales)) <= PAIR_LIMIT).all()
    bias = np.array([1e6, 0.0, 0.0])
    wide = cpu_weight_scales(weight, bias, np.array(1e-4))
    assert bias[0] / (wide[0] * 1e-4) <= 2**30 * 1.01
    assert wide[1] == scales[1]
