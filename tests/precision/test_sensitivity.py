"""Which layers are kept in higher precision, and on what grounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest

from tests.precision.conftest import Digits
from van_deploy.errors import ImageError
from van_deploy.graph.rebuilt import RebuiltVan
from van_deploy.precision.equalize import Equalization
from van_deploy.precision.observers import ChannelRange
from van_deploy.precision.plan import QuantizationPlan, make_plan, multiply_adds
from van_deploy.precision.scales import Method
from van_deploy.precision.sensitivity import (
    LayerSensitivity,
    SearchReport,
    labels_lost,
    rank_layers,
    require_resolution,
    search_kept,
)


@pytest.fixture(scope="module")
def plan(
    network: RebuiltVan, pointwise: tuple[str, ...], ranges: Mapping[str, ChannelRange]
) -> QuantizationPlan:
    return make_plan(Equalization(network), ranges, pointwise, method=Method.MINMAX)


@pytest.fixture(scope="module")
def ranking(plan: QuantizationPlan) -> tuple[LayerSensitivity, ...]:
    """A ranking of every layer that costs nothing to make."""
    return tuple(LayerSensitivity(name, 30.0 + n, 0.01) for n, name in enumerate(plan.layers))


def found(
    plan: QuantizationPlan,
    ranking: tuple[LayerSensitivity, ...],
    needed: int,
    limit: int = 16,
) -> SearchReport:
    """Search where a plan holds once the ``needed`` worst layers are out of it."""

    def lost(candidate: QuantizationPlan) -> int:
        gone = len(plan.layers) - len(candidate.layers)
        return max(0, 2 * (needed - gone) + 1) if gone < needed else 1

    return search_kept(plan, ranking, lost, 0.2, 500, limit=limit)


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 7, 20, 45])
def test_the_fewest_that_hold_are_kept(
    plan: QuantizationPlan, ranking: tuple[LayerSensitivity, ...], needed: int
) -> None:
    report = found(plan, ranking, needed)
    assert report.passed
    assert report.kept == tuple(layer.name for layer in ranking[:needed])
    assert report.share == pytest.approx(0.01 * (45 - needed))
    assert len(report.trials) <= 13
    assert list(report.reasons()) == list(report.kept)


def test_what_never_holds_ends_with_the_best_seen(
    plan: QuantizationPlan, ranking: tuple[LayerSensitivity, ...]
) -> None:
    report = found(plan, ranking, 99)
    assert not report.passed
    assert len(report.kept) == 45


def test_the_limit_of_evaluations_holds(
    plan: QuantizationPlan, ranking: tuple[LayerSensitivity, ...]
) -> None:
    report = found(plan, ranking, 30, limit=4)
    assert len(report.trials) == 4
    assert not report.passed
    assert len(report.kept) == 4
    assert found(plan, ranking, 5, limit=6).passed


def test_layers_are_ranked_by_noise_for_the_work_they_do(
    plan: QuantizationPlan, network: RebuiltVan, calibration_digits: Digits
) -> None:
    work = multiply_adds(network.model, 3, 64)
    ranking = rank_layers(plan, calibration_digits.images[:4], work)
    assert {layer.name for layer in ranking} == set(plan.convolutions)
    worths = [layer.worth_db for layer in ranking]
    assert worths == sorted(worths)
    assert all(20 < layer.sqnr_db < 90 for layer in ranking)
    assert sum(layer.share for layer in ranking) == pytest.approx(0.57, abs=0.01)


def test_improvements_do_not_offset_regressions() -> None:
    expected = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    after = np.eye(3, dtype=np.float32)[[0, 2, 1, 1]]
    labels: npt.NDArray[np.int64] = np.array([0, 1, 1, 1])
    assert labels_lost(expected, after, labels) == 1
    assert labels_lost(expected, after, None) == 3


def test_a_budget_below_one_image_is_refused() -> None:
    require_resolution(0.2, 500)
    require_resolution(0.0, 10)
    with pytest.raises(ImageError) as caught:
        require_resolution(0.2, 410)
    assert caught.value.message == (
        "A budget of 0.2 points cannot be searched on 410 images: one label is 0.24 points."
    )
    assert caught.value.remedy.startswith("Give 500 calibration images or more")
