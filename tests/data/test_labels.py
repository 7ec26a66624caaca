"""Class labels from folder names, folder orders and labels files, and ambiguous labels."""

from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets import ImageFolder

from tests.data.conftest import Make
from tests.each import each
from tests.errors import error_of
from van_deploy.data.images import ImageSet, image_set
from van_deploy.data.labels import class_names_from_file, label_images, multi_label_targets
from van_deploy.errors import ImageError, InputError, UsageError


def labels_of(images: ImageSet) -> list[int | None]:
    return [item.label for item in images.items]


def label_error(*arguments: Any, **options: Any) -> str:
    return error_of(ImageError, label_images, *arguments, **options).message


def by_folder(images: ImageSet) -> dict[str, int | None]:
    return {item.group: item.label for item in images.items}


def label_source(images: ImageSet) -> str:
    """Return the source of the labels."""
    return images.description.partition("', ")[2]


# --- class folders ---------------------------------------------------------------------------

EXACT = ("A", "a", "B", "b_c", "b c", "B-C", "+", "-", "_", "=")
IMAGENET = [text.split(",")[0].upper() for text in ImageNetInfo().label_descriptions()]
TWELVE = [str(number) for number in range(12)]
NUMBERS = [str(number) for number in range(999)]
UNKNOWN_ORDER = "The order of the network's classes is unknown"


@each(
    ("folders", "classes", "names", "labels", "text"),
    [
        (EXACT, 10, EXACT, range(10), "class name"),  # exact names come first
        (("Great_White-shark", "b"), 2, ("great white  shark", "b"), (0, 1), "class name"),
        (("TENCH", "b"), 2, ("tench, Tinca tinca", "b"), (0, 1), "class name"),
        (("\uff21u\u0308", "b"), 2, ("A\u00fc", "b"), (0, 1), "class name"),  # full-width, macOS
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
        (("0", "1", "2"), 3, ("cat", "dog", "emu"), range(3), "by number"),
        (("bad", "good"), 1, ["bad"], (1, 0), "class name"),
        (("bad", "good"), 1, ["good", "bad"], (1, 0), "class name"),
        (("bad", "good"), 1, None, (0, 1), "(the weights have no class names)"),
        (("0", "1"), 1, None, (0, 1), "by number"),
        # labels that are unknown
        (("bad", "good"), 1, ["dog"], None, "2 of the 2 folders"),
        (("Crane", "dog"), 3, ("crane", "CRANE", "dog"), None, "1 of the 2 folders"),  # ambiguous
        (("cat", "dgo"), 2, ("cat", "dog"), None, "one of the network's 2 class names: dgo"),
        (("x", "y"), 2, ("cat", "dog"), None, "one of the network's 2 class names: x, y"),
        (("a", "A", "b"), 2, ("a", "b"), None, "The folders 'A' and 'a' are both class 0"),
        (("a", "b", "stray.png"), 3, None, None, "The class of 'stray.png' is unknown"),
        (("n01440764", "n02123045"), 1000, ["plankton", *NUMBERS], None, "2 of the 2 folders"),
        (("n01440764", "n02123045"), 1000, ["tench, Tinca", *NUMBERS], None, "2 of the 2 folders"),
        ([str(number) for number in range(11)], 11, "abcdefghijk", None, UNKNOWN_ORDER),
        (("9\u00b2", "10\u00b2"), 2, None, None, UNKNOWN_ORDER),  # superscripts are not numbers
    ],
)
def test_class_folders(
    folders: Any, classes: int, names: Any, labels: Any, text: str, make: Make
) -> None:
    root = make(*folders)
    if labels is None:
        assert text in label_error(root, classes, names)
    else:
        images = label_images(root, classes, names)
        assert by_folder(images) == dict(zip(folders, labels, strict=True))
        assert label_source(images).endswith(text)


def test_wordnet_ids_of_files(make: Make) -> None:
    images = label_images(make("n02123045_tabby.png", "n01440764_1.png"), 1000)
    assert labels_of(images) == [0, 281]
    assert label_source(images) == "files by WordNet id"


# --- the order of class folders --------------------------------------------------------------


