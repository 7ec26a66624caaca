"""Folders of small images, and the preprocessing of a small network."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from van_deploy.model.preprocess import Preprocessing

Make = Callable[..., Path]


def for_channels(channels: int = 3) -> Preprocessing:
    """Return the preprocessing of a network for 32 x 32 pixels."""
    return Preprocessing(32, (0.5,) * channels, (0.25,) * channels, "bilinear", 1.0, "a test")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that creates a folder with a different image at each path."""

    def create(*names: str, folder: str = "images", empty: Sequence[str] = ()) -> Path:
        root = tmp_path / folder
        shutil.rmtree(root, ignore_errors=True)
        for number, name in enumerate(names):
            path = root / (name if "." in name else f"{name}/x.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(path, "PNG")
        for name in empty:
            (root / name).mkdir(parents=True)
        return root

    return create
