"""A bundle's FP32 graph as FP16, BF16 or INT8, judged beside FP32 and kept in the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from onnx import ModelProto, checker, load_model

from van_deploy.bundle import Artifact, Bundle, Origin, edit_bundle
from van_deploy.checks.golden import OutputLayout, golden_samples
from van_deploy.checks.outputs import check_new_graph
from van_deploy.config import QuantizeSettings
from van_deploy.documents import plain
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.graph.bfloat16 import BF16_EMULATED
from van_deploy.graph.export import van_from_onnx
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.manifest import GraphInfo, Precision
from van_deploy.precision.comparison import Candidate, compare_precisions, recommended
from van_deploy.precision.fp16 import (
    audit_ranges,
    bf16_from_fp32,
    default_fp32_nodes,
    fp16_from_fp32,
    fp32_nodes,
)
from van_deploy.precision.images import JobImages, images_for
from van_deploy.precision.int8 import Int8Maker, short
from van_deploy.precision.plan import SCOPES, histogram_tensors, layers_in_scope
from van_deploy.precision.scales import ChannelRange, observe_ranges, range_batch_size
from van_deploy.provenance import code_digest, tool_versions
from van_deploy.runners.onnxruntime import require_onnxruntime
from van_deploy.stopwatch import Progress, Stopwatch, no_progress


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantisation made.

    Attributes:
        bundle: as written.
        artifact: name of the new graph in it.
        reused: whether it was there already, from the same ingredients.
        reason: why it was reused, or made anew.
        facts: everything measured, as the manifest has it (`docs/precision.md` lists it).
        seconds: time of each stage that ran.
        allow_inconclusive: whether what the evaluation set cannot decide passes.
    """

    JSON_PROPERTIES: ClassVar[tuple[str, ...]] = ("graph",)

    bundle: Bundle
    artifact: str
    reused: bool
    reason: str
    facts: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    allow_inconclusive: bool = False

    @property
    def graph(self) -> GraphInfo | None:
        """What is in the new graph."""
        return self.bundle.artifact(self.artifact).graph

    @property
    def passed(self) -> bool:
        """Whether the precision asked for holds its gates, and the budget if there is one."""
        searched = self.facts.get("search", {}).get("passed", True)
        good = {"pass", "inconclusive"} if self.allow_inconclusive else {"pass"}
        judged = self.facts.get("judged", {}).get("outcome", "pass") in good
        rows = [row for row in self.facts["comparison"] if row["requested"]]
        shown = self.allow_inconclusive or not any(row["doubts"] for row in rows)
        return searched and judged and shown and all(row["passed"] for row in rows)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def quantize_bundle(
    path: str | Path,
    settings: QuantizeSettings | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> QuantizeResult:
    """Return a bundle that also holds its network in FP16, BF16 or INT8, and what that cost.

    Args:
        path: the bundle.
        settings: what to make, and on which images; INT8 for TensorRT by default. Where they
            name no evaluation set, the held-out part of the calibration images judges, and only
            the logits are judged.
        force: make it anew even if it is there already.
        progress: told what is being done.

    Raises:
        UsageError: a budget is asked for of a network without classes.
        BundleError: there is no bundle, or it is not what its manifest says.
        ImageError: there are no images, too few for the budget, too many cannot be read,
            or an image is used both to calibrate and to judge.
        GateFailed: with ``strict``, FP16 cannot hold a tensor.
        ConversionError: the graph is not a folded VAN, or the result was refused by
            ONNX's checker or ONNX Runtime.
    """
    opened, asked = Bundle.open(path), settings or QuantizeSettings()
    opened.verified_path("fp32")
    if asked.max_drop is not None and opened.manifest.architecture.out_indices:
        raise UsageError(
            f"The bundle '{opened.path}' gives feature maps, and --max-drop is of classes.",
            "Leave it out, and keep layers with --keep.",
        )
    watch = Stopwatch(progress)
    job = _Job(opened, asked, images_for(opened, asked, watch))
    name = asked.artifact
    reason = "--force" if force else opened.rebuild_reason(name, job.ingredients())
    reused = not reason
    if reused:
        reason = "the weights, graph, images, settings and versions are those it was made from"
    else:
        job.make_()
        opened = Bundle.open(path)
    facts, inconclusive = opened.artifact(name).quantization, asked.allow_inconclusive
    return QuantizeResult(opened, name, reused, reason, facts, dict(watch.seconds), inconclusive)


@dataclass
class _Job:
    """One quantisation, from an open bundle to a new artifact in it."""

    bundle: Bundle
    settings: QuantizeSettings
    images: JobImages
    facts: dict[str, Any] = field(default_factory=dict)

    def ingredients(self) -> dict[str, Any]:
        """Return everything that decides what the result will hold."""
        asked = self.settings.as_dict()
        for name in ("threads", "images", "calibration", "evaluate", "allow_inconclusive"):
            del asked[name]
        return {
            "weights": self.bundle.manifest.weights.sha256,
            "graph": self.bundle.artifact("fp32").sha256,
            "preprocessing": self.images.preprocessing.as_dict(),
            "calibration images": self.images.calibration.digest,
            "held-out images": self.images.held_out.digest,
            "evaluation images": self.images.judges.digest,
            "settings": asked,
            "code": code_digest("precision", "graph", "checks", "data", "model"),
            "versions": tool_versions("onnx", "onnxruntime", "torch", "numpy", "pillow"),
        }

    def make_(self) -> None:
        """Make the graph that was asked for, judge it, and write it into the bundle."""
        asked, images = self.settings, self.images
        model = load_model(self.bundle.verified_path("fp32"))
        network = van_from_onnx(model, self.bundle.manifest.architecture)
        by_user = fp32_nodes(model, asked.keep)
        scopes: dict[str, tuple[str, ...]] = {}  # the layers of each to try
        if asked.precision == "int8" and asked.scope == ("auto",):
            _timed_in(asked)  # says at once where nothing can be timed
            scopes = {scope: layers_in_scope(network.model, (scope,), by_user) for scope in SCOPES}
        elif asked.precision == "int8":
            scopes = {"": layers_in_scope(network.model, asked.scopes, by_user)}
        counted = histogram_tensors(network, set().union(*scopes.values()), asked.target)
        images.watch.begin("Recording ranges")
        height, width = images.preprocessing.sides
        read = images.read(images.calibration, range_batch_size(height * width))
        ranges = observe_ranges(network, (batch for batch, _ in read), counted)
        kept = self.kept(model, ranges, by_user)
        self.facts["calibration"] = {
            "images": len(images.calibration) - len(images.unreadable),
            "description": images.calibration.description,
            "noise": images.calibration.noise,
            "unreadable": list(images.unreadable),
        }
        candidates = [Candidate("fp32", "fp32", model)]
        if asked.precision == "bf16":
            candidates.append(Candidate(BF16_EMULATED, "bf16", bf16_from_fp32(model, kept)))
        elif asked.target == "tensorrt":
            usual = kept if asked.rest_precision == "fp16" else default_fp32_nodes(model)
            candidates.append(Candidate("fp16", "fp16", fp16_from_fp32(model, usual)))
        if scopes:
            maker = Int8Maker(model, network, ranges, asked, kept, images)
            for scope, layers in scopes.items():
                made = maker.make(layers)
                candidates.append(Candidate(f"int8 {scope}".strip(), "int8", made.model, made))
        self.write_(self.compared(candidates), ranges)

    def kept(
        self, model: ModelProto, ranges: Mapping[str, ChannelRange], by_user: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Return the nodes that stay FP32: the ones asked for, the usual ones, the audit's.

        Raises:
            GateFailed: with ``strict``, the audit found some.
        """
        settings = self.settings
        if settings.precision == "int8" and settings.rest_precision == "fp32":
            return by_user
        found = {**(default_fp32_nodes(model) if settings.keep_defaults else {}), **by_user}
        if settings.precision != "bf16":  # which has FP32's range
            audit = audit_ranges(model, ranges, found, strict=settings.strict)
            found |= audit["kept"]
            self.facts["audit"] = {"images": len(self.images.calibration), **audit}
        self.facts["kept"] = found
        return found

    def compared(self, candidates: Sequence[Candidate]) -> Candidate:
        """Check the new graphs, run them beside FP32, note the lines; return the chosen one."""
        asked, images = self.settings, self.images
        images.watch.begin("Comparing")
        try:
            for candidate in candidates[1:]:
                checker.check_model(candidate.model, full_check=True)
        except checker.ValidationError as error:
            raise ConversionError(
                f"The converted graph is not valid ONNX: {error}",
                "Please report it, with the command and the network's architecture.",
            ) from error
        size = images.preprocessing.image_size
        outputs = OutputLayout.of(self.bundle.manifest.architecture, size)
        rows = compare_precisions(candidates, images, asked, outputs, _timed_in(asked))
        ours = [row for row in rows if row["precision"] == asked.precision]
        chosen = min(ours, key=lambda row: (not row["passed"], row["ms_per_image"] or 0.0))
        best, why = recommended(rows, chosen)
        self.facts |= {
            "judged_on": {"images": chosen["images"], "description": images.judges.description},
            "comparison": [{**row, "requested": row is chosen} for row in rows],
            "recommended": best,
            "why": why,
        }
        return candidates[rows.index(chosen)]

    def judged(self, graph: ModelProto) -> dict[str, float]:
        """Judge the new graph on the bundle's golden samples, as verify will; return its SQNR."""
        if self.bundle.manifest.golden is None:
            return {}
        self.images.watch.begin("Judging on the golden samples")
        samples, method = golden_samples(self.bundle), self.settings.method
        judged, record = check_new_graph(graph, self.settings.precision, samples, method=method)
        self.facts["judged"] = {"images": samples.description, **plain(judged)}
        return record

    def write_(self, chosen: Candidate, ranges: Mapping[str, ChannelRange]) -> None:
        """Judge the chosen graph, and put it, its ranges and the facts into the bundle."""
        name, graph, int8 = self.settings.artifact, chosen.model, chosen.int8
        if int8 is not None:
            self.facts |= {"method": self.settings.method, **int8.as_dict()}
        record, about = self.judged(graph), graph_facts(graph)
        self.images.watch.begin("Writing the bundle")
        file, others = f"model.{name}.onnx", [f"ranges.{name}.json"]
        with edit_bundle(self.bundle.path) as draft:
            summary = {  # short numbers, to be read
                "schema": "van-deploy/ranges/2",
                "ranges": {
                    tensor: [short(found.minimum.min()), short(found.maximum.max())]
                    for tensor, found in ranges.items()
                },
                "scales": {} if int8 is None else int8.scales(),
            }
            text = json.dumps(summary, indent=2)
            draft.file(others[0]).write_text(text + "\n", encoding="utf-8")
            if int8 is not None and int8.plan.affines:
                others.append(f"channels.{name}.npz")
                self.facts["channels"] = others[1]
                channels = {  # what a tensor is here: (the FP32 graph's - shift) / factor
                    f"{tensor}.{part}": values.astype(np.float32)
                    for tensor, affine in int8.plan.affines.items()
                    for part, values in vars(affine).items()
                }
                with draft.file(others[1]).open("wb") as archive:
                    np.savez_compressed(archive, **channels)
            files = [*save_onnx(graph, draft.file(file)), *others]
            draft.record(
                Artifact(
                    name=name,
                    kind="onnx",
                    precision=cast("Precision", self.settings.precision),
                    file=file,
                    files=dict.fromkeys(files, ""),
                    made_from=Origin(name="fp32", sha256=self.bundle.artifact("fp32").sha256),
                    made_with=self.ingredients(),
                    graph=about,
                    quantization=self.facts,
                    golden_sqnr_db=record,
                )
            )
        self.images.watch.begin("")


def _timed_in(settings: QuantizeSettings) -> tuple[str, ...]:
    """Return ONNX Runtime's providers that stand for the target, none if no time is wanted.

    Raises:
        MissingDependency: times decide, and there is no such provider here.
    """
    if settings.target == "cpu":
        return ("CPUExecutionProvider",)
    if settings.scope != ("auto",):
        return ()
    if "CUDAExecutionProvider" not in require_onnxruntime().get_available_providers():
        raise MissingDependency(
            "--scope auto times graphs on a GPU, in ONNX Runtime's CUDA provider, which is not "
            "here.",
            "Name a scope, or give --target cpu.",
        )
    return ("CUDAExecutionProvider", "CPUExecutionProvider")
