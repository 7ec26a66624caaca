"""Limits on paper of GPUs that are not at hand.

Dense figures (NVIDIA often prints twice that, with structured sparsity), at boost
clock, from NVIDIA's data sheets. Nothing here was measured.
"""

from __future__ import annotations

from van_deploy.bench.ceilings import Ceilings
from van_deploy.errors import UsageError

__all__ = ["DEVICES", "paper_ceilings"]

TERA, GIGA = 1e12, 1e9


def _sheet(
    source: str, fp32: float, fp16: float, int8: float, gigabytes: float, tf32: float | None
) -> Ceilings:
    ops = {"fp32": fp32 * TERA, "fp16": fp16 * TERA, "bf16": fp16 * TERA, "int8": int8 * TERA}
    if tf32 is not None:
        ops["tf32"] = tf32 * TERA
    else:
        del ops["bf16"]  # before Ampere
    note = {"all": "on paper: dense peak at boost clock, not measured"}
    return Ceilings(ops, gigabytes * GIGA, source, note, vector_ops_per_s=fp32 * TERA)


DEVICES: dict[str, Ceilings] = {
    "t4": _sheet("NVIDIA T4 data sheet (2019)", 8.1, 65, 130, 320, None),
    "a10": _sheet("NVIDIA A10 data sheet (2022)", 31.2, 125, 250, 600, 62.5),
    "a100": _sheet("NVIDIA A100 80GB SXM data sheet (2021)", 19.5, 312, 624, 2039, 156),
    "l4": _sheet("NVIDIA L4 data sheet (2023)", 30.3, 121, 242, 300, 60),
    "l40s": _sheet("NVIDIA L40S data sheet (2023)", 91.6, 362, 733, 864, 183),
    "h100": _sheet("NVIDIA H100 SXM data sheet (2023)", 67, 989, 1979, 3350, 494),
    "h200": _sheet("NVIDIA H200 SXM data sheet (2024)", 67, 989, 1979, 4800, 494),
    "rtx4090": _sheet("NVIDIA Ada architecture white paper (2022)", 82.6, 165.2, 660.6, 1008, 82.6),
}
"""By name, in lower case. Matrix products run at ``ops_per_s``; everything else, the
depth-wise convolutions included, at ``vector_ops_per_s``, which is FP32's."""


def paper_ceilings(name: str) -> Ceilings:
    """Return the limits on paper of the GPU ``name``.

    Raises:
        UsageError: it is not in the table.
    """
    known = DEVICES.get(name.lower().replace(" ", "").replace("-", ""))
    if known is None:
        raise UsageError(
            f"There are no figures for the device '{name}'.", f"Known: {', '.join(DEVICES)}."
        )
    return known
