"""Quantise a network to INT8 step by step, within an optional accuracy budget.

Each technique is applied only if it improves the SQNR on held-out images. For an accuracy budget,
each layer is first quantised alone to measure its isolated SQNR. Then layers are returned to
higher precision in the order of their sensitivity: none, one, two, four, ... until the budget is
met, followed by a binary search for the smallest number. Sensitivity is noise *per multiply-add in
INT8*, because the search should keep as much work as possible in INT8, not as many layers.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy.typing as npt
from onnx import ModelProto

from van_deploy.config import QuantizeSettings
from van_deploy.errors import ImageError
from van_deploy.graph.export import RebuiltVan
from van_deploy.metrics import Task, sqnr_db
from van_deploy.precision.comparison import Row, count_lost_labels, logits_session, predict
from van_deploy.precision.equalize import TECHNIQUES, equalize
from van_deploy.precision.images import ImageSets
from van_deploy.precision.plan import (
    QuantizationPlan,
    correct_biases,
    logits,
    make_plan,
    multiply_adds,
)
from van_deploy.precision.qdq import qdq_for_cpu, qdq_for_tensorrt
from van_deploy.precision.scales import ChannelRange, Images

# Bias correction holds all its images in memory at once: at most this many pixels (20 images of
# 224 x 224) and this many images.
CORRECTION_PIXELS, CORRECTION_IMAGES = 2**20, 128
VALIDATION_IMAGES = 48  # held-out images that decide whether a technique is applied
RANKING_IMAGES = 32  # of these, enough to rank layers


@dataclass(frozen=True)
class Int8Model:
    """A network in INT8.

    Attributes:
        plan: the quantised layers and their scales.
        model: the graph for the target.
        techniques: the effect of each technique on top of those used before it: its ``name``
            (``scales``, ``bias_correction``, or one of :data:`TECHNIQUES`), the SQNR of the logits
            on held-out images ``before_db`` (None for ``scales``) and ``after_db``, both after
            bias correction where it is used, and whether it is ``used``.
        share: of the multiply-adds that run in INT8, 0..1.
        search: result of the layer search, with an accuracy budget only.
    """

    plan: QuantizationPlan
    model: ModelProto
    techniques: Sequence[Mapping[str, Any]]
    share: float
    search: Mapping[str, Any] | None = None

    def scales(self) -> dict[str, float]:
        """Return the scale of each quantised layer input, by the tensor's name in the graph."""
        plan = self.plan
        reads = {**plan.network.reads, **{name: f"{name}.add" for name in plan.inserted}}
        return {reads[name]: short(plan.layers[name].input.scale) for name in plan.convolutions}

    def as_dict(self) -> dict[str, Any]:
        """Return the results for the manifest."""
        results = {
            "quantized": len(self.plan.convolutions),
            "int8_share": self.share,
            "techniques": list(self.techniques),
            "scales": self.scales(),
        }
        return results if self.search is None else {**results, "search": self.search}


def short(value: npt.ArrayLike) -> float:
    """Return ``value`` with six significant digits, for files that people read."""
    return float(f"{float(value):.6g}")  # type: ignore[arg-type]


