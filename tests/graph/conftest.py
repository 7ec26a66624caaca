"""Networks that have something to fold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from van_deploy.checks.sample_images import images_to_check
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME


@pytest.fixture(scope="session")
def digits() -> LoadedVan:
    """Return the embedded trained network."""
    return load_van(EMBEDDED_NAME)


@pytest.fixture(scope="session")
def digit_images(digits: LoadedVan) -> Tensor:
    """Return five held-out digits as the network wants them, ``(5, 3, S, S)``."""
    images, _ = images_to_check(digits.name, digits.preprocessing, 5)
    return torch.from_numpy(images)