@each(
    ("names", "classes", "orders"),
    [
        ([f"class{number}" for number in range(1, 11)], 10, "strings or natural"),
        (list("AbCdEfGhIj"), 10, "strings or natural"),
        ([str(number) for number in range(1, 13)], 12, "strings or natural"),
        (TWELVE, 12, "index or strings or natural"),
        (["1", "2", "3"], 10, "index"),  # 1 is the first of 1..10, or index 1
        (["0", "5", "11"], 12, "index"),
    ],
)
def test_ambiguous_orders(names: list[str], classes: int, orders: str, make: Make) -> None:
    root, labels = make(*names), {}
    error = error_of(ImageError, label_images, root, classes)
    assert UNKNOWN_ORDER in error.message
    assert error.remedy.startswith(f"Give --class-order {orders}, ")
    for order in orders.split(" or "):
        labels[order] = by_folder(label_images(root, classes, class_order=order))
        [row] = [r for r in error.message.splitlines() if r.startswith(f"  {order}: ")]
        for folder, label in labels[order].items():
            assert f"'{folder}' is class" not in row or f"'{folder}' is class {label}" in row
    if "natural" in orders:
        assert labels["strings"] == ImageFolder(str(root)).class_to_idx
        assert labels["natural"] == find_images_and_targets(str(root))[1]
        assert labels["strings"] != labels["natural"]


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
    error = error_of(ImageError, label_images, make("x", "y"), 3, class_order=order)
    assert f"--class-order {order} is not possible: 2 of the 2" in error.message
    assert str(error).partition("\n")[2].startswith("Give --labels FILE, or export again")


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
ONE_LINE_EACH = "a.png 2\nb c.png 0\nd, e.png 1\n"
OTHERS = ("a/1.png", "b/1.png", "b/2.png")


@each(
    ("files", "text", "names", "order", "expected"),
    [
        *((FLAT, text, NAMES, None, [2, 0, 1]) for text in LABEL_FILES.values()),
        (FLAT, ONE_LINE_EACH, ["2", "0", "1"], "names", [0, 1, 2]),
        (FLAT, ONE_LINE_EACH, ["2", "0", "1"], "index", [2, 0, 1]),
        (FLAT, ONE_LINE_EACH, ["0", "1", "2"], None, [2, 0, 1]),
        (("a 1.png", "a.png"), "a 1 x\na y\n", ["x", "1 x", "y"], None, [0, 2]),  # longest match
        (OTHERS, "c/a/1 2\nb/1 0\n2.png 1", None, None, [2, 0, 1]),
        (("1.png", "b/1.png"), "1.png 0\nb/1.png 1\n", None, None, [0, 1]),
        (("a.jpg", "a.png"), "v/a.png 0\na.jpg 1\n", None, None, [1, 0]),
        # invalid files
        (("a.jpg", "a.png"), "a 0\na.png 1\n", None, None, "1 of the 2 images, the first: 'a.j"),
        (OTHERS, "a/1 2\na/2 1\nb/1 0\n", None, None, "1 of the 3 images, the first: 'b/2"),
        (("9.png", "10.png"), "0\n1\n", None, None, "order of the images is ambiguous"),
        (OTHERS, "1.png 0\n2.png 1\n", None, None, "for 2 of the 3 images, the first: 'a/1.png'"),
        (FLAT, "x y\na 2\nb c 0\n\nd, e 1\na.png 0", None, None, "'2' in line 2, '0' in line 6"),
        (FLAT, "a.png 2\nb c.png 3\nd, e.png 1\n", None, None, "'3' in line 2 of"),
        (FLAT, "a.png 2\n", None, None, "(1 lines) has no label for 2 of the 3 images"),
        (FLAT, "2\n1\n", None, None, "(2 lines) has no label for 3 of the 3 images"),
        (FLAT, b"a.png 1\nb\xe9.png 2\n", None, None, "cannot be read: it is not UTF-8"),
        (FLAT, "2\n0\n" + "9" * 5000, None, None, "matches no class of this network's 0 to 2"),
        (FLAT, "2\n2\n2\n", ["2", "a", "b"], None, "matches 0 or 2 of this network's 0 to 2"),
        (FLAT, "2\n0\n1\n", None, "strings", "is for class folders, but"),
        (FLAT, "2\n0\n1\n", None, "natural", "is for class folders, but"),
    ],
)
def test_label_files(
    files: Any, text: str | bytes, names: Any, order: Any, expected: Any, make: Make
) -> None:
    root = make(*files)
    file = root.parent / "labels.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    options = {"labels_file": file, "class_order": order}
    if isinstance(expected, str):
        kind = UsageError if order else InputError
        assert expected in error_of(kind, label_images, root, 3, names, **options).message
    else:
        images = label_images(root, 3, names, **options)
        assert labels_of(images) == expected
        assert label_source(images) == f"labels from '{file}'"


