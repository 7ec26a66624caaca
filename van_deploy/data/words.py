"""What a word says about a class: its name, WordNet id or index; and text files of such words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from van_deploy.documents import DocumentError, require_regular_file
from van_deploy.errors import InputError

WORDNET_ID = re.compile(r"n\d{8}")


class ClassWords:
    """The words by which a network's classes may be called.

    A word names the class that is called exactly so; else the one with that WordNet id
    (networks of ImageNet's 1,000 classes); else the one that is called so but for case,
    Unicode form, blanks, ``-`` and ``_``. What stands before a name's first comma is a name
    too. A whole number may also be a class's index, from 0.

    Args:
        classes: logits of the network; with one, classes 0 and 1 are its two answers.
        names: in the order of the logits, if known.
    """

    def __init__(self, classes: int, names: Sequence[str] | None = None) -> None:
        self.count = max(classes, 2)
        self.names = tuple(names) if names and len(names) == self.count else ()
        first = [name.split(",")[0] for name in self.names]
        folded = [[_folded(name) for name in names] for names in (self.names, first)]
        self._tables = [_table(keys) for keys in (self.names, first, *folded)]

    def named(self, word: str) -> tuple[int, ...]:
        """Return the class that ``word`` names; several where names are not unique, or none."""
        word = word.strip()
        for number, table in enumerate(self._tables):
            if number == 2 and WORDNET_ID.fullmatch(word) and word in self._synsets:
                return (self._synsets[word],)
            found = table.get(word if number < 2 else _folded(word))
            if found:
                return tuple(found)
        return ()

    def indexed(self, word: str) -> tuple[int, ...]:
        """Return the class whose index ``word`` is, or none."""
        number = int(word) if re.fullmatch("[0-9]+", word) else self.count
        return (number,) if number < self.count else ()

    def meant(self, word: str, order: str | None = None) -> tuple[int, ...]:
        """Return every class that ``word`` may mean; ``order`` may say ``names`` or ``index``."""
        named = () if order == "index" else self.named(word)
        indexed = () if order == "names" else self.indexed(word)
        return tuple(dict.fromkeys((*named, *indexed)))

    def doubt(self, found: Sequence[int]) -> str:
        """Return what is wrong with the classes a word may mean, as the end of a sentence."""
        if found:
            return f"may be any of the classes {', '.join(map(str, found))}"
        return f"is no class of this network (it has {self.count}, 0 to {self.count - 1})"

    @cached_property
    def _synsets(self) -> dict[str, int]:
        """ImageNet's WordNet ids, if the network's classes are ImageNet's."""
        if self.count != 1000:
            return {}
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        lemmas = [{*map(_folded, text.split(","))} for text in info.label_descriptions()]
        pairs = zip(self.names, lemmas, strict=False)
        same = sum(any(_folded(part) in known for part in n.split(",")) for n, known in pairs)
        ids = dict(zip(info.label_names(), range(1000), strict=True))
        return ids if 2 * same >= len(self.names) else {}


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _table(keys: Sequence[str]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        table.setdefault(key.strip(), []).append(index)
    table.pop("", None)
    return table


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
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"line {content[: error.start].count(10) + 1} is not UTF-8"
        raise InputError(f"The labels '{path}' cannot be read: {reason}.", "Check it.") from error
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
