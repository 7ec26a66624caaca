"""Resolve the class label of each image, the same way for every command.

In order of priority: the user's labels file; class folders named as the classes, or WordNet ids
at the beginning of file names (``n03041632_cleaver.jpg``); a ground-truth file beside the images
that has a label for each of them (ImageNet's layouts); the order of the class folders, if every
possible order gives the same labels. Ambiguous labels are an error, never a guess.
"""

import itertools
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

# Values of ``class_order`` for folders: sorted as strings, sorted with numbers as numbers and
# without case, or by the number that is the folder's name. ``names`` is for labels in a file.
CLASS_ORDERS = {"strings": "as torchvision", "natural": "as timm", "index": "counted from 0"}
KAGGLE_FILE, KAGGLE_HEADER = "LOC_val_solution.csv", "ImageId,PredictionString"
TENSORFLOW_FILE = "imagenet_2012_validation_synset_labels.txt"
KIT_FILE = "ILSVRC2012_validation_ground_truth.txt"
GROUND_TRUTH_FILES = (KAGGLE_FILE, TENSORFLOW_FILE, "val.txt", KIT_FILE)  # val.txt is Caffe's
WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile("[0-9]{1,255}")  # int() refuses very long numbers
Lines = list[tuple[int, str]]  # line numbers, from 1, and text


class ClassNames:
    """Lookup of class indices by name.

    A label matches the class with exactly this name; else the one whose name differs only in
    case, Unicode form, spaces, ``-`` and ``_``; else the one with this WordNet id (networks with
    ImageNet's 1,000 classes). The part of a name before its first comma is a name too. An integer
    may also be the index of a class, from 0.

    Args:
        classes: logits of the network; a network with one has the classes 0 and 1.
        names: in the order of the logits, if known; of a network with one logit, that of class 1.
    """

    def __init__(self, classes: int, names: Sequence[str] | None = None) -> None:
        self.count = max(classes, 2)
        self.names = tuple(names or ())
        if classes == len(self.names) == 1:
            self.names = ("", *self.names)  # class 0 has no name
        self.names = self.names if len(self.names) == self.count else ()
        first = [name.split(",")[0] for name in self.names]
        self._tables = [defaultdict[str, list[int]](list) for _ in range(4)]
        for index, forms in enumerate(zip(self.names, first, strict=True)):
            for table, form in zip(self._tables, (*forms, *map(_normalise, forms)), strict=True):
                table[form.strip()].append(index)

    def matches(self, label: str) -> tuple[int, ...]:
        """Return the classes whose name matches ``label``: one, several or none."""
        label, normalised = label.strip(), _normalise(label)
        for table, form in zip(self._tables, (label, label, normalised, normalised), strict=True):
            if form and form in table:
                return tuple(table[form])
        return self._synsets.get(label, ()) if WORDNET_ID.fullmatch(label) else ()

    def resolve(self, label: str, order: str | None, where: str) -> int:
        """Return the class of ``label``; ``order`` may be ``names`` or ``index``.

        Raises:
            InputError: no class or several match; the message has ``where``.
        """
        classes = set() if order == "index" else {*self.matches(label)}
        if _NUMBER.fullmatch(label) and order != "names" and int(label) < self.count:
            classes.add(int(label))
        if len(classes) == 1:
            return classes.pop()
        result = " or ".join(map(str, sorted(classes))) or "no class"
        message = f"'{label}' in {where} matches {result} of this network's 0 to {self.count - 1}."
        remedy = "Give a name, a WordNet id or an index, or --class-order names or index."
        raise InputError(message, remedy)

    @cached_property
    def _synsets(self) -> dict[str, tuple[int, ...]]:
        """ImageNet's WordNet ids, if the network has ImageNet's classes."""
        if self.count != 1000:
            return {}
        from timm.data.imagenet_info import ImageNetInfo  # not available without PyTorch

        info = ImageNetInfo("imagenet-1k")
        lemmas = [{*map(_normalise, text.split(","))} for text in info.label_descriptions()]
        pairs = zip(self.names, lemmas, strict=False)
        equal = sum(any(_normalise(part) in known for part in n.split(",")) for n, known in pairs)
        is_imagenet = 2 * equal >= len(self.names)
        return {n: (i,) for i, n in enumerate(info.label_names())} if is_imagenet else {}


