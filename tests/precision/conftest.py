"""The embedded network's graph, with training and held-out digits."""

from dataclasses import dataclass

import pytest
from onnx import ModelProto, load

from van_deploy.bundle import Bundle
from van_deploy.data.images import decoded_batches
from van_deploy.data.samples import digits_set
from van_deploy.graph.export import RebuiltVan, van_from_onnx
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.plan import QuantizationPlan, layers_in_scope, logits
from van_deploy.precision.scales import ChannelRange, Images, observe_ranges


@dataclass(frozen=True)
class Digits:
    """The embedded trained network; tests must not change it.

    Attributes:
        loaded: the original network.
        graph: its folded FP32 graph.
        network: rebuilt from the graph.
        pointwise: its 1x1 convolutions.
        train: 64 digits of the training part, ``(N, 3, S, S)``.
        heldout: 48 held-out digits.
        ranges: of its tensors on ``train``, with histograms.
        expected: its logits on ``heldout``.
    """

    loaded: LoadedVan
    graph: ModelProto
    network: RebuiltVan
    pointwise: tuple[str, ...]
    train: Images
    heldout: Images
    ranges: dict[str, ChannelRange]
    expected: Images


@pytest.fixture(scope="session")
def digits(digits_bundle: Bundle) -> Digits:
    loaded, graph = load_van("van_digits"), load(digits_bundle.verified_path("fp32"))
    network = van_from_onnx(graph, loaded.config)
    train, heldout = (
        next(decoded_batches(part.items[:count], loaded.preprocessing, count)).inputs
        for part, count in ((digits_set("train"), 64), (digits_set("heldout"), 48))
    )
    ranges = observe_ranges(network, batches(train), set(network.tensors))
    pointwise = layers_in_scope(network.model, ("pointwise",))
    expected = logits(QuantizationPlan(network), heldout)
    return Digits(loaded, graph, network, pointwise, train, heldout, ranges, expected)


def batches(images: Images, size: int = 16) -> list[Images]:
    """Return the images in batches."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def run(model: ModelProto, images: Images, *, fuse: bool = False) -> Images:
    """Return a graph's logits from ONNX Runtime."""
    return logits_session(model, fuse=fuse, threads=1)(images)
