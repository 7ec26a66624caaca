"""A bundle's FP32 graph as FP16, BF16 or INT8, judged beside FP32 and kept in the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, checker, load_model
from torch import nn

from van_deploy.bundle import Artefact, Bundle, Draft, Origin, writing
from van_deploy.calibration_set import CalibrationSet
from van_deploy.checks.golden import golden_samples
from van_deploy.checks.judging import judge_new
from van_deploy.checks.samples import Outputs
from van_deploy.config import QuantizeSettings
from van_deploy.documents import plain
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.graph.bfloat16 import BF16_EMULATED
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.graph.rebuilt import van_from_onnx
from van_deploy.manifest import GraphFacts, Precision
from van_deploy.precision.comparison import (
    Candidate,
    PrecisionRow,
    compare_precisions,
    recommended,
)
from van_deploy.precision.fp16 import (
    bf16_from_fp32,
    fp16_from_fp32,
    kept_nodes,
    usually_kept,
)
from van_deploy.precision.int8 import Int8, Int8Maker
from van_deploy.precision.job_images import JobImages, images_for
from van_deploy.precision.observers import ChannelRange, images_at_once, observe
from van_deploy.precision.plan import SCOPES, counted_tensors, layers_in_scope
from van_deploy.precision.range_audit import audit_ranges
from van_deploy.provenance import code_digest, tool_versions
from van_deploy.runners.onnxruntime import require_onnxruntime
from van_deploy.stopwatch import Progress, Stopwatch

__all__ = ["QuantizeResult", "quantize_bundle"]


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantisation made.

    Attributes:
        bundle: as written.
        artefact: name of the new graph in it.
        reused: whether it was there already, from the same ingredients.
        reason: why it was reused, or made anew.
        facts: everything measured, as the manifest has it (`docs/precision.md` lists it).
        seconds: time of each stage that ran.
        allow_inconclusive: whether what the evaluation set cannot decide passes.
    """

    JSON_PROPERTIES: ClassVar[tuple[str, ...]] = ("graph",)

    bundle: Bundle
    artefact: str
    reused: bool
    reason: str
    facts: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    allow_inconclusive: bool = False

    @property
    def graph(self) -> GraphFacts | None:
        """What is in the new graph."""
        return self.bundle.artefact(self.artefact).graph

    @property
    def passed(self) -> bool:
        """Whether the precision asked for holds its gates, and the budget if there is one."""
        searched = self.facts.get("search", {}).get("passed", True)
        judged = self.facts.get("judged", {}).get("outcome", "pass") == "pass"
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
    images: Path | None = None,
    calibration: CalibrationSet | str | None = None,
    evaluate: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Return a bundle that also holds its network in FP16, BF16 or INT8, and what that cost.

    Args:
        path: the bundle.
        settings: what to make; INT8 for TensorRT by default.
        images: folder or ``.npz`` of images to calibrate on, or, for FP16, to
            audit the ranges on.
        calibration: a calibration set, or the name or path of one.
        evaluate: folder of images to judge on; by default the held-out part of
            the calibration images, on which only the logits are judged.
        force: make it anew even if it is there already.
        progress: told what is being done.

    Raises:
        UsageError: the request contradicts itself.
        BundleError: there is no bundle, or it is not what its manifest says.
        ImageError: there are no images, too few for the budget, too many cannot be read,
            or an image is used both to calibrate and to judge.
        GateFailed: with ``strict``, FP16 cannot hold a tensor.
        ConversionError: the graph is not a folded VAN, or the result was refused by
            ONNX's checker or ONNX Runtime.
    """
    opened, asked = Bundle.open(path), settings or QuantizeSettings()
    opened.verified("fp32")
    if asked.max_drop is not None and opened.manifest.architecture.out_indices:
        raise UsageError(
            f"The bundle '{opened.path}' gives feature maps, and --max-drop is of classes.",
            "Leave it out, and keep layers with --keep.",
        )
    watch = Stopwatch(progress)
    chosen = images_for(
        opened, asked, watch, images=images, calibration=calibration, evaluate=evaluate
    )
    job = _Job(opened, asked, chosen, watch)
    name = asked.artefact
    reason = "asked to (--force)" if force else opened.why_anew(name, job.ingredients())
    if not reason:
        facts = opened.artefact(name).quantization
        why = "the weights, graph, images, settings and versions are those it was made from"
        return QuantizeResult(
            opened, name, True, why, facts, allow_inconclusive=asked.allow_inconclusive
        )
    job.make_()
    written = Bundle.open(path)
    facts = written.artefact(name).quantization
    return QuantizeResult(
        written, name, False, reason, facts, dict(watch.seconds), asked.allow_inconclusive
    )


class _Job:
    """One quantisation, from an open bundle to a new artefact in it."""

    def __init__(
        self,
        bundle: Bundle,
        settings: QuantizeSettings,
        images: JobImages,
        watch: Stopwatch,
    ) -> None:
        self.bundle = bundle
        self.settings = settings
        self.images = images
        self.watch = watch
        self.facts: dict[str, Any] = {}
        self.record: dict[str, float] = {}

    def ingredients(self) -> dict[str, Any]:
        """Return everything that decides what the result will hold."""
        asked = self.settings.as_dict()
        for name in ("threads", "images", "calibration", "evaluate", "allow_inconclusive"):
            del asked[name]
        return {
            "weights": self.bundle.manifest.weights.sha256,
            "graph": self.bundle.artefact("fp32").sha256,
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
        model = load_model(self.bundle.verified("fp32"))
        network = van_from_onnx(model, self.bundle.manifest.architecture)
        asked = self.settings
        by_user = kept_nodes(model, asked.keep)
        scopes: dict[str, tuple[str, ...]] = {}
        if asked.precision == "int8":
            scopes = _scopes(asked, network.model, by_user)
        every = set().union(*scopes.values())
        counted = counted_tensors(network, every, asked.target)
        self.watch.begin("Recording ranges")
        height, width = self.images.preprocessing.sides
        read = self.images.read(self.images.calibration, images_at_once(height * width))
        ranges = observe(network, (images for images, _ in read), counted)
        kept = self.kept(model, ranges, by_user)
        made: dict[str, Int8] = {}
        self.facts["calibration"] = {
            "images": len(self.images.calibration) - len(self.images.unreadable),
            "description": self.images.calibration.description,
            "noise": self.images.calibration.noise,
            "unreadable": list(self.images.unreadable),
        }
        candidates = [Candidate("fp32", "fp32", model)]
        if asked.precision == "bf16":
            candidates.append(Candidate(BF16_EMULATED, "bf16", bf16_from_fp32(model, kept)))
        elif asked.target == "tensorrt":
            half_io = asked.half_io and asked.precision == "fp16"
            usual = kept if asked.rest_precision == "fp16" else usually_kept(model)
            half = fp16_from_fp32(model, usual, half_io=half_io)
            candidates.append(Candidate("fp16", "fp16", half))
        if scopes:
            maker = Int8Maker(model, network, ranges, asked, kept, self.images)
            made = {name: maker.make(layers) for name, layers in scopes.items()}
            names = {s: "int8" if len(made) == 1 else f"int8 {s}" for s in made}
            candidates += [Candidate(names[s], "int8", m.model) for s, m in made.items()]
        row = self.compare_(candidates)
        graph = next(c.model for c in candidates if c.name == row.name)
        int8 = next((result for result in made.values() if result.model is graph), None)
        if int8 is not None:
            self.facts |= {"method": asked.method, **int8.as_dict()}
        self.judge_(graph)
        self.write_(graph, ranges, int8)

    def kept(
        self, model: ModelProto, ranges: Mapping[str, ChannelRange], asked: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Return the nodes that stay FP32: the ones asked for, the usual ones, the audit's.

        Raises:
            GateFailed: with ``strict``, the audit found some.
        """
        settings = self.settings
        if settings.precision == "int8" and settings.rest_precision == "fp32":
            return asked
        usual = usually_kept(model) if settings.keep_defaults else {}
        if settings.precision == "bf16":  # which has FP32's range
            self.facts["kept"] = {**usual, **asked}
            return {**usual, **asked}
        audit = audit_ranges(model, ranges, {*asked, *usual}, len(self.images.calibration))
        if settings.strict:
            audit.require_passed()
        found = {**usual, **asked, **audit.kept}
        self.facts |= {"audit": audit.as_dict(), "kept": found}
        return found

    def compare_(self, candidates: Sequence[Candidate]) -> PrecisionRow:
        """Check the new graphs, run them beside FP32, note the lines; return the chosen one's."""
        self.watch.begin("Comparing")
        asked = self.settings
        for candidate in candidates[1:]:
            _check(candidate.model)
        rows = compare_precisions(
            candidates,
            self.images.read(self.images.judges, 32),
            self.images.judges.labels,
            fuse=asked.target == "cpu",
            judged=self.images.named,
            outputs=Outputs.of(
                self.bundle.manifest.architecture, self.images.preprocessing.image_size
            ),
            max_drop=asked.max_drop,
            providers=_timed_in(asked),
            threads=asked.threads,
        )
        ours = [row for row in rows if row.precision == asked.precision]
        chosen = min(ours, key=lambda row: (not row.passed, row.ms_per_image or 0.0))
        best, why = recommended(rows, chosen)
        self.facts |= {
            "judged_on": {"images": rows[0].images, "description": self.images.judges.description},
            "comparison": [{**row.as_dict(), "requested": row is chosen} for row in rows],
            "recommended": best,
            "why": why,
        }
        return chosen

    def judge_(self, graph: ModelProto) -> None:
        """Judge the new graph on the bundle's golden samples, as verify will."""
        if self.bundle.manifest.golden is None:
            return
        self.watch.begin("Judging on the golden samples")
        samples = golden_samples(self.bundle)
        judged, self.record = judge_new(
            graph, self.settings.precision, samples, method=self.settings.method
        )
        self.facts["judged"] = {"images": samples.description, **plain(judged)}

    def write_(
        self, graph: ModelProto, ranges: Mapping[str, ChannelRange], int8: Int8 | None
    ) -> None:
        """Put the graph, its ranges and the facts into the bundle."""
        self.watch.begin("Writing the bundle")
        name = self.settings.artefact
        file = f"model.{name}.onnx"
        with writing(self.bundle.path) as draft:
            others = [f"ranges.{name}.json"]
            draft.file(others[0]).write_text(
                json.dumps(_summary(ranges, int8), indent=2) + "\n", encoding="utf-8"
            )
            if int8 is not None and int8.affines:
                others.append(f"channels.{name}.npz")
                self.facts["channels"] = others[1]
                with draft.file(others[1]).open("wb") as archive:
                    np.savez_compressed(archive, **_channels(int8))  # type: ignore[arg-type]
            draft.record(
                Artefact(
                    name=name,
                    kind="onnx",
                    precision=cast("Precision", self.settings.precision),
                    file=file,
                    files=dict.fromkeys([*_save(draft, file, graph), *others], ""),
                    made_from=Origin(name="fp32", sha256=self.bundle.artefact("fp32").sha256),
                    made_with=self.ingredients(),
                    graph=graph_facts(graph),
                    quantization=self.facts,
                    golden_sqnr_db=self.record,
                )
            )
        self.watch.begin("")


