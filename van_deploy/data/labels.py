"""Which class each image is, and how that was found out: one resolver for every command.

A labels file that was given; else class folders called as the
classes are, or WordNet ids at the beginning of file names (``n03041632_cleaver.jpg``); else a
ground-truth file that lies beside the images and fits all of them (ImageNet's layouts); else
the order of the class folders, where every order that fits gives the same classes. Where
readings differ and nothing decides, nothing is guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.data.images import SUFFIXES, ImageSet, image_set
from van_deploy.documents import DocumentError, read_text_file
from van_deploy.errors import ImageError, InputError, UsageError

# What ``class_order`` may say of folders: sorted as strings, or numbers as numbers and ignoring
# case, or by the number that each is. ``names`` is of words in a file.
CLASS_ORDERS = {"strings": "as torchvision", "natural": "as timm", "index": "counted from 0"}
KAGGLE_FILE, KAGGLE_HEADER = "LOC_val_solution.csv", "ImageId,PredictionString"
TENSORFLOW_FILE = "imagenet_2012_validation_synset_labels.txt"
KIT_FILE = "ILSVRC2012_validation_ground_truth.txt"
GROUND_TRUTH_FILES = (KAGGLE_FILE, TENSORFLOW_FILE, "val.txt", KIT_FILE)  # val.txt is Caffe's
WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile("[0-9]+")


class ClassWords:
    """The words by which a network's classes may be called.

    A word names the class that is called exactly so; else the one that is called so but for
    case, Unicode form, blanks, ``-`` and ``_``; else the one with that WordNet id (networks of
    ImageNet's 1,000 classes). What stands before a name's first comma is a name too. A whole
    number may also be a class's index, from 0.

    Args:
        classes: logits of the network; with one, classes 0 and 1 are its two answers.
        names: in the order of the logits, if known.
    """

    def __init__(self, classes: int, names: Sequence[str] | None = None) -> None:
        self.count = max(classes, 2)
        self.names = tuple(names) if names and len(names) == self.count else ()
        first = [name.split(",")[0] for name in self.names]
        self._tables = [defaultdict[str, list[int]](list) for _ in range(4)]
        for index, forms in enumerate(zip(self.names, first, strict=True)):
            for table, form in zip(self._tables, (*forms, *map(_folded, forms)), strict=True):
                table[form.strip()].append(index)

    def named(self, word: str) -> tuple[int, ...]:
        """Return the class that ``word`` names; several where names are not unique, or none."""
        word, folded = word.strip(), _folded(word)
        for table, form in zip(self._tables, (word, word, folded, folded), strict=True):
            if form and form in table:
                return tuple(table[form])
        return self._synsets.get(word, ()) if WORDNET_ID.fullmatch(word) else ()

    def only(self, word: str, order: str | None, where: str) -> int:
        """Return the one class that ``word`` means; ``order`` may say ``names`` or ``index``.

        Raises:
            InputError: it means none, or several; ``where`` says where it stands.
        """
        found = set() if order == "index" else {*self.named(word)}
        if _NUMBER.fullmatch(word) and order != "names" and int(word) < self.count:
            found.add(int(word))
        if len(found) == 1:
            return found.pop()
        what = " or ".join(map(str, sorted(found))) or "no class"
        raise InputError(
            f"'{word}' in {where} may mean {what} of this network's 0 to {self.count - 1}.",
            "Give a name, a WordNet id or an index; --class-order names or index says which.",
        )

    @cached_property
    def _synsets(self) -> dict[str, tuple[int, ...]]:
        """ImageNet's WordNet ids, if the network's classes are ImageNet's."""
        if self.count != 1000:
            return {}
        from timm.data.imagenet_info import ImageNetInfo  # hosts without PyTorch do not have it

        info = ImageNetInfo("imagenet-1k")
        lemmas = [{*map(_folded, text.split(","))} for text in info.label_descriptions()]
        pairs = zip(self.names, lemmas, strict=False)
        same = sum(any(_folded(part) in known for part in n.split(",")) for n, known in pairs)
        known_here = 2 * same >= len(self.names)
        return {n: (i,) for i, n in enumerate(info.label_names())} if known_here else {}


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def label_images(
    source: Path | ImageSet,
    classes: int,
    class_names: Sequence[str] | None = None,
    *,
    labels_file: Path | None = None,
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
        class_order: one of :data:`CLASS_ORDERS` or ``names``, where nothing else decides.
        find_labels: look for a ground-truth file beside the images.

    Raises:
        UsageError: the order is one of folders, and the labels are in a file.
        ImageError: there is no image, or no label can be found for one.
        InputError: a labels file cannot be read or does not fit the images.
    """
    images, words = image_set(source), ClassWords(classes, class_names)
    if labels_file is not None:
        return _of_file(images, labels_file, words, class_order)
    if images.labels is not None:  # the digits' own
        return images
    if class_order in {None, "names"} and (named := _by_name(images, words)):
        return named
    groups = sorted({item.group for item in images.items})
    flat, unfit = groups == [""], ""
    if images.root is not None and find_labels and (flat or class_order is None):
        here = images.root.resolve()
        places = (here, *here.parents[:3]) if flat else (here,)
        beside = (place / name for place in places for name in GROUND_TRUTH_FILES)
        if file := next(filter(Path.is_file, beside), None):
            try:
                return _of_file(images, file, words, class_order)
            except InputError as error:
                unfit = f" ('{file}' is not used: {error.message.rstrip('.')})"
    if "" in groups:
        lost = next(item.name for item in images.items if not item.group)
        wrong = f"Nothing says which class '{lost}' belongs to{unfit}."
        raise ImageError(wrong, "Sort the images into one folder a class, or give --labels FILE.")
    return _by_order(images, groups, words, class_order, unfit)


def _by_name(images: ImageSet, words: ClassWords) -> ImageSet | None:
    """Return the images by class folders' names or WordNet ids; None where one names no class.

    Raises:
        ImageError: two folders name the same class.
    """
    called = [i.group or (WORDNET_ID.match(Path(i.name).name) or [""])[0] for i in images.items]
    meant = {word: words.named(word) for word in dict.fromkeys(called)}
    if any(len(found) != 1 for found in meant.values()):
        return None
    by_class: dict[int, str] = {}
    for word, (number,) in meant.items():
        if by_class.setdefault(number, word) != word:
            wrong = f"The folders '{by_class[number]}' and '{word}' are both class {number}."
            raise ImageError(wrong, "Put their images into one, or rename one of them.")
    kind = "WordNet id" if all(map(WORDNET_ID.fullmatch, meant)) else "class name"
    what = "class folders" if any(item.group for item in images.items) else "files"
    return images.labelled([meant[word][0] for word in called], f"{what} by {kind}")


# --- the order of class folders --------------------------------------------------------------


def natural_key(name: str) -> list[str | int]:
    """Return timm's key for class folders: numbers as numbers, case ignored.

    >>> sorted(["class10", "class2", "B", "a"], key=natural_key)
    ['a', 'B', 'class2', 'class10']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _by_order(
    images: ImageSet, groups: Sequence[str], words: ClassWords, order: str | None, unfit: str
) -> ImageSet:
    """Return the images with the class of each folder, by the folder's place or number.

    Places are those among all folders where these are as many as the classes: then an empty
    folder is a class without images. Numbers that leave classes out may count from 0 or from 1.

    Raises:
        ImageError: no order fits, or those that do differ.
    """
    readings: dict[str, tuple[int, ...]] = {}
    whole = sorted(images.folders if len(images.folders) == words.count else groups)
    numeric, complete = all(map(_NUMBER.fullmatch, whole)), len(whole) == words.count
    if numeric and max(map(int, whole)) < words.count:
        readings["index"] = tuple(map(int, groups))
    if complete:
        natural = sorted(whole, key=natural_key)
        readings["strings"] = tuple(map(whole.index, groups))
        readings["natural"] = tuple(map(natural.index, groups))
    strangers = [name for name in groups if len(words.named(name)) != 1]
    nameless = len(strangers) == len(groups) and (numeric or not words.names)
    agreed = complete and nameless and len({*readings.values()}) == 1
    if order in readings or (agreed and not order):
        how = "by number" if numeric else "in sorted order (the weights name no classes)"
        how = f"in the order asked for ({order})" if order else how
        by_group = dict(zip(groups, readings[order or "strings"], strict=True))
        labels = [by_group[item.group] for item in images.items]
        return images.labelled(labels, f"class folders {how}{unfit}")
    wrong = (
        f"{f'--class-order {order} does not fit: ' if order else ''}{len(strangers)} of the "
        f"{len(groups)} folders in '{images.root}' do not name one of the network's "
        f"{words.count} classes: {', '.join(strangers[:5])}{unfit}."
    )
    if nameless and readings and not order:
        wrong += " Nothing says in which order the network has them. What fits:"
        rows = [*zip(groups, *readings.values(), strict=True)]
        rows.sort(key=lambda row: len({*row[1:]}) == 1)  # first what they differ in
        for place, name in enumerate(readings, 1):
            few = ", ".join(f"{row[0]!r} is class {row[place]}" for row in rows[:3])
            wrong += f"\n  {name}: {few} ({CLASS_ORDERS[name]})"
    raise ImageError(
        wrong,
        f"Give --class-order {' or '.join(readings or CLASS_ORDERS)}, --labels FILE, or export "
        "again with --labels NAMES.txt: one folder's name a line, in the order of the logits (an "
        "empty folder for a class without images counts).",
    )


# --- text files ------------------------------------------------------------------------------


def text_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, stripped, with their numbers from 1.

    UTF-8; a byte order mark is no part of the text.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        text = read_text_file(path).removeprefix("\ufeff")
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"The labels '{path}' cannot be read: {reason}.", "Check it.") from error
    lines = enumerate(text.splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def class_names_from_file(path: Path, classes: int) -> tuple[str, ...]:
    """Return the class names in a file, one a line, in the order of the logits.

    Raises:
        InputError: it cannot be read, or has another number of names than ``classes``.
    """
    names = tuple(line for _, line in text_lines(path))
    if len(names) != classes:
        wrong = f"'{path}' has {len(names)} class names; the network has {classes} classes."
        raise InputError(wrong, "Write one name a line, in the order of the logits.")
    return names


def _of_file(images: ImageSet, file: Path, words: ClassWords, order: str | None) -> ImageSet:
    """Return the images with the class of every one, as a file says.

    Raises:
        InputError: it cannot be read, contradicts itself, or does not fit; the line is named.
        UsageError: the order is one of folders.
    """
    if order in {"strings", "natural"}:
        wrong = f"--class-order {order} orders class folders, and the labels are in '{file}'."
        raise UsageError(wrong, "Leave it out, or give names or index.")
    if file.name == KIT_FILE:
        wrong = f"The numbers in '{file}' are the development kit's own, not the network's classes."
        raise InputError(wrong, "Give --labels with ImageNet's val.txt or LOC_val_solution.csv.")
    lines = text_lines(file)
    if lines and lines[0][1].replace(" ", "") == KAGGLE_HEADER:
        lines = [(number, line.split()[0]) for number, line in lines]
    said = _said(images, file, lines)
    labels = [words.only(word, order, f"line {number} of '{file}'") for number, word in said]
    return images.labelled(labels, f"labels from '{file}'")


def multi_label_targets(
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
            "Give --labels FILE. Write a line for each image: 'file<TAB>label,label'.",
        )
    words, found = ClassWords(classes, class_names), np.zeros((len(images), classes), np.int64)
    said = _said(images, file, [(number, f"{line}\t") for number, line in text_lines(file)])
    for row, (number, text) in enumerate(said):
        for word in filter(None, map(str.strip, text.split(","))):
            found[row, words.only(word, None, f"line {number} of '{file}'")] = 1
    return found


def _said(images: ImageSet, file: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return line and label of every image: of lines ``file label``, or one label a line.

    The file is the path of one image or an end of it, with or without suffix; where a line can
    be cut in several places, the longest file counts.

    Raises:
        InputError: an image has no line, or two that differ.
    """
    tails = [_tails(item.name) for item in images.items]
    times = Counter(tail for each in tails for tail in each)  # what several are called names none
    named = {t: index for index, each in enumerate(tails) for t in each if times[t] == 1}
    named |= {each[0]: index for index, each in enumerate(tails)}
    said: dict[int, tuple[int, str]] = {}
    for number, line in lines:
        for cut in reversed([*re.finditer(r"[\s,;]+", line)]):
            found = [named[tail] for tail in _tails(_bare(line[: cut.start()])) if tail in named]
            if not found:
                continue
            label, image = _bare(line[cut.end() :]), images.items[found[0]].name
            before = said.setdefault(found[0], (number, label))
            if before[1] != label:
                raise InputError(
                    f"'{file}' contradicts itself about '{image}': '{before[1]}' in line "
                    f"{before[0]}, '{label}' in line {number}.",
                    "Take the wrong line out.",
                )
            break
    if not said and len(lines) == len(images):
        return [(number, _bare(line)) for number, line in lines]
    missing = [item for index, item in enumerate(images.items) if index not in said]
    if missing:
        raise InputError(
            f"'{file}' ({len(lines)} lines) has no label for {len(missing)} of the {len(images)} "
            f"images, the first: '{missing[0].name}'.",
            "Give a line 'file label' for each, or one label a line for all in sorted order.",
        )
    return [said[index] for index in range(len(images))]


def _tails(path: str) -> list[str]:
    """Return the ends of a path, the longest first, without an image's suffix."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in {"", "."}]
    if parts and Path(parts[-1]).suffix.lower() in SUFFIXES:
        parts[-1] = Path(parts[-1]).stem
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _bare(text: str) -> str:
    """Return a text without blanks and quotes around it."""
    return text.strip().strip("\"'").strip()
