"""A bundle's FP32 graph as FP16 or INT8, judged beside FP32 and kept in the bundle."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, checker, load_model

from van_deploy.bundle import Artefact, Bundle, Draft, content_key, writing
from van_deploy.errors import BundleError, ConversionError, ImageError, UsageError
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.images import UnreadableImages, sample_pictures
from van_deploy.metrics import kl_divergence
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.preprocess import Preprocessing
from van_deploy.precision.audit import audit_ranges, require_no_surprise
from van_deploy.precision.calibration import (
    NO_IMAGES,
    CalibrationSet,
    ChosenImages,
    ImageSelection,
    Picture,
    calibration_set_named,
    choose_images,
    input_batches,
    noise_images,
    refuse_overlap,
)
from van_deploy.precision.compare import (
    Candidate,
    compare_precisions,
    logits_session,
    recommended,
)
from van_deploy.precision.cpu import qdq_for_cpu
from van_deploy.precision.equalize import equalize
from van_deploy.precision.half import DEFAULT_KEEP, HalfGraph, half_from_fp32, kept_nodes
from van_deploy.precision.initial import initial_plan, nodes_in_scope
from van_deploy.precision.plan import QuantizationPlan, simulate
from van_deploy.precision.quantize import qdq_from_plan, quantized_share
from van_deploy.precision.ranges import (
    Ranges,
    float_tensors,
    lean_batch,
    ranges_from_file,
    ranges_summary,
    record_ranges,
    write_ranges,
)
from van_deploy.precision.refine import RefineSettings, refine_plan
from van_deploy.precision.scales import Method
from van_deploy.precision.search import Drop, rank_layers, search_kept, top1_drop
from van_deploy.precision.settings import AUTO, QuantizeSettings
from van_deploy.provenance import code_digest, tool_versions

__all__ = ["QuantizeResult", "quantize_bundle"]

EQUALIZE_IMAGES = 128
REFINE_IMAGES = 256
RANKING_IMAGES = 32
AUDIT_IMAGES = 64
JUDGED_METHOD_IMAGES = 128

Progress = Callable[[str], None]
Images = npt.NDArray[np.float32]
"""Normalised network input ``(N, C, S, S)`` float32."""


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantisation made.

    Attributes:
        bundle: as written.
        artefact: name of the new graph in it.
        reused: whether it was there already, from the same ingredients.
        reason: why it was reused, or made anew.
        facts: everything measured, as the manifest has it.
        seconds: time of each stage that ran.
    """

    bundle: Bundle
    artefact: str
    reused: bool
    reason: str
    facts: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the precision asked for holds its gate, and the budget if there is one."""
        searched = self.facts.get("search", {}).get("passed", True)
        return searched and all(
            row["passed"] for row in self.facts["comparison"] if row["requested"]
        )

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def quantize_bundle(
    path: str | Path,
    settings: QuantizeSettings | None = None,
    *,
    images: Path | None = None,
    calibration: CalibrationSet | str | None = None,
    evaluate: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Return a bundle that also holds its network in FP16 or INT8, and what that cost.

    Args:
        path: the bundle.
        settings: what to make; INT8 for TensorRT by default.
        images: folder or ``.npz`` of images to calibrate on, or, for FP16, to
            audit the ranges on.
        calibration: a calibration set, or the name or path of one.
        evaluate: folder of images to judge on; by default the held-out part of
            the calibration images.
        force: make it anew even if it is there already.
        progress: told what is being done.

    Raises:
        UsageError: the request contradicts itself.
        BundleError: there is no bundle, or it is not what its manifest says.
        ImageError: there are no images, too many cannot be read, or an image
            is used both to calibrate and to judge.
        GateFailed: with ``strict``, FP16 cannot hold a tensor.
        ConversionError: the result was refused by ONNX's checker or ONNX Runtime.
    """
    job = _Job(Bundle.open(path), settings or QuantizeSettings(), progress)
    job.choose_images_(images, calibration, evaluate)
    reason = job.why_anew(force)
    if not reason:
        facts = job.bundle.artefact(job.settings.artefact).facts
        why = "the weights, graph, images, settings and versions are those it was made from"
        return QuantizeResult(job.bundle, job.settings.artefact, True, why, facts)
    job.make_()
    written = Bundle.open(path)
    name = job.settings.artefact
    return QuantizeResult(
        written, name, False, reason, written.artefact(name).facts, dict(job.seconds)
    )


