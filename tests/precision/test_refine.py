"""Refining: nearer to the FP32 logits, never further, and the same every time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from onnx import ModelProto

from tests.precision.conftest import Digits
from van_deploy.errors import ImageError, UsageError
from van_deploy.metrics import sqnr_db
from van_deploy.precision.correct import corrected_biases, rounded_by_error
from van_deploy.precision.initial import initial_plan
from van_deploy.precision.plan import QuantizationPlan, simulate, storable_scales
from van_deploy.precision.ranges import Ranges, record_ranges
from van_deploy.precision.refine import refine_plan
from van_deploy.precision.refine_settings import RefineSettings
from van_deploy.precision.rounded import RoundedNetwork
from van_deploy.precision.scales import Method

BRIEF = RefineSettings(scales=True, biases=True, turns=True, steps=4, batch=16)


@pytest.fixture(scope="module")
def ranges(digits_graph: ModelProto, calibration_digits: Digits) -> Ranges:
    return record_ranges(digits_graph, calibration_digits.batches(), threads=1)


@pytest.fixture(scope="module")
def plan(digits_graph: ModelProto, ranges: Ranges) -> QuantizationPlan:
    return initial_plan(digits_graph, ranges)


def quality(plan: QuantizationPlan, digits: Digits) -> float:
    network = RoundedNetwork(plan)
    images = torch.from_numpy(digits.images)
    with torch.inference_mode():
        return sqnr_db(network.reference(images).numpy(), network(images).numpy())


@pytest.mark.parametrize("scope", ["pointwise", "all"])
def test_the_network_computes_what_the_simulated_graph_does(
    digits_graph: ModelProto, ranges: Ranges, heldout_digits: Digits, scope: str
) -> None:
    plan = initial_plan(digits_graph, ranges, scope)
    images = heldout_digits.images[:8]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        simulate(plan).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, {"images": images})[0]
    with torch.inference_mode():
        network = RoundedNetwork(plan)
        found = network(torch.from_numpy(images)).numpy()
        exact = network.reference(torch.from_numpy(images)).numpy()
    # A value on the edge between two integers may fall to either side, and the two part there.
    apart = np.abs(found - expected).max(axis=1)
    assert np.median(apart) < 1e-4 < np.median(np.abs(exact - expected).max(axis=1))
    unchanged = network.to_plan()
    for name, conv in plan.convs.items():
        assert np.array_equal(unchanged.convs[name].weight, conv.weight)
        assert unchanged.convs[name].activation_scale == conv.activation_scale


def test_correcting_biases_takes_the_mean_error_away(
    plan: QuantizationPlan, calibration_digits: Digits, heldout_digits: Digits
) -> None:
    crude = _crude(plan)
    corrected = corrected_biases(crude, torch.from_numpy(calibration_digits.images[:32]))
    assert quality(corrected, heldout_digits) > quality(crude, heldout_digits) + 3.0
    for name, conv in corrected.convs.items():
        assert np.array_equal(conv.weight, crude.convs[name].weight)
        assert conv.activation_scale == crude.convs[name].activation_scale


def _crude(plan: QuantizationPlan) -> QuantizationPlan:
    """Return ``plan`` with every bias off by a tenth."""
    convs = {
        name: replace(conv, bias=None if conv.bias is None else conv.bias + np.float32(0.1))
        for name, conv in plan.convs.items()
    }
    return replace(plan, convs=convs)


SWITCHES = ("bias_correction", "rounding", "scales", "biases", "turns")


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_changes_its_own_numbers(
    plan: QuantizationPlan, calibration_digits: Digits, switch: str
) -> None:
    off = dict.fromkeys(SWITCHES, False)
    settings = replace(
        BRIEF, steps=8, scale_rate=0.1, bias_rate=0.01, turn_rate=0.2, **{**off, switch: True}
    )
    start = _crude(plan) if "bias" in switch else _coarse(plan) if switch == "scales" else plan
    report = refine_plan(start, calibration_digits.batches(), settings)
    tried = switch if switch in {"bias_correction", "rounding"} else "learning"
    assert [change.name for change in report.changes] == [tried]
    if switch not in {"rounding", "turns"}:
        assert report.changes[0].kept
    changed = _changed(start, report.plan)
    expected = {"bias_correction": "bias", "biases": "bias", "turns": "rounding"}.get(
        switch, switch
    )
    assert changed == ({expected} if report.changes[0].kept else set())


def _coarse(plan: QuantizationPlan) -> QuantizationPlan:
    """Return ``plan`` with every activation's step four times what it should be."""
    convs = {
        name: replace(conv, activation_scale=4 * conv.activation_scale)
        for name, conv in plan.convs.items()
    }
    return replace(plan, convs=convs)


