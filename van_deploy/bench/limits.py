"""What a bundle could do at best: here, and on paper on a GPU that is not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender
from van_deploy.bench.devices import paper_ceilings
from van_deploy.bench.document import Reached
from van_deploy.bench.lane import Row
from van_deploy.bench.roofline import Limit, Work, limit_of, work_of_file
from van_deploy.bundle import Bundle
from van_deploy.config.sizes import ImageSize

__all__ = ["PaperLimit", "PaperLimits", "measured_limits", "paper_limits"]

ASSUMED = {"fp32": ("fp32", "tf32", "fp16"), "fp16": ("fp16",), "int8": ("fp16",)}
"""The floating-point arithmetic an engine made from an artefact may use. The quantised
parts of an INT8 graph run at the INT8 rate, the rest of it in FP16."""


@dataclass(frozen=True)
class PaperLimit:
    """The least time of one graph at one batch size.

    Attributes:
        graph: the artefact.
        precision: of the arithmetic.
        batch: images.
        operations: of one batch.
        limit: the least time.
    """

    graph: str
    precision: str
    batch: int
    operations: int
    limit: Limit


@dataclass(frozen=True)
class PaperLimits:
    """What a bundle could do at best on a GPU that is not at hand; nothing here was measured.

    Attributes:
        device: the GPU.
        source: where its figures come from.
        note: what they are worth.
        ceilings: the figures.
        limits: one a graph, precision and batch.
    """

    device: str
    source: str
    note: str
    ceilings: Ceilings
    limits: tuple[PaperLimit, ...]


def paper_limits(bundle: Bundle, device: str, batches: Sequence[int]) -> PaperLimits:
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
                precision = f"int8 + {kind}" if work.quantized_ops else kind
                limits.append(PaperLimit(artefact.name, precision, batch, work.operations, limit))
    note = "on paper: dense peak at boost clock; nothing here was measured"
    return PaperLimits(device, ceilings.source, note, ceilings, tuple(limits))


def measured_limits(
    contenders: Sequence[Contender], rows: Sequence[Row], ceilings: Ceilings
) -> tuple[Reached, ...]:
    """Return each row's time over the least possible time for the same graph."""
    graphs = {c.name: c for c in contenders if c.file.endswith(".onnx")}
    plain = next((c for c in graphs.values() if c.precision == "fp32"), None)
    counted: dict[tuple[str, int, ImageSize], Work] = {}
    result = []
    for row in rows:
        contender = next(c for c in contenders if c.name == row.contender)
        graph = graphs.get(row.contender, plain)  # PyTorch does the same arithmetic
        if row.latency is None or graph is None:
            continue
        key = (graph.file, row.batch, row.image_size)
        if key not in counted:
            counted[key] = work_of_file(Path(graph.file), row.batch, row.image_size)
        limit = limit_of(counted[key], ceilings, contender.precision)
        if limit is None:
            continue
        per_batch = 1e3 * row.batch / row.images_per_s if row.images_per_s else row.latency.p50_ms
        result.append(
            Reached(
                contender=row.contender,
                batch=row.batch,
                image_size=row.image_size,
                work=counted[key],
                limit=limit,
                percent_of_limit=100 * limit.ms / per_batch,
            )
        )
    return tuple(result)