@dataclass
class Int8Builder:
    """Builds INT8 graphs of one network.

    Attributes:
        model: the FP32 graph.
        network: rebuilt from the graph.
        ranges: of its tensors, with histograms for every layer that may be quantised.
        settings: the quantisation options.
        kept: nodes that stay FP32 in an otherwise FP16 graph.
        images: for bias correction, validation and layer search.
    """

    model: ModelProto
    network: RebuiltVan
    ranges: Mapping[str, ChannelRange]
    settings: QuantizeSettings
    kept: Mapping[str, str]
    images: ImageSets

    def __post_init__(self) -> None:
        """Count the multiply-adds and read the images."""
        images, preprocessing = self.images, self.images.preprocessing
        self.work = multiply_adds(self.network.model, preprocessing.image_size)
        most = max(min(CORRECTION_IMAGES, CORRECTION_PIXELS // math.prod(preprocessing.sides)), 1)
        self.correction_inputs = images.sample(images.calibration, most)
        self.validation_inputs = images.sample(images.held_out, VALIDATION_IMAGES)

    def build(self, layers: Sequence[str]) -> Int8Model:
        """Return the network with ``layers`` in INT8, or as many of them as the budget allows.

        Raises:
            ImageError: the budget is smaller than one image.
        """
        budget, search = self.settings.max_drop, None
        if budget is not None:
            sets = self.images
            require_resolution(budget, len(sets.search), len(sets.calibration) + len(sets.held_out))
        plan, techniques = self._apply_techniques(layers)
        correct = any(t["used"] and t["name"] == "bias_correction" for t in techniques)

        def finish(plan: QuantizationPlan) -> tuple[QuantizationPlan, ModelProto]:
            plan = correct_biases(plan, self.correction_inputs) if correct else plan
            if self.settings.target == "cpu":
                return plan, qdq_for_cpu(self.model, plan)
            rest = self.settings.rest_precision
            return plan, qdq_for_tensorrt(self.model, plan, rest=rest, kept=self.kept)

        if budget is not None:
            search = self._search_layers(plan, lambda candidate: finish(candidate)[1], budget)
            plan = plan.without(search["excluded"])
        plan, model = finish(plan)
        share = sum(self.work[name] for name in plan.convolutions) / sum(self.work.values())
        return Int8Model(plan, model, techniques, share, search)

    def _apply_techniques(self, layers: Sequence[str]) -> tuple[QuantizationPlan, list[Row]]:
        """Return the plan with every technique that improves it, before bias correction."""
        settings, results, inputs = self.settings, list[Row](), self.validation_inputs
        target, method = settings.target, settings.method
        names = ["scales", "bias_correction"] if settings.bias_correction else ["scales"]
        if settings.equalize:
            names += [n for n in TECHNIQUES if target == "tensorrt" or n != "shift_scale"]
        best = QuantizationPlan(self.network)
        expected, best_db = logits(best, inputs), None
        for name in names:
            self.images.watch.begin(f"Trying {name.replace('_', ' ')}")
            trial = [*(result["name"] for result in results if result["used"]), name]
            equalized = equalize(self.network, self.ranges, layers, trial)
            plan = make_plan(equalized, self.ranges, layers, target=target, method=method)
            correct = "bias_correction" in trial
            corrected = correct_biases(plan, self.correction_inputs) if correct else plan
            db = sqnr_db(expected, logits(corrected, inputs))
            used = best_db is None or db > best_db
            results.append({"name": name, "before_db": best_db, "after_db": db, "used": used})
            if used:
                best, best_db = plan, db
        return best, results

    def _search_layers(
        self,
        plan: QuantizationPlan,
        graph_of: Callable[[QuantizationPlan], ModelProto],
        budget: float,
    ) -> dict[str, Any]:
        """Return the layers to keep in higher precision.

        Layers are ranked one at a time in PyTorch. The budget is checked with the graph that
        will be deployed, which includes the effects of FP16 or of a CPU's integer kernels.
        """
        images, settings = self.images, self.settings
        images.watch.begin("Searching")
        ranking = rank_layers(plan, images.sample(images.held_out, RANKING_IMAGES), self.work)
        config, fuse = self.network.model.config, settings.target == "cpu"
        task = Task.of(config.num_classes, config.problem_type)
        session = functools.partial(logits_session, fuse=fuse, threads=settings.threads)
        (expected,), labels = predict([session(self.model)], images, images.search)

        def lost(candidate: QuantizationPlan) -> int:
            (actual,), _ = predict([session(graph_of(candidate))], images, images.search)
            return count_lost_labels(expected, actual, labels, task)

        return search_fp16_layers(
            plan,
            ranking,
            lost,
            budget,
            len(expected),
            metric="agreement" if labels is None else "top-1",
            limit=settings.evaluations,
        )


# --- search for an accuracy budget -----------------------------------------------------------


@dataclass(frozen=True)
class LayerSensitivity:
    """Effect of quantising one layer alone.

    Attributes:
        name: of the layer.
        sqnr_db: SQNR of the logits.
        share: of the network's multiply-adds, 0..1.
    """

    name: str
    sqnr_db: float
    share: float

    @property
    def ranking_db(self) -> float:
        """Multiply-adds in INT8 over the added noise, in dB; the smallest is most sensitive."""
        return self.sqnr_db + 10 * math.log10(max(self.share, 1e-12))


def rank_layers(
    plan: QuantizationPlan, images: Images, work: Mapping[str, int]
) -> tuple[LayerSensitivity, ...]:
    """Return the layers of ``plan``, the most sensitive one per multiply-add first.

    Args:
        plan: before bias correction, so that its network without quantisation is the original.
        images: ``(N, C, S, S)``.
        work: multiply-adds of every layer of the network, quantised or not.
    """
    total, expected = sum(work.values()), logits(plan.without(plan.convolutions), images)
    layers = [
        LayerSensitivity(name, sqnr_db(expected, logits(plan, images, name)), work[name] / total)
        for name in plan.convolutions
    ]
    return tuple(sorted(layers, key=lambda layer: layer.ranking_db))


def require_resolution(max_drop: float, images: int, selected: int) -> None:
    """Check that ``images`` of ``selected`` images can resolve ``max_drop`` percentage points.

    Raises:
        ImageError: a single image is more than the budget.
    """
    if 0 < max_drop < 100 / images:
        raise ImageError(
            f"A budget of {max_drop:g} points cannot be searched on {images} images: "
            f"one label is {100 / images:.2g} points.",
            "Give a larger --max-drop, or a calibration set (--calibration FILE.toml) with count = "
            f"{math.ceil(math.ceil(100 / max_drop) * selected / images)} and as many images.",
        )


def search_fp16_layers(
    plan: QuantizationPlan,
    ranking: Sequence[LayerSensitivity],
    lost: Callable[[QuantizationPlan], int],
    max_drop: float,
    images: int,
    *,
    metric: str = "top-1",
    limit: int = 16,
) -> dict[str, Any]:
    """Return the smallest number of sensitive layers to keep in higher precision for a budget.

    Keys, for the manifest: the budget ``max_drop``, the number of ``images`` and the ``metric``;
    the ``ranking``; every evaluated plan (``trials``: the number of ``excluded`` layers, of images
    ``lost``, and whether the plan is ``within_budget``); the ``excluded`` layers, which stay in
    higher precision, the most sensitive first, each with the reason; the ``share`` of the
    multiply-adds that stays in INT8, 0..1; ``passed``, whether the resulting plan was evaluated
    and meets the budget.

    Args:
        plan: with all layers quantised.
        ranking: its layers, the most sensitive first.
        lost: returns the number of labels that a plan loses.
        max_drop: budget, in percentage points of ``images``.
        images: number of images that ``lost`` evaluates.
        metric: ``top-1`` or ``agreement``.
        limit: largest number of evaluations.
    """
    trials: dict[int, dict[str, Any]] = {}

    def meets_budget(excluded: int) -> bool:
        if excluded not in trials:
            count = lost(plan.without([layer.name for layer in ranking[:excluded]]))
            within = 100 * count / images <= max_drop
            trials[excluded] = {"excluded": excluded, "lost": count, "within_budget": within}
        return bool(trials[excluded]["within_budget"])

    failing, passing = -1, 0
    while len(trials) < limit and not meets_budget(passing) and passing < len(ranking):
        failing, passing = passing, min(max(2 * passing, 1), len(ranking))
    while len(trials) < limit and passing in trials and passing - failing > 1:
        middle = (failing + passing) // 2
        failing, passing = (failing, middle) if meets_budget(middle) else (middle, passing)
    best = min(trials.values(), key=lambda t: (not t["within_budget"] and t["lost"], t["excluded"]))
    excluded = best["excluded"]
    reasons = {
        layer.name: f"isolated SQNR {layer.sqnr_db:.1f} dB for {100 * layer.share:.1f} % "
        f"of the work, rank {rank} of {len(ranking)}"
        for rank, layer in enumerate(ranking[:excluded], 1)
    }
    return {
        "max_drop": max_drop,
        "images": images,
        "metric": metric,
        "ranking": [asdict(layer) for layer in ranking],
        "trials": list(trials.values()),
        "excluded": reasons,
        "share": sum(layer.share for layer in ranking[excluded:]),
        "passed": best["within_budget"],
    }
