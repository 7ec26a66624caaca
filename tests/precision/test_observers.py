"""Every value is counted once, whatever the batches, and extremes are exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.precision.conftest import Digits
from van_deploy.errors import ConversionError, ImageError
from van_deploy.graph.rebuilt import RebuiltVan
from van_deploy.precision.observers import (
    BINS,
    ChannelRange,
    bin_values,
    images_at_once,
    observe,
    range_of,
)


def test_values_land_in_the_bin_that_stands_for_them() -> None:
    values = torch.tensor([[-3.0, 0.0, 1e-9, 0.7, 60000.0, -1e8]]).T.repeat(1, 2)
    found = range_of(values, counted=True)
    assert found.counts is not None
    assert found.counts.shape == (2, BINS)
    assert found.counts.sum() == values.numel()
    held = np.repeat(bin_values(), found.counts[0])
    assert held[1] == pytest.approx(-3.0, rel=0.07)
    assert list(held[2:4]) == [0.0, 0.0]
    assert held[4] == pytest.approx(0.7, rel=0.07)
    assert held[5] == pytest.approx(60000.0, rel=0.07)
    assert (found.minimum[0], found.maximum[0]) == (np.float32(-1e8), 60000.0)
    assert found.largest == np.float32(1e8)


def test_bins_rise_and_are_narrow() -> None:
    values = bin_values()
    assert (np.diff(values) >= 0).all()
    positive = values[values > 0]
    assert (positive[1:] / positive[:-1]).max() <= 1.13


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_are_kept_apart(layout: torch.memory_format) -> None:
    values = torch.zeros(2, 3, 4, 4).contiguous(memory_format=layout)
    values[:, 1] = 2.0
    values[0, 2, 0, 0] = -5.0
    found = range_of(values, counted=True)
    assert found.counts is not None
    assert found.maximum.tolist() == [0.0, 2.0, 0.0]
    assert found.minimum.tolist() == [0.0, 2.0, -5.0]
    assert [int((c > 0).sum()) for c in found.counts] == [1, 1, 2]


def test_batches_of_any_size_give_the_same(
    network: RebuiltVan, calibration_digits: Digits, ranges: Mapping[str, ChannelRange]
) -> None:
    name = "block1.0.mlp.act"
    found = observe(network, calibration_digits.batches(7), [name])[name]
    once = ranges[name].counts
    assert found.counts is not None
    assert once is not None
    assert found.counts.sum() == once.sum()
    assert np.abs(found.counts.astype(float) - once).sum() < 1e-3 * once.sum()
    assert np.allclose(found.maximum, ranges[name].maximum, rtol=1e-4)


def test_every_tensor_has_extremes_and_only_the_asked_are_counted(
    network: RebuiltVan, calibration_digits: Digits
) -> None:
    found = observe(network, calibration_digits.batches(32), ["block1.0"])
    assert set(found) == set(network.tensors)
    assert [name for name, record in found.items() if record.counts is not None] == ["block1.0"]
    assert found["images"].largest == pytest.approx(np.abs(calibration_digits.images).max())


def test_no_image_is_an_error(network: RebuiltVan) -> None:
    with pytest.raises(ImageError, match="no image to record ranges on"):
        observe(network, [], [])


def test_what_is_not_finite_is_named(network: RebuiltVan, calibration_digits: Digits) -> None:
    broken = replace(network, model=copy.deepcopy(network.model))
    broken.model.stage_blocks(2)[0].mlp.fc1.bias.data[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ConversionError) as caught:
        observe(broken, calibration_digits.batches(), [])
    assert caught.value.message == (
        "The tensor 'block2.0.mlp.fc1' is infinite or NaN on the calibration images."
    )


def test_large_images_are_looked_at_few_at_a_time() -> None:
    assert (images_at_once(64 * 64), images_at_once(224 * 224), images_at_once(2000**2)) == (
        32,
        5,
        1,
    )
