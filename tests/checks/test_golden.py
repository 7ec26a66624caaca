"""Golden samples: content, originals, and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.artifacts import Copy, Subject
from tests.checks.conftest import tiny_bundle
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks.gates import Outcome
from van_deploy.checks.golden import check_originals, golden_images, golden_samples
from van_deploy.errors import BundleError
from van_deploy.files import file_sha256
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
    assert samples.noise_db == pytest.approx(sqnr_db(double, single), abs=1e-3)


def test_originals_and_licence(digits: Subject) -> None:
    golden = digits.bundle.manifest.golden
    assert golden is not None
    assert golden.originals == ("golden/0.png", "golden/1.png")
    found = check_originals(digits.bundle, digits.samples)
    assert [(f.outcome, f.value) for f in found] == [(Outcome.PASS, 0.0)] * 2
    assert "scikit-image's and scikit-learn's own photographs" in golden.licence


def test_another_resize_filter_fails(digits: Subject, copy_bundle: Copy) -> None:
    path = copy_bundle(digits)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["preprocessing"]["interpolation"] = "nearest"
    (path / "manifest.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(path)
    found = check_originals(bundle, golden_samples(bundle))
    assert {f.outcome for f in found} == {Outcome.FAIL}
    message = "from golden sample 0: the decoder or the preprocessing differs"
    assert found[0].message.endswith(message)


def test_five_channels_have_no_originals() -> None:
    five = replace(OFFICIAL, mean=(0.5,) * 5, std=(0.5,) * 5, image_size=32)
    images, originals = golden_images("five", five, None)
    assert originals == ()
    assert images.inputs.shape == (16, 5, 32, 32)
    assert len({row.tobytes() for row in images.inputs}) == 16


def test_one_image_gives_distinct_samples(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    images, originals = golden_images("one", OFFICIAL, tmp_path)
    assert len(originals) == 1
    assert len({row.tobytes() for row in images.inputs}) == 16  # one is the original's


@pytest.mark.parametrize("choice", ["samples", "images", "none"])
def test_manifest_names_the_image_source(tmp_path: Path, digits: Subject, choice: str) -> None:
    path = tiny_bundle(tmp_path, 7, images=digits.labelled, golden=choice, simplify=False)
    bundle = Bundle.open(path)
    golden = bundle.manifest.golden
    written = (path / "manifest.json").read_text()
    if choice != "none":
        assert golden is not None
        assert ("photographs" in golden.images) is (choice == "samples")
        assert (str(digits.labelled) in written) is (choice == "images")
        is_user = golden.licence == "the terms of the images given with --images"
        assert is_user is (choice == "images")
    else:
        assert golden is None
        assert not list(path.glob("golden*"))
        with pytest.raises(BundleError, match="has no golden samples"):
            golden_samples(bundle)


@each(
    ("names", "message"),
    [((), "are damaged"), (("pixels", "noise_db"), "logits is not a file in the archive")],
)
def test_damaged_golden_samples(
    digits: Subject, copy_bundle: Copy, names: tuple[str, ...], message: str
) -> None:
    path = copy_bundle(digits, message)
    file, manifest = path / "golden.npz", path / "manifest.json"
    before, arrays = file_sha256(file), dict(np.load(file))
    np.savez(file, **{name: arrays[name] for name in names})
    if not names:
        file.write_bytes(b"PK nothing")
    manifest.write_text(manifest.read_text().replace(before, file_sha256(file)))
    with pytest.raises(BundleError) as error:
        golden_samples(Bundle.open(path))
    assert message in error.value.message
    assert error.value.remedy == "Export the model again with `van-deploy export --force`."


def test_changed_original(digits: Subject, copy_bundle: Copy) -> None:
    path = copy_bundle(digits)
    (path / "golden" / "1.png").write_bytes(b"")
    with pytest.raises(BundleError, match=r"1\.png' was changed after the manifest"):
        check_originals(Bundle.open(path), digits.samples)
