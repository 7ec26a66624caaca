"""Images as a graph takes them, and classes from whatever outputs it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.errors import UsageError
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import Task, probabilities
from van_deploy.model.pixels import Pixels, normalised
from van_deploy.model.preprocess import Preprocessing
from van_deploy.runners.base import Images


@dataclass(frozen=True)
class TopClasses:
    """The most probable classes of a batch, most probable first.

    Attributes:
        classes: indices ``(N, k)`` int64.
        probabilities: ``(N, k)`` float32, 0 to 1.
    """

    classes: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]


def network_input(
    pixels: Pixels | Images, embedding: str, preprocessing: Preprocessing
) -> npt.NDArray[Any]:
    """Return images as a graph with ``embedding`` takes them.

    Args:
        pixels: resized images ``(N, S, S, C)`` uint8, or normalised ``(N, C, S, S)`` float32.
        embedding: the preprocessing inside the graph.
        preprocessing: of the network.

    Raises:
        UsageError: the graph normalises, and the images are normalised already.
    """
    if pixels.dtype == np.float32 and embedding == "none":
        return pixels
    if pixels.dtype == np.float32:
        raise UsageError(
            f"The images are normalised network input, and the graph (embedded: {embedding}) "
            "normalises by itself.",
            "Give uint8 images.",
        )
    if embedding == "uint8":
        return np.ascontiguousarray(pixels)
    if embedding == "normalize":
        values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        return values / np.float32(255)
    return normalised(pixels.astype(np.uint8, copy=False), preprocessing)


def top_classes(
    outputs: Mapping[str, npt.NDArray[Any]], count: int, task: Task, name: str
) -> TopClasses:
    """Return the ``count`` most probable classes of each row, or as many as there are.

    Args:
        outputs: of the network, by name.
        count: how many classes.
        task: how logits become probabilities.
        name: of the artifact, for the error.

    Raises:
        UsageError: the artifact gives only its first five and more are asked for.
    """
    if OUTPUT_NAME in outputs or "probabilities" in outputs:
        logits = outputs.get(OUTPUT_NAME)
        scores = outputs["probabilities"] if logits is None else logits.astype(np.float32)
        shares = scores if logits is None else probabilities(scores, task)
        classes = np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int64)
        ranked = np.take_along_axis(shares, classes, axis=1).astype(np.float32)
        return TopClasses(classes, ranked)
    classes, shares = outputs[TOP_CLASSES], outputs[TOP_PROBABILITIES]
    if count > classes.shape[1]:
        raise UsageError(
            f"'{name}' gives its first {classes.shape[1]} classes only, not {count}.",
            f"Ask for {classes.shape[1]}, or take another artifact.",
        )
    return TopClasses(classes[:, :count], shares[:, :count])
