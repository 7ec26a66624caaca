"""What a word says about a class: its name, WordNet id or number, or a folder's place in order."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from van_deploy.documents import DocumentError, require_regular_file
from van_deploy.errors import ImageError, InputError

__all__ = [
    "CLASS_ORDERS",
    "WORDNET_ID",
    "ClassWords",
    "class_names_from_file",
    "natural_key",
    "order_readings",
    "text_lines",
]

CLASS_ORDERS = {
    "names": "the words are the network's class names",
    "index": "a number is the class's index, from 0",
    "strings": "folders sorted as strings, as torchvision's ImageFolder does",
    "natural": "folders sorted with numbers as numbers, ignoring case, as timm does",
}
"""What ``class_order`` may say, and what it means."""

WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[0-9]+")


class ClassWords:
    """The words by which a network's classes may be called.

    A word means the class whose name it is exactly; else the one with that WordNet id
    (networks of ImageNet's 1,000 classes); else the only one whose name it is but for case,
    Unicode form, blanks, ``-`` and ``_``. Before the first comma of a name is a name, too.

    Args:
        classes: logits of the network; with one, classes 0 and 1 are its two answers.
        names: in the order of the logits, if known.
    """

    def __init__(self, classes: int, names: Sequence[str] | None = None) -> None:
        self.count = max(classes, 2)
        self.names = tuple(names) if names and len(names) == self.count else ()
        self._tables = [
            _table(name.strip() for name in self.names),
            _table(name.split(",")[0].strip() for name in self.names),
            _table(map(_folded, self.names)),
            _table(_folded(name.split(",")[0]) for name in self.names),
        ]

    def matches(self, word: str) -> tuple[int, ...]:
        """Return every class that ``word`` may name; several where names are not unique."""
        word = word.strip()
        for number, table in enumerate(self._tables):
            if number == 2 and WORDNET_ID.fullmatch(word) and word in self._synsets:
                return (self._synsets[word],)
            found = table.get(word if number < 2 else _folded(word), ())
            if found:
                return tuple(found)
        return ()

    def named(self, word: str) -> int | None:
        """Return the only class that ``word`` names, or None."""
        found = self.matches(word)
        return found[0] if len(found) == 1 else None

    def indexed(self, word: str) -> int | None:
        """Return the class whose index ``word`` is, or None."""
        number = int(word) if _NUMBER.fullmatch(word.strip()) else self.count
        return number if number < self.count else None

    def find(self, word: str) -> int | None:
        """Return the class that ``word`` names, else the one whose index it is, or None."""
        named = self.named(word)
        return self.indexed(word) if named is None else named

    def refusal(self, word: str) -> str:
        """Return why ``word`` means no class, as the end of a sentence."""
        found = self.matches(word)
        if len(found) > 1:
            return f"is the name of {len(found)} classes ({', '.join(map(str, found))})"
        if _NUMBER.fullmatch(word):
            return f"is not one of the network's {self.count} classes (0 to {self.count - 1})"
        return "is no class of this network"

    @cached_property
    def _synsets(self) -> Mapping[str, int]:
        """ImageNet's WordNet ids, if the network's classes are ImageNet's."""
        if self.count != 1000:
            return {}
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        same = [
            any(_folded(part) in map(_folded, described.split(",")) for part in name.split(","))
            for name, described in zip(self.names, info.label_descriptions(), strict=False)
        ]
        if self.names and 2 * sum(same) < len(same):
            return {}
        return {info.index_to_label_name(index): index for index in range(info.num_classes())}


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _table(keys: Iterable[str]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        if key:
            table.setdefault(key, []).append(index)
    return table


# --- folders in order ------------------------------------------------------------------------


def natural_key(name: str) -> list[str | int]:
    """Return timm's key for class folders: numbers as numbers, case ignored.

    >>> sorted(["class10", "class2", "B", "a"], key=natural_key)
    ['a', 'B', 'class2', 'class10']
    """
    return [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name.lower())]


def order_readings(
    used: Sequence[str], folders: Sequence[str], classes: int
) -> dict[str, dict[str, int]]:
    """Return each way to number class folders that fits the number of classes.

    Args:
        used: the folders that hold images.
        folders: all of them: where these are as many as the classes, an empty one counts.
        classes: of the network.
    """
    readings: dict[str, dict[str, int]] = {}
    whole = [names for names in (folders, used) if len(names) == classes]
    numeric = all(_NUMBER.fullmatch(name) for name in used)
    if not whole and numeric:  # some are missing: the whole is taken to be 0.. or 1..
        first = min(1, *map(int, used)) if len(used) > 1 else min(1, int(used[0]))
        width = max(map(len, used)) if any(n[0] == "0" and len(n) > 1 for n in used) else 0
        whole = [[str(number).zfill(width) for number in range(first, first + classes)]]
    if whole and set(used) <= set(whole[0]):
        keys: dict[str, Callable[[str], object]] = {"strings": str, "natural": natural_key}
        for order, key in keys.items():
            ranked = sorted(sorted(whole[0]), key=key)  # type: ignore[arg-type]
            readings[order] = {name: ranked.index(name) for name in used}
    numbers = {name: int(name) for name in used} if numeric else {}
    if numeric and max(numbers.values()) < classes and len({*numbers.values()}) == len(used):
        readings["index"] = numbers
    return readings


# --- text files ------------------------------------------------------------------------------


def text_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, stripped, with their numbers from 1.

    UTF-8, or UTF-16 with its byte order mark; a mark is no part of the text.

    Raises:
        InputError: it cannot be read, or is neither.
    """
    try:
        require_regular_file(path)
        content = path.read_bytes()
        wide = content[:2] in {b"\xff\xfe", b"\xfe\xff"}
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeDecodeError):
            line = content[: error.start].count(b"\n") + 1
            reason = f"line {line} is not UTF-8"
        raise InputError(
            f"The labels '{path}' cannot be read: {reason}.",
            "Check the path, and save it as UTF-8.",
        ) from error
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def class_names_from_file(path: Path, classes: int) -> tuple[str, ...]:
    """Return the class names in a file, one a line, in the order of the logits.

    Raises:
        InputError: it cannot be read, or has another number of names than ``classes``.
    """
    names = tuple(line for _, line in text_lines(path))
    if len(names) != classes:
        raise InputError(
            f"'{path}' has {len(names)} class names; the network has {classes} classes.",
            "Write one name a line, in the order of the logits.",
        )
    return names


def refuse_shared(known: Mapping[str, int], names: Sequence[str]) -> None:
    """Do nothing if no two folders are the same class.

    Raises:
        ImageError: two are.
    """
    first: dict[int, str] = {}
    for folder, label in known.items():
        if label in first:
            called = f" '{names[label]}'" if names else f" {label}"
            raise ImageError(
                f"The folders '{first[label]}' and '{folder}' are both the class{called}.",
                "Put their images into one, or rename one of them.",
            )
        first[label] = folder