def _normalise(name: str) -> str:
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
    """Return the images with a label for each.

    Args:
        source: the images: a folder, an ``.npz``, or an ``ImageSet``.
        classes: logits of the network; with one, the labels are 0 and 1.
        class_names: in the order of the logits, if known.
        labels_file: lines ``file label`` (separated by spaces, tab, comma or semicolon), or one
            label per line in the order of the images. A label is a class name, a WordNet id
            or an index from 0.
        class_order: one of :data:`CLASS_ORDERS` or ``names``, for ambiguous labels.
        find_labels: look for a ground-truth file beside the images.

    Raises:
        UsageError: the order is for folders, but the labels are in a file.
        ImageError: there is no image, or an image has no label.
        InputError: a labels file cannot be read or does not match the images.
    """
    images, names = image_set(source), ClassNames(classes, class_names)
    if labels_file is not None:
        return _label_by_file(images, labels_file, names, class_order)
    if images.labels is not None:  # of the packaged digits
        return images
    if class_order in {None, "names"} and (labelled := _label_by_name(images, names)):
        return labelled
    groups = sorted({item.group for item in images.items})
    is_flat, unused_file = groups == [""], ""
    if images.root is not None and find_labels and (is_flat or class_order is None):
        root = images.root.resolve()
        folders = (root, *root.parents[:3]) if is_flat else (root,)
        files = (folder / name for folder in folders for name in GROUND_TRUTH_FILES)
        if file := next(filter(Path.is_file, files), None):
            try:
                return _label_by_file(images, file, names, class_order)
            except InputError as error:
                unused_file = f" ('{file}' is not used: {error.message.rstrip('.')})"
    if "" in groups:
        first = next(item.name for item in images.items if not item.group)
        message = f"The class of '{first}' is unknown{unused_file}."
        raise ImageError(message, "Sort the images into a folder per class, or give --labels FILE.")
    return _label_by_order(images, groups, names, class_order, unused_file)


def _label_by_name(images: ImageSet, names: ClassNames) -> ImageSet | None:
    """Label by the names of class folders or by WordNet ids; return None if one does not match.

    Raises:
        ImageError: two folders match the same class.
    """
    labels = [i.group or (WORDNET_ID.match(Path(i.name).name) or [""])[0] for i in images.items]
    matches = {label: names.matches(label) for label in dict.fromkeys(labels)}
    if names.names[:1] == ("",) and sorted(matches.values()) == [(), (1,)]:
        matches = {label: classes or (0,) for label, classes in matches.items()}
    if any(len(classes) != 1 for classes in matches.values()):
        return None
    by_class: dict[int, str] = {}
    for label, (index,) in matches.items():
        if by_class.setdefault(index, label) != label:
            message = f"The folders '{by_class[index]}' and '{label}' are both class {index}."
            raise ImageError(message, "Merge the two folders, or rename one of them.")
    kind = "WordNet id" if all(map(WORDNET_ID.fullmatch, matches)) else "class name"
    source = "class folders" if any(item.group for item in images.items) else "files"
    return images.with_labels([matches[label][0] for label in labels], f"{source} by {kind}")


# --- the order of class folders --------------------------------------------------------------


