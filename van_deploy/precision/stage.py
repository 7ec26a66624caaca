"""A bundle's FP32 graph as FP16 or INT8, judged beside FP32 and kept in the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from onnx import ModelProto, checker, load_model

from van_deploy.bundle import Artefact, Bundle, Draft, Origin, Precision, writing
from van_deploy.calibration_set import CalibrationSet
from van_deploy.errors import BundleError, ConversionError
from van_deploy.files import content_key
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.metrics import wilson_interval
from van_deploy.precision.audit import audit_ranges, require_no_surprise
from van_deploy.precision.compare import Candidate, compare_precisions
from van_deploy.precision.half import DEFAULT_KEEP, HalfGraph, half_from_fp32, kept_nodes
from van_deploy.precision.int8 import Int8Maker
from van_deploy.precision.job_images import JobImages, images_for
from van_deploy.precision.ranges import Ranges, lean_batch
from van_deploy.precision.ranges_file import ranges_summary, write_ranges
from van_deploy.precision.recording import changed, ranges_of, ranges_stem
from van_deploy.precision.settings import QuantizeSettings, rest_precision
from van_deploy.precision.stopwatch import Progress, Stopwatch
from van_deploy.precision.verdict import recommended
from van_deploy.provenance import code_digest, tool_versions

__all__ = ["QuantizeResult", "quantize_bundle"]


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

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        rows = []
        for row in self.facts["comparison"]:
            known = row["correct"] is not None
            interval = wilson_interval(row["correct"], row["images"]) if known else None
            rows.append({**row, "top1_interval": interval})
        return {
            "bundle": str(self.bundle.path),
            "artefact": self.artefact,
            "reused": self.reused,
            "reason": self.reason,
            "passed": self.passed,
            "seconds": dict(self.seconds),
            "graph": self.bundle.artefact(self.artefact).graph,
            **self.facts,
            "comparison": rows,
        }


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
    opened, asked = Bundle.open(path), settings or QuantizeSettings()
    opened.verified("fp32")
    watch = Stopwatch(progress)
    chosen = images_for(
        opened, asked, watch, images=images, calibration=calibration, evaluate=evaluate
    )
    job = _Job(opened, asked, chosen, watch)
    reason = job.why_anew(force)
    if not reason:
        facts = job.bundle.artefact(job.settings.artefact).quantization
        why = "the weights, graph, images, settings and versions are those it was made from"
        return QuantizeResult(job.bundle, job.settings.artefact, True, why, facts)
    job.make_()
    written = Bundle.open(path)
    name = job.settings.artefact
    facts = written.artefact(name).quantization
    return QuantizeResult(written, name, False, reason, facts, dict(watch.seconds))


class _Job:
    """One quantisation, from an open bundle to a new artefact in it."""

    def __init__(
        self, bundle: Bundle, settings: QuantizeSettings, images: JobImages, watch: Stopwatch
    ) -> None:
        self.bundle = bundle
        self.settings = settings
        self.images = images
        self.watch = watch
        self.int8 = Int8Maker(settings, images, watch)
        self.facts = self.int8.facts

    # --- the cache ---

    def ingredients(self) -> dict[str, Any]:
        """Return everything that decides what the result will hold."""
        asked = self.settings.as_dict()
        for name in ("threads", "images", "calibration", "evaluate"):
            del asked[name]
        return {
            "weights": self.bundle.manifest.weights.sha256,
            "graph": self.bundle.artefact("fp32").sha256,
            "preprocessing": self.images.preprocessing.as_dict(),
            "calibration images": self.images.calibration.digest,
            "held-out images": self.images.held_out.digest,
            "evaluation images": self.images.judges.digest,
            "settings": asked,
            "code": code_digest("precision", "data", "model"),
            "versions": tool_versions("onnx", "onnxruntime", "numpy", "pillow"),
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
        return f"changed since: {changed(artefact.made_with, wanted)}"

    # --- the work ---

    def make_(self) -> None:
        """Make the graph that was asked for, judge it, and write it into the bundle."""
        original = load_model(self.bundle.verified("fp32"))
        batch = lean_batch(original)
        fp16 = self.settings.precision == "fp16"
        model = original if fp16 else self.int8.equalized(original, batch)
        ranges, self.facts["ranges"] = ranges_of(
            self.bundle,
            model,
            self.settings,
            self.ingredients(),
            lambda: self.images.batches(self.images.calibration, batch),
            self.watch,
        )
        kept = {} if self.settings.target == "cpu" else self.kept(model, ranges)
        self.facts["calibration"] = {
            "images": ranges.images,
            "description": self.images.calibration.description,
            "noise": self.images.calibration.noise,
            "unreadable": list(self.images.unreadable),
        }
        graphs: dict[str, ModelProto] = {}
        if self.settings.target == "tensorrt":
            half = self.half(original, kept)
            self.facts |= {"kept": dict(kept), "casts": half.casts}
            graphs["fp16"] = half.model
        if self.settings.precision == "int8":
            graphs["int8"] = self.int8.graph(model, ranges, kept)
        self.compare_(original, graphs, batch)
        self.write_(graphs[self.settings.precision], ranges)

    def half(self, model: ModelProto, kept: Mapping[str, str]) -> HalfGraph:
        """Return the FP16 graph, asked for or to compare INT8 with."""
        if self.settings.precision == "fp16":
            return half_from_fp32(model, kept, half_io=self.settings.half_io)
        names = {node.name for node in model.graph.node}
        if rest_precision(self.settings) == "fp32":
            kept = kept_nodes(model, DEFAULT_KEEP)
        return half_from_fp32(model, {name: why for name, why in kept.items() if name in names})

    def kept(self, model: ModelProto, ranges: Ranges) -> dict[str, str]:
        """Return the nodes that stay FP32: the ones asked for, and the audit's.

        Raises:
            GateFailed: with ``strict``, the audit found some.
        """
        if self.settings.precision == "int8" and rest_precision(self.settings) == "fp32":
            return {node.name: "--rest fp32" for node in model.graph.node}
        names = (*(DEFAULT_KEEP if self.settings.keep_defaults else ()), *self.settings.keep)
        asked = kept_nodes(model, names)
        audit = audit_ranges(model, ranges, asked)
        if self.settings.strict:
            require_no_surprise(audit)
        self.facts["audit"] = audit.as_dict()
        return {**asked, **audit.kept}

    def compare_(self, model: ModelProto, graphs: Mapping[str, ModelProto], batch: int) -> None:
        """Check the new graphs, run them beside FP32, and note the lines and the verdict."""
        self.watch.begin("Comparing")
        for graph in graphs.values():
            _check(graph)
        cpu = self.settings.target == "cpu"
        candidates = [Candidate("fp32", model, _size(model))]
        candidates += [
            Candidate(name, graph, _size(graph), fuse=cpu) for name, graph in graphs.items()
        ]
        total = len(self.images.judges)
        rows = compare_precisions(
            candidates,
            self.images.judges,
            self.images.preprocessing,
            batch=min(4 * batch, 32),
            timed=cpu,
            threads=self.settings.threads,
            progress=lambda done: self.watch.say(f"Comparing {done}/{total}"),
        )
        best, why = recommended(rows, self.settings.target)
        requested = self.settings.precision
        self.facts |= {
            "judged_on": {"images": rows[0].images, "description": self.images.judges.description},
            "comparison": [
                {**row.as_dict(), "requested": row.precision == requested} for row in rows
            ],
            "recommended": best,
            "why": why,
        }

    def write_(self, graph: ModelProto, ranges: Ranges) -> None:
        """Put the graph, its ranges and the facts into the bundle."""
        self.watch.begin("Writing the bundle")
        name = self.settings.artefact
        file, stem = f"model.{name}.onnx", ranges_stem(name)
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
                    precision=cast("Precision", self.settings.precision),
                    file=file,
                    files=dict.fromkeys([*files, f"{stem}.json", f"{stem}.npz"], ""),
                    made_from=Origin(name="fp32", sha256=self.bundle.artefact("fp32").sha256),
                    made_with=self.ingredients(),
                    graph=graph_facts(graph),
                    quantization=self.facts,
                )
            )
        self.watch.begin("")


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
