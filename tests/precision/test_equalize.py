"""Equalisation changes nothing but how well tensors round, and says what it did."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.precision.conftest import Digits
from van_deploy.graph.rebuilt import RebuiltVan
from van_deploy.metrics import sqnr_db
from van_deploy.precision.equalize import FACTOR_LIMIT, TECHNIQUES, equalize
from van_deploy.precision.observers import ChannelRange, observe
from van_deploy.precision.plan import QuantizationPlan, layers_in_scope, make_plan
from van_deploy.precision.simulate import bias_corrected, logits

Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("scope", ["pointwise", "all", "block2"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_network_computes_what_it_did(
    network: RebuiltVan,
    ranges: Mapping[str, ChannelRange],
    heldout_digits: Digits,
    expected: Floats,
    scope: str,
    technique: str,
) -> None:
    layers = layers_in_scope(network.model, (scope,))
    changed = equalize(network, ranges, layers, [technique])
    assert changed.affines or changed.inserted
    found = logits(QuantizationPlan(changed.network), heldout_digits.images)
    assert sqnr_db(expected, found) > 100


def test_every_changed_tensor_is_what_the_record_says(
    network: RebuiltVan,
    pointwise: tuple[str, ...],
    ranges: Mapping[str, ChannelRange],
    calibration_digits: Digits,
) -> None:
    changed = equalize(network, ranges, pointwise)
    now = observe(changed.network, calibration_digits.batches(), [])
    assert {"block1.0.add", "block2.0", "block1.0.attn.spatial_gating_unit"} <= set(changed.affines)
    for tensor, affine in changed.affines.items():
        wanted = affine.of(ranges[tensor].maximum)
        assert np.allclose(now[tensor].maximum, wanted, atol=2e-3 * np.abs(wanted).max()), tensor
        assert (affine.factor >= 1 / FACTOR_LIMIT).all()
        assert (affine.factor <= FACTOR_LIMIT).all()


def test_a_stream_that_keeps_a_multiply_is_centred_exactly(
    network: RebuiltVan,
    pointwise: tuple[str, ...],
    ranges: Mapping[str, ChannelRange],
    heldout_digits: Digits,
) -> None:
    model = copy.deepcopy(network.model)
    block = model.stage_blocks(2)[1]
    block.carry = torch.ones(len(block.attn.proj_2.weight))
    block.carry[::2] = 0.25
    other = replace(network, model=model)
    before = logits(QuantizationPlan(other), heldout_digits.images)
    changed = equalize(other, ranges, pointwise, ["shift"])
    assert sqnr_db(before, logits(QuantizationPlan(changed.network), heldout_digits.images)) > 100


def test_together_with_bias_correction_they_bring_decibels(
    network: RebuiltVan,
    pointwise: tuple[str, ...],
    ranges: Mapping[str, ChannelRange],
    calibration_digits: Digits,
    heldout_digits: Digits,
    expected: Floats,
) -> None:
    quality = {}
    for techniques in ((), ("cross_layer",), TECHNIQUES):
        plan = make_plan(equalize(network, ranges, pointwise, techniques), ranges, pointwise)
        plan = bias_corrected(plan, calibration_digits.images)
        quality[techniques] = sqnr_db(expected, logits(plan, heldout_digits.images))
    assert quality["cross_layer",] > quality[()] + 0.5
    assert quality[TECHNIQUES] > quality["cross_layer",] + 0.5


def test_a_dead_channel_does_no_harm(
    network: RebuiltVan, pointwise: tuple[str, ...], calibration_digits: Digits
) -> None:
    model = copy.deepcopy(network.model)
    unit = model.stage_blocks(1)[0].attn.spatial_gating_unit
    for conv in (unit.conv_spatial, unit.conv1):
        conv.weight.data[0] = 0.0
        if conv.bias is not None:
            conv.bias.data[0] = 0.0
    dead = replace(network, model=model)
    found = observe(dead, calibration_digits.batches(), set(dead.tensors))
    changed = equalize(dead, found, pointwise)
    images = calibration_digits.images[:8]
    before = logits(QuantizationPlan(dead), images)
    assert sqnr_db(before, logits(QuantizationPlan(changed.network), images)) > 100


def test_the_original_is_left_as_it_was(
    network: RebuiltVan, pointwise: tuple[str, ...], ranges: Mapping[str, ChannelRange]
) -> None:
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    plan = make_plan(equalize(network, ranges, pointwise), ranges, pointwise)
    bias_corrected(plan, np.zeros((2, 3, 64, 64), np.float32))
    after = network.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert list(before) == list(after)
