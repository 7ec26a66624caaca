"""A network quantised step by step, each technique kept where held-out images confirm it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.config import QuantizeSettings
from van_deploy.graph.rebuilt import RebuiltVan
from van_deploy.metrics import sqnr_db
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.equalize import TECHNIQUES, equalize
from van_deploy.precision.observers import ChannelRange
from van_deploy.precision.plan import QuantizationPlan, make_plan
from van_deploy.precision.qdq import qdq_for_cpu, qdq_for_tensorrt
from van_deploy.precision.scales import ChannelAffine, Method
from van_deploy.precision.sensitivity import (
    SearchReport,
    labels_lost,
    rank_layers,
    require_resolution,
    search_kept,
)
from van_deploy.precision.simulate import bias_corrected, logits

__all__ = ["Budget", "Int8", "Int8Maker", "TechniqueGain"]

RANKING_IMAGES = 32

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TechniqueGain:
    """What one technique brought on top of those kept before it.

    Attributes:
        name: ``scales``, ``bias_correction``, or one of :data:`TECHNIQUES`.
        before_db: SQNR of the logits of the held-out images before it; None for ``scales``.
        after_db: and with it, biases corrected anew.
        kept: whether it is in the result.
    """

    name: str
    before_db: float | None
    after_db: float
    kept: bool


@dataclass(frozen=True)
class Int8:
    """A network in INT8.

    Attributes:
        plan: what is quantised, and how.
        model: the graph for the target.
        techniques: what each brought.
        share: of the multiply-adds that run in INT8, 0..1.
        affines: by tensor, how it differs from the FP32 graph's.
        search: for a budget, what was kept in higher precision.
    """

    plan: QuantizationPlan
    model: ModelProto
    techniques: tuple[TechniqueGain, ...]
    share: float
    affines: Mapping[str, ChannelAffine]
    search: SearchReport | None = None

    def scales(self) -> dict[str, float]:
        """Return the scale of each quantised activation that has one, by its name in the graph."""
        plan = self.plan
        found = {plan.network.reads[name]: plan.layers[name].input for name in plan.convolutions}
        return {name: float(f"{float(q.scale):.6g}") for name, q in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return what was decided, for the manifest."""
        found = {
            "quantized": len(self.plan.convolutions),
            "int8_share": self.share,
            "techniques": [asdict(gain) for gain in self.techniques],
            "scales": self.scales(),
        }
        return found if self.search is None else {**found, "search": self.search.as_dict()}


@dataclass(frozen=True)
class Budget:
    """How much accuracy may be lost, on which images: not those the result is judged on.

    Attributes:
        max_drop: percentage points.
        evaluations: most plans to try.
        images: how many there are.
        labels: ``(images,)`` by number, or None.
        batches: gives the images ``(n, C, S, S)`` with their numbers, as often as it is called.
    """

    max_drop: float
    evaluations: int
    images: int
    labels: npt.NDArray[np.int64] | None
    batches: Callable[[], Iterable[tuple[Images, Sequence[int]]]]


