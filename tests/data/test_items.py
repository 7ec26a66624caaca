"""Sets of images: found in folders, read from archives of arrays, and known by a digest."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.each import each
from van_deploy.data.items import ImageItem, ImageSet, dataset_digest, find_images, image_set
from van_deploy.errors import ImageError

# --- finding ---------------------------------------------------------------------------------


def test_images_are_found_at_any_depth_in_order_and_by_suffix(tmp_path: Path) -> None:
    for name in (
        "b/2.PNG",
        "b/1.jpeg",
        "a.webp",
        ".hidden.png",
        ".git/x.png",
        "notes.txt",
        "b/c/3.tif",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert found == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/c/3.tif"]
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert find_images(tmp_path) == (tmp_path / "a" / "x.png",)


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    store, view = tmp_path / "store", tmp_path / "view"
    store.mkdir()
    view.mkdir()
    (store / "x.png").touch()
    (view / "linked").symlink_to(store)
    (view / "y.png").symlink_to(store / "x.png")
    (view / "gone.png").symlink_to(store / "nothing.png")
    assert find_images(view) == (view / "linked" / "x.png", view / "y.png")


def test_missing_empty_and_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as missing:
        find_images(tmp_path / "nowhere")
    assert str(missing.value) == (
        f"The image folder '{tmp_path}/nowhere' does not exist.\nCheck the path."
    )
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError) as empty:
        find_images(tmp_path)
    assert empty.value.message == f"There is no image in '{tmp_path}' or the folders below it."
    assert ".jpg" in empty.value.remedy
    with pytest.raises(ImageError, match="is a file, not a folder"):
        find_images(tmp_path / "notes.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_closed_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ImageError, match="closed' cannot be read: Permission denied"):
        find_images(tmp_path)


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "x").write_bytes(content)
    assert ImageItem("x", tmp_path / "x").digest == hashlib.sha256(content).hexdigest()
    with pytest.raises(ImageError, match="gone' cannot be read: No such file"):
        _ = ImageItem("gone", tmp_path / "gone").digest


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
    assert images.labels is not None
    assert images.labels.tolist() == [3, 1, 0, 2]
    part = images.first(2)
    assert part.labels is not None
    assert part.labels.tolist() == [3, 2]
    assert part.description == f"4 images of '{classes}', by hand; 2 of 4, evenly spread"
    assert images.first(9) is images


def test_the_digest_of_a_dataset_holds_names_contents_and_labels(
    classes: Path, tmp_path: Path
) -> None:
    images = image_set(classes)
    whole = dataset_digest(images)
    copy = Path(shutil.copytree(classes, tmp_path / "elsewhere"))
    assert dataset_digest(image_set(copy)) == whole
    assert dataset_digest(images.take([3, 1, 0, 2])) == whole
    assert dataset_digest(images.take([0, 1, 2])) != whole
    labelled = dataset_digest(images.labelled([0, 0, 1, 1], "by hand"))
    assert labelled not in {whole, dataset_digest(images.labelled([0, 0, 1, 0], "by hand"))}
    (copy / "cat" / "b.png").rename(copy / "cat" / "z.png")
    renamed = dataset_digest(image_set(copy))
    assert renamed != whole
    (copy / "cat" / "z.png").rename(copy / "cat" / "b.png")
    Image.new("L", (4, 4), 99).save(copy / "cat" / "b.png")
    assert dataset_digest(image_set(copy)) not in {whole, renamed}


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


@each(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 5))}, "the images are float64 of shape (4, 5)"),
        (
            {"a": np.zeros(3), "b": np.zeros(3)},
            "it has no array called 'images' (it has: a, b)",
        ),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "the images are uint8 of shape (0, 4, 4)"),
        (
            {"images": np.full((1, 3, 4, 4), np.nan, np.float32)},
            "the images are float32 of shape (1, 3, 4, 4), not all finite",
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


@each(
    ("labels", "least"),
    [
        (np.zeros(2, int), ", from 0"),
        (np.zeros((3, 1), int), ", from 0"),
        (np.zeros(3), ""),
        (np.array([0, -1, 2]), ", from -1"),
        (np.array(["a", "b", "c"]), ""),
    ],
)
def test_labels_that_are_no_indices_are_refused(labels: Any, least: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError) as refused:
        saved(tmp_path, images=np.zeros((3, 4, 4), np.uint8), labels=labels)
    assert refused.value.message == (
        f"'{tmp_path}/x.npz' cannot be read as an .npz of images: the labels of its 3 images are "
        f"{labels.dtype} of shape {labels.shape}{least}."
    )


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no zip")
    with pytest.raises(ImageError, match=r"cannot be read as an \.npz of images"):
        image_set(tmp_path / "x.npz")