def _changed(before: QuantizationPlan, after: QuantizationPlan) -> set[str]:
    found = set()
    for name, conv in before.convs.items():
        other = after.convs[name]
        if conv.activation_scale != other.activation_scale:
            found.add("scales")
        if not np.array_equal(conv.weight, other.weight):
            found.add("rounding")
        assert conv.bias is not None
        assert other.bias is not None
        if not np.array_equal(conv.bias, other.bias):
            found.add("bias")
        assert np.array_equal(conv.weight_scale, other.weight_scale)
    return found


@pytest.mark.parametrize("method", [Method.MSE, Method.MINMAX])
def test_refining_never_makes_it_worse(
    digits_graph: ModelProto, ranges: Ranges, calibration_digits: Digits, method: Method
) -> None:
    plan = initial_plan(digits_graph, ranges, method=method)
    report = refine_plan(plan, calibration_digits.batches(), BRIEF)
    assert report.gain_db >= 0
    assert report.images_learnt + report.images_held_out == len(calibration_digits.images)
    for change in report.changes:
        assert change.kept == (change.after_db > change.before_db)


def test_a_harmful_change_is_thrown_away(
    plan: QuantizationPlan, calibration_digits: Digits
) -> None:
    wild = replace(
        BRIEF, bias_correction=False, rounding=False, scale_rate=3.0, turn_rate=1.0, bias_rate=5.0
    )
    report = refine_plan(plan, calibration_digits.batches(), wild)
    assert [change.kept for change in report.changes] == [False]
    assert report.gain_db == 0.0
    assert _changed(plan, report.plan) == set()
    assert report.plan.facts["refined"] == []


def test_the_same_seed_gives_the_same_plan(
    plan: QuantizationPlan, calibration_digits: Digits
) -> None:
    first, second = (refine_plan(plan, calibration_digits.batches(), BRIEF) for _ in range(2))
    assert first.changes == second.changes
    assert _changed(first.plan, second.plan) == set()


@pytest.mark.parametrize("learnt", [False, True])
def test_refined_numbers_fit_the_file(
    plan: QuantizationPlan, calibration_digits: Digits, learnt: bool
) -> None:
    settings = replace(BRIEF, rounding=False) if learnt else RefineSettings()
    report = refine_plan(plan, calibration_digits.batches(), settings)
    for name, conv in report.plan.convs.items():
        assert conv.weight.dtype == np.int8
        assert np.abs(conv.weight.astype(int)).max() <= 127
        moved = np.abs(conv.weight.astype(int) - plan.convs[name].weight)
        if learnt:  # up or down; a row that is rounded as a whole may go further
            assert moved.max() <= 1
        assert (moved <= 1).mean() > 0.95
        assert conv.activation_scale == float(storable_scales(conv.activation_scale))
        assert conv.bias is not None
        assert conv.bias.dtype == np.float32


def test_a_row_is_rounded_as_a_whole() -> None:
    """Inputs that go together: the errors of their weights cancel, to nearest they add up."""
    generator = np.random.default_rng(3)
    weight = generator.normal(size=(8, 24)).astype(np.float32)
    steps = (np.abs(weight).max(axis=1) / 7).astype(np.float32)
    inputs = generator.normal(size=(24, 3)) @ generator.normal(size=(3, 500))
    inputs += 0.1 * generator.normal(size=inputs.shape)
    nearest = np.rint(weight / steps[:, None]).astype(np.int8)
    chosen = rounded_by_error(weight, steps, np.cov(inputs))
    assert chosen.dtype == np.int8

    def error(integers: npt.NDArray[np.int8]) -> float:
        return float(np.square((integers * steps[:, None] - weight) @ inputs).mean())

    assert error(chosen) < 0.3 * error(nearest)
    nothing = rounded_by_error(weight, steps, np.zeros((24, 24)))
    assert np.array_equal(nothing, nearest)


def test_progress_counts_every_step(plan: QuantizationPlan, calibration_digits: Digits) -> None:
    told: list[tuple[int, int]] = []
    refine_plan(
        plan,
        calibration_digits.batches(),
        replace(BRIEF, steps=2, bias_correction=False, rounding=False),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 2), (2, 2)]


def test_senseless_requests_are_refused(plan: QuantizationPlan) -> None:
    with pytest.raises(ImageError) as refused:
        refine_plan(plan, [np.zeros((1, 3, 64, 64), np.float32)])
    assert str(refused.value) == (
        "Refining needs at least two calibration images, and there are 1.\n"
        "Pass more images with --images DIR, or switch refinement off."
    )
    with pytest.raises(UsageError, match="Refining with 0 steps of 32 images"):
        RefineSettings(steps=0)
