"""Calibration sets: their documents, and the images they choose."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from van_deploy.errors import ImageError, RecipeError
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.job_images import choose_images
from van_deploy.precision.manifests import (
    ImageSelection,
    builtin_calibration_sets,
    calibration_set_named,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "train", "train", 60)


class TestManifests:
    def test_every_shipped_set_is_read_and_described(self) -> None:
        known = builtin_calibration_sets()
        assert {"cifar10", "digits", "folder", "imagenet-512"} <= set(known)
        for name in known:
            found = calibration_set_named(name)
            assert found.description
            assert found.images.count >= 100
            assert 0 < found.images.held_out < 0.5
            assert found.images.path == ""

    def test_the_digits_are_the_ones_the_set_names(self) -> None:
        selection = calibration_set_named("digits").images
        chosen = choose_images(selection)
        assert len(chosen.items) == 512
        assert chosen.digest == selection.digest
        assert set(Counter(p.group for p in chosen.items).values()) == {51, 52}

    def test_an_unknown_set_is_refused_with_a_guess(self) -> None:
        with pytest.raises(RecipeError) as caught:
            calibration_set_named("digit")
        assert caught.value.message == "There is no calibration set called 'digit'."
        assert caught.value.remedy.startswith("Did you mean digits? Known sets: cifar10, digits")

    def test_a_users_manifest_is_relative_to_itself(self, folder: Path) -> None:
        manifest = folder.parent / "mine.toml"
        manifest.write_text(f'[images]\npath = "{folder.name}"\ncount = 20\n')
        chosen = choose_images(calibration_set_named(str(manifest)).images)
        assert len(chosen.items) == 20

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[images]\nsource = 'web'", "There is no source of images called 'web'."),
            ("[images]\ncount = 1", "1 images are too few."),
            ("[images]\nheld_out = 1.0", "The held-out share 1 is outside [0, 1)."),
            ("[images]\nimages = 5", "has an unknown key 'images.images'."),
            ("count = 5", "has an unknown key 'count'."),
            ("[images]\nseed = 'a'", "the key 'images.seed' must be a int, not 'a'."),
        ],
    )
    def test_a_wrong_manifest_names_the_file_and_the_key(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        path = tmp_path / "wrong.toml"
        path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            calibration_set_named(str(path))
        assert message in caught.value.message
        assert str(path) in caught.value.message

    def test_other_images_than_the_set_names_are_refused(self, folder: Path) -> None:
        selection = ImageSelection(path=str(folder), count=10, digest="0" * 64)
        with pytest.raises(ImageError, match="The images are not the ones the calibration set"):
            choose_images(selection)


def test_no_images_is_an_error_that_says_so() -> None:
    with pytest.raises(ImageError) as caught:
        choose_images(ImageSelection())
    assert caught.value.message == "INT8 needs images to calibrate on, and none were given."
    assert "--calibrate-on-noise" in caught.value.remedy
