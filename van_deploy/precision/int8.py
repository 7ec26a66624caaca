"""An FP32 graph made into INT8, step by step, by what the settings ask."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.metrics import kl_divergence
from van_deploy.precision.correct import Written
from van_deploy.precision.cpu import CpuScales, cpu_scales, cpu_weight_scales
from van_deploy.precision.cpu_writer import qdq_for_cpu
from van_deploy.precision.drop import Drop, top1_drop
from van_deploy.precision.equalize import equalize
from van_deploy.precision.initial import initial_plan, nodes_in_scope
from van_deploy.precision.job_images import JobImages, spread_over
from van_deploy.precision.plan import QuantizationPlan, simulate, weight_scales
from van_deploy.precision.quantize import qdq_from_plan, quantized_share
from van_deploy.precision.ranges import Ranges
from van_deploy.precision.ranking import rank_layers
from van_deploy.precision.refine import refine_plan
from van_deploy.precision.scales import Method
from van_deploy.precision.search import search_kept
from van_deploy.precision.session import logits_session
from van_deploy.precision.settings import (
    AUTO,
    QuantizeSettings,
    equalizing,
    refining,
    rest_precision,
    scope_asked,
)
from van_deploy.precision.stopwatch import Stopwatch

__all__ = ["Int8Maker"]

EQUALIZE_IMAGES = 128
REFINE_IMAGES = 192
RANKING_IMAGES = 32
JUDGED_METHOD_IMAGES = 128

Images = npt.NDArray[np.float32]


class Int8Maker:
    """The steps from an FP32 graph to an INT8 one.

    Args:
        settings: what is asked.
        images: to calibrate and judge on.
        watch: told what is being done.

    Attributes:
        facts: what was decided and measured, for the manifest.
    """

    def __init__(
        self,
        settings: QuantizeSettings,
        images: JobImages,
        watch: Stopwatch,
    ) -> None:
        """Take the settings; nothing is done yet."""
        self.settings = settings
        self.images = images
        self.watch = watch
        self.facts: dict[str, Any] = {}

    def equalized(self, model: ModelProto, batch: int) -> ModelProto:
        """Return the graph after the exact changes that make its tensors round better."""
        settings = equalizing(self.settings)
        if settings is None:
            return model
        self.watch.begin("Equalising")
        nodes = nodes_in_scope(model, scope_asked(self.settings))
        few = spread_over(self.images.calibration, EQUALIZE_IMAGES)
        report = equalize(model, self.images.batches(few, batch), nodes, settings)
        self.facts["equalize"] = report.as_dict()
        return report.model

    def graph(self, model: ModelProto, ranges: Ranges, kept: Mapping[str, str]) -> ModelProto:
        """Return the INT8 graph for the target.

        Args:
            model: FP32, equalised or not.
            ranges: of it.
            kept: nodes that stay FP32 where the rest is FP16, and why.
        """
        nodes_in_scope(model, scope_asked(self.settings))  # a wrong scope is said before any work
        method = self._method(model, ranges)
        self.watch.begin("Choosing scales")
        plan = self._initial(model, ranges, method)
        scales: CpuScales | None = None
        if self.settings.target == "cpu":
            percentile = self.settings.percentile / 100
            scales = cpu_scales(plan, ranges, method, percentile=percentile)
        written = simulate if scales is None else functools.partial(_looked_into, scales)
        plan = self._refined(plan, written)

        def file(candidate: QuantizationPlan) -> ModelProto:
            if scales is not None:
                return qdq_for_cpu(candidate, scales)
            rest, half_io = rest_precision(self.settings), self.settings.half_io
            return qdq_from_plan(candidate, rest=rest, kept=kept, half_io=half_io)

        if self.settings.max_drop is not None:
            plan = self._searched(model, plan, self.settings.max_drop, written, file)
        self.watch.begin("Writing the graph")
        self.facts |= {
            "plan": dict(plan.facts),
            "scales": {
                conv.activation: float(f"{conv.activation_scale:.6g}")
                for conv in plan.convs.values()
            },
            "quantized": len(plan.convs),
            "int8_share": quantized_share(plan),
        }
        if scales is not None:
            self.facts["scales"] = {n: float(f"{s.scale:.6g}") for n, s in scales.tensors.items()}
        return file(plan)

    def _initial(self, model: ModelProto, ranges: Ranges, method: Method) -> QuantizationPlan:
        scope, percentile = scope_asked(self.settings), self.settings.percentile / 100
        steps = cpu_weight_scales if self.settings.target == "cpu" else weight_scales
        return initial_plan(model, ranges, scope, method, percentile=percentile, weight_steps=steps)

    def _refined(self, plan: QuantizationPlan, written: Written) -> QuantizationPlan:
        """Return the plan improved against the network's own answers, if that is asked."""
        settings = refining(self.settings)
        if settings is None:
            return plan
        self.watch.begin("Refining")
        few = spread_over(self.images.calibration, REFINE_IMAGES)
        batches = self.images.batches(few, settings.batch)
        threads = self.settings.threads
        report = refine_plan(
            plan, batches, settings, self.watch.reached, written=written, threads=threads
        )
        self.facts["refine"] = report.as_dict()
        return report.plan

    def _searched(
        self,
        model: ModelProto,
        plan: QuantizationPlan,
        max_drop: float,
        written: Written,
        file: Written,
    ) -> QuantizationPlan:
        """Return the plan with as many layers as the budget allows.

        Layers are ranked one at a time by ``written``; what holds the budget is the ``file``
        that will be deployed, with all that FP16 or a CPU's kernels do to it.
        """
        self.watch.begin("Ranking layers")
        first = spread_over(self.images.held_out, RANKING_IMAGES)
        inputs = np.concatenate(list(self.images.batches(first, RANKING_IMAGES)))
        ranking = rank_layers(
            plan, inputs, self.watch.reached, written=written, threads=self.settings.threads
        )
        self.watch.begin("Searching")
        expected, labels = self._judged_logits(model)

        def evaluate(candidate: QuantizationPlan) -> Drop:
            return top1_drop(expected, self._judged_logits(file(candidate))[0], labels)

        report = search_kept(
            plan,
            ranking,
            evaluate,
            max_drop,
            limit=self.settings.evaluations,
            progress=lambda trial: self.watch.say(f"Searching: {trial.kept} layers kept"),
        )
        on = self.images.judges.description
        self.facts["search"] = {**report.as_dict(), "searched_on": on}
        return report.plan

    def _judged_logits(
        self, model: ModelProto
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any] | None]:
        """Return the logits of the images that judge, and their labels if the folders say them."""
        fuse = self.settings.target == "cpu"
        run = logits_session(model, fuse=fuse, threads=self.settings.threads)
        pieces, numbers = [], []
        for inputs, found in self.images.judged():
            pieces.append(run(inputs))
            numbers += found
        logits = np.concatenate(pieces)
        labels = self.images.judges.labels
        return logits, None if labels is None else labels[numbers]

    def _method(self, model: ModelProto, ranges: Ranges) -> Method:
        """Return the method asked for, or the one that disturbs held-out logits least."""
        if self.settings.method != AUTO:
            return Method(self.settings.method)
        self.watch.begin("Trying methods")
        few = spread_over(self.images.held_out, JUDGED_METHOD_IMAGES)
        inputs = np.concatenate(list(self.images.batches(few, 16)))
        expected = _run(model, inputs, self.settings.threads)
        table: dict[str, float] = {}
        for method in Method:
            self.watch.say(f"Trying methods: {method.value}")
            plan = self._initial(model, ranges, method)
            found = _run(simulate(plan), inputs, self.settings.threads)
            table[method.value] = float(kl_divergence(expected, found).mean())
        best = min(table, key=lambda name: table[name])
        self.facts["methods"] = {"images": len(inputs), "kl": table, "chosen": best}
        return Method(best)


def _looked_into(scales: CpuScales, plan: QuantizationPlan) -> ModelProto:
    return qdq_for_cpu(plan, scales, own_units=True)


def _run(model: ModelProto, inputs: Images, threads: int | None) -> npt.NDArray[np.float32]:
    run = logits_session(model, fuse=False, threads=threads)
    return np.concatenate([run(inputs[i : i + 16]) for i in range(0, len(inputs), 16)])
