"""Every variant, its size and work, and where its weights are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from van_deploy.model.hub import locate_weights
from van_deploy.model.variants import VARIANTS, VanConfig

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
    found = [
        Listed(
            variant.name,
            *(variant.config.parameter_count(), variant.config.mac_count(IMAGE_SIZE), IMAGE_SIZE),
            *(variant.top1, "ImageNet-1K validation"),
            str(variant.weights) if variant.weights else None,
            variant.weights_note,
            str(locate_weights(variant) or "") or None,
        )
        for variant in VARIANTS.values()
    ]
    # Its card is read as text: NumPy need not be imported for this.
    folder = files("van_deploy.model") / "digits"
    card = json.loads((folder / "van_digits.json").read_text(encoding="utf-8"))
    config, size = VanConfig(**card["config"]), card["preprocessing"]["image_size"]
    work, top1 = config.mac_count(size), card["heldout"]["top1_percent"]
    place = str(folder / f"{card['name']}.safetensors")
    on = "held-out handwritten digits"
    embedded = (card["name"], config.parameter_count(), work, size, top1, on, "embedded", "", place)
    return [*found, Listed(*embedded)]
