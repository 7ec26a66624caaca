"""The search for layers to keep: it holds the budget, and it stops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from tests.precision.conftest import Digits
from van_deploy.errors import ImageError, UsageError
from van_deploy.precision.drop import Drop, top1_drop
from van_deploy.precision.initial import initial_plan
from van_deploy.precision.plan import QuantizationPlan
from van_deploy.precision.quantize import quantized_share
from van_deploy.precision.ranges import record_ranges
from van_deploy.precision.ranking import LayerDisturbance, rank_layers
from van_deploy.precision.scales import Method
from van_deploy.precision.search import SearchTrial, search_kept


@pytest.fixture(scope="module")
def plan(digits_graph: ModelProto, calibration_digits: Digits) -> QuantizationPlan:
    ranges = record_ranges(digits_graph, calibration_digits.batches()[:1], threads=1)
    return initial_plan(digits_graph, ranges, method=Method.MINMAX)


@pytest.fixture(scope="module")
def ranking(plan: QuantizationPlan, calibration_digits: Digits) -> tuple[LayerDisturbance, ...]:
    return rank_layers(plan, calibration_digits.images[:8])


Evaluate = Callable[[QuantizationPlan], Drop]


def costing(cost: dict[str, float]) -> Evaluate:
    """Return an evaluation in which each quantised layer costs so many points."""
    return lambda plan: Drop(sum(cost[name] for name in plan.convs), 0.0, "top-1")


def test_every_layer_is_ranked_by_what_it_does_alone(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...]
) -> None:
    assert {layer.name for layer in ranking} == set(plan.convs)
    figures = [layer.worth_db for layer in ranking]
    assert figures == sorted(figures)
    assert figures[0] < figures[-1]
    assert sum(layer.share for layer in ranking) == pytest.approx(quantized_share(plan))


def test_a_layer_made_worse_moves_to_the_top(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...], calibration_digits: Digits
) -> None:
    from dataclasses import replace

    best = ranking[-1].name
    spoilt = replace(plan.convs[best], activation_scale=64 * plan.convs[best].activation_scale)
    other = replace(plan, convs={**plan.convs, best: spoilt})
    assert rank_layers(other, calibration_digits.images[:8])[0].name == best


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 7, 20, 44, 45])
def test_it_finds_the_fewest_layers(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...], needed: int
) -> None:
    cost = {layer.name: float(place < needed) for place, layer in enumerate(ranking)}
    assert len(ranking) == 45
    report = search_kept(plan, ranking, costing(cost), max_drop=0.5)
    assert report.passed
    assert report.kept == tuple(layer.name for layer in ranking[:needed])
    assert set(report.plan.convs) == set(plan.convs) - set(report.kept)
    assert report.share == pytest.approx(quantized_share(report.plan))
    assert set(report.reasons()) == set(report.kept)
    assert not report.exhausted


def test_the_limit_ends_the_search_with_the_best_seen(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...]
) -> None:
    cost = {layer.name: float(place < 20) for place, layer in enumerate(ranking)}
    trials: list[SearchTrial] = []
    report = search_kept(
        plan, ranking, costing(cost), max_drop=0.5, limit=3, progress=trials.append
    )
    assert [trial.kept for trial in trials] == [0, 1, 2]
    assert len(report.kept) == 2
    assert report.exhausted
    assert not report


def test_the_limit_ends_the_search_where_the_budget_already_holds(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...]
) -> None:
    cost = {layer.name: float(place < 20) for place, layer in enumerate(ranking)}
    report = search_kept(plan, ranking, costing(cost), max_drop=0.5, limit=7)
    assert [trial.kept for trial in report.trials] == [0, 1, 2, 4, 8, 16, 32]
    assert len(report.kept) == 32
    assert report.passed
    assert report.exhausted


def test_a_budget_nothing_holds_is_said(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...]
) -> None:
    report = search_kept(plan, ranking, lambda _: Drop(1.0, 0.0, "top-1"), max_drop=0.5)
    assert not report.passed
    assert report.kept == ()
    assert report.as_dict()["passed"] is False


def test_the_standard_error_counts_against_the_budget(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...]
) -> None:
    report = search_kept(plan, ranking, lambda _: Drop(0.4, 0.2, "top-1"), max_drop=0.5)
    assert not report.passed


def test_wins_do_not_make_up_for_losses(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...]
) -> None:
    """As many won as lost: top-1 is the same, and yet the network is another one."""
    within, beyond = (Drop(0.0, 0.1, "top-1", changed) for changed in (1.0, 1.1))
    assert search_kept(plan, ranking, lambda _: within, max_drop=0.5).passed
    assert not search_kept(plan, ranking, lambda _: beyond, max_drop=0.5).passed


def test_it_holds_a_real_budget(
    plan: QuantizationPlan,
    ranking: tuple[LayerDisturbance, ...],
    heldout_digits: Digits,
) -> None:
    import torch

    from van_deploy.precision.rounded import RoundedNetwork

    images = torch.from_numpy(heldout_digits.images)

    def evaluate(candidate: QuantizationPlan) -> Drop:
        network = RoundedNetwork(candidate)
        with torch.inference_mode():
            reference, found = network.reference(images).numpy(), network(images).numpy()
        return top1_drop(reference, found, heldout_digits.labels)

    report = search_kept(plan, ranking, evaluate, max_drop=0.5, limit=4)
    assert report.passed
    assert evaluate(report.plan).upper <= 0.5


def test_a_drop_counts_images() -> None:
    reference = np.eye(4)
    labels = np.array([0, 1, 2, 0])
    same = top1_drop(reference, reference, labels)
    assert same == Drop(0.0, 0.0, "top-1")
    worse = top1_drop(reference, reference[[0, 1, 3, 3]], labels)
    assert worse == Drop(25.0, 25.0, "top-1", 25.0)
    better_and_worse = top1_drop(reference, reference[[1, 1, 2, 0]], labels)
    assert better_and_worse.points == 0.0
    assert better_and_worse.changed == 50.0
    assert better_and_worse.error == pytest.approx(25 * np.sqrt(2))
    assert top1_drop(reference, reference[[1, 1, 2, 3]]).of == "agreement"


def test_senseless_requests_are_refused(
    plan: QuantizationPlan, ranking: tuple[LayerDisturbance, ...]
) -> None:
    with pytest.raises(UsageError) as refused:
        search_kept(plan, ranking, lambda _: Drop(0.0, 0.0, "top-1"), max_drop=-1.0)
    assert str(refused.value) == (
        "A search for at most -1 points with 16 evaluations makes no sense.\n"
        "Give --max-drop between 0 and 100, and at least one evaluation."
    )
    with pytest.raises(ImageError, match="There is no image to rank layers with"):
        rank_layers(plan, np.zeros((0, 3, 64, 64), np.float32))
