"""Resampling the images of a correct artefact 200 times raises no alarm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from tests.artifacts import Subject
from van_deploy.checks.accuracy import paired_drift
from van_deploy.checks.contestants import Answers
from van_deploy.checks.expected import ReferenceLogits, reference_logits
from van_deploy.checks.gates import limits_from_noise, measure_noise
from van_deploy.checks.opened import NotRun, open_artefact
from van_deploy.checks.statistics import bootstrap
from van_deploy.checks.verify import verify_logits
from van_deploy.config import GateSettings
from van_deploy.data import check_images, labelled_images
from van_deploy.metrics import Array

RESAMPLES = 200
IMAGES = 64

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answered:
    """Logits of PyTorch and of each artefact for the same labelled images."""

    expected: ReferenceLogits
    found: dict[str, Array]
    labels: npt.NDArray[np.int64]


def answered(whole: Subject) -> Answered:
    preprocessing = whole.loaded.preprocessing
    pictures = check_images(whole.loaded.name, preprocessing, IMAGES, whole.labelled)
    found = {}
    for name in ("fp32", "fp16", "int8"):
        opened = open_artefact(whole.bundle, name, threads=1)
        assert not isinstance(opened, NotRun)
        with opened:
            pieces = [opened.logits(pictures.values[i : i + 8]) for i in range(0, IMAGES, 8)]
        found[name] = np.concatenate(pieces)
    labelled = labelled_images(whole.labelled, 10)
    by_name = {labelled.relative(item): item.label for item in labelled.items}
    labels = np.array([by_name[name] for name in pictures.names])
    return Answered(reference_logits(whole.loaded, pictures), found, labels)


@pytest.fixture(scope="module", params=["digits", pytest.param("cifar", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Answered:
    """Return the answers of the embedded network and, where it is, of the shared one."""
    return answered(request.getfixturevalue(request.param))


def verify_alarms(network: Answered, name: str, judged_as: str) -> float:
    """Return how many of 200 resamples fail a gate of verify."""
    double, single = network.expected.float64, network.expected.float32
    profile = GateSettings().of(judged_as)

    def alarm(rows: Rows) -> float:
        noise = measure_noise(double[rows], single[rows])
        limits = limits_from_noise(noise, judged_as, profile)
        verdict = verify_logits(name, judged_as, double[rows], network.found[name][rows], limits)
        return float(verdict.outcome == "failed")

    return float(bootstrap(IMAGES, alarm, RESAMPLES).sum())


def evaluate_alarms(network: Answered, found: Array, top1_drop: float) -> float:
    """Return how many of 200 resamples fail the gate of evaluate."""
    before, after = Answers.of(network.expected.float32), Answers.of(found)

    def alarm(rows: Rows) -> float:
        one, other = (Answers(a.classes[rows], a.confidence[rows]) for a in (before, after))
        return float(not paired_drift(one, other, network.labels[rows], top1_drop).passed)

    return float(bootstrap(IMAGES, alarm, RESAMPLES).sum())


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_a_right_artefact_raises_no_alarm(network: Answered, name: str) -> None:
    assert verify_alarms(network, name, name) == 0
    allowed = float(GateSettings().of(name).top1_drop or 0.0)
    assert evaluate_alarms(network, network.found[name].astype(np.float32), allowed) == 0


def test_the_alarms_themselves(network: Answered) -> None:
    """FP16 judged as FP32 always alarms, and so does an artefact that answers at random."""
    assert verify_alarms(network, "fp16", "fp32") == RESAMPLES
    nonsense = network.expected.float32[:, ::-1]
    assert evaluate_alarms(network, nonsense, 0.2) == RESAMPLES
