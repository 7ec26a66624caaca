"""Files that say which class each image is: found, read as people write them, and matched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from van_deploy.data.class_words import WORDNET_ID, ClassWords, text_lines
from van_deploy.data.items import ImageSet
from van_deploy.errors import InputError, UsageError

__all__ = ["labels_beside", "labels_from_file"]

GROUND_TRUTH_FILES = (
    "LOC_val_solution.csv",  # Kaggle's ImageNet
    "imagenet_2012_validation_synset_labels.txt",  # TensorFlow's
    "val.txt",  # Caffe's
    "ILSVRC2012_validation_ground_truth.txt",  # the development kit's
)
KAGGLE_HEADER = "ImageId,PredictionString"
KIT_FILE = GROUND_TRUTH_FILES[3]
SYNSET_FILES = ("LOC_synset_mapping.txt", "map_clsloc.txt", "synsets.txt", "synset_words.txt")
PARENTS = 3
_SEPARATOR = re.compile(r"[\s,;]+")


def labels_beside(images: ImageSet) -> Path | None:
    """Return a file in the images' folder that is called as a ground truth is, or None.

    Where the images lie in no class folders, the three folders above are looked into, too.
    """
    flat = all(not item.group for item in images.items)
    return _beside(images, GROUND_TRUTH_FILES, PARENTS if flat else 0)


def _beside(images: ImageSet, names: Sequence[str], parents: int = PARENTS) -> Path | None:
    if images.root is None:
        return None
    places = [images.root, *list(images.root.resolve().parents)[:parents]]
    return next((place / n for place in places for n in names if (place / n).is_file()), None)


def labels_from_file(
    images: ImageSet,
    file: Path,
    words: ClassWords,
    *,
    order: str | None = None,
    synsets_file: Path | None = None,
) -> list[int]:
    """Return the class of every image, as a file says.

    Lines are ``file label`` (blanks, tab, comma or semicolon between; either may hold blanks;
    the file's path, name, or name without suffix), or one label a line for the images in their
    order. A label is a class name, a WordNet id, or an index from 0.

    Raises:
        InputError: the file cannot be read, contradicts itself, or does not fit the images;
            the line is named.
        UsageError: ``order`` is one for folders.
    """
    if order in {"strings", "natural"}:
        raise UsageError(
            f"--class-order {order} orders class folders, and the labels are in '{file}'.",
            "For a labels file it is names or index; or leave it out.",
        )
    lines = text_lines(file)
    if file.name == KIT_FILE:
        resolve = _kit_numbers(file, synsets_file or _beside(images, SYNSET_FILES), words)
        order = "kit"
    else:
        resolve = words.find
    first_word = bool(lines) and lines[0][1].replace(" ", "") == KAGGLE_HEADER
    said = _by_image(images, file, lines, resolve, first_word)
    if not said:
        said = _in_order(images, file, lines, resolve)
    return _labels(said, file, words, order, resolve)


Resolve = Callable[[str], "int | None"]
Said = dict[int, tuple[int, str]]  # by image: the line and its label


def _labels(
    said: Said, file: Path, words: ClassWords, order: str | None, resolve: Resolve
) -> list[int]:
    rows = [said[index] for index in sorted(said)]
    named = [words.named(word) for _, word in rows]
    indexed = [words.indexed(word) for _, word in rows]
    if order is None and None not in named and None not in indexed and named != indexed:
        row, name, index = next(r for r in zip(rows, named, indexed, strict=True) if r[1] != r[2])
        raise InputError(
            f"The labels in '{file}' may be class names or indices: '{row[1]}' in line {row[0]} "
            f"is the name of class {name} and the index of class {index}.",
            "Say which, with --class-order names or --class-order index.",
        )
    made = {"names": words.named, "index": words.indexed}.get(order or "", resolve)
    labels = []
    for number, word in rows:
        label = made(word)
        if label is None:
            raise _no_class(words, word, number, file)
        labels.append(label)
    return labels


def _no_class(words: ClassWords, word: str, number: int, file: Path) -> InputError:
    return InputError(
        f"'{word}' in line {number} of '{file}' {words.refusal(word)}.",
        "A label is a class name, a WordNet id, or an index from 0.",
    )


def _in_order(
    images: ImageSet, file: Path, lines: Sequence[tuple[int, str]], resolve: Resolve
) -> Said:
    if len(lines) != len(images):
        where = f" in '{images.root}'" if images.root else ""
        raise InputError(
            f"'{file}' has {len(lines)} lines for {len(images)} images{where}, "
            "and none begins with the name of one.",
            "Give one label a line for every image in sorted order, or lines 'file label'.",
        )
    return {index: (number, _bare(line)) for index, (number, line) in enumerate(lines)}


def _bare(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].strip() if quoted else text


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Yield a line as file and label, split at each separator in turn."""
    for match in _SEPARATOR.finditer(line):
        yield _bare(line[: match.start()]), _bare(line[match.end() :])


class _Files:
    """The images by the names a labels file may give them."""

    def __init__(self, images: ImageSet) -> None:
        self._paths = [PurePosixPath(images.relative(item)) for item in images.items]
        self._above = images.root.resolve().parts if images.root else ()
        self._short: dict[str, set[int]] = {}
        for index, path in enumerate(self._paths):
            for key in {str(path), path.name, path.stem}:
                self._short.setdefault(key, set()).add(index)

    def find(self, word: str) -> tuple[int, int] | None:
        """Return the image that ``word`` names and how many parts of its path agree, or None."""
        parts = [p for p in word.replace("\\", "/").split("/") if p not in {"", "."}]
        if not parts:
            return None
        near = self._short.get(parts[-1]) or self._short.get("/".join(parts)) or set()
        ranked = sorted(((self._agreement(i, parts), i) for i in near), reverse=True)
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None  # several are called that
        return ranked[0][1], ranked[0][0]

    def _agreement(self, index: int, parts: Sequence[str]) -> int:
        own = (*self._above, *self._paths[index].parts)
        pairs = zip(reversed(own), reversed(parts), strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(own), len(parts)))


