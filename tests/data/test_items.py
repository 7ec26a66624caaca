"""Sets of images: found, read from archives, known by a digest, chosen and split to calibrate."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.each import each
from van_deploy.data.items import ImageItem, ImageSet, dataset_digest, find_images, image_set
from van_deploy.data.samples import digits_set, noise_set
from van_deploy.errors import ImageError
from van_deploy.model.preprocess import Preprocessing

# --- finding ---------------------------------------------------------------------------------


def test_images_are_found_at_any_depth_in_order_and_by_suffix(tmp_path: Path) -> None:
    hidden = (".hidden.png", ".git/x.png", "notes.txt")
    for name in ("b/2.PNG", "b/1.jpeg", "a.webp", "b/c/3.tif", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert found == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/c/3.tif"]
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path: Path) -> None:
    store, view = tmp_path / "store", tmp_path / "view"
    for folder in (store, view):
        folder.mkdir()
    (store / "x.png").touch()
    for name, target in {
        "linked": store,
        "y.png": store / "x.png",
        "gone.png": store / "nothing.png",
        "up": view,
        "self": view / "self",
    }.items():
        (view / name).symlink_to(target)
    assert find_images(view) == (view / "linked" / "x.png", view / "y.png")


@each(
    ("name", "message"),
    [
        ("nowhere", "'{}/nowhere' cannot be read: No such file or directory."),
        ("notes.txt", "'{}/notes.txt' cannot be read: Not a directory."),
        (".", "There is no image in '{}' or the folders below it."),
    ],
)
def test_missing_empty_and_wrong_folders_are_refused(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError) as refused:
        find_images(tmp_path / name)
    assert refused.value.message == message.format(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_closed_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ImageError, match="closed' cannot be read: Permission denied"):
        find_images(tmp_path)


# --- sets ------------------------------------------------------------------------------------


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two class folders of two images, an empty one, a hidden one, and a stray file."""
    for number, name in enumerate(("cat/a.png", "cat/b.png", "dog/x/a.png", "dog/c.png")):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    for folder in ("emu", ".hidden"):
        (tmp_path / "set" / folder).mkdir()
    (tmp_path / "set" / "notes.txt").touch()
    return tmp_path / "set"


def test_a_folder_knows_its_class_folders_and_the_empty_ones(classes: Path) -> None:
    images = image_set(classes)
    assert [(images.relative(i), i.group) for i in images.items] == [
        *(("cat/a.png", "cat"), ("cat/b.png", "cat")),
        *(("dog/c.png", "dog"), ("dog/x/a.png", "dog")),
    ]
    assert images.folders == ("cat", "dog", "emu")
    assert images.labels is None
    assert images.description == f"4 images of '{classes}'"
    assert image_set(str(classes)).items == images.items
    assert image_set(images) is images


def test_a_part_of_a_set_is_spread_evenly_and_says_so(classes: Path) -> None:
    images = image_set(classes).labelled([3, 1, 0, 2], "by hand")
    part = images.first(2)
    assert [item.label for item in (*images.items, *part.items)] == [3, 1, 0, 2, 3, 2]
    assert part.description == f"4 images of '{classes}', by hand; 2 of 4, evenly spread"
    assert images.first(9) is images


def test_the_digest_of_a_dataset_holds_names_contents_and_labels(
    classes: Path, tmp_path: Path
) -> None:
    images = image_set(classes)
    content = (classes / "cat" / "a.png").read_bytes()
    assert images.items[0].digest == hashlib.sha256(content).hexdigest()
    with pytest.raises(ImageError, match="gone' cannot be read: No such file"):
        _ = ImageItem("gone", tmp_path / "gone").digest
    whole = dataset_digest(images)
    copy = Path(shutil.copytree(classes, tmp_path / "elsewhere"))
    assert dataset_digest(image_set(copy)) == whole
    assert dataset_digest(images.take([3, 1, 0, 2])) == whole
    others = [
        dataset_digest(changed)
        for changed in (
            images.take([0, 1, 2]),
            images.labelled([0, 0, 1, 1], "by hand"),
            images.labelled([0, 0, 1, 0], "by hand"),
        )
    ]
    (copy / "cat" / "b.png").rename(copy / "cat" / "z.png")
    others.append(dataset_digest(image_set(copy)))
    (copy / "cat" / "z.png").rename(copy / "cat" / "b.png")
    Image.new("L", (4, 4), 99).save(copy / "cat" / "b.png")
    others.append(dataset_digest(image_set(copy)))
    assert len({whole, *others}) == 6