class _Job:
    """One quantisation, from an open bundle to a new artefact in it."""

    def __init__(
        self,
        bundle: Bundle,
        settings: QuantizeSettings,
        progress: Progress | None,
    ) -> None:
        self.bundle = bundle
        self.settings = settings
        self.say = progress or (lambda _: None)
        self.source = bundle.verified("fp32")
        self.preprocessing = Preprocessing.from_dict(bundle.manifest["preprocessing"])
        names = bundle.manifest.get("class_names")
        self.class_names = tuple(names) if names else None
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.calibration: ChosenImages
        self.held_out: ChosenImages
        self.judges: ChosenImages
        self.unreadable = UnreadableImages()
        self.stage = ""
        self.started = 0.0

    # --- images ---

    def choose_images_(
        self,
        images: Path | None,
        calibration: CalibrationSet | str | None,
        evaluate: Path | None,
    ) -> None:
        found = calibration_set_named(calibration) if isinstance(calibration, str) else calibration
        selection = found.images if found else ImageSelection()
        chosen = self._calibration_images(images, found, selection)
        judges = None
        if evaluate is not None:
            everything = ImageSelection(count=1 << 31, held_out=0.0)
            judges = choose_images(everything, evaluate)
            refuse_overlap(chosen, judges)
        self.calibration, self.held_out = chosen.split(selection.held_out, selection.seed)
        self.judges = judges or self.held_out

    def _calibration_images(
        self, images: Path | None, found: CalibrationSet | None, selection: ImageSelection
    ) -> ChosenImages:
        if self.settings.noise:
            if images is not None or found is not None:
                raise UsageError(
                    "--calibrate-on-noise and images to calibrate on were both given.",
                    "Leave one of them out; images are always better.",
                )
            return noise_images(AUDIT_IMAGES, self.preprocessing, selection.seed)
        if images is not None or found is not None:
            return choose_images(selection, images)
        if self.bundle.name == EMBEDDED_NAME:
            return choose_images(calibration_set_named("digits").images)
        if self.settings.precision == "fp16":
            return _sample_images()
        raise ImageError(*NO_IMAGES)

    def batches(self, chosen: ChosenImages, batch: int) -> Any:
        """Yield the network's input, and say how far it is."""
        done, total = 0, len(chosen.pictures)
        for inputs, _ in input_batches(chosen, self.preprocessing, batch, self.unreadable):
            yield inputs
            done += len(inputs)
            self.say(f"{self.stage} {done}/{total}")

    # --- the cache ---

    def ingredients(self) -> dict[str, Any]:
        """Return everything that decides what the result will hold."""
        asked = asdict(self.settings)
        del asked["threads"]
        return {
            "weights": self.bundle.manifest["weights"]["sha256"],
            "graph": self.bundle.artefact("fp32").sha256,
            "preprocessing": self.preprocessing.as_dict(),
            "calibration images": self.calibration.digest,
            "held-out images": self.held_out.digest,
            "evaluation images": self.judges.digest,
            "settings": asked,
            "code": code_digest("precision", "images", "model"),
            "versions": tool_versions("onnx", "onnxruntime", "numpy", "pillow"),
        }

    def range_ingredients(self, model: ModelProto) -> dict[str, Any]:
        """Return what decides the recorded ranges: not the method, not the scope."""
        chosen = self.ingredients()
        parts = ("weights", "preprocessing", "calibration images", "code", "versions")
        return {
            **{part: chosen[part] for part in parts},
            "graph": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
            "histograms": "all" if self.settings.target == "cpu" else "inputs of convolutions",
        }

    def why_anew(self, force: bool) -> str:
        """Return why the artefact has to be made, or "" if it is there already."""
        if force:
            return "asked to (--force)"
        name = self.settings.artefact
        try:
            artefact = self.bundle.artefact(name)
            self.bundle.verified(name)
        except BundleError as error:
            return error.message if name in self.bundle.artefacts else "not there yet"
        wanted = self.ingredients()
        if artefact.key == content_key(wanted):
            return ""
        return f"changed since: {_changed(artefact.made_with, wanted)}"

    # --- the work ---

    def make_(self) -> None:
        """Make the graph that was asked for, judge it, and write it into the bundle."""
        original = load_model(self.source)
        batch = lean_batch(original)
        model = original if self.settings.precision == "fp16" else self.equalized(original, batch)
        ranges = self.ranges(model, batch)
        kept = {} if self.settings.target == "cpu" else self.kept(model, ranges)
        self.facts["calibration"] = {
            "images": ranges.images,
            "description": self.calibration.description,
            "noise": self.calibration.noise,
            "unreadable": [error.message for _, error in self.unreadable.found],
        }
        graphs: dict[str, ModelProto] = {}
        if self.settings.target == "tensorrt":
            half = self.half(original, kept)
            self.facts |= {"kept": dict(kept), "casts": half.casts}
            graphs["fp16"] = half.model
        if self.settings.precision == "int8":
            graphs["int8"] = self.int8(model, ranges, kept)
        self.compare_(original, graphs, batch)
        self.write_(graphs[self.settings.precision], ranges)

    def half(self, model: ModelProto, kept: Mapping[str, str]) -> HalfGraph:
        """Return the FP16 graph, asked for or to compare INT8 with."""
        if self.settings.precision == "fp16":
            return half_from_fp32(model, kept, half_io=self.settings.half_io)
        names = {node.name for node in model.graph.node}
        if self.settings.rest_precision == "fp32":
            kept = kept_nodes(model, DEFAULT_KEEP)
        return half_from_fp32(model, {name: why for name, why in kept.items() if name in names})

    def equalized(self, model: ModelProto, batch: int) -> ModelProto:
        """Return the graph after the exact changes that make its tensors round better."""
        settings = self.settings.equalize_for_target
        if settings is None:
            return model
        self._begin("Equalising")
        nodes = nodes_in_scope(model, self.settings.scope_asked)
        images = self.batches(_first(self.calibration, EQUALIZE_IMAGES), batch)
        report = equalize(model, images, nodes, settings)
        self.facts["equalize"] = report.as_dict()
        return report.model

    def ranges(self, model: ModelProto, batch: int) -> Ranges:
        """Return the ranges, from the bundle if they were recorded from the same ingredients."""
        wanted = self.range_ingredients(model)
        stored, why = self._stored_ranges(wanted)
        self.facts["ranges"] = {"reused": stored is not None, "reason": why}
        if stored is not None:
            return stored
        self._begin("Recording ranges")
        found = record_ranges(
            model,
            self.batches(self.calibration, batch),
            histograms=float_tensors(model) if self.settings.target == "cpu" else None,
            threads=self.settings.threads,
        )
        return replace(found, facts=json.loads(json.dumps({"made_with": wanted})))

    def _stored_ranges(self, wanted: Mapping[str, Any]) -> tuple[Ranges | None, str]:
        name = self.settings.artefact
        if name not in self.bundle.artefacts:
            return None, "none were recorded yet"
        try:
            self.bundle.verified(name)
            found = ranges_from_file(self.bundle.path / f"{_stem(name)}.npz")
        except (BundleError, OSError, ValueError, KeyError) as error:
            return None, f"the recorded ones cannot be used: {error}"
        changed = _changed(found.facts["made_with"], wanted)
        return (None, f"changed since: {changed}") if changed else (found, "nothing changed")

    def kept(self, model: ModelProto, ranges: Ranges) -> dict[str, str]:
        """Return the nodes that stay FP32: the ones asked for, and the audit's.

        Raises:
            GateFailed: with ``strict``, the audit found some.
        """
        if self.settings.precision == "int8" and self.settings.rest_precision == "fp32":
            return {node.name: "--rest fp32" for node in model.graph.node}
        names = (*(DEFAULT_KEEP if self.settings.keep_defaults else ()), *self.settings.keep)
        asked = kept_nodes(model, names)
        audit = audit_ranges(model, ranges, asked)
        if self.settings.strict:
            require_no_surprise(audit)
        self.facts["audit"] = audit.as_dict()
        return {**asked, **audit.kept}

    def int8(self, model: ModelProto, ranges: Ranges, kept: Mapping[str, str]) -> ModelProto:
        """Return the INT8 graph for the target."""
        scope = self.settings.scope_asked
        nodes_in_scope(model, scope)  # a wrong scope is said before any work
        method = self._method(model, ranges)
        self._begin("Choosing scales")
        plan = initial_plan(model, ranges, scope, method, percentile=self.settings.percentile)
        if self.settings.refine is not None and self.settings.target == "tensorrt":
            plan = self.refined(plan, self.settings.refine)
        if self.settings.max_drop is not None:
            plan = self.searched(model, plan, self.settings.max_drop)
        self._begin("Writing the graph")
        self.facts |= {
            "plan": dict(plan.facts),
            "scales": {
                conv.activation: float(f"{conv.activation_scale:.6g}")
                for conv in plan.convs.values()
            },
            "quantized": len(plan.convs),
            "int8_share": quantized_share(plan),
        }
        if self.settings.target == "cpu":
            percentile = self.settings.percentile
            return qdq_for_cpu(plan, ranges, method, percentile=percentile)
        return qdq_from_plan(
            plan,
            rest=self.settings.rest_precision,
            kept=kept,
            half_io=self.settings.half_io,
        )

    def refined(self, plan: QuantizationPlan, settings: RefineSettings) -> QuantizationPlan:
        """Return the plan improved against the network's own answers."""
        self._begin("Refining")
        images = self.batches(_first(self.calibration, REFINE_IMAGES), settings.batch)
        report = refine_plan(plan, images, settings)
        self.facts["refine"] = report.as_dict()
        return report.plan

    def searched(
        self, model: ModelProto, plan: QuantizationPlan, max_drop: float
    ) -> QuantizationPlan:
        """Return the plan with as many layers as the budget allows."""
        self._begin("Ranking layers")
        first = _first(self.held_out, RANKING_IMAGES)
        inputs = np.concatenate(list(self.batches(first, RANKING_IMAGES)))
        ranking = rank_layers(plan, inputs, lambda i, n: self.say(f"Ranking layers {i}/{n}"))
        self._begin("Searching")
        expected, labels = self._judged_logits(model)

        def evaluate(candidate: QuantizationPlan) -> Drop:
            return top1_drop(expected, self._judged_logits(simulate(candidate))[0], labels)

        report = search_kept(
            plan,
            ranking,
            evaluate,
            max_drop,
            limit=self.settings.evaluations,
            progress=lambda trial: self.say(f"Searching: {trial.kept} layers kept"),
        )
        self.facts["search"] = {**report.as_dict(), "searched_on": self.judges.description}
        return report.plan

    def _judged_logits(
        self, model: ModelProto
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any] | None]:
        """Return the logits of the images that judge, and their labels if the folders say them."""
        run = logits_session(model, fuse=False, threads=self.settings.threads)
        batches = input_batches(self.judges, self.preprocessing, 32, self.unreadable)
        pieces, numbers = [], []
        for inputs, found in batches:
            pieces.append(run(inputs))
            numbers += found
        logits = np.concatenate(pieces)
        labels = self.judges.labels(self.class_names, logits.shape[1])
        return logits, None if labels is None else labels[numbers]

    def _method(self, model: ModelProto, ranges: Ranges) -> Method:
        """Return the method asked for, or the one that disturbs held-out logits least."""
        if self.settings.method != AUTO:
            return Method(self.settings.method)
        self._begin("Trying methods")
        inputs = np.concatenate(list(self.batches(_first(self.held_out, JUDGED_METHOD_IMAGES), 16)))
        threads = self.settings.threads
        expected = _run(model, inputs, threads)
        table: dict[str, float] = {}
        for method in Method:
            self.say(f"Trying methods: {method.value}")
            plan = initial_plan(
                model,
                ranges,
                self.settings.scope_asked,
                method,
                percentile=self.settings.percentile,
            )
            found = _run(simulate(plan), inputs, threads)
            table[method.value] = float(kl_divergence(expected, found).mean())
        best = min(table, key=lambda name: table[name])
        self.facts["methods"] = {"images": len(inputs), "kl": table, "chosen": best}
        return Method(best)

    def compare_(self, model: ModelProto, graphs: Mapping[str, ModelProto], batch: int) -> None:
        """Check the new graphs, run them beside FP32, and note the lines and the verdict."""
        self._begin("Comparing")
        for graph in graphs.values():
            _check(graph)
        cpu = self.settings.target == "cpu"
        candidates = [Candidate("fp32", model, _size(model))]
        candidates += [
            Candidate(name, graph, _size(graph), fuse=cpu) for name, graph in graphs.items()
        ]
        total = len(self.judges.pictures)
        rows = compare_precisions(
            candidates,
            self.judges,
            self.preprocessing,
            batch=min(4 * batch, 32),
            class_names=self.class_names,
            timed=cpu,
            threads=self.settings.threads,
            progress=lambda done: self.say(f"Comparing {done}/{total}"),
        )
        best, why = recommended(rows, self.settings.target)
        requested = self.settings.precision
        self.facts |= {
            "judged_on": {"images": rows[0].images, "description": self.judges.description},
            "comparison": [
                {**row.as_dict(), "requested": row.precision == requested} for row in rows
            ],
            "recommended": best,
            "why": why,
        }

    def write_(self, graph: ModelProto, ranges: Ranges) -> None:
        """Put the graph, its ranges and the facts into the bundle."""
        self._begin("Writing the bundle")
        name = self.settings.artefact
        file, stem = f"model.{name}.onnx", _stem(name)
        made_with = self.ingredients()
        with writing(self.bundle.path) as draft:
            files = _save(draft, file, graph)
            summary = {**ranges_summary(ranges), "scales": self.facts.get("scales", {})}
            draft.file(f"{stem}.json").write_text(
                json.dumps(summary, indent=2) + "\n", encoding="utf-8"
            )
            write_ranges(draft.file(f"{stem}.npz"), ranges)
            draft.record(
                Artefact(
                    name=name,
                    kind="onnx",
                    precision=self.settings.precision,
                    file=file,
                    files=dict.fromkeys([*files, f"{stem}.json", f"{stem}.npz"], ""),
                    made_from={"name": "fp32", "sha256": self.bundle.artefact("fp32").sha256},
                    made_with=made_with,
                    key=content_key(made_with),
                    facts={**graph_facts(graph), **self.facts},
                )
            )
        self._begin("")

    def _begin(self, stage: str) -> None:
        now = time.perf_counter()
        if self.stage:
            self.seconds[self.stage] = round(now - self.started, 3)
        self.stage, self.started = stage, now
        if stage:
            self.say(stage)