def _scopes(
    settings: QuantizeSettings, model: nn.Module, kept: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return the layers of each scope to try, by its name."""
    if settings.scope != ("auto",):
        return {"": layers_in_scope(model, settings.scopes, kept)}
    _timed_in(settings)  # says at once where nothing can be timed
    return {scope: layers_in_scope(model, (scope,), kept) for scope in SCOPES}


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


def _summary(ranges: Mapping[str, ChannelRange], int8: Int8 | None) -> dict[str, Any]:
    """Return the ends of every tensor, and the scales: short numbers, to be read."""
    ends = {
        name: [_short(record.minimum.min()), _short(record.maximum.max())]
        for name, record in ranges.items()
    }
    scales = {} if int8 is None else int8.scales()
    return {"schema": "van-deploy/ranges/2", "ranges": ends, "scales": scales}


def _short(value: float) -> float:
    """Return ``value`` with six significant digits, so that files can be compared by eye."""
    return float(f"{value:.6g}")


def _channels(int8: Int8) -> dict[str, npt.NDArray[np.float32]]:
    """Return how tensors differ from the FP32 graph's: ``(theirs - shift) / factor``."""
    return {
        f"{tensor}.{part}": getattr(affine, part).astype(np.float32)
        for tensor, affine in int8.affines.items()
        for part in ("shift", "factor")
    }


def _check(graph: ModelProto) -> None:
    try:
        checker.check_model(graph, full_check=True)
    except checker.ValidationError as error:
        raise ConversionError(
            f"The converted graph is not valid ONNX: {error}",
            "Please report it, with the command and the network's architecture.",
        ) from error


def _save(draft: Draft, file: str, graph: ModelProto) -> list[str]:
    copy = ModelProto()
    copy.CopyFrom(graph)
    return save_onnx(copy, draft.file(file))
