"""Resampling the images of a correct artefact 200 times raises no alarm."""

from __future__ import annotations

import numpy as np
import pytest

from tests.checks.conftest import Subject
from van_deploy.checks.accuracy import paired_drift
from van_deploy.checks.contestants import Answers
from van_deploy.checks.gates import limits_from_noise, measure_noise
from van_deploy.checks.labels import labelled_images
from van_deploy.checks.opened import NotRun, open_artefact
from van_deploy.checks.pictures import pictures_to_check
from van_deploy.checks.statistics import bootstrap
from van_deploy.checks.verify import reference_logits, verify_logits
from van_deploy.metrics import Array
from van_deploy.recipe import GateSettings

RESAMPLES = 200
IMAGES = 120


def logits_of(whole: Subject, name: str, pixels: Array) -> Array:
    opened = open_artefact(whole.bundle, name, threads=1)
    assert not isinstance(opened, NotRun)
    with opened:
        return np.concatenate([opened.logits(pixels[i : i + 8]) for i in range(0, len(pixels), 8)])


def alarms(whole: Subject, name: str) -> float:
    """Return how many of 200 resamples fail a gate of verify."""
    pictures = pictures_to_check(
        whole.loaded.name, whole.loaded.preprocessing, IMAGES, whole.labelled
    )
    expected = reference_logits(whole.loaded, pictures)
    found = logits_of(whole, name, pictures.pixels)
    precision = whole.bundle.artefact(name).precision
    profile = GateSettings().of(precision)

    def alarm(rows: np.ndarray) -> float:
        noise = measure_noise(expected.float64[rows], expected.float32[rows])
        limits = limits_from_noise(noise, precision, profile)
        verdict = verify_logits(name, precision, expected.float64[rows], found[rows], limits)
        return float(verdict.outcome == "failed")

    return float(bootstrap(IMAGES, alarm, RESAMPLES).sum())


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_verify_on_the_digits(digits: Subject, name: str) -> None:
    assert alarms(digits, name) == 0


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_verify_on_the_shared_network(cifar: Subject, name: str) -> None:
    assert alarms(cifar, name) == 0


def test_the_alarm_itself(digits: Subject) -> None:
    """The same resamples of an artefact judged by a finer precision's limits all alarm."""
    pictures = pictures_to_check("van_digits", digits.loaded.preprocessing, 32, digits.labelled)
    expected = reference_logits(digits.loaded, pictures)
    found = logits_of(digits, "fp16", pictures.pixels)

    def alarm(rows: np.ndarray) -> float:
        noise = measure_noise(expected.float64[rows], expected.float32[rows])
        limits = limits_from_noise(noise, "fp32", GateSettings().of("fp32"))
        verdict = verify_logits("x", "fp32", expected.float64[rows], found[rows], limits)
        return float(verdict.outcome == "failed")

    assert bootstrap(32, alarm, RESAMPLES).sum() == RESAMPLES


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_evaluate_on_the_shared_network(cifar: Subject, name: str) -> None:
    labelled = labelled_images(cifar.labelled, 10).first(IMAGES)
    pictures = pictures_to_check(
        cifar.loaded.name, cifar.loaded.preprocessing, IMAGES, cifar.labelled
    )
    expected = Answers.of(reference_logits(cifar.loaded, pictures).float32)
    found = Answers.of(logits_of(cifar, name, pictures.pixels).astype(np.float32))
    allowed = float(GateSettings().of(name).top1_drop or 0.0)

    def alarm(rows: np.ndarray) -> float:
        before = Answers(expected.classes[rows], expected.confidence[rows])
        after = Answers(found.classes[rows], found.confidence[rows])
        return float(not paired_drift(before, after, labelled.labels[rows], allowed).passed)

    assert bootstrap(IMAGES, alarm, RESAMPLES).sum() == 0
