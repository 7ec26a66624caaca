"""Which class each image is, and how that was found out: one resolver for every command.

A labels file that was given; else labels inside an ``.npz``; else class folders called as the
classes are, or WordNet ids at the beginning of file names (``n03041632_cleaver.jpg``); else a
ground-truth file that lies beside the images and fits all of them (ImageNet's layouts); else
the order of the class folders, where every order that fits gives the same classes. Where
readings differ and nothing decides, nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.data.items import ImageSet, image_set
from van_deploy.data.words import WORDNET_ID, ClassWords, text_lines
from van_deploy.errors import ImageError, InputError, UsageError

CLASS_ORDERS = {
    "strings": "folders sorted as strings, as torchvision's ImageFolder does",
    "natural": "folders sorted with numbers as numbers, ignoring case, as timm does",
    "index": "a number is the class's index, from 0",
    "names": "the words are the network's class names",
}
"""What ``class_order`` may say, and what it means."""

KIT_FILE, KAGGLE_HEADER = "ILSVRC2012_validation_ground_truth.txt", "ImageId,PredictionString"
GROUND_TRUTH_FILES = (
    "LOC_val_solution.csv",  # Kaggle's ImageNet
    "imagenet_2012_validation_synset_labels.txt",  # TensorFlow's
    "val.txt",  # Caffe's
    KIT_FILE,  # the development kit's
)
SYNSET_FILES = ("LOC_synset_mapping.txt", "map_clsloc.txt", "synsets.txt", "synset_words.txt")
_FOLDER_REMEDY = (
    "Call the folders by class name or WordNet id, give --labels FILE, or say how training "
    "numbered them with --class-order (an empty folder for a class without images counts)."
)
_SETS_FORM = "Write a line for each image: its file, a tab, and its labels with commas between."

_NUMBER = re.compile("[0-9]+")

Meant = Callable[[str], "tuple[int, ...]"]
"""From a word to every class it may mean."""


def labelled_images(
    source: Path | ImageSet,
    classes: int,
    class_names: Sequence[str] | None = None,
    *,
    labels_file: Path | None = None,
    synsets_file: Path | None = None,
    class_order: str | None = None,
    find_labels: bool = True,
) -> ImageSet:
    """Return images with a label for each.

    Args:
        source: the images: a folder, an ``.npz``, or a set.
        classes: logits of the network; with one, the labels are 0 and 1.
        class_names: in the order of the logits, if known.
        labels_file: lines ``file label`` (blanks, tab, comma or semicolon between), or one
            label a line for the images in their order. A label is a class name, a WordNet id
            or an index from 0.
        synsets_file: what the numbers of ImageNet's development kit mean: one
            WordNet id a line.
        class_order: one of :data:`CLASS_ORDERS`, where nothing else decides.
        find_labels: look for a ground-truth file beside the images.

    Raises:
        UsageError: the order is one of folders, and the labels are in a file.
        ImageError: there is no image, or no label can be found for one.
        InputError: a labels file cannot be read or does not fit the images.
    """
    images = image_set(source)
    words = ClassWords(classes, class_names)
    if labels_file is not None:
        labels = _of_file(images, labels_file, words, class_order, synsets_file)
        return images.labelled(labels, f"labels from '{labels_file}'")
    if images.labels is not None:
        largest = str(images.labels.max())
        if words.indexed(largest):
            return images
        raise InputError(
            f"Label {largest} of the {images.description} {words.doubt(())}.",
            "Check that the labels are this network's, and count from 0.",
        )
    groups = sorted({item.group for item in images.items})
    named = _of_names(images, groups, words) if class_order in {None, "names"} else None
    if named is not None:
        return images.labelled(*named)
    flat = groups == [""]
    file = _beside(images, GROUND_TRUTH_FILES, flat) if find_labels else None
    unfit, instead = "", "Sort the images into one folder a class, or give --labels FILE."
    if file is not None and (flat or class_order is None):
        try:
            labels = _of_file(images, file, words, class_order, synsets_file)
            return images.labelled(labels, f"labels from '{file}'")
        except InputError as error:
            instead = f"{error.remedy} Or {instead[0].lower()}{instead[1:]}"
            unfit = f" ('{file}' is not used: {error.message.rstrip('.')})"
    if "" in groups:
        lost = next(item.name for item in images.items if not item.group)
        raise ImageError(f"Nothing says which class '{lost}' belongs to{unfit}.", instead)
    by_group, how = _of_order(images, groups, words, class_order, unfit)
    return images.labelled([by_group[item.group] for item in images.items], how + unfit)


def label_sets(
    images: ImageSet, file: Path | None, classes: int, class_names: Sequence[str] | None
) -> npt.NDArray[np.int64]:
    """Return which of a multi-label network's labels each image has, ``(N, K)`` of 0 and 1.

    Args:
        images: in the order of the rows.
        file: lines ``file<TAB>label,label``; a label is a class's name or index, and an image
            may have none.
        classes: labels of the network.
        class_names: in the order of the logits, if known.

    Raises:
        InputError: there is no file, it cannot be read, or it does not fit the images.
    """
    if file is None:
        raise InputError(
            "The network gives many labels an image, and no folder says which.",
            f"Give --labels FILE. {_SETS_FORM}",
        )
    words, sets = ClassWords(classes, class_names), {}
    for number, line in text_lines(file):
        name, _, said = line.partition("\t")
        labels = [word.strip() for word in said.split(",") if word.strip()]
        sets[name.strip()] = [_class(words, words.meant(w), w, number, file) for w in labels]
    names = [images.relative(item) for item in images.items]
    if lost := [name for name in names if name not in sets]:
        raise InputError(f"'{file}' has no labels for '{lost[0]}'.", _SETS_FORM)
    found = np.zeros((len(images), classes), np.int64)
    for row, name in enumerate(names):
        found[row, sets[name]] = 1
    return found


# --- folders and file names ------------------------------------------------------------------


def _of_names(
    images: ImageSet, groups: Sequence[str], words: ClassWords
) -> tuple[list[int], str] | None:
    """Return labels from names that are the network's own, and how; None if they are not."""
    called = [item.group for item in images.items]
    ids = all(WORDNET_ID.fullmatch(name) for name in groups)
    kind = f"class folders by {'WordNet id' if ids else 'class name'}"
    if groups == [""]:
        kind = "WordNet ids in the files' names"
        found = [WORDNET_ID.match(Path(item.name).name) for item in images.items]
        called = [match[0] if match else "" for match in found]
    classes = {word: words.named(word) for word in dict.fromkeys(called)}
    if any(len(meant) != 1 for meant in classes.values()):
        return None
    first: dict[int, str] = {}
    for word, (number,) in classes.items():
        if first.setdefault(number, word) != word:
            raise ImageError(
                f"The folders '{first[number]}' and '{word}' are both class {number}.",
                "Put their images into one, or rename one of them.",
            )
    return [classes[word][0] for word in called], kind