def _by_image(
    images: ImageSet,
    file: Path,
    lines: Sequence[tuple[int, str]],
    resolve: Resolve,
    first_word: bool,
) -> Said:
    """Return what lines ``file label`` say of every image; empty if no line is one.

    Raises:
        InputError: two lines contradict each other, or an image has no label.
    """
    files = _Files(images)
    said: dict[int, tuple[int, int, str]] = {}
    for number, line in lines:
        found = _reading(files, number, line, file, resolve, first_word)
        if found is None:
            continue
        index, agreement, word = found
        before = said.get(index, (-1, 0, ""))
        if before[0] == agreement and resolve(before[2]) != resolve(word):
            raise InputError(
                f"'{file}' contradicts itself about '{images.relative(images.items[index])}': "
                f"'{before[2]}' in line {before[1]}, '{word}' in line {number}.",
                "Take the wrong line out.",
            )
        if agreement > before[0]:
            said[index] = (agreement, number, word)
    missing = [item for index, item in enumerate(images.items) if index not in said]
    if said and missing:
        raise InputError(
            f"'{file}' has no label for {len(missing)} of the {len(images)} images, the first: "
            f"'{images.relative(missing[0])}'.",
            "Add a line 'file label' for each, or take the images away.",
        )
    return {index: (number, word) for index, (_, number, word) in said.items()}


def _reading(
    files: _Files, number: int, line: str, file: Path, resolve: Resolve, first_word: bool
) -> tuple[int, int, str] | None:
    """Return the image of a line, how well its name agrees, and its label; None without one."""
    found: list[tuple[int, int, str]] = []
    for name, word in _pairs(line):
        match = files.find(name)
        if match is not None and word:
            found.append((*match, word.split()[0] if first_word else word))
    fitting = [reading for reading in found if resolve(reading[2]) is not None]
    if len({(index, resolve(word)) for index, _, word in fitting}) > 1:
        shown = " or ".join(f"'{word}'" for _, _, word in fitting)
        raise InputError(
            f"Line {number} of '{file}' can be read in two ways: its label is {shown}.",
            "Put a tab between file and label, and leave out images with such names.",
        )
    readings = fitting or found
    return readings[-1] if readings else None


def _kit_numbers(file: Path, synsets: Path | None, words: ClassWords) -> Resolve:
    """Return a resolver for the development kit's own numbers, 1 to 1000 in its own order."""
    if synsets is None:
        raise InputError(
            f"The numbers in '{file}' are the development kit's, not the network's, "
            "and nothing says what they mean.",
            "Give --synsets FILE with one WordNet id a line, in the kit's order.",
        )
    ids = [match[0] for _, row in text_lines(synsets) if (match := WORDNET_ID.search(row))]

    def by_number(word: str) -> int | None:
        index = int(word) - 1 if word.isdigit() else -1
        return words.named(ids[index]) if 0 <= index < len(ids) else None

    return by_number
