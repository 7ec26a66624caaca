"""Labelled images: which class each picture of a folder belongs to, and how that was found out.

In this order: a labels file, the folder's own ground-truth file (ImageNet's
layouts), class folders (by class name, WordNet id or index), and WordNet ids
at the beginning of file names (``n03041632_cleaver.jpg``).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.errors import ImageError, InputError
from van_deploy.images import find_images

__all__ = ["LabelledImages", "labelled_images"]

GROUND_TRUTH_FILES = (
    "LOC_val_solution.csv",  # Kaggle's ImageNet
    "imagenet_2012_validation_synset_labels.txt",  # TensorFlow's
    "val.txt",  # Caffe's
    "ILSVRC2012_validation_ground_truth.txt",  # the development kit's
)
SYNSET_FILES = ("LOC_synset_mapping.txt", "map_clsloc.txt", "synsets.txt", "synset_words.txt")
_WNID = re.compile(r"n\d{8}")

Resolver = Callable[[str], "int | None"]


@dataclass(frozen=True)
class LabelledImages:
    """Pictures and their classes.

    Attributes:
        folder: where they lie.
        paths: of the files, sorted.
        labels: ``(N,)`` int64, indices of the network's classes.
        described: how the labels were found.
    """

    folder: Path
    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    described: str

    def first(self, limit: int) -> LabelledImages:
        """Return at most ``limit`` images, spread evenly over the sorted paths."""
        if limit >= len(self.paths):
            return self
        chosen = np.linspace(0, len(self.paths) - 1, limit).astype(int)
        paths = tuple(self.paths[index] for index in chosen)
        described = f"{self.described}; {limit} of {len(self.paths)}, evenly spread"
        return LabelledImages(self.folder, paths, self.labels[chosen], described)


def labelled_images(
    folder: Path,
    classes: int,
    class_names: Sequence[str] | None = None,
    *,
    labels_file: Path | None = None,
    synsets_file: Path | None = None,
) -> LabelledImages:
    """Return the images of ``folder`` with their labels.

    Args:
        folder: the images.
        classes: how many the network has.
        class_names: in the order of the logits, if known.
        labels_file: lines ``file label`` (blanks, tab or comma between), or one
            label a line for the sorted files. A label is a class name, a WordNet id or an index.
        synsets_file: what the numbers of ImageNet's development kit mean: one
            WordNet id a line.

    Raises:
        ImageError: there is no image, or no label can be found for one.
        InputError: a labels file cannot be read or does not fit the images.
    """
    paths = find_images(folder)
    resolve = _resolver(classes, class_names)
    truth = labels_file or _beside(folder, GROUND_TRUTH_FILES)
    if truth is not None:
        synsets = synsets_file or _beside(folder, SYNSET_FILES)
        labels = _from_file(paths, folder, truth, resolve, synsets)
        described = f"labels from '{truth}'"
        return _labelled(folder, paths, labels, classes, described)
    parts = [path.relative_to(folder).parts for path in paths]
    if all(len(part) > 1 for part in parts):
        names = sorted({part[0] for part in parts})
        known, described = _from_folders(folder, names, classes, class_names, resolve)
        return _labelled(folder, paths, [known[part[0]] for part in parts], classes, described)
    return _from_file_names(folder, paths, classes, resolve)


def _from_folders(
    folder: Path,
    names: Sequence[str],
    classes: int,
    class_names: Sequence[str] | None,
    resolve: Resolver,
) -> tuple[Mapping[str, int], str]:
    """Return the class of each folder, and how it was found."""
    found = {name: resolve(name) for name in names}
    known = {name: label for name, label in found.items() if label is not None}
    if len(known) == len(names):
        kinds = {"WordNet id" if _WNID.fullmatch(name) else _kind(name) for name in names}
        return known, f"class folders by {' or '.join(sorted(kinds))}"
    if class_names is None and not known and len(names) == classes:
        # What ImageFolder does in training; said in the report, since nothing confirms it.
        return {name: index for index, name in enumerate(names)}, (
            f"{classes} class folders in alphabetical order, as ImageFolder numbers them "
            "(the weights name no classes)"
        )
    strangers = [name for name in names if name not in known]
    raise ImageError(
        f"{len(strangers)} of the {len(names)} folders in '{folder}' are no class of this "
        f"network: {', '.join(strangers[:5])}.",
        "Call them by class name, WordNet id or index, or give --labels FILE.",
    )


def _kind(name: str) -> str:
    return "index" if name.isdigit() else "class name"


def _from_file_names(
    folder: Path, paths: Sequence[Path], classes: int, resolve: Resolver
) -> LabelledImages:
    labels = []
    for path in paths:
        wnid = _WNID.match(path.name)
        label = resolve(wnid[0]) if wnid else None
        if label is None:
            raise ImageError(
                f"Nothing says which class '{path}' belongs to.",
                "Sort the images into one folder a class, or give --labels FILE.",
            )
        labels.append(label)
    return _labelled(folder, paths, labels, classes, "WordNet ids in the files' names")


def _labelled(
    folder: Path, paths: Sequence[Path], labels: Sequence[int], classes: int, described: str
) -> LabelledImages:
    values = np.array(labels, np.int64)
    if values.min() < 0 or values.max() >= classes:
        wrong = int(values[(values < 0) | (values >= classes)][0])
        raise InputError(
            f"Label {wrong} is not one of the network's {classes} classes (0 to {classes - 1}).",
            "Check that the labels are this network's, and count from 0.",
        )
    return LabelledImages(folder, tuple(paths), values, described)


# --- labels as text ------------------------------------------------------------------------


def _resolver(classes: int, class_names: Sequence[str] | None) -> Resolver:
    """Return a function from a class name, WordNet id or index to the class, or None."""
    named: dict[str, set[int]] = {}
    for index, name in enumerate(class_names or ()):
        for word in {name, name.split(",")[0]}:
            named.setdefault(_plain(word), set()).add(index)
    synsets = _imagenet_synsets() if classes == 1000 else {}

    def resolve(word: str) -> int | None:
        matches = named.get(_plain(word), set())
        if len(matches) == 1:
            return next(iter(matches))
        if _WNID.fullmatch(word):
            return synsets.get(word)
        return int(word) if word.isdigit() and int(word) < classes else None

    return resolve


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _imagenet_synsets() -> dict[str, int]:
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return {info.index_to_label_name(index): index for index in range(info.num_classes())}


# --- labels files --------------------------------------------------------------------------


def _beside(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of some files that lies in the folder or in one of the three above it."""
    places = [folder, *list(folder.resolve().parents)[:3]]
    return next((place / n for place in places for n in names if (place / n).is_file()), None)


