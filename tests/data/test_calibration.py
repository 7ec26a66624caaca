"""Which images calibrate: chosen, balanced, split, and never judged on."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.each import each
from van_deploy.data.calibration import choose, digits_set, noise_set, refuse_overlap, split
from van_deploy.data.items import ImageItem, ImageSet, image_set
from van_deploy.errors import ImageError
from van_deploy.model.embedded import write_digits_folder
from van_deploy.model.preprocess import Preprocessing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "train", "train", 60)


def groups(images: ImageSet) -> Counter[str]:
    return Counter(item.group for item in images.items)


def test_a_choice_is_balanced_and_follows_its_seed(folder: Path) -> None:
    images = image_set(folder)
    chosen = choose(images, 30)
    assert groups(chosen) == {str(digit): 3 for digit in range(10)}
    assert chosen.description == f"30 of 60 images of '{folder}'"
    assert choose(images, 30).items == chosen.items
    assert choose(images, 30, seed=1).digest != chosen.digest
    assert [item.name for item in chosen.items] == sorted(item.name for item in chosen.items)


def test_a_class_with_few_images_gives_all_and_the_others_fill_up() -> None:
    counts = {"a": 2, "b": 10, "c": 10}
    items = [
        ImageItem(f"{name}{n}", np.full((2, 2), 50 * number + n, np.uint8), name)
        for number, (name, count) in enumerate(counts.items())
        for n in range(count)
    ]
    assert groups(choose(ImageSet(tuple(items), "22 images"), 12)) == {"a": 2, "b": 5, "c": 5}


def test_fewer_than_the_classes_are_spread_over_random_classes(folder: Path) -> None:
    chosen = groups(choose(image_set(folder), 4))
    assert set(chosen.values()) == {1}
    assert list(chosen) != ["0", "1", "2", "3"]


def test_unbalanced_takes_them_as_they_come(folder: Path) -> None:
    chosen = choose(image_set(folder), 30, balanced=False)
    assert len(chosen) == 30
    assert set(groups(chosen).values()) != {3}


def test_one_image_is_too_few(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ImageError) as refused:
        choose(image_set(tmp_path), 30)
    assert refused.value.message == "1 image(s) are too few to calibrate on."


def test_the_split_keeps_every_class_and_shares_no_image(folder: Path) -> None:
    kept, aside = split(choose(image_set(folder), 50), 0.2)
    assert (len(kept), len(aside)) == (40, 10)
    assert groups(aside) == {str(digit): 1 for digit in range(10)}
    assert aside.description == f"10 held-out images of 50 of 60 images of '{folder}'"
    refuse_overlap(kept, aside)
    assert split(choose(image_set(folder), 50), 0.2)[1].items == aside.items


def test_a_copy_of_a_held_out_image_is_not_calibrated_on(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    for path in sorted(copied.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    kept, aside = split(image_set(copied), 0.2)
    assert len(aside) == 24
    assert len(kept) < 96
    refuse_overlap(kept, aside)


@each("shades", [[1], [5, 5, 5]])
def test_what_cannot_be_split_is_refused(shades: list[int]) -> None:
    items = [ImageItem(str(n), np.full((2, 2), shade, np.uint8)) for n, shade in enumerate(shades)]
    with pytest.raises(ImageError) as refused:
        split(ImageSet(tuple(items), "some images"), 0.2)
    assert refused.value.message == (
        f"{len(shades)} image(s) cannot be split into two parts: too few of them are different."
    )


def test_the_same_image_in_both_sets_is_an_error(folder: Path, tmp_path: Path) -> None:
    first = sorted(folder.rglob("*.png"))[0]
    (tmp_path / "0").mkdir()
    shutil.copy(first, tmp_path / "0" / "renamed.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "0" / "other.png")
    with pytest.raises(ImageError) as caught:
        refuse_overlap(image_set(folder), image_set(tmp_path))
    assert caught.value.message == (
        "1 calibration image(s) are also evaluation images, byte for byte: "
        f"{first} and {tmp_path / '0' / 'renamed.png'}."
    )


def test_the_digits_know_their_classes() -> None:
    train, heldout = digits_set("train"), digits_set("heldout")
    assert (len(train), len(heldout)) == (1437, 360)
    assert train.labels is not None
    assert [str(label) for label in train.labels] == [item.group for item in train.items]
    refuse_overlap(train, heldout)


def test_noise_says_that_it_is_noise() -> None:
    preprocessing = Preprocessing(32, (0.5,) * 5, (0.5,) * 5, "bicubic", 1.0, "a test")
    noise = noise_set(4, preprocessing)
    assert noise.noise
    assert noise.description == "4 samples of NOISE, no images"
    assert all(np.asarray(item.data).shape == (5, 32, 32) for item in noise.items)
    assert noise.digest == noise_set(4, preprocessing).digest
    assert noise.digest != noise_set(4, preprocessing, seed=1).digest