def natural_key(name: str) -> list[str | int]:
    """Return timm's sort key of class folders: numbers as numbers, case ignored.

    >>> sorted(["class10", "class2", "B", "a"], key=natural_key)
    ['a', 'B', 'class2', 'class10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def _label_by_order(
    images: ImageSet, groups: Sequence[str], names: ClassNames, order: str | None, unused_file: str
) -> ImageSet:
    """Label by the sorted position or the number of each class folder.

    Empty folders count if there are as many folders as classes. Without a folder for each
    class, numbers may start at 0 or 1, so the order is ambiguous.

    Raises:
        ImageError: no order is possible, or the possible ones differ.
    """
    orders: dict[str, tuple[int, ...]] = {}
    folders = sorted(images.folders if len(images.folders) == names.count else groups)
    is_numeric, is_complete = all(map(_NUMBER.fullmatch, folders)), len(folders) == names.count
    if is_numeric and max(map(int, folders)) < names.count:
        orders["index"] = tuple(map(int, groups))
    if is_complete:
        natural = sorted(folders, key=natural_key)
        orders["strings"] = tuple(map(folders.index, groups))
        orders["natural"] = tuple(map(natural.index, groups))
    unmatched = [name for name in groups if len(names.matches(name)) != 1]
    use_order = len(unmatched) == len(groups) and (is_numeric or not names.names)
    is_unambiguous = is_complete and use_order and len({*orders.values()}) == 1
    if order in orders or (is_unambiguous and not order):
        how = "by number" if is_numeric else "in sorted order (the weights have no class names)"
        how = f"in the requested order ({order})" if order else how
        by_group = dict(zip(groups, orders[order or "strings"], strict=True))
        labels = [by_group[item.group] for item in images.items]
        return images.with_labels(labels, f"class folders {how}{unused_file}")
    known = "class names" if names.names else "classes, which have no names"
    message = (
        f"{f'--class-order {order} is not possible: ' if order else ''}{len(unmatched)} of the "
        f"{len(groups)} folders in '{images.root}' do not match one of the network's "
        f"{names.count} {known}: {', '.join(unmatched[:5])}{unused_file}."
    )
    if use_order and orders and not order:
        message += " The order of the network's classes is unknown. Possible orders:"
        rows = [*zip(groups, *orders.values(), strict=True)]
        rows.sort(key=lambda row: len({*row[1:]}) == 1)  # folders with different labels first
        for column, name in enumerate(orders, 1):
            examples = ", ".join(f"{row[0]!r} is class {row[column]}" for row in rows[:3])
            message += f"\n  {name}: {examples} ({CLASS_ORDERS[name]})"
    choice = f"--class-order {' or '.join(orders)}, " if orders else ""
    remedy = f"Give {choice}--labels FILE, or export again with --labels NAMES.txt: one folder "
    remedy += "name per line in the order of the logits (including those without images)."
    raise ImageError(message, remedy)


# --- text files ------------------------------------------------------------------------------


def read_lines(path: Path) -> Lines:
    """Return the non-blank lines of a UTF-8 file, stripped, with their numbers from 1.

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
    """Return the class names of a file with one per line, in the order of the logits.

    Raises:
        InputError: it cannot be read, or the number of names is not ``classes``.
    """
    names = tuple(line for _, line in read_lines(path))
    if classes == 1 and len(names) == 2:  # as in a checkpoint: one logit of two classes
        return names[1:]
    if len(names) != classes:
        message = f"'{path}' has {len(names)} class names; the network has {classes} classes."
        raise InputError(message, "Write one name per line, in the order of the logits.")
    return names


def _label_by_file(images: ImageSet, file: Path, names: ClassNames, order: str | None) -> ImageSet:
    """Label with a labels file.

    Raises:
        InputError: it cannot be read, is contradictory, or does not match the images or classes.
        UsageError: the order is for folders.
    """
    if order in {"strings", "natural"}:
        message = f"--class-order {order} is for class folders, but the labels are in '{file}'."
        raise UsageError(message, "Omit it, or give names or index.")
    if file.name == KIT_FILE:
        message = f"The numbers in '{file}' are the development kit's ids, not class indices."
        raise InputError(message, "Give --labels with ImageNet's val.txt or LOC_val_solution.csv.")
    lines = read_lines(file)
    if lines and lines[0][1].replace(" ", "") == KAGGLE_HEADER:
        lines = [(number, line.split()[0]) for number, line in lines]
    entries = _match_lines(images, file, lines)
    labels = [names.resolve(text, order, f"line {number} of '{file}'") for number, text in entries]
    return images.with_labels(labels, f"labels from '{file}'")