def _first(chosen: ChosenImages, count: int) -> ChosenImages:
    """Return at most ``count`` images, spread evenly over ``chosen``."""
    step = max(1, len(chosen.pictures) // count)
    return replace(chosen, pictures=chosen.pictures[::step][:count])


def _run(model: ModelProto, inputs: Images, threads: int | None) -> npt.NDArray[np.float32]:
    run = logits_session(model, fuse=False, threads=threads)
    return np.concatenate([run(inputs[i : i + 16]) for i in range(0, len(inputs), 16)])


def _sample_images() -> ChosenImages:
    """Return photographs found in installed packages, for an audit without the user's images."""
    samples = sample_pictures()
    pictures = tuple(
        Picture(
            f"sample {number}", hashlib.sha256(image.tobytes()).hexdigest(), "", np.asarray(image)
        )
        for number, image in enumerate(samples.images)
    )
    return ChosenImages(pictures, samples.description)


def _check(graph: ModelProto) -> None:
    try:
        checker.check_model(graph, full_check=True)
    except checker.ValidationError as error:
        raise ConversionError(
            f"The converted graph is not valid ONNX: {error}",
            "Please report it, with the command and the network's architecture.",
        ) from error


def _size(model: ModelProto) -> int:
    return int(model.ByteSize())


def _save(draft: Draft, file: str, graph: ModelProto) -> list[str]:
    copy = ModelProto()
    copy.CopyFrom(graph)
    return save_onnx(copy, draft.file(file))


def _stem(artefact: str) -> str:
    """Return what the files with an artefact's ranges are called, without suffix."""
    return "ranges" if artefact == "int8" else f"ranges.{artefact}"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the names of the ingredients that differ, with commas; "" if none does."""
    plain = json.loads(json.dumps(now))
    return ", ".join(key for key, value in plain.items() if before.get(key) != value)