def natural_key(name: str) -> list[str | int]:
    """Return timm's key for class folders: numbers as numbers, case ignored.

    >>> sorted(["class10", "class2", "B", "a"], key=natural_key)
    ['a', 'B', 'class2', 'class10']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _readings(
    used: Sequence[str], folders: Sequence[str], classes: int
) -> dict[str, dict[str, int]]:
    """Return each way to number class folders that fits the number of classes.

    Args:
        used: the folders that hold images.
        folders: all of them: where these are as many as the classes, an empty one counts.
        classes: of the network.
    """
    readings: dict[str, dict[str, int]] = {}
    whole = list(folders if len(folders) == classes else used)
    numbers = [int(name) for name in whole if _NUMBER.fullmatch(name)]
    if len(set(numbers)) == len(whole):
        if max(numbers) < classes:
            readings["index"] = {name: int(name) for name in used}
        if len(whole) < classes:  # some are missing: all of them are taken to be 0.. or 1..
            width = max(map(len, whole)) if any(name[0] == "0" < name for name in whole) else 0
            first = 0 if 0 in numbers else 1
            whole = [str(number).zfill(width) for number in range(first, first + classes)]
    if len(whole) == classes and set(used) <= set(whole):
        strings, natural = sorted(whole), sorted(sorted(whole), key=natural_key)
        readings["strings"] = {name: strings.index(name) for name in used}
        readings["natural"] = {name: natural.index(name) for name in used}
    return readings


def _of_order(
    images: ImageSet, groups: Sequence[str], words: ClassWords, order: str | None, unfit: str
) -> tuple[Mapping[str, int], str]:
    """Return the class of each folder by its place or number, and how it was found.

    Raises:
        ImageError: no reading fits, or those that do differ.
    """
    readings = _readings(groups, images.folders or groups, words.count)
    if order in readings:
        return readings[order], f"class folders in the order asked for ({order})"
    strangers = [name for name in groups if len(words.named(name)) != 1]
    numeric = all(_NUMBER.fullmatch(name) for name in groups)
    named = len(strangers) < len(groups) or (words.names and not numeric)
    if order or named or not readings:
        fits = f"--class-order {order} does not fit: " if order else ""
        raise ImageError(
            f"{fits}{len(strangers)} of the {len(groups)} folders in '{images.root}' do not name "
            f"one of the network's {words.count} classes: {', '.join(strangers[:5])}{unfit}.",
            _FOLDER_REMEDY,
        )
    kinds: dict[tuple[int, ...], str] = {}  # a reading, and the first order that gives it
    for name, reading in readings.items():
        kinds.setdefault(tuple(reading[group] for group in groups), name)
    if len(kinds) == 1:
        how = "by number" if numeric else "in sorted order (the weights name no classes)"
        return readings.popitem()[1], f"class folders {how}"
    differ = [g for g in groups if len({readings[name][g] for name in kinds.values()}) > 1]
    shown = "".join(
        f"\n  {name}: {', '.join(f'{g!r} is class {readings[name][g]}' for g in differ[:3])}"
        f"{', ...' if len(differ) > 3 else ''} ({CLASS_ORDERS[name]})"
        for name in kinds.values()
    )
    raise ImageError(
        f"The classes of the {len(groups)} folders in '{images.root}' are not known: nothing says "
        f"in which order the network has them, and what fits differs{unfit}:{shown}",
        f"Give --class-order {' or '.join(kinds.values())}, --labels FILE, or export again with "
        "--labels NAMES.txt: one folder's name a line, in the order of the logits.",
    )


# --- labels files ----------------------------------------------------------------------------


def _beside(images: ImageSet, names: Sequence[str], above: bool = True) -> Path | None:
    """Return the first of some files in the images' folder or, if ``above``, the three above."""
    if images.root is None:
        return None
    places = [images.root, *list(images.root.resolve().parents)[: 3 if above else 0]]
    return next((place / n for place in places for n in names if (place / n).is_file()), None)


