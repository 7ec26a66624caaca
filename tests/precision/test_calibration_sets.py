"""Calibration sets: their documents, and the images they choose."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from van_deploy.calibration_set import (
    ImageSelection,
    builtin_calibration_sets,
    calibration_set_named,
)
from van_deploy.errors import ImageError, RecipeError
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.job_images import choose_images


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
        assert caught.value.remedy.startswith("Did you mean digits? Known calibration sets: ")

    def test_a_users_manifest_is_relative_to_itself(self, folder: Path) -> None:
        manifest = folder.parent / "mine.toml"
        manifest.write_text(f'[images]\npath = "{folder.name}"\ncount = 20\n')
        chosen = choose_images(calibration_set_named(str(manifest)).images)
        assert len(chosen.items) == 20

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[images]\nsource = 'web'", "'images.source' is 'web': it should be 'folder', 'npz'"),
            ("[images]\ncount = 1", "'images.count' is 1: it should be greater than or equal to 2"),
            ("[images]\nheld_out = 1.0", "'images.held_out' is 1.0: it should be less than 1."),
            ("[images]\nimages = 5", "the key 'images.images' is unknown."),
            ("count = 5", "the key 'count' is unknown."),
            ("[images]\nseed = 'a'", "'images.seed' is 'a': it should be a whole number."),
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
