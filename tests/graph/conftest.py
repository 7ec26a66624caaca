"""The embedded trained network, folded and exported."""

from __future__ import annotations

import pytest
import torch
from onnx import ModelProto
from torch import Tensor

from van_deploy.data import check_images
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import RewrittenVan, fold_van
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


@pytest.fixture(scope="session")
def folded(digits: LoadedVan, digit_images: Tensor) -> RewrittenVan:
    """Return the network with every rewrite."""
    return fold_van(digits.model, digit_images[:1]).model


@pytest.fixture(scope="session")
def graph(digits: LoadedVan, folded: RewrittenVan) -> ModelProto:
    """Return its graph; not to be changed."""
    return onnx_from_van(folded, digits.preprocessing.image_size)


@pytest.fixture(scope="session")
def unfolded(digits: LoadedVan) -> ModelProto:
    """Return the graph of the network as it is; not to be changed."""
    return onnx_from_van(digits.model, digits.preprocessing.image_size)
