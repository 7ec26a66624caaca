"""Which class each image is, and how that was found out: one resolver for every command.

In this order: a labels file that was given, labels inside an ``.npz``, a ground-truth file
that lies beside the images and fits all of them (ImageNet's layouts), class folders (by class
name, WordNet id or number), WordNet ids at the beginning of file names
(``n03041632_cleaver.jpg``). Where readings differ and nothing decides, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from van_deploy.data.class_words import (
    CLASS_ORDERS,
    WORDNET_ID,
    ClassWords,
    class_names_from_file,
    order_readings,
    refuse_shared,
)
from van_deploy.data.items import ImageSet, image_set
from van_deploy.data.label_files import labels_beside, labels_from_file
from van_deploy.errors import ImageError, InputError, UsageError

__all__ = ["CLASS_ORDERS", "class_names_from_file", "labelled_images", "with_labels_if_known"]

REMEDY = "Call them by class name, WordNet id or index, or give --labels FILE."


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
        labels_file: lines ``file label``, or one label a line for the sorted files.
        synsets_file: what the numbers of ImageNet's development kit mean: one
            WordNet id a line.
        class_order: one of :data:`CLASS_ORDERS`, where nothing else decides.
        find_labels: look for a ground-truth file beside the images.

    Raises:
        UsageError: there is no such order.
        ImageError: there is no image, or no label can be found for one.
        InputError: a labels file cannot be read or does not fit the images.
    """
    if class_order is not None and class_order not in CLASS_ORDERS:
        raise UsageError(
            f"There is no class order '{class_order}'.", f"Known: {', '.join(CLASS_ORDERS)}."
        )
    images = source if isinstance(source, ImageSet) else image_set(source)
    words = ClassWords(classes, class_names)
    if labels_file is not None:
        labels = labels_from_file(
            images, labels_file, words, order=class_order, synsets_file=synsets_file
        )
        return images.labelled(labels, f"labels from '{labels_file}'")
    if images.labels is not None:
        largest = int(images.labels.max())
        if largest >= words.count:
            raise InputError(
                f"Label {largest} of {images.description} {words.refusal(str(largest))}.",
                "Check that the labels are this network's, and count from 0.",
            )
        return images
    file = labels_beside(images) if find_labels else None
    if file is None:
        return images.labelled(*_of_names(images, words, class_order))
    return _with_file(images, words, file, class_order, synsets_file)


def with_labels_if_known(
    images: ImageSet,
    classes: int,
    class_names: Sequence[str] | None = None,
    class_order: str | None = None,
) -> tuple[ImageSet, str]:
    """Return the images with labels, and ""; or without any, and why there are none.

    For commands that can do without: what they measure is then agreement, not accuracy.
    """
    try:
        return labelled_images(images, classes, class_names, class_order=class_order), ""
    except InputError as reason:
        return images, str(reason)


def _with_file(
    images: ImageSet,
    words: ClassWords,
    file: Path,
    order: str | None,
    synsets_file: Path | None,
) -> ImageSet:
    """Return the images labelled by a file found beside them, or by their names if it is no help.

    Raises:
        ImageError: neither fits, or both do and differ.
    """
    kind = order if order in {"names", "index"} else None
    try:
        by_file = labels_from_file(images, file, words, order=kind, synsets_file=synsets_file)
    except InputError as unfit:
        try:
            labels, how = _of_names(images, words, order)
        except ImageError as error:
            raise ImageError(
                f"{error.message}\nThe file beside them was not used: {unfit.message}", error.remedy
            ) from None
        return images.labelled(labels, f"{how} ('{file}' is not used: {unfit.message})")
    try:
        labels, how = _of_names(images, words, order)
    except ImageError:
        labels = by_file
    if labels != by_file:
        index = next(
            i for i, pair in enumerate(zip(labels, by_file, strict=True)) if len({*pair}) > 1
        )
        raise ImageError(
            f"'{file}' says that '{images.relative(images.items[index])}' is class "
            f"{by_file[index]}, and its folder or name says class {labels[index]} ({how}).",
            f"Give --labels {file}, or --no-label-files to go by the folders.",
        )
    return images.labelled(by_file, f"labels from '{file}'")


