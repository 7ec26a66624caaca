"""A bundle with all measurements of a report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import van_deploy as vd
from tests.artifacts import ArtifactCache
from van_deploy.bundle import Bundle


@pytest.fixture(scope="session")
def full(artifact_cache: ArtifactCache, digits_bundle: Bundle, heldout_200: Path) -> Bundle:
    """Return van_digits with verification, drift, accuracy and a benchmark; not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(digits_bundle.path, folder)
        bundle = vd.open_bundle(folder)
        bundle.verify()
        bundle.drift(level="stage", count=2)
        bundle.evaluate(heldout_200)
        short: Any = {"seconds": 0.05, "calls": 2, "limit": 0.2, "rounds": 2, "warmup": 0.0}
        bundle.benchmark(batches=(1, 2), threads=1, runners=("ort-*",), roofline=False, **short)

    return Bundle.open(artifact_cache("full_report", make))