@dataclass(frozen=True)
class Int8Maker:
    """What INT8 graphs of one network are made from.

    Attributes:
        model: the FP32 graph.
        network: rebuilt from it.
        ranges: of its tensors, counted for every layer that may be quantised.
        settings: what is asked.
        kept: nodes that stay FP32 where the rest is FP16.
        work: multiply-adds by module.
        calibration: images that biases are corrected on, ``(N, C, S, S)``.
        held_out: images that confirm techniques and rank layers, likewise.
        say: told what is being done.
    """

    model: ModelProto
    network: RebuiltVan
    ranges: Mapping[str, ChannelRange]
    settings: QuantizeSettings
    kept: Mapping[str, str]
    work: Mapping[str, int]
    calibration: Images
    held_out: Images
    say: Callable[[str], None]

    def make(self, layers: Sequence[str], budget: Budget | None = None) -> Int8:
        """Return the network with ``layers`` in INT8, or as many of them as the budget allows.

        Raises:
            ImageError: the budget is smaller than one image.
        """
        if budget is not None:
            require_resolution(budget.max_drop, budget.images)
        plan, affines, gains = self._confirmed(layers)
        search = None
        if budget is not None:
            search = self._searched(plan, gains, budget)
            plan = plan.without(search.kept)
        final = self._corrected(plan, gains)
        share = sum(self.work[name] for name in final.convolutions) / sum(self.work.values())
        return Int8(final, self._graph(final), gains, share, affines, search)

    def _confirmed(
        self, layers: Sequence[str]
    ) -> tuple[QuantizationPlan, Mapping[str, ChannelAffine], tuple[TechniqueGain, ...]]:
        """Return the plan with every technique that held-out images confirm, uncorrected."""
        wanted = ["bias_correction"] if self.settings.bias_correction else []
        if self.settings.equalize:
            added = self.settings.target == "tensorrt"
            wanted += [name for name in TECHNIQUES if added or name != "shift_scale"]
        expected = logits(QuantizationPlan(self.network), self.held_out)
        gains: list[TechniqueGain] = []
        best: tuple[QuantizationPlan, Mapping[str, ChannelAffine]]
        best_db: float | None = None
        for name in ("scales", *wanted):
            self.say(f"Trying {name.replace('_', ' ')}")
            trial = [*(gain.name for gain in gains if gain.kept), name]
            changed = equalize(self.network, self.ranges, layers, trial)
            plan = make_plan(
                changed,
                self.ranges,
                layers,
                target=self.settings.target,
                method=Method(self.settings.method),
                percentile=self.settings.percentile,
            )
            tried = bias_corrected(plan, self.calibration) if "bias_correction" in trial else plan
            found = sqnr_db(expected, logits(tried, self.held_out))
            kept = best_db is None or found > best_db
            gains.append(TechniqueGain(name, best_db, found, kept))
            if kept:
                best, best_db = (plan, changed.affines), found
        return (*best, tuple(gains))

    def _corrected(
        self, plan: QuantizationPlan, gains: Sequence[TechniqueGain]
    ) -> QuantizationPlan:
        if any(gain.kept and gain.name == "bias_correction" for gain in gains):
            return bias_corrected(plan, self.calibration)
        return plan

    def _searched(
        self, plan: QuantizationPlan, gains: Sequence[TechniqueGain], budget: Budget
    ) -> SearchReport:
        """Return what to keep in higher precision.

        Layers are ranked one at a time in PyTorch; what holds the budget is the graph that
        will be deployed, with all that FP16 or a CPU's kernels do to it.
        """
        self.say("Ranking layers")
        ranking = rank_layers(plan, self.held_out[:RANKING_IMAGES], self.work)
        expected, numbers = self._logits(self.model, budget)
        labels = None if budget.labels is None else budget.labels[numbers]

        def lost(candidate: QuantizationPlan) -> int:
            graph = self._graph(self._corrected(candidate, gains))
            return labels_lost(expected, self._logits(graph, budget)[0], labels)

        return search_kept(
            plan,
            ranking,
            lost,
            budget.max_drop,
            len(numbers),
            of="agreement" if labels is None else "top-1",
            limit=budget.evaluations,
            progress=lambda trial: self.say(f"Searching: {trial.kept} layers kept"),
        )

    def _logits(self, model: ModelProto, budget: Budget) -> tuple[Images, list[int]]:
        fuse = self.settings.target == "cpu"
        run = logits_session(model, fuse=fuse, threads=self.settings.threads)
        pieces: list[Images] = []
        numbers: list[int] = []
        for images, found in budget.batches():
            pieces.append(run(images))
            numbers += found
        return np.concatenate(pieces), numbers

    def _graph(self, plan: QuantizationPlan) -> ModelProto:
        if self.settings.target == "cpu":
            return qdq_for_cpu(self.model, plan)
        rest, half_io = self.settings.rest_precision, self.settings.half_io
        return qdq_for_tensorrt(self.model, plan, rest=rest, kept=self.kept, half_io=half_io)