def test_class_names_from_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("the first\n second, or other \n\nthird\n", encoding="utf-8-sig")
    assert class_names_from_file(file, 3) == ("the first", "second, or other", "third")
    (tmp_path / "two.txt").write_text("good\nbad\n")
    assert class_names_from_file(tmp_path / "two.txt", 1) == ("bad",)
    message = error_of(InputError, class_names_from_file, file, 4).message
    assert "has 3 class names; the network has 4 classes" in message
    message = error_of(InputError, class_names_from_file, tmp_path / "gone", 4).message
    assert "gone' cannot be read: No such file" in message


def test_multi_label_targets(make: Make, tmp_path: Path) -> None:
    images, file, names = image_set(make(*FLAT)), tmp_path / "sets.txt", ["cat", "dog", "emu"]
    file.write_text("a.png\tcat, dog\nb c.png\nd, e.png\t2\n")
    targets = multi_label_targets(images, file, 3, names)
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    columns = tmp_path / "columns.csv"
    columns.write_text("file,cat,dog,emu\na.png,1,0,1\nb c.png,0,0,0\nd, e.png,0,0,0\n")
    file.write_text("a.png\tcow\nb c.png\nd, e.png\n")
    for source, message in (
        (file, "'cow' in line 1 of"),
        (columns, f"A label is repeated in line 2 of '{columns}': '1,0,1'."),
        (None, "needs a labels file"),
    ):
        error = error_of(InputError, multi_label_targets, images, source, 3, names)
        assert message in error.message


# --- ground-truth files beside the images ----------------------------------------------------


UNKNOWN_CLASS = "The class of 'a.png' is unknown"


def test_ground_truth_file_in_parent_folders(make: Make) -> None:
    root = make("a.png", "b.png", folder="deep/er/still/flat")
    above = root.parents[2] / "val.txt"
    above.write_text("a.png 1\nb.png 0\n")
    images = label_images(root, 2)
    assert labels_of(images) == [1, 0]
    assert label_source(images) == f"labels from '{above}'"
    (root / "val.txt").write_text("0\n0\n")
    assert labels_of(label_images(root, 2)) == [0, 0]
    assert UNKNOWN_CLASS in label_error(root, 2, find_labels=False)
    (root / "val.txt").unlink()
    above.rename(root.parents[3] / "val.txt")
    assert UNKNOWN_CLASS in label_error(root, 2)


@each("text", ["data/val/a/x.png\ndata/val/b/x.png\n", "run 7\nfine\n", ""])
@each("place", ["", "..", "../.."])
def test_class_folders_take_priority_over_other_files(text: str, place: str, make: Make) -> None:
    root = make("a", "b", folder="data/val")
    (root / place / "val.txt").write_text(text)
    assert by_folder(label_images(root, 2)) == {"a": 0, "b": 1}
    assert by_folder(label_images(root, 2, ["b", "a"])) == {"a": 1, "b": 0}


def test_unusable_ground_truth_file_is_reported(make: Make) -> None:
    root = make("a", "b", folder="sorted")
    (root / "val.txt").write_text("7\n8\n")
    assert "'7' in line 1 of" in label_source(label_images(root, 2))
    kit = make("a.png", folder="kit") / "ILSVRC2012_validation_ground_truth.txt"
    kit.write_text("1\n")
    assert "are the development kit's ids" in label_error(kit.parent, 1000)


def test_kaggle_solution_file_of_imagenet(make: Make) -> None:
    root = make("a.png", "b.png", folder="kaggle/val")
    lines = "a,n02123045 1 2 30 40\nb,n01440764 1 2 3 4 n01440764 5 6 7 8\n"
    (root.parent / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{lines}")
    assert [item.label for item in label_images(root, 1000).items] == [281, 0]


def test_ground_truth_file_for_class_folders(make: Make) -> None:
    root, text = make("class2", "class10"), "class2/x.png 1\nclass10/x.png 0\n"
    (root.parent / "val.txt").write_text(text)  # parent folders of class folders are not searched
    assert UNKNOWN_ORDER in label_error(root, 2)
    (root / "val.txt").write_text(text[:15])
    message = label_error(root, 2)
    assert f"('{root}/val.txt' is not used: " in message
    assert "has no label for 1 of the 2 images" in message
    (root / "val.txt").write_text(text)
    assert by_folder(label_images(root, 2)) == {"class2": 1, "class10": 0}
    requested = label_images(root, 2, class_order="natural")
    assert by_folder(requested) == {"class2": 0, "class10": 1}
