"""Histograms hold every value, and scales are what they are defined by."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.each import each
from tests.precision.conftest import Images, batches
from van_deploy.errors import ConversionError
from van_deploy.graph.export import RebuiltVan
from van_deploy.precision.scales import (
    BINS,
    FP16_LARGEST,
    INT8_LIMIT,
    PAIR_LIMIT,
    SMALLEST_SCALE,
    ChannelAffine,
    ChannelRange,
    Method,
    Quantizer,
    bin_values,
    by_channel,
    cpu_weight_scales,
    images_at_once,
    observe,
    pair_sums,
    percentile_range,
    range_of,
    rounded,
    storable_scales,
    symmetric,
    unsigned,
    weight_scales,
)

Floats = npt.NDArray[np.float32]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse")


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


# --- histograms ------------------------------------------------------------------------------


def test_values_land_in_the_bin_that_stands_for_them() -> None:
    values = torch.tensor([[-3.0, 0.0, 1e-9, 0.7, 60000.0, -1e8]]).T.repeat(1, 2)
    found = range_of(values, counted=True)
    assert found.counts.shape == (2, BINS)
    assert found.counts.sum() == values.numel()
    held = np.repeat(bin_values(), found.counts[0])
    assert list(held[2:4]) == [0.0, 0.0]
    assert held[[1, 4, 5]] == pytest.approx([-3.0, 0.7, 60000.0], rel=0.07)
    assert (found.minimum[0], found.maximum[0]) == (np.float32(-1e8), 60000.0)
    assert found.largest == np.float32(1e8)
    assert (np.diff(bin_values()) >= 0).all()
    positive = bin_values()[bin_values() > 0]
    assert (positive[1:] / positive[:-1]).max() <= 1.13


@each("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_are_kept_apart(layout: torch.memory_format) -> None:
    values = torch.zeros(2, 3, 4, 4).contiguous(memory_format=layout)
    values[:, 1] = 2.0
    values[0, 2, 0, 0] = -5.0
    found = range_of(values, counted=True)
    assert found.maximum.tolist() == [0.0, 2.0, 0.0]
    assert found.minimum.tolist() == [0.0, 2.0, -5.0]
    assert [int((c > 0).sum()) for c in found.counts] == [1, 1, 2]


def test_batches_of_any_size_give_the_same_and_only_the_asked_are_counted(
    network: RebuiltVan, calibration_digits: Images, ranges: Mapping[str, ChannelRange]
) -> None:
    name = "block1.0.mlp.act"
    found, once = observe(network, batches(calibration_digits, 7), [name]), ranges[name]
    assert found[name].counts.sum() == once.counts.sum()
    difference = np.abs(found[name].counts.astype(float) - once.counts).sum()
    assert difference < 1e-3 * once.counts.sum()
    assert np.allclose(found[name].maximum, once.maximum, rtol=1e-4)
    assert set(found) == set(network.tensors)
    assert [tensor for tensor, r in found.items() if r.counts.size] == [name]
    assert found["images"].largest == pytest.approx(np.abs(calibration_digits).max())
    sides = (64, 224, 2000)
    assert [images_at_once(side**2) for side in sides] == [32, 5, 1]


def test_what_is_not_finite_is_named(network: RebuiltVan, calibration_digits: Images) -> None:
    broken = replace(network, model=copy.deepcopy(network.model))
    broken.model.stage_blocks(2)[0].mlp.fc1.bias.data[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ConversionError) as caught:
        observe(broken, batches(calibration_digits), ["block2.0.mlp.fc1"])
    assert caught.value.message == (
        "The tensor 'block2.0.mlp.fc1' is infinite or NaN on the calibration images."
    )


# --- activations -----------------------------------------------------------------------------


def test_minmax_clips_nothing_and_percentile_no_more_than_its_share(heavy: Floats) -> None:
    found = symmetric(record(heavy), "minmax")
    assert float(found.scale) * INT8_LIMIT == pytest.approx(np.abs(heavy).max(), rel=1e-3)
    assert found.limits == (-128, 127)
    found = symmetric(record(heavy), "percentile")
    assert 0 < (np.abs(heavy) > 127.5 * float(found.scale)).mean() <= 2e-5
    low, high = percentile_range(record(heavy), 99.0)  # of each channel
    inside = ((heavy >= 1.07 * low) & (heavy <= 1.07 * high)).mean(axis=0)
    assert (inside > 0.97).all()
    assert high[0] < high[1] < high[2]


def test_mse_is_the_least_error(heavy: Floats) -> None:
    found = symmetric(record(heavy), "mse")
    tried = [error(heavy, Quantizer(found.scale * f)) for f in np.geomspace(0.3, 4, 60)]
    assert error(heavy, found) <= 1.02 * min(tried)
    assert error(heavy, found) < 0.8 * error(heavy, symmetric(record(heavy), "minmax"))


def test_an_affine_stands_before_the_rounding(heavy: Floats) -> None:
    affine = ChannelAffine(np.array([0.1, 0.0, -1.0]), np.array([0.1, 1.0, 2.0]))
    changed = affine.of(heavy).astype(np.float32)
    found = symmetric(record(heavy), "mse", affine=affine)
    direct = symmetric(record(changed), "mse")
    assert float(found.scale) == pytest.approx(float(direct.scale), rel=0.1)
    multiplier, offset = affine.multiply_add()
    assert np.allclose(heavy * multiplier + offset, changed, atol=1e-5)


@each("method", METHODS)
def test_unsigned_represents_zero_and_never_reaches_beyond_the_data(
    heavy: Floats, method: Method
) -> None:
    values = np.maximum(heavy, -0.17)
    found = unsigned(record(values), method)
    low, high = (limit * float(found.scale) for limit in found.limits)
    assert found.limits[0] == -found.zero_point <= 0
    assert low >= values.min() - 2 * float(found.scale)
    assert high <= values.max() + 2 * float(found.scale)
    found = unsigned(record(heavy), method, lowest=-0.5)  # no integers are spent below it
    assert found.limits[0] * float(found.scale) >= -0.5 - float(found.scale)
    zeros = record(np.zeros((10, 2), np.float32))
    for quantizer in (symmetric(zeros, method), unsigned(zeros, method)):
        assert float(quantizer.scale) == SMALLEST_SCALE


def test_one_scale_a_channel_clips_nothing(heavy: Floats) -> None:
    found = by_channel(record(heavy))
    assert (found.scale.shape, found.zero_point) == ((3,), 128)
    assert (np.abs(heavy) <= 127.01 * found.scale).all()


# --- weights ---------------------------------------------------------------------------------


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
