"""The embedded network's graph, and digits it was and was not trained on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import ModelProto, load, save
from PIL import Image

from van_deploy.bundle import Bundle
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.engine.backend import RTX, backend_named
from van_deploy.engine.build import engine_from_onnx
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME, DigitsSplit, digits_images


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


@pytest.fixture
def rtx_plan(tmp_path: Path) -> Callable[[ModelProto], bytes]:
    """Return a function that gives the plan TensorRT for RTX builds of a graph, for Ada GPUs."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed (pip install tensorrt-rtx-cu13)")

    def build(model: ModelProto) -> bytes:
        save(model, tmp_path / "model.onnx")
        engine_from_onnx(
            tmp_path / "model.onnx",
            tmp_path / "model.plan",
            backend=backend_named(RTX),
            options=BuildOptions(targets=("sm_89",), profiles=(BatchRange(1, 2, 4),)),
            precision="int8",
        )
        return (tmp_path / "model.plan").read_bytes()

    return build


def _digits(network: LoadedVan, split: DigitsSplit, count: int) -> Digits:
    pixels, labels = digits_images(split)
    transform = network.preprocessing.transform()
    pictures = [transform(Image.fromarray(image).convert("RGB")) for image in pixels[:count]]
    return Digits(torch.stack(pictures).numpy(), labels[:count])
