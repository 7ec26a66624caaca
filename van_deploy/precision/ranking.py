"""Which quantised layers disturb the logits most, each rounded alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.errors import ImageError
from van_deploy.metrics import kl_divergence, sqnr_db
from van_deploy.precision.correct import Written
from van_deploy.precision.plan import QuantizationPlan, simulate
from van_deploy.precision.quantize import multiply_adds
from van_deploy.precision.session import logits_session

__all__ = ["LayerDisturbance", "rank_layers"]

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerDisturbance:
    """What rounding one layer alone does to the logits.

    Attributes:
        name: of the layer.
        kl: mean Kullback-Leibler divergence from the FP32 logits, in nats.
        sqnr_db: signal to noise of the logits.
        share: of the network's multiply-adds, 0..1.
    """

    name: str
    kl: float
    sqnr_db: float
    share: float

    @property
    def worth_db(self) -> float:
        """The work it does in INT8 over the noise it brings, in decibels; the least goes first."""
        return self.sqnr_db + 10 * math.log10(max(self.share, 1e-12))


def rank_layers(
    plan: QuantizationPlan,
    images: Images,
    progress: Callable[[int, int], None] | None = None,
    *,
    written: Written = simulate,
    threads: int | None = None,
) -> tuple[LayerDisturbance, ...]:
    """Return the layers of ``plan``, first the one that disturbs most for the work it does.

    Args:
        plan: whose numbers are used.
        images: ``(N, C, S, S)`` float32; 32 to 64 are enough to put layers in order.
        progress: told of each layer, and of how many there are.
        written: the graph of a plan whose rounding counts.
        threads: of ONNX Runtime.

    Raises:
        ImageError: there is no image.
    """
    if not len(images):
        raise ImageError("There is no image to rank layers with.", "Pass --images DIR.")
    work = multiply_adds(plan.model)
    total = sum(work.values())
    reference = _logits(plan.model, images, threads)
    found = []
    for done, (name, conv) in enumerate(plan.convs.items(), 1):
        alone = written(replace(plan, convs={name: conv}))
        logits = _logits(alone, images, threads)
        kl = float(kl_divergence(reference, logits).mean())
        quality = sqnr_db(reference, logits)
        found.append(LayerDisturbance(name, kl, quality, work[name] / total))
        if progress is not None:
            progress(done, len(plan.convs))
    return tuple(sorted(found, key=lambda layer: layer.worth_db))


def _logits(model: ModelProto, images: Images, threads: int | None) -> Logits:
    return logits_session(model, fuse=False, threads=threads)(images)
