"""Histograms count every value, and scales follow their definitions."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.each import each
from tests.precision.conftest import Digits, batches
from van_deploy.errors import ConversionError
from van_deploy.precision import scales
from van_deploy.precision.scales import ChannelAffine, ChannelRange, Images, Method, Quantizer


@pytest.fixture(scope="module")
def heavy() -> Images:
    """Values ``(N, 3)`` with heavy tails, of three sizes."""
    values = np.random.default_rng(0).standard_t(3, (40_000, 3)) * [0.1, 1.0, 2.0]
    return values.astype(np.float32)


def record(values: Images) -> ChannelRange:
    return scales.channel_range(torch.from_numpy(values), histogram=True)


def error(values: Images, quantizer: Quantizer) -> float:
    codes = np.clip(np.rint(values / quantizer.scale), *quantizer.limits)
    return float(np.square(values - codes * quantizer.scale).mean())


# --- histograms ------------------------------------------------------------------------------


@each("layout", [torch.contiguous_format, torch.channels_last])
def test_histogram_bins_of_each_channel(layout: torch.memory_format) -> None:
    values = torch.zeros(2, 3, 4, 4).contiguous(memory_format=layout)
    values[:, 1] = 0.7
    values[0, 2, 0, :] = torch.tensor([-3.0, 1e-9, 60000.0, -1e8])
    found = scales.channel_range(values, histogram=True)
    assert found.counts.shape == (3, scales.BINS)
    assert found.counts.sum() == values.numel()
    assert found.minimum.tolist() == [0.0, np.float32(0.7), np.float32(-1e8)]
    assert found.maximum.tolist() == [0.0, np.float32(0.7), 60000.0]
    assert found.largest == np.float32(1e8)
    held = [np.repeat(scales.bin_values(), counts) for counts in found.counts]
    assert held[1] == pytest.approx([0.7] * 32, rel=0.07)
    assert held[2][[1, -1]] == pytest.approx([-3.0, 60000.0], rel=0.07)
    assert list(held[2][2:-1]) == [0.0] * 29
    rising = scales.bin_values()[scales.bin_values() > 0]
    assert 1 < (rising[1:] / rising[:-1]).max() <= 1.13


def test_ranges_do_not_depend_on_the_batch_size(digits: Digits) -> None:
    name = "block1.0.mlp.act"
    ranges = scales.observe_ranges(digits.network, batches(digits.train, 7), [name])
    actual, expected = ranges[name], digits.ranges[name]
    difference = np.abs(actual.counts.astype(float) - expected.counts).sum()
    assert difference < 1e-3 * actual.counts.sum()
    assert actual.counts.sum() == expected.counts.sum()
    assert np.allclose(actual.minimum, expected.minimum, rtol=1e-4)
    assert np.allclose(actual.maximum, expected.maximum, rtol=1e-4)
    assert set(ranges) == set(digits.network.tensors)
    assert [tensor for tensor, r in ranges.items() if r.counts.size] == [name]
    assert ranges["images"].largest == pytest.approx(np.abs(digits.train).max())
    assert [scales.range_batch_size(side**2) for side in (64, 224, 2000)] == [32, 5, 1]


def test_nan_is_rejected_with_the_name_of_its_tensor(digits: Digits) -> None:
    broken = replace(digits.network, model=copy.deepcopy(digits.network.model))
    broken.model.stage_blocks(2)[0].mlp.fc1.bias.data[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ConversionError, match=r"'block2\.0\.mlp\.fc1' is infinite or NaN"):
        scales.observe_ranges(broken, batches(digits.train), ["block2.0.mlp.fc1"])


# --- scales ----------------------------------------------------------------------------------


def test_minmax_clips_nothing_and_percentile_clips_at_most_its_share(heavy: Images) -> None:
    found = scales.symmetric_quantizer(record(heavy), "minmax")
    assert float(found.scale) * 127 == pytest.approx(np.abs(heavy).max(), rel=1e-3)
    assert found.limits == (-128, 127)
    found = scales.symmetric_quantizer(record(heavy), "percentile")
    assert 0 < (np.abs(heavy) > 127.5 * float(found.scale)).mean() <= 2e-5
    low, high = scales.percentile_range(record(heavy), 99.0)  # of each channel
    inside = ((heavy >= 1.07 * low) & (heavy <= 1.07 * high)).mean(axis=0)
    assert (inside > 0.97).all()
    assert high[0] < high[1] < high[2]
    found = scales.per_channel_quantizer(record(heavy))
    assert (found.scale.shape, found.zero_point) == ((3,), 128)
    assert (np.abs(heavy) <= 127.01 * found.scale).all()


def test_mse_minimises_the_error_after_the_affine(heavy: Images) -> None:
    found = scales.symmetric_quantizer(record(heavy), "mse")
    tried = [error(heavy, Quantizer(found.scale * f)) for f in np.geomspace(0.3, 4, 60)]
    assert error(heavy, found) <= 1.02 * min(tried)
    for make in (scales.symmetric_quantizer, scales.unsigned_quantizer):
        clipped, whole = (make(record(heavy), method) for method in ("mse", "minmax"))
        assert error(heavy, clipped) < 0.9 * error(heavy, whole)
    affine = ChannelAffine(np.array([0.1, 0.0, -1.0]), np.array([0.1, 1.0, 2.0]))
    changed = affine.apply(heavy).astype(np.float32)
    found = scales.symmetric_quantizer(record(heavy), "mse", affine)
    direct = scales.symmetric_quantizer(record(changed), "mse")
    assert float(found.scale) == pytest.approx(float(direct.scale), rel=0.1)
    multiplier, offset = affine.multiply_add()
    assert np.allclose(heavy * multiplier + offset, changed, atol=1e-5)


@each("method", ("minmax", "percentile", "mse"))
def test_unsigned_range_contains_zero_and_fits_the_data(heavy: Images, method: Method) -> None:
    values = np.maximum(heavy, -0.17)
    found = scales.unsigned_quantizer(record(values), method)
    low, high = (limit * float(found.scale) for limit in found.limits)
    assert found.limits[0] == -found.zero_point <= 0
    assert low >= values.min() - 2 * float(found.scale)
    assert high <= values.max() + 2 * float(found.scale)
    found = scales.unsigned_quantizer(record(heavy), method, lowest=-0.5)
    assert found.limits[0] * float(found.scale) >= -0.5 - float(found.scale)
    zeros = record(np.zeros((10, 2), np.float32))
    for make in (scales.symmetric_quantizer, scales.unsigned_quantizer):
        assert float(make(zeros, method).scale) == scales.SMALLEST_SCALE


def test_weight_scales_use_all_integers_without_overflow() -> None:
    wanted = np.array([0.0, 0.1, 1.2345, 1e9])
    found = scales.fp16_scales(wanted)
    assert (found.astype(np.float16).astype(np.float32) == found).all()
    assert (found[:3] >= wanted[:3]).all()
    assert (found[0], found[3]) == (scales.SMALLEST_SCALE, scales.FP16_LARGEST)
    weight = np.ones((3, 8, 1, 1), np.float32)
    weight[1, 0] = 7.3
    weight[2] *= -1000
    integers = scales.quantize_weight(weight, scales.weight_scales(weight))
    assert np.abs(integers).reshape(3, -1).max(axis=1).tolist() == [127] * 3
    found = scales.cpu_weight_scales(weight, np.zeros(3), np.array(0.1))
    assert (scales.pair_sums(scales.quantize_weight(weight, found)) <= scales.PAIR_LIMIT).all()
    bias = np.array([1e6, 0.0, 0.0])
    wide = scales.cpu_weight_scales(weight, bias, np.array(1e-4))
    assert bias[0] / (wide[0] * 1e-4) <= 2**30 * 1.01
    assert wide[1] == found[1]
