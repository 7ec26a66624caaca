"""The variants as a person reads them."""

from __future__ import annotations

from rich.console import RenderableType

from van_deploy.model.listing import Listed
from van_deploy.report.tables import Column, facts_table, rows_table, stack, verdict

__all__ = ["listed_table"]

HUB_OWNER = "Visual-Attention-Network"
LICENCE = (
    "The public weights are Apache-2.0; their authors add: "
    '"for commercial use, please contact the authors".'
)


def listed_table(listed: list[Listed]) -> RenderableType:
    """Return one line a variant, and remarks on the columns."""
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
