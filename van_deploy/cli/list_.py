"""``van-deploy list``: the VAN variants and where their weights are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from van_deploy.cli.console import AsJson, emit

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.model.variants import Variant

__all__ = ["Listed", "list_variants", "listed_variants"]

IMAGE_SIZE = 224  # what the published networks were trained at
HUB_OWNER = "Visual-Attention-Network"
LICENCE = (
    "The public weights are Apache-2.0; their authors add: "
    '"for commercial use, please contact the authors".'
)


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


def list_variants(as_json: AsJson = False) -> None:
    """List the variants: size, work, accuracy, and where their weights are.

    Example: van-deploy list --json
    """
    emit(listed_variants(), as_json, _table)


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


def _table(listed: list[Listed]) -> RenderableType:
    from van_deploy.report.tables import Column, facts_table, rows_table, stack, verdict

    notes = list(dict.fromkeys(item.note for item in listed if item.note))
    rows = (
        (
            item.name,
            f"{item.parameters / 1e6:.1f} M",
            f"{item.multiply_adds / 1e9:.2f} G",
            item.image_size,
            f"{item.top1_percent:.1f} %" if item.top1_percent is not None else None,
            verdict("YES") if item.here else None,
            _weights_text(item, notes),
        )
        for item in listed
    )
    columns = (
        Column("variant", style="bold"),
        Column("params", "right"),
        Column("mult-adds", "right"),
        Column("px", "right"),
        Column("top-1", "right"),
        "here",
        Column("weights", wrap=True),
    )
    remarks = {f"[{number}]": note for number, note in enumerate(notes, 1)}
    embedded = listed[-1]
    remarks["mult-adds"] = "multiply-adds of one square image with sides of so many pixels"
    remarks["top-1"] = (
        f"{listed[0].top1_on}, as published; {embedded.name}: {embedded.top1_on}, measured"
    )
    remarks["weights"] = f"files in repositories of https://huggingface.co/{HUB_OWNER}"
    remarks["licence"] = LICENCE
    return stack(rows_table(columns, rows), facts_table(remarks))


def _weights_text(item: Listed, notes: list[str]) -> str:
    """Return where the weights are; the hub's common owner is left out of the line."""
    if item.weights is None:
        return f"no public ImageNet-1K weights [{notes.index(item.note) + 1}]"
    if item.weights == "embedded":
        return "in this package"
    return item.weights.removeprefix(f"{HUB_OWNER}/")
