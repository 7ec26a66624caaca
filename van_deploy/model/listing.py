"""Every variant, its size and work, and where its weights are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from van_deploy.model.variants import Variant

__all__ = ["Listed", "listed_variants"]

IMAGE_SIZE = 224  # what the published networks were trained at


@dataclass(frozen=True)
class Listed:
    """One line of the list.

    Attributes:
        name: what ``van-deploy export`` takes.
        parameters: trainable parameters.
        multiply_adds: of one image of ``image_size``.
        image_size: side of a square image, in pixels.
        top1_percent: top-1 accuracy as published, or None.
        top1_on: what the accuracy was measured on.
        weights: the file on the hub, ``embedded``, or None.
        note: what to pass where there are no public weights.
        here: where the weights are on this machine, or None.
    """

    name: str
    parameters: int
    multiply_adds: int
    image_size: int
    top1_percent: float | None
    top1_on: str
    weights: str | None
    note: str
    here: str | None


def listed_variants() -> list[Listed]:
    """Return every published variant, then the network that ships in the package."""
    from van_deploy.model.variants import VARIANTS

    return [*(_listed(variant) for variant in VARIANTS.values()), _embedded()]


def _listed(variant: Variant) -> Listed:
    from van_deploy.model.hub import locate_weights

    here = locate_weights(variant)
    return Listed(
        name=variant.name,
        parameters=variant.config.parameter_count(),
        multiply_adds=variant.config.mac_count(IMAGE_SIZE),
        image_size=IMAGE_SIZE,
        top1_percent=variant.top1,
        top1_on="ImageNet-1K validation",
        weights=str(variant.weights) if variant.weights else None,
        note=variant.weights_note,
        here=str(here) if here else None,
    )


def _embedded() -> Listed:
    """Return van_digits as its card describes it; NumPy need not be imported for this."""
    from van_deploy.model.variants import VanConfig

    folder = files("van_deploy.model") / "digits"
    card = json.loads((folder / "van_digits.json").read_text(encoding="utf-8"))
    config = VanConfig(**card["config"])
    size = card["preprocessing"]["image_size"]
    return Listed(
        name=card["name"],
        parameters=config.parameter_count(),
        multiply_adds=config.mac_count(size),
        image_size=size,
        top1_percent=card["heldout"]["top1_percent"],
        top1_on="held-out handwritten digits",
        weights="embedded",
        note="",
        here=str(folder / f"{card['name']}.safetensors"),
    )
