"""Golden samples: their content, originals, and the source of their images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.artifacts import Subject
from tests.checks.conftest import tiny_bundle
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks.golden import golden_images, golden_samples
from van_deploy.metrics import sqnr_db
from van_deploy.model.preprocess import OFFICIAL, normalise


def test_logits_and_noise_match_pytorch(digits: Subject) -> None:
    samples = golden_samples(digits.bundle)
    assert len(samples) == 16
    assert samples.pixels is not None
    inputs = normalise(samples.pixels, digits.loaded.preprocessing)
    assert np.array_equal(samples.inputs, inputs)
    with torch.inference_mode():
        parts = torch.from_numpy(inputs).split(8)  # how many at a time decides float32's noise
        single = torch.cat([digits.loaded.model(part) for part in parts]).numpy()
        double = digits.loaded.model.double()(torch.from_numpy(inputs).double()).numpy()
        digits.loaded.model.float()
    assert np.abs(samples.logits - double).max() < 1e-12
    assert 120 < samples.noise_db < 150
    assert abs(samples.noise_db - sqnr_db(double, single)) < 1e-3


def test_samples_are_distinct_and_originals_need_image_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    five = replace(OFFICIAL, mean=(0.5,) * 5, std=(0.5,) * 5, image_size=32)
    for preprocessing, source, count in ((five, None, 0), (OFFICIAL, tmp_path, 1)):
        images, originals = golden_images("x", preprocessing, source)
        assert (len(originals), images.inputs.shape[1]) == (count, preprocessing.channels)
        assert len({row.tobytes() for row in images.inputs}) == len(images.inputs) == 16


@each(
    ("choice", "licence"),
    [
        ("samples", "scikit-image's and scikit-learn's own photographs"),
        ("images", "the terms of the images given with --images"),
        ("none", ""),
    ],
)
def test_manifest_names_the_image_source(
    tmp_path: Path, digits: Subject, choice: str, licence: str
) -> None:
    path = tiny_bundle(tmp_path, 7, images=digits.labelled, golden=choice, simplify=False)
    golden = Bundle.open(path).manifest.golden
    if golden is None:
        assert (choice, list(path.glob("golden*"))) == ("none", [])
    else:
        assert licence in golden.licence
        assert (str(digits.labelled) in (path / "manifest.json").read_text()) is (
            choice == "images"
        )
