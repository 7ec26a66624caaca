"""A network quantised step by step, each technique kept where held-out images confirm it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.config import QuantizeSettings
from van_deploy.graph.rebuilt import RebuiltVan
from van_deploy.metrics import sqnr_db
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.equalize import TECHNIQUES, equalize
from van_deploy.precision.job_images import JobImages
from van_deploy.precision.observers import ChannelRange
from van_deploy.precision.plan import QuantizationPlan, make_plan, multiply_adds
from van_deploy.precision.qdq import qdq_for_cpu, qdq_for_tensorrt
from van_deploy.precision.sensitivity import (
    labels_lost,
    rank_layers,
    require_resolution,
    search_kept,
)
from van_deploy.precision.simulate import CORRECTION_IMAGES, bias_corrected, logits

CONFIRMING_IMAGES = 48
"""Held-out images that techniques are confirmed on; :data:`RANKING_IMAGES` rank layers."""

RANKING_IMAGES = 32

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Int8:
    """A network in INT8.

    Attributes:
        plan: what is quantised, and how.
        model: the graph for the target.
        techniques: what each brought on top of those kept before it: its ``name`` (``scales``,
            ``bias_correction``, or one of :data:`TECHNIQUES`), the SQNR of the logits of the
            held-out images ``before_db`` (None for ``scales``) and ``after_db``, biases corrected
            anew, and whether it is ``kept``.
        share: of the multiply-adds that run in INT8, 0..1.
        search: for a budget, what was kept in higher precision, and why.
    """

    plan: QuantizationPlan
    model: ModelProto
    techniques: Sequence[Mapping[str, Any]]
    share: float
    search: Mapping[str, Any] | None = None

    def scales(self) -> dict[str, float]:
        """Return the scale of each quantised activation that has one, by its name in the graph."""
        plan = self.plan
        found = {plan.network.reads[name]: plan.layers[name].input for name in plan.convolutions}
        return {name: short(q.scale) for name, q in found.items()}

    def channels(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return how tensors differ from the FP32 graph's: ``(theirs - shift) / factor``."""
        return {
            f"{tensor}.{part}": getattr(affine, part).astype(np.float32)
            for tensor, affine in self.plan.affines.items()
            for part in ("shift", "factor")
        }

    def as_dict(self) -> dict[str, Any]:
        """Return what was decided, for the manifest."""
        found = {
            "quantized": len(self.plan.convolutions),
            "int8_share": self.share,
            "techniques": list(self.techniques),
            "scales": self.scales(),
        }
        return found if self.search is None else {**found, "search": dict(self.search)}


def short(value: npt.ArrayLike) -> float:
    """Return ``value`` with six significant digits, so that files can be compared by eye."""
    return float(f"{float(value):.6g}")  # type: ignore[arg-type]


