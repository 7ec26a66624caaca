"""A small bundle, and a skip of GPU tests on machines without a GPU.

These tests do not use the parent folders, so a copy of ``tests/gpu`` and an installed wheel are
sufficient: ``pytest -m gpu tests/gpu``.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for imports of tests.gpu, also in a copy

import numpy as np
import pytest

import van_deploy
from tests.gpu.cases import Digits
from van_deploy.bundle import Bundle
from van_deploy.engine.backend import detect_host

IMAGES = 8
HAS_GPU = detect_host().gpu is not None


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks without the project's settings."""
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped without one")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip GPU tests on machines without a GPU."""
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and none answers here"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Return van_digits in all precisions, with images and float64 logits."""
    import torch

    from van_deploy.metrics import compare
    from van_deploy.runners.network import original_network

    path = tmp_path_factory.mktemp("gpu") / "digits"
    exported = van_deploy.export("van_digits", path, batch="1:4:8")
    exported.quantize(precision="fp16")
    exported.quantize(precision="int8")
    bundle = Bundle.open(path)
    preprocessing = bundle.manifest.preprocessing
    shape = (IMAGES, preprocessing.channels, *preprocessing.sides)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    network = original_network(bundle).model
    with torch.no_grad():
        float32 = network(torch.from_numpy(images)).numpy()
        double = network.double().to("cuda" if HAS_GPU else "cpu")
        inputs = torch.from_numpy(images).double().to(next(double.parameters()).device)
        expected = double(inputs).cpu().numpy()
    return Digits(bundle, images, expected, compare(expected, float32).sqnr_db)
