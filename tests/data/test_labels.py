"""Class labels from folder names, folder orders and labels files, and ambiguous labels."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key as timm_natural_key
from torchvision.datasets import ImageFolder

from tests.each import each
from van_deploy.data.images import ImageSet, image_set
from van_deploy.data.labels import (
    class_names_from_file,
    label_images,
    multi_label_targets,
    natural_key,
)
from van_deploy.errors import ImageError, InputError, UsageError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that creates a folder with a different image at each path."""

    def create(*names: str, folder: str = "images", empty: Sequence[str] = ()) -> Path:
        root = tmp_path / folder
        shutil.rmtree(root, ignore_errors=True)
        for number, name in enumerate(names):
            path = root / (name if "." in name else f"{name}/x.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(path, "PNG")
        for name in empty:
            (root / name).mkdir(parents=True)
        return root

    return create


def by_folder(images: ImageSet) -> dict[str, int | None]:
    return {item.group: item.label for item in images.items}


def label_source(images: ImageSet) -> str:
    """Return the source of the labels."""
    return images.description.partition("', ")[2]


# --- class folders ---------------------------------------------------------------------------

EXACT = ("A", "a", "B", "b_c", "b c", "B-C", "+", "-", "_", "=")
IMAGENET = [text.split(",")[0].upper() for text in ImageNetInfo().label_descriptions()]
TWELVE = [str(number) for number in range(12)]
UNKNOWN_ORDER = "The order of the network's classes is unknown"


@each(
    ("folders", "classes", "names", "labels", "source"),
    [
        (EXACT, 10, EXACT, range(10), "class name"),  # exact names come first
        (("Great_White-shark", "b"), 2, ("great white  shark", "b"), (0, 1), "class name"),
        (("TENCH", "b"), 2, ("tench, Tinca tinca", "b"), (0, 1), "class name"),
        (("u\u0308ber", "b"), 2, ("\u00fcber", "b"), (0, 1), "class name"),  # as on macOS
        (("\uff21\uff22", "b"), 2, ("AB", "b"), (0, 1), "class name"),  # full-width letters
        (("stra\u00dfe", "b"), 2, ("STRASSE", "b"), (0, 1), "class name"),
        (("hot dog", "b"), 2, (" hot dog", "b"), (0, 1), "class name"),
        (("class1", "class2", "class10"), 3, ("class10", "class2", "class1"), (2, 1, 0), "name"),
        (sorted(TWELVE), 12, sorted(TWELVE), range(12), "class name"),  # an ImageFolder's classes
        (("n01440764", "n02123045"), 1000, None, (0, 281), "WordNet id"),
        (("n01440764", "tabby"), 1000, IMAGENET, (0, 281), "class name"),
        (("n02123045",), 1000, [f"{name}, x" for name in IMAGENET], (281,), "WordNet id"),
        (("airplane", "bird", "cat"), 3, None, range(3), "(the weights have no class names)"),
        ([f"{number:03}" for number in range(1, 103)], 102, None, range(102), "by number"),
        (("0", "1", "2"), 3, None, range(3), "by number"),
        (("00", "01", "02"), 3, None, range(3), "by number"),
        (("0", "1", "2"), 3, ("cat", "dog", "emu"), range(3), "by number"),
        (("bad", "good"), 1, None, (0, 1), "(the weights have no class names)"),
        (("0", "1"), 1, None, (0, 1), "by number"),
    ],
)
def test_class_folders(
    folders: Any, classes: int, names: Any, labels: Any, source: str, make: Make
) -> None:
    images = label_images(make(*folders), classes, names)
    assert by_folder(images) == dict(zip(folders, labels, strict=True))
    assert label_source(images).endswith(source)


@each(
    ("folders", "classes", "names", "message"),
    [
        (("Crane", "dog"), 3, ["crane", "CRANE", "dog"], "1 of the 2 folders"),  # ambiguous
        (("cat", "dgo"), 2, ["cat", "dog"], "match one of the network's 2 class names: dgo"),
        (("x", "y"), 2, ["cat", "dog"], "do not match one of the network's 2 class names: x, y"),
        (("a", "A", "b"), 2, ["a", "b"], "The folders 'A' and 'a' are both class 0"),
        (("a", "b", "stray.png"), 3, None, "The class of 'stray.png' is unknown"),
        *(
            (("n01440764", "n02123045"), 1000, [first, *map(str, range(999))], "2 of the 2 folders")
            for first in ("plankton", "tench, Tinca tinca")
        ),
        (list(map(str, range(11))), 11, list("abcdefghijk"), UNKNOWN_ORDER),
        (("9\u00b2", "10\u00b2"), 2, None, UNKNOWN_ORDER),  # superscripts are not numbers
    ],
)
def test_unknown_class_folders(
    folders: Any, classes: int, names: Any, message: str, make: Make
) -> None:
    with pytest.raises(ImageError, match=message):
        label_images(make(*folders), classes, names)


def test_wordnet_ids_of_files(make: Make) -> None:
    images = label_images(make("n02123045_tabby.png", "n01440764_1.png"), 1000)
    assert [item.label for item in images.items] == [0, 281]
    assert label_source(images) == "files by WordNet id"


# --- the order of class folders --------------------------------------------------------------

FOLDERS = {
    "natural": [f"class{number}" for number in range(1, 11)],
    "case": list("AbCdEfGhIj"),
    "numbers": TWELVE,
    "from one": [str(number) for number in range(1, 13)],
}


@each("names", FOLDERS.values())
def test_orders_equal_torchvision_and_timm(names: list[str], make: Make) -> None:
    root = make(*names)
    strings = label_images(root, len(names), class_order="strings")
    assert by_folder(strings) == ImageFolder(str(root)).class_to_idx
    natural = label_images(root, len(names), class_order="natural")
    assert by_folder(natural) == find_images_and_targets(str(root))[1]
    assert by_folder(strings) != by_folder(natural)
    assert all(natural_key(name) == timm_natural_key(name) for name in names)


@each(
    ("names", "classes", "orders"),
    [
        *((n, len(n), "strings or natural") for k, n in FOLDERS.items() if k != "numbers"),
        (TWELVE, 12, "index or strings or natural"),
        (["1", "2", "3"], 10, "index"),  # 1 is the first of 1..10, or index 1
        (["0", "5", "11"], 12, "index"),
    ],
)
def test_ambiguous_orders(names: list[str], classes: int, orders: str, make: Make) -> None:
    root = make(*names)
    with pytest.raises(ImageError, match=UNKNOWN_ORDER) as error:
        label_images(root, classes)
    assert error.value.remedy.startswith(f"Give --class-order {orders}, ")
    for order in orders.split(" or "):
        [row] = [r for r in error.value.message.splitlines() if r.startswith(f"  {order}: ")]
        for folder, label in by_folder(label_images(root, classes, class_order=order)).items():
            assert f"'{folder}' is class" not in row or f"'{folder}' is class {label}" in row


@each(
    ("names", "empty", "classes", "labels"),
    [
        (list("12345678"), ["9"], 9, {str(number): number - 1 for number in range(1, 9)}),
        (["b", "c"], ["a", ".git"], 3, {"b": 1, "c": 2}),
        (["b", "c"], ["a", "d"], 2, {"b": 0, "c": 1}),  # those with images are the classes
    ],
)
def test_empty_class_folders(names: Any, empty: Any, classes: int, labels: Any, make: Make) -> None:
    images = image_set(make(*names, empty=empty))
    assert by_folder(label_images(images, classes)) == labels
    if classes > len(names):  # folders without selected images count too
        part = label_images(images.take([1]), classes)
        assert by_folder(part) == {names[1]: labels[names[1]]}


@each("order", ["strings", "natural", "index", "names"])
def test_impossible_order(order: str, make: Make) -> None:
    with pytest.raises(ImageError, match=f"--class-order {order} is not possible: 2 of the 2"):
        label_images(make("x", "y"), 3, class_order=order)


# --- labels files ----------------------------------------------------------------------------


FLAT = ("a.png", "b c.png", "d, e.png")
NAMES = ["the first", "second, or other", "third"]
LABEL_FILES = {
    "blanks": "a.png    2  \n  b c.png   0\n\nd, e.png\t \t1",
    "tabs": "a.png\t2\nb c.png\t0\nd, e.png\t1\n",
    "commas": "a.png,2\nb c.png, 0\nd, e.png,1\n",
    "semicolons": "a.png;2\nb c.png;0\nd, e.png;1\n",
    "quotes": 'a.png,2\n"b c.png",0\n"d, e.png","1"\n',
    "a header": "file,label\na.png,2\nb c.png,0\nd, e.png,1\n",
    "no suffix": "a 2\nb c 0\nd, e 1\n",
    "paths": "./a.png 2\nval/b c.png 0\nC:\\data\\d, e.png 1\n",
    "other files": "z.png 1\na.png 2\nb c.png 0\nd, e.png 1\ny.png 7\n",
    "a repeated line": "a.png 2\nb c.png 0\nd, e.png 1\na.png 2\n",
    "one a line, with a mark": "\ufeff2\n0\n1\n",
    "carriage returns": "a.png 2\r\nb c.png 0\r\nd, e.png 1\r\n",
    "names": "a.png third\nb c.png The First\nd, e.png second, or other\n",
    "names one a line": "third\nThe First\nsecond, or other\n",
}
NUMBERS = "a.png 2\nb c.png 0\nd, e.png 1\n"


@each(
    ("files", "text", "names", "order", "labels"),
    [
        *((FLAT, text, NAMES, None, [2, 0, 1]) for text in LABEL_FILES.values()),
        (FLAT, NUMBERS, ["2", "0", "1"], "names", [0, 1, 2]),
        (FLAT, NUMBERS, ["2", "0", "1"], "index", [2, 0, 1]),
        (FLAT, NUMBERS, ["0", "1", "2"], None, [2, 0, 1]),
        (("a 1.png", "a.png"), "a 1 x\na y\n", ["x", "1 x", "y"], None, [0, 2]),  # longest match
        (("a/1.png", "b/1.png", "b/2.png"), "c/a/1 2\nb/1 0\n2.png 1", None, None, [2, 0, 1]),
        (("1.png", "b/1.png"), "1.png 0\nb/1.png 1\n", None, None, [0, 1]),
    ],
)
def test_label_file_formats(
    files: Any, text: str, names: Any, order: Any, labels: Any, make: Make
) -> None:
    root = make(*files)
    file = root.parent / "labels.txt"
    file.write_text(text, encoding="utf-8")
    images = label_images(root, 3, names, labels_file=file, class_order=order)
    assert [item.label for item in images.items] == labels
    assert label_source(images) == f"labels from '{file}'"


@each(
    ("text", "order", "message"),
    [
        (b"h l\na 2\nb c 0\n\nd, e 1\na.png 0", None, "'a.png': '2' in line 2, '0' in line 6"),
        (b"a.png 2\nb c.png 3\nd, e.png 1\n", None, "'3' in line 2 of .* matches no class of this"),
        (b"a.png 2\n", None, r"\(1 lines\) has no label for 2 of the 3 images, the first: 'b c"),
        (b"2\n1\n", None, r"\(2 lines\) has no label for 3 of the 3 images"),
        (b"a.png 1\nb\xe9.png 2\n", None, "cannot be read: it is not UTF-8"),
        (b"2\n0\n" + b"9" * 5000, None, "' in line 3 of .* matches no class of this"),
        (b"4\n4\n4\n", None, "'4' in line 1 of .* matches 0 or 4 of this network"),
        *((b"2\n0\n1\n", order, "is for class folders, but") for order in ("strings", "natural")),
    ],
)
def test_invalid_label_files(text: bytes, order: str | None, message: str, make: Make) -> None:
    root = make(*FLAT)
    file = root.parent / "labels.txt"
    file.write_bytes(text)
    names = list("4abcd") if text[:1] == b"4" else None
    with pytest.raises((InputError, UsageError), match=message):
        label_images(root, 5 if names else 3, names, labels_file=file, class_order=order)


def test_ambiguous_file_names(make: Make) -> None:
    root = make("a/1.png", "b/1.png", "b/2.png")
    (root / "x.txt").write_text("1.png 0\n2.png 1\n")
    with pytest.raises(InputError, match="has no label for 2 of the 3 images, the first: 'a/1"):
        label_images(root, 3, labels_file=root / "x.txt")


def test_class_names_from_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("the first\n second, or other \n\nthird\n", encoding="utf-8-sig")
    assert class_names_from_file(file, 3) == ("the first", "second, or other", "third")
    with pytest.raises(InputError, match="has 3 class names; the network has 4 classes"):
        class_names_from_file(file, 4)
    with pytest.raises(InputError, match="gone' cannot be read: No such file"):
        class_names_from_file(tmp_path / "gone", 4)


def test_multi_label_targets(make: Make, tmp_path: Path) -> None:
    images, file = image_set(make(*FLAT)), tmp_path / "sets.txt"
    file.write_text("a.png\tcat, dog\nb c.png\nd, e.png\t2\n")
    targets = multi_label_targets(images, file, 3, ["cat", "dog", "emu"])
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    file.write_text("a.png\tcow\nb c.png\nd, e.png\n")
    with pytest.raises(InputError, match="'cow' in line 1 of"):
        multi_label_targets(images, file, 3, ["cat", "dog", "emu"])
    with pytest.raises(InputError, match="needs a labels file"):
        multi_label_targets(images, None, 3, None)


# --- ground-truth files beside the images ----------------------------------------------------


def test_ground_truth_file_in_parent_folders(make: Make) -> None:
    root = make("a.png", "b.png", folder="deep/er/still/flat")
    above = root.parents[2] / "val.txt"
    above.write_text("a.png 1\nb.png 0\n")
    images = label_images(root, 2)
    assert [item.label for item in images.items] == [1, 0]
    assert label_source(images) == f"labels from '{above}'"
    (root / "val.txt").write_text("0\n0\n")
    assert [item.label for item in label_images(root, 2).items] == [0, 0]
    with pytest.raises(ImageError, match=r"The class of 'a.png' is unknown"):
        label_images(root, 2, find_labels=False)
    (root / "val.txt").unlink()
    above.rename(root.parents[3] / "val.txt")
    with pytest.raises(ImageError, match=r"The class of 'a.png' is unknown"):
        label_images(root, 2)


@each("text", ["data/val/a/x.png\ndata/val/b/x.png\n", "run 7\nfine\n", ""])
@each("place", ["", "..", "../.."])
def test_class_folders_take_priority_over_other_files(text: str, place: str, make: Make) -> None:
    root = make("a", "b", folder="data/val")
    (root / place / "val.txt").write_text(text)
    assert by_folder(label_images(root, 2)) == {"a": 0, "b": 1}
    assert by_folder(label_images(root, 2, ["b", "a"])) == {"a": 1, "b": 0}


def test_unusable_ground_truth_file_is_reported(make: Make) -> None:
    root = make("class2", "class10")
    (root / "val.txt").write_text("class2/x.png 0\n")
    with pytest.raises(ImageError, match=r"is not used: .* has no label for 1 of the 2 images"):
        label_images(root, 2)
    root = make("a", "b", folder="sorted")
    (root / "val.txt").write_text("7\n8\n")
    assert "'7' in line 1 of" in label_source(label_images(root, 2))
    kit = make("a.png", folder="kit") / "ILSVRC2012_validation_ground_truth.txt"
    kit.write_text("1\n")
    with pytest.raises(ImageError, match="are the development kit's ids"):
        label_images(kit.parent, 1000)


def test_kaggle_solution_file_of_imagenet(make: Make) -> None:
    root = make("a.png", "b.png", folder="kaggle/val")
    lines = "a,n02123045 1 2 30 40\nb,n01440764 1 2 3 4 n01440764 5 6 7 8\n"
    (root.parent / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{lines}")
    assert [item.label for item in label_images(root, 1000).items] == [281, 0]


def test_ground_truth_file_for_class_folders(make: Make) -> None:
    root, text = make("class2", "class10"), "class2/x.png 1\nclass10/x.png 0\n"
    (root.parent / "val.txt").write_text(text)  # parent folders of class folders are not searched
    with pytest.raises(ImageError, match=UNKNOWN_ORDER):
        label_images(root, 2)
    (root / "val.txt").write_text(text)
    assert by_folder(label_images(root, 2)) == {"class2": 1, "class10": 0}
    requested = label_images(root, 2, class_order="natural")
    assert by_folder(requested) == {"class2": 0, "class10": 1}
