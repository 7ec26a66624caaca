"""Logits and pixels equal those of Transformers 4.30.2, in a separate environment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.conftest import sample_images
from van_deploy.model.checkpoint import load_van
from van_deploy.model.preprocess import OFFICIAL, normalise, pixels_from_image
from van_deploy.model.processors import from_processor

pytestmark = pytest.mark.slow

# The last release with a VAN, and its missing dependencies, are installed in a separate folder.
TRANSFORMERS = ("transformers==4.30.2", "huggingface_hub==0.30.0", "regex", "requests")
PROCESSORS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}}),
    ("ConvNextImageProcessor", {"size": 225, "crop_pct": 0.9}),
    ("ConvNextImageProcessor", {"size": 384, "resample": 3}),
    ("ConvNextImageProcessor", {}),
    ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
    ("ViTImageProcessor", {"size": 65, "do_normalize": False}),
    ("DeiTImageProcessor", {"size": 71, "crop_size": 64}),
    ("DeiTImageProcessor", {"size": 64, "do_center_crop": False}),
    ("BitImageProcessor", {"size": {"shortest_edge": 71}, "crop_size": 64}),
    ("CLIPImageProcessor", {"image_mean": [0.5, 0.4, 0.3], "resample": 0}),
)
PIXELS = """
import json, sys
import numpy as np, transformers
from PIL import Image
folder = sys.argv[1]
for index, (kind, config) in enumerate(json.load(open(f"{folder}/processors.json"))):
    processor = getattr(transformers, kind).from_dict(config)
    for number in range(int(sys.argv[2])):
        image = Image.open(f"{folder}/{number}.png")
        np.save(f"{folder}/{index}-{number}.npy", processor(image)["pixel_values"][0])
"""
NETWORK = """
import sys
import torch
from transformers import VanConfig, VanForImageClassification
torch.manual_seed(0)
config = VanConfig(
    hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], mlp_ratios=[4, 4, 2, 2], num_channels=4,
    strides=[2, 2, 1, 2], patch_sizes=[7, 5, 3, 3], layer_norm_eps=1e-2,
    id2label={0: "cat", 1: "dog", 2: "emu"}, problem_type="multi_label_classification",
)
model = VanForImageClassification(config).eval()
with torch.no_grad():
    for name, value in model.state_dict().items():
        if "norm" in name or "scaling" in name:
            value.uniform_(0.5, 1.5) if value.is_floating_point() else None
    images = torch.randn(2, 4, 64, 96)
    logits = model(images).logits
model.save_pretrained(sys.argv[1])
torch.save((images, logits), f"{sys.argv[1]}/run.pt")
"""


@pytest.fixture(scope="module")
def transformers(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return environment variables with which Transformers 4.30.2 can be imported."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("transformers-4.30.2")
    if not (folder / "installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run(
            [*pip, "--target", folder, *TRANSFORMERS], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"Transformers 4.30.2 cannot be installed: {done.stderr.strip()[-200:]}")
        (folder / "installed").touch()
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_pixels_equal_transformers(transformers: dict[str, str], tmp_path: Path) -> None:
    images = [image for image in sample_images() if min(image.size) > 8]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "processors.json").write_text(json.dumps(PROCESSORS))
    command = [sys.executable, "-c", PIXELS, str(tmp_path), str(len(images))]
    subprocess.run(command, check=True, env=transformers | {"USE_TORCH": "0"})
    for index, (kind, config) in enumerate(PROCESSORS):
        values = from_processor({"image_processor_type": kind, **config})
        preprocessing = OFFICIAL.override(**values)
        for number, image in enumerate(images):
            expected = np.load(tmp_path / f"{index}-{number}.npy")
            actual = normalise(pixels_from_image(image, preprocessing)[None], preprocessing)[0]
            # Transformers scales and normalises in another order, so floats differ by rounding.
            assert np.allclose(expected, actual, rtol=0, atol=1e-5), (kind, config, image.size)


def test_logits_equal_transformers(transformers: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", NETWORK, str(tmp_path)]
    subprocess.run(command, check=True, env=transformers | {"USE_TORCH": "1"})
    images, logits = torch.load(tmp_path / "run.pt")
    (tmp_path / "run.pt").unlink()
    loaded = load_van(str(tmp_path))
    assert logits.std() > 0.01
    assert torch.allclose(loaded.model(images), logits, rtol=1e-5, atol=1e-5)
    config = loaded.config
    assert (config.strides, config.patch_sizes) == ((2, 2, 1, 2), (7, 5, 3, 3))
    assert (config.layer_norm_eps, config.in_chans) == (1e-2, 4)
    assert config.problem_type == "multi_label_classification"
    assert loaded.class_names == ("cat", "dog", "emu")