def _of_file(
    images: ImageSet, file: Path, words: ClassWords, order: str | None, synsets: Path | None
) -> list[int]:
    """Return the class of every image, as a file says.

    Raises:
        InputError: it cannot be read, contradicts itself, or does not fit; the line is named.
        UsageError: the order is one of folders.
    """
    if order in {"strings", "natural"}:
        raise UsageError(
            f"--class-order {order} orders class folders, and the labels are in '{file}'.",
            "Leave it out, or give names or index.",
        )
    lines = text_lines(file)
    if lines and lines[0][1].replace(" ", "") == KAGGLE_HEADER:
        lines = [(number, line.split()[0]) for number, line in lines]
    meant: Meant = partial(words.meant, order=order)
    if file.name == KIT_FILE:
        meant = _kit_numbers(file, synsets or _beside(images, SYNSET_FILES), words)
    said = _by_image(images, file, lines, meant)
    if not said and len(lines) == len(images):
        said = {index: (number, _bare(line)) for index, (number, line) in enumerate(lines)}
    missing = [item for index, item in enumerate(images.items) if index not in said]
    if missing:
        raise InputError(
            f"'{file}' ({len(lines)} lines) has no label for {len(missing)} of the {len(images)} "
            f"images, the first: '{images.relative(missing[0])}'.",
            "Give a line 'file label' for each, or one label a line for all in sorted order.",
        )
    rows = [said[index] for index in range(len(images))]
    return [_class(words, meant(word), word, number, file) for number, word in rows]


def _class(words: ClassWords, meant: Sequence[int], word: str, number: int, file: Path) -> int:
    """Return the one class that a word in line ``number`` of a file means.

    Raises:
        InputError: it means none, or several.
    """
    if len(meant) != 1:
        raise InputError(
            f"'{word}' in line {number} of '{file}' {words.doubt(meant)}.",
            "A label is a class name, a WordNet id, or an index from 0; --class-order names "
            "or index says which.",
        )
    return meant[0]


def _by_image(
    images: ImageSet, file: Path, lines: Sequence[tuple[int, str]], meant: Meant
) -> dict[int, tuple[int, str]]:
    """Return line and label of each image that a line ``file label`` names."""
    named: dict[str, int | None] = {}
    paths = [Path(images.relative(item)) for item in images.items]
    for keys in ([p.as_posix() for p in paths], [p.name for p in paths], [p.stem for p in paths]):
        layer: dict[str, int | None] = {}
        for place, key in enumerate(keys):
            layer[key] = None if key in layer else place  # what several are called says nothing
        named = {**layer, **named}
    said: dict[int, tuple[int, str]] = {}
    for number, line in lines:
        found = [
            (index, label)
            for match in re.finditer(r"[\s,;]+", line)
            if (index := _image(named, _bare(line[: match.start()]))) is not None
            and (label := _bare(line[match.end() :]))
        ]
        known = [pair for pair in found if meant(pair[1])]
        for index, label in (known or found)[-1:]:
            before = said.setdefault(index, (number, label))
            if meant(before[1]) != meant(label):
                raise InputError(
                    f"'{file}' contradicts itself about "
                    f"'{images.relative(images.items[index])}': '{before[1]}' in line "
                    f"{before[0]}, '{label}' in line {number}.",
                    "Take the wrong line out.",
                )
    return said


def _image(named: Mapping[str, int | None], word: str) -> int | None:
    """Return the image whose path, or the end of whose path, a word is."""
    parts = [part for part in re.split(r"[/\\]", word) if part not in {"", "."}]
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((named[tail] for tail in tails if tail in named), None)


def _bare(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].strip() if quoted else text


def _kit_numbers(file: Path, synsets: Path | None, words: ClassWords) -> Meant:
    """Return what the development kit's own numbers mean, 1 to 1000 in its own order."""
    if synsets is None:
        raise InputError(
            f"The numbers in '{file}' are the development kit's, not the network's, "
            "and nothing says what they mean.",
            "Give --synsets FILE with one WordNet id a line, in the kit's order.",
        )
    ids = [match[0] for _, row in text_lines(synsets) if (match := WORDNET_ID.search(row))]
    numbers = {str(number): wnid for number, wnid in enumerate(ids, 1)}
    return lambda word: words.named(numbers.get(word, ""))
