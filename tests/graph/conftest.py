"""The embedded trained network, folded and exported."""

from dataclasses import dataclass

import pytest
import torch
from onnx import ModelProto
from torch import Tensor

from van_deploy.data.samples import verification_images
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import RewrittenVan, fold_van
from van_deploy.model.checkpoint import LoadedVan, load_van


@dataclass(frozen=True)
class Exported:
    """The embedded network and its graphs; tests must not change them.

    Attributes:
        loaded: the original network.
        images: five held-out digits, ``(5, 3, S, S)``.
        folded: with every rewrite.
        graph: of the folded network.
        unfolded: the graph of the original network.
    """

    loaded: LoadedVan
    images: Tensor
    folded: RewrittenVan
    graph: ModelProto
    unfolded: ModelProto


@pytest.fixture(scope="session")
def digits() -> Exported:
    loaded = load_van("van_digits")
    size = loaded.preprocessing.image_size
    images = torch.from_numpy(verification_images(loaded.name, loaded.preprocessing, 5).inputs)
    folded = fold_van(loaded.model, images[:1]).model
    graphs = (onnx_from_van(model, size) for model in (folded, loaded.model))
    return Exported(loaded, images, folded, *graphs)