def _of_names(images: ImageSet, words: ClassWords, order: str | None) -> tuple[list[int], str]:
    """Return labels from class folders, or from the files' own names, and how."""
    groups = sorted({item.group for item in images.items})
    if "" not in groups:
        known, how = _of_folders(images, groups, words, order)
        return [known[item.group] for item in images.items], how
    labels = []
    for item in images.items:
        wnid = WORDNET_ID.match(Path(item.name).name)
        label = words.named(wnid[0]) if wnid else None
        if label is None:
            beside = " It lies beside the class folders." if len(groups) > 1 else ""
            raise ImageError(
                f"Nothing says which class '{item.name}' belongs to.{beside}",
                "Sort the images into one folder a class, or give --labels FILE.",
            )
        labels.append(label)
    return labels, "WordNet ids in the files' names"


def _of_folders(
    images: ImageSet, groups: Sequence[str], words: ClassWords, order: str | None
) -> tuple[Mapping[str, int], str]:
    """Return the class of each folder, and how it was found."""
    known = {name: label for name in groups if (label := words.named(name)) is not None}
    if len(known) == len(groups) and order in {None, "names"}:
        refuse_shared(known, words.names)
        ids = all(map(WORDNET_ID.fullmatch, groups)) and not set(groups) <= set(words.names)
        return known, f"class folders by {'WordNet id' if ids else 'class name'}"
    readings = order_readings(groups, images.folders or groups, words.count)
    if order in readings:
        if len(known) == len(groups) and known != readings[order]:
            raise ImageError(
                f"The folders in '{images.root}' carry the class names, in another order than "
                f"--class-order {order} gives.",
                "Leave --class-order out.",
            )
        return readings[order], f"class folders in the order asked for ({order})"
    by_number = "index" in readings
    if order is None and not known and (by_number or not words.names):
        distinct = {tuple(reading.items()) for reading in readings.values()}
        if len(distinct) == 1:
            how = "number" if by_number else "sorted name, since the weights name no classes"
            return next(iter(readings.values())), f"class folders by {how}"
        if distinct:
            raise _unknown_order(images, groups, readings)
    raise _strangers(images, groups, known, words, order)


def _unknown_order(
    images: ImageSet, groups: Sequence[str], readings: Mapping[str, Mapping[str, int]]
) -> ImageError:
    differing = [n for n in groups if len({reading[n] for reading in readings.values()}) > 1]
    lines = [
        f"  {order}: {', '.join(f'{name!r} is class {reading[name]}' for name in differing[:3])}"
        f"{', ...' if len(differing) > 3 else ''} ({CLASS_ORDERS[order]})"
        for order, reading in readings.items()
    ]
    return ImageError(
        f"Which class each of the {len(groups)} folders in '{images.root}' is, is not known: no "
        "class of the network is called as they are, and readings that fit differ:\n"
        + "\n".join(lines),
        f"Say how training numbered them with --class-order {' or '.join(readings)}, give "
        "--labels FILE, or export again with --labels NAMES.txt, one folder's name a line in the "
        "order of the logits.",
    )


def _strangers(
    images: ImageSet,
    groups: Sequence[str],
    known: Mapping[str, int],
    words: ClassWords,
    order: str | None,
) -> ImageError:
    strangers = [name for name in groups if name not in known]
    if order in {"strings", "natural", "index"}:
        return ImageError(
            f"--class-order {order} does not fit: '{images.root}' has {len(groups)} class "
            f"folders ({', '.join(groups[:5])}), the network {words.count} classes.",
            "Name the folders after the classes, or give --labels FILE; an empty folder for a "
            "class without images counts.",
        )
    twice = [name for name in strangers if len(words.matches(name)) > 1]
    if twice:
        return ImageError(f"The folder '{twice[0]}' {words.refusal(twice[0])}.", REMEDY)
    return ImageError(
        f"{len(strangers)} of the {len(groups)} folders in '{images.root}' are no class of this "
        f"network: {', '.join(strangers[:5])}.",
        REMEDY,
    )
