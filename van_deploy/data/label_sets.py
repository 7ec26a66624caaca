"""Many labels an image: a file that says which of them each image has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.data.items import ImageSet
from van_deploy.data.words import ClassWords, text_lines
from van_deploy.errors import InputError

__all__ = ["label_sets"]

_FORM = "Write a line for each image: its file, a tab, and its labels with commas between."


def label_sets(
    images: ImageSet, file: Path | None, classes: int, class_names: Sequence[str] | None
) -> npt.NDArray[np.int64]:
    """Return which labels each image has, ``(N, K)`` of 0 and 1.

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
            f"Give --labels FILE. {_FORM}",
        )
    words = ClassWords(classes, class_names)
    sets: dict[str, list[int]] = {}
    for number, line in text_lines(file):
        name, _, labels = line.partition("\t")
        sets[name.strip()] = [
            _label(words, word, number, file) for word in labels.split(",") if word.strip()
        ]
    found = np.zeros((len(images), classes), np.int64)
    for row, item in enumerate(images.items):
        name = images.relative(item)
        if name not in sets:
            raise InputError(f"'{file}' has no labels for '{name}'.", _FORM)
        found[row, sets[name]] = 1
    return found


def _label(words: ClassWords, word: str, number: int, file: Path) -> int:
    meant = words.meant(word)
    if len(meant) != 1:
        raise InputError(
            f"'{word.strip()}' in line {number} of '{file}' {words.doubt(meant)}.", _FORM
        )
    return meant[0]