class Int8Maker:
    """What INT8 graphs of one network are made from.

    Args:
        model: the FP32 graph.
        network: rebuilt from it.
        ranges: of its tensors, counted for every layer that may be quantised.
        settings: what is asked.
        kept: nodes that stay FP32 where the rest is FP16.
        images: to correct biases on, to confirm techniques and to search on.
    """

    def __init__(
        self,
        model: ModelProto,
        network: RebuiltVan,
        ranges: Mapping[str, ChannelRange],
        settings: QuantizeSettings,
        kept: Mapping[str, str],
        images: JobImages,
    ) -> None:
        self.model, self.network, self.ranges = model, network, ranges
        self.settings, self.kept, self.images = settings, kept, images
        preprocessing = images.preprocessing
        self.work = multiply_adds(network.model, preprocessing.channels, preprocessing.image_size)
        self.correcting = images.few(images.calibration, CORRECTION_IMAGES)
        self.confirming = images.few(images.held_out, CONFIRMING_IMAGES)

    def make(self, layers: Sequence[str]) -> Int8:
        """Return the network with ``layers`` in INT8, or as many of them as the budget allows.

        Raises:
            ImageError: the budget is smaller than one image.
        """
        budget, search = self.settings.max_drop, None
        if budget is not None:
            require_resolution(budget, len(self.images.others))
        plan, gains = self._confirmed(layers)
        correct = any(gain["kept"] and gain["name"] == "bias_correction" for gain in gains)

        def finished(plan: QuantizationPlan) -> tuple[QuantizationPlan, ModelProto]:
            plan = bias_corrected(plan, self.correcting) if correct else plan
            return plan, self._graph(plan)

        if budget is not None:
            search = self._searched(plan, lambda candidate: finished(candidate)[1], budget)
            plan = plan.without(search["kept"])
        plan, model = finished(plan)
        share = sum(self.work[name] for name in plan.convolutions) / sum(self.work.values())
        return Int8(plan, model, gains, share, search)

    def _confirmed(self, layers: Sequence[str]) -> tuple[QuantizationPlan, list[dict[str, Any]]]:
        """Return the plan with every technique that held-out images confirm, uncorrected."""
        asked, gains = self.settings, list[dict[str, Any]]()
        wanted = ["scales", "bias_correction"] if asked.bias_correction else ["scales"]
        if asked.equalize:
            wanted += [n for n in TECHNIQUES if asked.target == "tensorrt" or n != "shift_scale"]
        best = QuantizationPlan(self.network)
        expected, best_db = logits(best, self.confirming), None
        for name in wanted:
            self.images.watch.begin(f"Trying {name.replace('_', ' ')}")
            trial = [*(gain["name"] for gain in gains if gain["kept"]), name]
            plan = make_plan(
                equalize(self.network, self.ranges, layers, trial),
                self.ranges,
                layers,
                target=asked.target,
                method=asked.method,
                percentile=asked.percentile,
            )
            tried = bias_corrected(plan, self.correcting) if "bias_correction" in trial else plan
            found = sqnr_db(expected, logits(tried, self.confirming))
            kept = best_db is None or found > best_db
            gains.append({"name": name, "before_db": best_db, "after_db": found, "kept": kept})
            if kept:
                best, best_db = plan, found
        return best, gains

    def _searched(
        self,
        plan: QuantizationPlan,
        graph_of: Callable[[QuantizationPlan], ModelProto],
        budget: float,
    ) -> dict[str, Any]:
        """Return what to keep in higher precision.

        Layers are ranked one at a time in PyTorch; what holds the budget is the graph that
        will be deployed, with all that FP16 or a CPU's kernels do to it.
        """
        self.images.watch.begin("Searching")
        ranking = rank_layers(plan, self.confirming[:RANKING_IMAGES], self.work)
        expected, numbers = self._logits(self.model)
        labels = self.images.others.labels
        known = None if labels is None else labels[numbers]

        def lost(candidate: QuantizationPlan) -> int:
            return labels_lost(expected, self._logits(graph_of(candidate))[0], known)

        of = "agreement" if labels is None else "top-1"
        limit = self.settings.evaluations
        return search_kept(plan, ranking, lost, budget, len(numbers), of=of, limit=limit)

    def _logits(self, model: ModelProto) -> tuple[Images, list[int]]:
        """Return the logits of the images to search on, and the images' numbers."""
        fuse = self.settings.target == "cpu"
        run = logits_session(model, fuse=fuse, threads=self.settings.threads)
        parts = [(run(images), found) for images, found in self.images.read(self.images.others, 32)]
        return np.concatenate([logits for logits, _ in parts]), [n for _, f in parts for n in f]

    def _graph(self, plan: QuantizationPlan) -> ModelProto:
        if self.settings.target == "cpu":
            return qdq_for_cpu(self.model, plan)
        rest, half_io = self.settings.rest_precision, self.settings.half_io
        return qdq_for_tensorrt(self.model, plan, rest=rest, kept=self.kept, half_io=half_io)