def multi_label_targets(
    images: ImageSet, file: Path | None, classes: int, class_names: Sequence[str] | None
) -> npt.NDArray[np.int64]:
    """Return the targets ``(N, K)`` of a multi-label network, 0 or 1.

    Args:
        images: in the order of the rows.
        file: lines ``file<TAB>label,label``; a label is the name or index of a class, and an
            image may have none.
        classes: labels of the network.
        class_names: in the order of the logits, if known.

    Raises:
        InputError: there is no file, it cannot be read, or it does not match the images.
    """
    if file is None:
        message = "A multi-label network needs a labels file; class folders are not enough."
        remedy = "Give --labels FILE with a line for each image: 'file<TAB>label,label'."
        raise InputError(message, remedy)
    names, targets = ClassNames(classes, class_names), np.zeros((len(images), classes), np.int64)
    lines = [(number, f"{line}\t") for number, line in read_lines(file)]
    for row, (number, text) in enumerate(_match_lines(images, file, lines)):
        where = f"line {number} of '{file}'"
        labels = filter(None, map(str.strip, text.split(",")))
        columns = [names.resolve(label, None, where) for label in labels]
        if len({*columns}) < len(columns):
            message = f"A label is repeated in {where}: '{text.strip()}'."
            remedy = "List the image's labels, not 0 or 1 per class: 'file<TAB>label,label'."
            raise InputError(message, remedy)
        targets[row, columns] = 1
    return targets


def _match_lines(images: ImageSet, file: Path, lines: Lines) -> Lines:
    """Return line number and label of every image, from lines ``file label`` or ``label``.

    ``file`` is the path of an image, the last parts of it, or a longer path that ends in it, with
    or without suffix. If a line can be split at several separators, the longest file name is used.

    Raises:
        InputError: an image has no line, or several that differ.
    """
    paths = [item.name for item in images.items]
    stems = [_without_suffix(path) for path in paths]
    tails = [{*_path_tails(p), *_path_tails(s)} for p, s in zip(paths, stems, strict=True)]
    counts, stem_counts = Counter(itertools.chain(*tails)), Counter(stems)
    names = {stem: i for i, stem in enumerate(stems) if stem_counts[stem] == 1}
    names |= {path: i for i, path in enumerate(paths)}
    ends = {tail: i for i, each in enumerate(tails) for tail in each if counts[tail] == 1} | names
    entries: dict[int, tuple[int, str]] = {}
    for number, line in lines:
        for separator in reversed([*re.finditer(r"[\s,;]+", line)]):
            path, *shorter = _path_tails(_unquote(line[: separator.start()])) or [""]
            tables = ((path, ends), *((tail, names) for tail in shorter))
            forms = ((form, t) for p, t in tables for form in (p, _without_suffix(p)))
            index = next((table[form] for form, table in forms if form in table), None)
            if index is None:
                continue
            label = _unquote(line[separator.end() :])
            first = entries.setdefault(index, (number, label))
            if first[1] != label:
                pair = f"'{first[1]}' in line {first[0]}, '{label}' in line {number}"
                message = f"'{file}' has two labels for '{images.items[index].name}': {pair}."
                raise InputError(message, "Remove one of the two lines.")
            break
    if not entries and len(lines) == len(images):
        if images.root and paths != sorted(paths, key=natural_key):
            message = f"'{file}' has one label per line, and the order of the images is ambiguous: "
            message += "their names sort differently with numbers as numbers and without case."
            raise InputError(message, "Write lines 'file label'.")
        return [(number, _unquote(line)) for number, line in lines]
    missing = [item for index, item in enumerate(images.items) if index not in entries]
    if missing:
        message = f"'{file}' ({len(lines)} lines) has no label for {len(missing)} of the "
        message += f"{len(images)} images, the first: '{missing[0].name}'."
        remedy = "Give a line 'file label' for each, or one label per line for all in sorted order."
        raise InputError(message, remedy)
    return [entries[index] for index in range(len(images))]


def _path_tails(path: str) -> list[str]:
    """Return the trailing parts of a path, the longest first."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in {"", "."}]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _without_suffix(path: str) -> str:
    """Return a path without an image's suffix."""
    suffix = Path(path).suffix
    return path.removesuffix(suffix) if suffix.lower() in SUFFIXES else path


def _unquote(text: str) -> str:
    """Return a text without surrounding spaces and quotes."""
    return text.strip().strip("\"'").strip()