def _from_file(
    paths: Sequence[Path], folder: Path, file: Path, resolve: Resolver, synsets: Path | None
) -> list[int]:
    rows = _rows(file)
    if file.name == "ILSVRC2012_validation_ground_truth.txt":
        resolve = _by_number(file, synsets, resolve)
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(paths):
            raise InputError(
                f"'{file}' has {len(rows)} labels for {len(paths)} images in '{folder}'.",
                "Give one label a line for every image in sorted order, or lines 'file label'.",
            )
        return [_label(row[0], file, resolve) for row in rows]
    by_file = {row[0]: row[1] for row in rows if len(row) > 1}
    return [_label(_row_of(path, folder, by_file, file), file, resolve) for path in paths]


def _rows(file: Path) -> list[list[str]]:
    """Return the fields of each line; a header and blank lines left out."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"The labels '{file}' cannot be read: {reason}.", "Check the path.") from (
            error
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].replace(" ", "") == "ImageId,PredictionString":
        return [[(row := line.split(",", 1))[0], row[1].split()[0]] for line in lines[1:]]
    if any("\t" in line for line in lines):
        return [line.split("\t", 1) for line in lines]
    if file.suffix.lower() == ".csv":
        return [row[:2] for row in csv.reader(lines)]
    return [_split(line) for line in lines]


def _split(line: str) -> list[str]:
    """Return file and label; a line that does not begin with a file name is one label."""
    first, _, rest = line.partition(" ")
    return [first, rest.strip()] if "." in first and rest else [line]


def _row_of(path: Path, folder: Path, by_file: Mapping[str, str], file: Path) -> str:
    for name in (path.relative_to(folder).as_posix(), path.name, path.stem):
        if name in by_file:
            return by_file[name]
    raise InputError(
        f"'{file}' has no label for '{path.relative_to(folder)}'.",
        "Add a line 'file label' for it, or take the image away.",
    )


def _label(word: str, file: Path, resolve: Resolver) -> int:
    label = resolve(word.strip())
    if label is None:
        raise InputError(
            f"'{word.strip()}' in '{file}' is no class of this network.",
            "A label is a class name, a WordNet id, or an index from 0.",
        )
    return label


def _by_number(file: Path, synsets: Path | None, resolve: Resolver) -> Resolver:
    """Return a resolver for the development kit's own numbers, 1 to 1000 in its own order."""
    if synsets is None:
        raise InputError(
            f"The numbers in '{file}' are the development kit's, not the network's, "
            "and nothing says what they mean.",
            "Give --synsets FILE with one WordNet id a line, in the kit's order.",
        )
    ids = [match[0] for row in synsets.read_text().splitlines() if (match := _WNID.search(row))]

    def by_number(word: str) -> int | None:
        index = int(word) - 1 if word.isdigit() else -1
        return resolve(ids[index]) if 0 <= index < len(ids) else None

    return by_number
