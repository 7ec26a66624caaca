"""The embedded network's graph, and digits it was and was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import ModelProto, load
from PIL import Image

from van_deploy.bundle import Bundle
from van_deploy.graph.rebuilt import RebuiltVan, van_from_onnx
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME, DigitsSplit, digits_images
from van_deploy.precision.observers import ChannelRange, observe
from van_deploy.precision.plan import QuantizationPlan, layers_in_scope
from van_deploy.precision.simulate import logits


@dataclass(frozen=True)
class Digits:
    """Network input ``(N, 3, S, S)`` float32 with labels ``(N,)``."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[Any]

    def batches(self, size: int = 16) -> list[npt.NDArray[np.float32]]:
        """Return the images in batches."""
        return [self.images[i : i + size] for i in range(0, len(self.images), size)]


@pytest.fixture(scope="session")
def van_digits() -> LoadedVan:
    """Return the embedded trained network."""
    return load_van(EMBEDDED_NAME)


@pytest.fixture(scope="session")
def digits_graph(digits_bundle: Bundle) -> ModelProto:
    """Return its folded FP32 graph; not to be changed."""
    return load(digits_bundle.verified("fp32"))


@pytest.fixture(scope="session")
def calibration_digits(van_digits: LoadedVan) -> Digits:
    """Return 64 digits from the training part."""
    return _digits(van_digits, "train", 64)


@pytest.fixture(scope="session")
def heldout_digits(van_digits: LoadedVan) -> Digits:
    """Return 48 digits the network was not trained on."""
    return _digits(van_digits, "heldout", 48)


@pytest.fixture(scope="session")
def network(digits_graph: ModelProto, van_digits: LoadedVan) -> RebuiltVan:
    """Return the embedded network, rebuilt from its graph; not to be changed."""
    return van_from_onnx(digits_graph, van_digits.config)


@pytest.fixture(scope="session")
def pointwise(network: RebuiltVan) -> tuple[str, ...]:
    """Return its 1x1 convolutions."""
    return layers_in_scope(network.model, ("pointwise",))


@pytest.fixture(scope="session")
def ranges(network: RebuiltVan, calibration_digits: Digits) -> dict[str, ChannelRange]:
    """Return the ranges of its tensors, all counted."""
    return observe(network, calibration_digits.batches(), set(network.tensors))


@pytest.fixture(scope="session")
def expected(network: RebuiltVan, heldout_digits: Digits) -> npt.NDArray[np.float32]:
    """Return its logits of the held-out digits."""
    return logits(QuantizationPlan(network), heldout_digits.images)


def _digits(network: LoadedVan, split: DigitsSplit, count: int) -> Digits:
    pixels, labels = digits_images(split)
    transform = network.preprocessing.transform()
    pictures = [transform(Image.fromarray(image).convert("RGB")) for image in pixels[:count]]
    return Digits(torch.stack(pictures).numpy(), labels[:count])
