"""What a bundle could do at best on a GPU that is not at hand, from figures on paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from van_deploy.bench.devices import paper_ceilings
from van_deploy.bench.roofline import limit_of, work_of_file
from van_deploy.bundle import Bundle

__all__ = ["paper_limits"]

ASSUMED = {"fp32": ("fp32", "tf32", "fp16"), "fp16": ("fp16",), "int8": ("fp16",)}
"""The floating-point arithmetic an engine made from an artefact may use. The quantised
parts of an INT8 graph run at the INT8 rate, the rest of it in FP16."""


def paper_limits(bundle: Bundle, device: str, batches: Sequence[int]) -> dict[str, Any]:
    """Return the least time of each ONNX artefact on ``device``, on paper.

    Raises:
        UsageError: there are no figures for the device.
        BundleError: a file is not the manifest's.
    """
    ceilings = paper_ceilings(device)
    limits = []
    for artefact in bundle.artefacts.values():
        if artefact.kind != "onnx":
            continue
        path = bundle.verified(artefact.name)
        for batch in sorted(set(batches)):
            work = work_of_file(path, batch)
            for kind in ASSUMED.get(artefact.precision, ("fp16",)):
                limit = limit_of(work, ceilings, kind)
                if limit is None:
                    continue
                limits.append(
                    {
                        "graph": artefact.name,
                        "precision": f"int8 + {kind}" if work.quantized_ops else kind,
                        "batch": batch,
                        "operations": work.operations,
                        "limit": limit.as_dict(),
                    }
                )
    return {
        "device": device,
        "source": ceilings.source,
        "note": "on paper: dense peak at boost clock; nothing here was measured",
        "ceilings": ceilings.as_dict(),
        "limits": limits,
    }
