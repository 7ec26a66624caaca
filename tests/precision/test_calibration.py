"""Calibration sets: manifests, choice, batches, and what stops a run."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from van_deploy.calibration_set import (
    ImageSelection,
    builtin_calibration_sets,
    calibration_set_named,
)
from van_deploy.errors import ImageError, RecipeError, UsageError
from van_deploy.images import UnreadableImages
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.calibration import choose_images, refuse_overlap
from van_deploy.precision.inputs import input_batches, noise_images


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
        assert len(chosen.pictures) == 512
        assert chosen.digest == selection.digest
        assert set(Counter(p.group for p in chosen.pictures).values()) == {51, 52}

    def test_an_unknown_set_is_refused_with_a_guess(self) -> None:
        with pytest.raises(RecipeError) as caught:
            calibration_set_named("digit")
        assert caught.value.message == "There is no calibration set called 'digit'."
        assert caught.value.remedy.startswith("Did you mean digits? Known sets: cifar10, digits")

    def test_a_users_manifest_is_relative_to_itself(self, folder: Path) -> None:
        manifest = folder.parent / "mine.toml"
        manifest.write_text(f'[images]\npath = "{folder.name}"\ncount = 20\n')
        chosen = choose_images(calibration_set_named(str(manifest)).images)
        assert len(chosen.pictures) == 20

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


class TestChoice:
    def test_it_is_balanced_and_repeatable(self, folder: Path) -> None:
        selection = ImageSelection(count=30)
        chosen = choose_images(selection, folder)
        assert Counter(p.group for p in chosen.pictures) == {str(d): 3 for d in range(10)}
        assert choose_images(selection, folder).digest == chosen.digest
        other = choose_images(ImageSelection(count=30, seed=1), folder)
        assert other.digest != chosen.digest

    def test_fewer_than_the_classes_are_spread_over_random_classes(self, folder: Path) -> None:
        chosen = choose_images(ImageSelection(count=4), folder)
        groups = [p.group for p in chosen.pictures]
        assert len(set(groups)) == 4
        assert groups != ["0", "1", "2", "3"]

    def test_unbalanced_takes_them_as_they_come(self, folder: Path) -> None:
        chosen = choose_images(ImageSelection(count=30, balanced=False), folder)
        assert len(chosen.pictures) == 30

    def test_a_flat_folder_is_one_group(self, folder: Path, tmp_path: Path) -> None:
        for path in folder.rglob("*.png"):
            shutil.copy(path, tmp_path / f"{path.parent.name}_{path.name}")
        chosen = choose_images(ImageSelection(count=12), tmp_path)
        assert {p.group for p in chosen.pictures} == {""}
        assert chosen.labels(None, 10) is None

    def test_the_split_keeps_every_class_and_shares_no_image(self, folder: Path) -> None:
        chosen = choose_images(ImageSelection(count=50), folder)
        kept, aside = chosen.split(0.2, seed=0)
        assert (len(kept.pictures), len(aside.pictures)) == (40, 10)
        assert {p.group for p in aside.pictures} == {str(d) for d in range(10)}
        refuse_overlap(kept, aside)

    def test_labels_come_from_the_folders(self, folder: Path) -> None:
        chosen = choose_images(ImageSelection(count=20), folder)
        expected = [int(p.group) for p in chosen.pictures]
        for names in (None, tuple("0123456789")):
            labels = chosen.labels(names, 10)
            assert labels is not None
            assert labels.tolist() == expected
        backwards = chosen.labels(tuple("9876543210"), 10)
        assert backwards is not None
        assert backwards.tolist() == [9 - label for label in expected]

    def test_no_images_is_an_error_that_says_so(self) -> None:
        with pytest.raises(ImageError) as caught:
            choose_images(ImageSelection())
        assert caught.value.message == "INT8 needs images to calibrate on, and none were given."
        assert "--calibrate-on-noise" in caught.value.remedy

    def test_the_same_image_in_both_sets_is_an_error(self, folder: Path, tmp_path: Path) -> None:
        first = sorted(folder.rglob("*.png"))[0]
        (tmp_path / "0").mkdir()
        shutil.copy(first, tmp_path / "0" / "renamed.png")
        Image.new("L", (8, 8), 77).save(tmp_path / "0" / "other.png")
        everything = ImageSelection(count=1000)
        with pytest.raises(ImageError) as caught:
            refuse_overlap(choose_images(everything, folder), choose_images(everything, tmp_path))
        assert caught.value.message == (
            "1 calibration image(s) are also evaluation images, byte for byte: "
            f"{first} and {tmp_path / '0' / 'renamed.png'}."
        )


class TestNpz:
    def test_pictures_and_network_input_are_taken(
        self, tmp_path: Path, van_digits: LoadedVan, folder: Path
    ) -> None:
        paths = sorted(folder.rglob("*.png"))[:6]
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
        np.savez(tmp_path / "bytes.npz", images=pixels, labels=np.arange(6))
        selection = ImageSelection(count=6, balanced=False)
        chosen = choose_images(selection, tmp_path / "bytes.npz")
        bad = UnreadableImages()
        ((inputs, numbers),) = input_batches(chosen, van_digits.preprocessing, 8, bad)
        assert numbers == [0, 1, 2, 3, 4, 5]
        np.savez(tmp_path / "inputs.npz", inputs)
        again = choose_images(selection, tmp_path / "inputs.npz")
        ((same, _),) = input_batches(again, van_digits.preprocessing, 8, bad)
        assert np.array_equal(same, inputs)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"images": np.zeros((4, 5))}, "are float64 of shape (4, 5)"),
            ({"a": np.zeros(3), "b": np.zeros(3)}, "has no array called 'images' (it has: a, b)"),
        ],
    )
    def test_other_arrays_are_refused(
        self,
        tmp_path: Path,
        arrays: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]],
        message: str,
    ) -> None:
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(ImageError) as caught:
            choose_images(ImageSelection(), tmp_path / "x.npz")
        assert message in caught.value.message

    def test_input_of_another_size_is_refused(self, tmp_path: Path, van_digits: LoadedVan) -> None:
        np.savez(tmp_path / "x.npz", images=np.zeros((4, 3, 32, 32), np.float32))
        chosen = choose_images(ImageSelection(), tmp_path / "x.npz")
        with pytest.raises(UsageError, match=r"is network input of shape \(3, 32, 32\)"):
            list(input_batches(chosen, van_digits.preprocessing, 4, UnreadableImages()))

    def test_what_is_no_npz_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.npz").write_text("no zip")
        with pytest.raises(ImageError, match=r"cannot be read as an \.npz of images"):
            choose_images(ImageSelection(), tmp_path / "x.npz")


class TestBatches:
    def test_they_are_what_timm_makes(self, van_digits: LoadedVan, folder: Path) -> None:
        chosen = choose_images(ImageSelection(count=10), folder)
        batches = list(input_batches(chosen, van_digits.preprocessing, 4, UnreadableImages()))
        assert [len(images) for images, _ in batches] == [4, 4, 2]
        transform = van_digits.preprocessing.transform()
        with Image.open(chosen.pictures[0].name) as picture:
            expected = transform(picture.convert("RGB")).numpy()
        assert np.array_equal(batches[0][0][0], expected)

    def test_more_than_one_percent_unreadable_stops_the_run(
        self, van_digits: LoadedVan, folder: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(folder, tmp_path / "copy")
        victim = sorted(copy.rglob("*.png"))[5]
        victim.write_bytes(b"not a picture")
        chosen = choose_images(ImageSelection(count=60), copy)
        with pytest.raises(ImageError) as caught:
            list(input_batches(chosen, van_digits.preprocessing, 8, UnreadableImages()))
        assert caught.value.message.startswith(
            "1 of 60 images could not be read, more than the 1 % allowed."
        )
        assert str(victim) in caught.value.message

    def test_fewer_are_named_and_counted(self, van_digits: LoadedVan, tmp_path: Path) -> None:
        copy = write_digits_folder(tmp_path / "copy", "train", 150)
        victim = sorted(copy.rglob("*.png"))[5]
        victim.write_bytes(b"not a picture")
        chosen = choose_images(ImageSelection(count=150), copy)
        bad = UnreadableImages()
        batches = list(input_batches(chosen, van_digits.preprocessing, 50, bad))
        assert sum(len(images) for images, _ in batches) == 149
        assert [path for path, _ in bad.found] == [victim]

    def test_noise_says_that_it_is_noise(self, van_digits: LoadedVan) -> None:
        noise = noise_images(4, van_digits.preprocessing, seed=0)
        assert noise.noise
        assert noise.description == "4 samples of NOISE, no images"
        assert noise.digest == noise_images(4, van_digits.preprocessing, seed=0).digest
