"""Networks that have something to fold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from van_deploy.data import check_images
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME


@pytest.fixture(scope="session")
def digits() -> LoadedVan:
    """Return the embedded trained network."""
    return load_van(EMBEDDED_NAME)


@pytest.fixture(scope="session")
def digit_images(digits: LoadedVan) -> Tensor:
    """Return five held-out digits as the network wants them, ``(5, 3, S, S)``."""
    return torch.from_numpy(check_images(digits.name, digits.preprocessing, 5).inputs)
