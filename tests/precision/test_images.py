"""Selection of calibration and held-out images."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.each import each
from van_deploy.data.images import ImageSet, image_set
from van_deploy.errors import ImageError, RecipeError
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision.images import choose_images, split
from van_deploy.recipe import (
    CALIBRATION_SETS,
    ImageSelection,
    builtin_files,
    load_calibration_set,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "train", "train", 60)


def groups(images: ImageSet) -> Counter[str]:
    return Counter(item.group for item in images.items)


def test_selection_is_balanced_and_depends_on_its_seed(digits: Path, tmp_path: Path) -> None:
    chosen = choose_images(ImageSelection(count=30), digits)
    assert groups(chosen) == {str(digit): 3 for digit in range(10)}
    assert chosen.description == f"30 of 60 images of '{digits}'"
    assert choose_images(ImageSelection(count=30), digits).items == chosen.items
    assert choose_images(ImageSelection(count=30, seed=1), digits).digest != chosen.digest
    assert [item.name for item in chosen.items] == sorted(item.name for item in chosen.items)
    few = groups(choose_images(ImageSelection(count=4), digits))  # spread over random classes
    assert set(few.values()) == {1}
    assert list(few) != ["0", "1", "2", "3"]
    loose = choose_images(ImageSelection(count=30, balanced=False), digits)
    assert len(loose) == 30
    assert set(groups(loose).values()) != {3}
    for path in sorted(digits.glob("[0-2]/*.png"))[4:]:  # a class with few gives all of them
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    assert groups(choose_images(ImageSelection(count=12), tmp_path)) == {"0": 2, "1": 5, "2": 5}


def test_split_has_all_classes_in_both_parts_and_shares_no_image(
    digits: Path, tmp_path: Path
) -> None:
    chosen = choose_images(ImageSelection(count=50), digits)
    kept, aside = split(chosen, 0.2)
    assert (len(kept), groups(aside)) == (40, {str(digit): 1 for digit in range(10)})
    assert aside.description == f"10 held-out images of 50 of 60 images of '{digits}'"
    assert split(chosen, 0.2)[1].items == aside.items
    copied = Path(shutil.copytree(digits, tmp_path / "copied"))
    for path in sorted(copied.rglob("*.png")):  # no copy of a held-out image is calibrated on
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    kept, aside = split(image_set(copied), 0.2)
    assert len(aside) == 24
    assert len(kept) < 96
    assert not {item.digest for item in kept.items} & {item.digest for item in aside.items}


@each(("shades", "message"), [([1], "too few to calibrate on"), ([5, 5, 5], "cannot be split")])
def test_too_few_different_images_are_rejected(
    shades: list[int], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", np.array(shades, np.uint8).repeat(4).reshape(-1, 2, 2))
    with pytest.raises(ImageError, match=message):
        split(choose_images(ImageSelection(), tmp_path / "x.npz"), 0.2)


def test_builtin_sets_have_descriptions_and_the_digits_match_their_digest(digits: Path) -> None:
    assert all(load_calibration_set(name).description for name in builtin_files(CALIBRATION_SETS))
    selection = load_calibration_set("digits").images
    chosen = choose_images(selection)
    assert (chosen.digest, len(chosen)) == (selection.digest, 512)
    with pytest.raises(ImageError, match="The images do not match the calibration set"):
        choose_images(ImageSelection(path=str(digits), count=10, digest="0" * 64))


def test_a_set_of_ones_own_is_relative_to_itself_and_none_is_said(digits: Path) -> None:
    manifest = digits.parent / "mine.toml"
    manifest.write_text(f'[images]\npath = "{digits.name}"\ncount = 20\n')
    assert len(choose_images(load_calibration_set(str(manifest)).images)) == 20
    with pytest.raises(ImageError, match="none were given") as caught:
        choose_images(ImageSelection())
    assert "--calibrate-on-noise" in caught.value.remedy
    manifest.write_text('[images]\nsource = "web"')
    for name, message in (("digit", "no calibration set called"), (manifest, "mine.*'web'")):
        with pytest.raises(RecipeError, match=message):
            load_calibration_set(str(name))
