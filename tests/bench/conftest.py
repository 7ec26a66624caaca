"""A bundle of the embedded network, made once, and settings that take a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from van_deploy.bench.budget import Budget
from van_deploy.bench.settings import Settings
from van_deploy.bundle import Bundle
from van_deploy.pipeline import export_bundle, load_for
from van_deploy.recipe import recipe_named


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the bundle of van_digits; tests that write take a copy."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    recipe = recipe_named("van_digits")
    folder = tmp_path_factory.mktemp("bench") / "van_digits"
    return export_bundle(load_for(recipe), recipe, folder).bundle


@pytest.fixture
def quick() -> Settings:
    """Return settings for a race of a second with ONNX Runtime alone."""
    return Settings(
        batches=(1, 2),
        threads=1,
        runners=("ort-cpu",),
        budget=Budget(seconds=0.1, calls=4, limit_s=0.5, rounds=2, warmup_s=0.02),
        roofline=False,
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a file of eight inputs for van_digits, noise of natural size."""
    import numpy as np

    path = tmp_path / "images.npy"
    values = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    np.save(path, values)
    return path
