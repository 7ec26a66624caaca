"""The embedded network's graph, and digits it was and was not trained on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, load

from van_deploy.bundle import Bundle
from van_deploy.data import decoded_batches
from van_deploy.data.samples import digits_set
from van_deploy.graph.export import RebuiltVan, van_from_onnx
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME, DigitsSplit
from van_deploy.precision.plan import QuantizationPlan, layers_in_scope, logits
from van_deploy.precision.scales import ChannelRange, observe

Images = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def van_digits() -> LoadedVan:
    """Return the embedded trained network."""
    return load_van(EMBEDDED_NAME)


@pytest.fixture(scope="session")
def digits_graph(digits_bundle: Bundle) -> ModelProto:
    """Return its folded FP32 graph; not to be changed."""
    return load(digits_bundle.verified("fp32"))


@pytest.fixture(scope="session")
def calibration_digits(van_digits: LoadedVan) -> Images:
    """Return 64 digits from the training part, ``(N, 3, S, S)``."""
    return _digits(van_digits, "train", 64)


@pytest.fixture(scope="session")
def heldout_digits(van_digits: LoadedVan) -> Images:
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
def ranges(network: RebuiltVan, calibration_digits: Images) -> dict[str, ChannelRange]:
    """Return the ranges of its tensors, all counted."""
    return observe(network, batches(calibration_digits), set(network.tensors))


@pytest.fixture(scope="session")
def expected(network: RebuiltVan, heldout_digits: Images) -> Images:
    """Return its logits of the held-out digits."""
    return logits(QuantizationPlan(network), heldout_digits)


def batches(images: Images, size: int = 16) -> list[Images]:
    """Return the images in batches."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def _digits(network: LoadedVan, split: DigitsSplit, count: int) -> Images:
    [batch] = decoded_batches(digits_set(split).items[:count], network.preprocessing, count)
    return batch.inputs
