"""A bundle with everything in it that a report can show, measured for real once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import van_deploy as vd
from tests.artifacts import MadeOnce
from van_deploy.bundle import Bundle


@pytest.fixture(scope="session")
def bare(digits_bundle: Bundle) -> Bundle:
    """Return a bundle of van_digits as export leaves it."""
    return digits_bundle


@pytest.fixture(scope="session")
def full(made_once: MadeOnce, bare: Bundle, heldout_200: Path) -> Bundle:
    """Return the same verified, with drift, accuracy and a benchmark."""

    def make(folder: Path) -> None:
        shutil.copytree(bare.path, folder)
        bundle = vd.open_bundle(folder)
        bundle.verify()
        bundle.drift(level="stage", count=2)
        bundle.evaluate(heldout_200)
        bundle.benchmark(
            batches=(1, 2),
            threads=1,
            runners=("ort-*",),
            seconds=0.05,
            calls=2,
            limit=0.2,
            rounds=2,
            warmup=0.0,
            roofline=False,
        )

    return Bundle.open(made_once("full_report", make))
