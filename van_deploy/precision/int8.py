"""A network quantised step by step, and layers left in higher precision to hold a budget.

Each technique is kept where held-out images confirm it. For a budget of accuracy, every
quantised layer is first rounded alone, to see how much it disturbs the logits. Then layers are
returned to higher precision, the worst first: none, one, two, four, ... until the budget holds,
and by halving the gap down to the fewest. Worst is what disturbs most *for the work it does in
INT8*: what is to be kept small is the work that is given back, not the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.config import QuantizeSettings
from van_deploy.errors import ImageError
from van_deploy.graph.export import RebuiltVan
from van_deploy.metrics import sqnr_db
from van_deploy.precision.comparison import count_lost_labels, logits_session
from van_deploy.precision.equalize import TECHNIQUES, equalize
from van_deploy.precision.images import JobImages
from van_deploy.precision.plan import (
    CORRECTION_IMAGES,
    QuantizationPlan,
    correct_biases,
    logits,
    make_plan,
    multiply_adds,
)
from van_deploy.precision.qdq import qdq_for_cpu, qdq_for_tensorrt
from van_deploy.precision.scales import ChannelRange, Images

CONFIRMING_IMAGES = 48  # held-out images that techniques are confirmed on
RANKING_IMAGES = 32  # of these: enough to put layers in order


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

    def as_dict(self) -> dict[str, Any]:
        """Return what was decided, for the manifest."""
        found = {
            "quantized": len(self.plan.convolutions),
            "int8_share": self.share,
            "techniques": list(self.techniques),
            "scales": self.scales(),
        }
        return found if self.search is None else {**found, "search": self.search}


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
            plan = correct_biases(plan, self.correcting) if correct else plan
            if self.settings.target == "cpu":
                return plan, qdq_for_cpu(self.model, plan)
            rest = self.settings.rest_precision
            return plan, qdq_for_tensorrt(self.model, plan, rest=rest, kept=self.kept)

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
            changed = equalize(self.network, self.ranges, layers, trial)
            how: dict[str, Any] = {"target": asked.target, "method": asked.method}
            plan = make_plan(changed, self.ranges, layers, **how)
            tried = correct_biases(plan, self.correcting) if "bias_correction" in trial else plan
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
        images, asked = self.images, self.settings

        def answers(model: ModelProto) -> tuple[Images, list[int]]:
            run = logits_session(model, fuse=asked.target == "cpu", threads=asked.threads)
            parts = [(run(inputs), found) for inputs, found in images.read(images.others, 32)]
            return np.concatenate([each for each, _ in parts]), [n for _, f in parts for n in f]

        images.watch.begin("Searching")
        ranking = rank_layers(plan, self.confirming[:RANKING_IMAGES], self.work)
        expected, numbers = answers(self.model)
        labels = images.others.labels
        known = None if labels is None else labels[numbers]
        return search_kept(
            plan,
            ranking,
            lambda candidate: count_lost_labels(expected, answers(graph_of(candidate))[0], known),
            budget,
            len(numbers),
            of="agreement" if labels is None else "top-1",
            limit=asked.evaluations,
        )


# --- the search for a budget -----------------------------------------------------------------


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one layer alone does to the logits.

    Attributes:
        name: of the layer.
        sqnr_db: signal to noise of the logits.
        share: of the network's multiply-adds, 0..1.
    """

    name: str
    sqnr_db: float
    share: float

    @property
    def worth_db(self) -> float:
        """The work it does in INT8 over the noise it brings, in decibels; the least goes first."""
        return self.sqnr_db + 10 * math.log10(max(self.share, 1e-12))


def rank_layers(
    plan: QuantizationPlan, images: Images, work: Mapping[str, int]
) -> tuple[LayerSensitivity, ...]:
    """Return the layers of ``plan``, first the one that disturbs most for the work it does.

    Args:
        plan: not corrected: without rounding its network must be the original.
        images: ``(N, C, S, S)``.
        work: multiply-adds of each layer, and of what is not quantised.
    """
    total, expected = sum(work.values()), logits(plan.without(plan.convolutions), images)
    found = [
        LayerSensitivity(name, sqnr_db(expected, logits(plan, images, name)), work[name] / total)
        for name in plan.convolutions
    ]
    return tuple(sorted(found, key=lambda layer: layer.worth_db))


def require_resolution(max_drop: float, images: int) -> None:
    """Do nothing if so many images can tell whether ``max_drop`` points are lost.

    Raises:
        ImageError: a single label is more than the budget.
    """
    if 0 < max_drop < 100 / images:
        raise ImageError(
            f"A budget of {max_drop:g} points cannot be searched on {images} images: "
            f"one label is {100 / images:.2g} points.",
            f"Give {math.ceil(100 / max_drop)} calibration images or more, or a larger --max-drop.",
        )


def search_kept(
    plan: QuantizationPlan,
    ranking: Sequence[LayerSensitivity],
    lost: Callable[[QuantizationPlan], int],
    max_drop: float,
    images: int,
    *,
    of: str = "top-1",
    limit: int = 16,
) -> dict[str, Any]:
    """Return which of the worst layers must be kept in higher precision, the fewest that hold.

    What the manifest keeps of it: the budget ``max_drop``, the ``images`` it was searched on, and
    what is lost ``of`` them; the ``ranking``; every plan that was tried (``trials``: how many
    layers were ``kept``, images ``lost``, whether the budget ``holds``); the layers to be ``kept``,
    the worst first, each with the reason; the ``share`` of the multiply-adds that is left in INT8,
    0..1; ``passed``, whether the budget was seen to hold.

    Args:
        plan: everything quantised.
        ranking: its layers, the worst first.
        lost: how many labels a plan loses.
        max_drop: budget, in percentage points of ``images``.
        images: how many ``lost`` looks at.
        of: what is lost, ``top-1`` or ``agreement``.
        limit: most evaluations.
    """
    trials: dict[int, dict[str, Any]] = {}

    def holds(kept: int) -> bool:
        if kept not in trials:
            count = lost(plan.without([layer.name for layer in ranking[:kept]]))
            within = 100 * count / images <= max_drop
            trials[kept] = {"kept": kept, "lost": count, "holds": within}
        return bool(trials[kept]["holds"])

    failing, holding = -1, 0
    while len(trials) < limit and not holds(holding) and holding < len(ranking):
        failing, holding = holding, min(max(2 * holding, 1), len(ranking))
    while len(trials) < limit and holding in trials and holding - failing > 1:
        middle = (failing + holding) // 2
        failing, holding = (failing, middle) if holds(middle) else (middle, holding)
    kept = holding
    if not (kept in trials and trials[kept]["holds"]):
        kept = min(trials.values(), key=lambda trial: (trial["lost"], trial["kept"]))["kept"]
    reasons = {
        layer.name: f"alone it leaves {layer.sqnr_db:.1f} dB for {100 * layer.share:.1f} % "
        f"of the work, number {place} of {len(ranking)}"
        for place, layer in enumerate(ranking[:kept], 1)
    }
    return {
        "max_drop": max_drop,
        "images": images,
        "of": of,
        "ranking": [asdict(layer) for layer in ranking],
        "trials": list(trials.values()),
        "kept": reasons,
        "share": sum(layer.share for layer in ranking[kept:]),
        "passed": trials[kept]["holds"],
    }