# --- arrays ----------------------------------------------------------------------------------


def saved(path: Path, **arrays: Any) -> ImageSet:
    np.savez(path / "x.npz", **arrays)
    return image_set(path / "x.npz")


@each(
    "values",
    [
        np.zeros((3, 5, 7), np.uint8),
        np.zeros((3, 5, 7, 13), np.uint8),
        np.zeros((3, 2, 32, 32), np.float32),
    ],
)
def test_arrays_are_images_with_or_without_labels(values: Any, tmp_path: Path) -> None:
    images = saved(tmp_path, images=values, labels=np.array([0, 10, 2]))
    assert [item.label for item in images.items] == [0, 10, 2]
    assert [item.group for item in images.items] == ["0", "10", "2"]
    assert images.items[1].name == f"image 1 of '{tmp_path}/x.npz'"
    assert (images.root, images.description) == (None, f"3 images of '{tmp_path}/x.npz'")
    assert saved(tmp_path, anything=values).labels is None


THREE = np.zeros((3, 4, 4), np.uint8)


@each(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 5))}, "the images are float64 of shape (4, 5)"),
        ({"a": THREE, "b": THREE}, "it has no array called 'images' (it has: a, b)"),
        ({"images": THREE[:0]}, "the images are uint8 of shape (0, 4, 4)"),
        (
            {"images": np.full((1, 3, 4, 4), np.nan, np.float32)},
            "the images are float32 of shape (1, 3, 4, 4), not all finite",
        ),
        ({"images": np.array([None])}, "Object arrays cannot be loaded when allow_pickle=False"),
        *(
            (
                {"images": THREE, "labels": labels},
                f"the labels are {labels.dtype} of shape {labels.shape}, not 3 whole numbers "
                "from 0",
            )
            for labels in map(np.array, ([0, 0], [[0], [0], [0]], [0.0] * 3, [0, -1, 2], [*"abc"]))
        ),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError) as refused:
        saved(tmp_path, **arrays)
    assert refused.value.message == (
        f"'{tmp_path}/x.npz' cannot be read as an .npz of images: {message}."
    )
    assert refused.value.remedy.startswith("Save it with np.savez(path, images=array")


def test_what_is_no_archive_or_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("no zip")
    with pytest.raises(ImageError, match=r"cannot be read as an \.npz of images"):
        image_set(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(257 * 2**20))
    with pytest.raises(ImageError, match="bytes and claims to unpack to 269,484,032"):
        image_set(path)


def test_the_digits_know_their_classes_and_noise_that_it_is_noise() -> None:
    train, heldout = digits_set("train"), digits_set("heldout")
    assert (len(train), len(heldout)) == (1437, 360)
    assert [str(item.label) for item in train.items] == [item.group for item in train.items]
    assert not {i.digest for i in train.items} & {i.digest for i in heldout.items}
    preprocessing = Preprocessing(32, (0.5,) * 5, (0.5,) * 5, "bicubic", 1.0, "a test")
    noise = noise_set(4, preprocessing)
    assert (noise.noise, noise.description) == (True, "4 samples of NOISE, no images")
    assert all(np.asarray(item.data).shape == (5, 32, 32) for item in noise.items)
    assert noise.digest == noise_set(4, preprocessing).digest
    assert noise.digest != noise_set(4, preprocessing, seed=1).digest
