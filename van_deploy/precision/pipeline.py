"""Quantise a bundle's FP32 graph to FP16, BF16 or INT8 and save the checked result."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from onnx import ModelProto, checker, load_model

from van_deploy.bundle import Artifact, Bundle, Origin, edit_bundle
from van_deploy.checks.golden import OutputLayout, golden_samples
from van_deploy.checks.outputs import check_new_graph
from van_deploy.config import GateSettings, QuantizeSettings
from van_deploy.documents import Verdict, plain
from van_deploy.environment.hardware import cpu
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.files import content_key
from van_deploy.graph.bfloat16 import BF16_EMULATED
from van_deploy.graph.export import van_from_onnx
from van_deploy.graph.files import graph_facts, opset_of, save_onnx
from van_deploy.manifest import GraphInfo, Precision
from van_deploy.metrics import Task
from van_deploy.precision import fp16
from van_deploy.precision.comparison import Candidate, compare_precisions, gate_rank, recommend
from van_deploy.precision.images import ImageSets, select_images
from van_deploy.precision.int8 import Int8Builder, short
from van_deploy.precision.plan import SCOPES, histogram_tensors, layers_in_scope
from van_deploy.precision.scales import ChannelRange, observe_ranges, range_batch_size
from van_deploy.provenance import ONNXRUNTIMES, code_digest, tool_versions
from van_deploy.runners.network import task_of
from van_deploy.runners.onnxruntime import require_onnxruntime
from van_deploy.stopwatch import Progress, Stopwatch, no_progress

# Settings that do not change the result, or that are other keys of the cache.
OTHER_KEYS = ("threads", "images", "calibration", "evaluate", "allow_inconclusive")


@dataclass(frozen=True)
class QuantizeResult(Verdict):
    """Result of a quantisation.

    Attributes:
        bundle: as written.
        artifact: name of the quantised graph in the bundle.
        reused: whether it already existed, made from the same inputs.
        reason: why it was reused or built again.
        facts: all measurements, as in the manifest (`docs/precision.md` lists the keys).
        seconds: duration of each stage.
        allow_inconclusive: whether an inconclusive check passes.
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
        """Operators, inputs and outputs of the quantised graph."""
        return self.bundle.artifact(self.artifact).graph

    @property
    def passed(self) -> bool:
        """Whether the requested precision passes its gates and meets the accuracy budget."""
        return _passes(self.facts, self.allow_inconclusive)


def _passes(facts: Mapping[str, Any], allow_inconclusive: bool = False) -> bool:
    within_budget = facts.get("search", {}).get("passed", True)
    accepted = {"pass", "inconclusive"} if allow_inconclusive else {"pass"}
    golden_passed = facts.get("golden_check", {}).get("outcome", "pass") in accepted
    (row,) = (row for row in facts["comparison"] if row["requested"])
    conclusive = allow_inconclusive or not row["inconclusive"]
    return bool(within_budget and golden_passed and conclusive and row["passed"])


def quantize_bundle(
    path: str | Path,
    settings: QuantizeSettings | None = None,
    *,
    rules: GateSettings | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> QuantizeResult:
    """Add an FP16, BF16 or INT8 graph to a bundle and compare it with FP32.

    Args:
        path: the bundle.
        settings: precision, target and images; INT8 for TensorRT by default. Without an
            evaluation set, the result is checked on held-out calibration images, and only
            its logits are checked.
        rules: limits of the recipe, which take precedence.
        force: build it again even if it already exists.
        progress: receives the name of each stage.

    Raises:
        UsageError: an accuracy budget was given for a network without classes.
        BundleError: there is no bundle, or a file does not match its manifest.
        ImageError: there are no images, too few for the budget, too many cannot be read,
            or an image is used for both calibration and evaluation.
        GateFailed: with ``strict``, FP16 cannot represent a tensor.
        ConversionError: the graph is not a folded VAN, its opset is too old for the precision, or
            ONNX Runtime rejects the result.
    """
    bundle, settings = Bundle.open(path), settings or QuantizeSettings()
    bundle.verified_path("fp32")
    maps = bundle.manifest.architecture.out_indices
    if settings.max_drop is not None and (maps or task_of(bundle) is Task.REGRESSION):
        outputs = "feature maps" if maps else "the values of a regression"
        raise UsageError(
            f"The bundle '{bundle.path}' exports {outputs}, and --max-drop needs classes.",
            "Omit --max-drop, and choose the layers to keep in higher precision with --keep.",
        )
    watch = Stopwatch(progress)
    watch.begin("Selecting images")
    images = select_images(bundle, settings, watch)
    job = _QuantizeJob(bundle, settings, images, rules or GateSettings())
    name = settings.artifact
    reason = "--force" if force else bundle.rebuild_reason(name, job.cache_key())
    reused = not reason
    if reused:
        reason = "the weights, graph, images, settings and versions have not changed"
    else:
        job.run_()
        before, bundle = bundle, Bundle.open(path)
        reason += bundle.removed_since(before)
    facts, inconclusive = bundle.artifact(name).quantization, settings.allow_inconclusive
    return QuantizeResult(bundle, name, reused, reason, facts, dict(watch.seconds), inconclusive)


@dataclass
class _QuantizeJob:
    """One quantisation, from an open bundle to a new artifact in it."""

    bundle: Bundle
    settings: QuantizeSettings
    images: ImageSets
    rules: GateSettings
    facts: dict[str, Any] = field(default_factory=dict)

    def cache_key(self) -> dict[str, Any]:
        """Return the inputs that determine the result."""
        bundle, images, golden = self.bundle, self.images, self.bundle.manifest.golden
        settings = {k: v for k, v in self.settings.as_dict().items() if k not in OTHER_KEYS}
        sets = (images.calibration, images.held_out, images.evaluation)
        is_timed = self.settings.target == "cpu" or self.settings.scope == ("auto",)
        return {
            "weights": bundle.manifest.weights.sha256,
            "graph": bundle.artifact("fp32").sha256,
            "golden samples": golden and bundle.digests.get(golden.file),
            "preprocessing": images.preprocessing.as_dict(),
            "calibration images": images.calibration.digest,
            "held-out images": images.held_out.digest,
            "evaluation images": images.evaluation.digest,
            "labels": content_key({"labels": [[i.label for i in one.items] for one in sets]}),
            "settings": settings,
            "gates": [self.rules.of(one).as_dict() for one in ("fp16", self.settings.precision)],
            "processor": asdict(cpu()) if is_timed else None,
            "threads": self.settings.threads if is_timed else None,
            "code": code_digest(".", "precision", "graph", "checks", "data", "model", "runners"),
            "versions": tool_versions("onnx", "onnx-ir", *ONNXRUNTIMES, "torch", "numpy", "pillow"),
        }

    def run_(self) -> None:
        """Build the requested graph, check it, and write it into the bundle."""
        settings, images = self.settings, self.images
        model = load_model(self.bundle.verified_path("fp32"))
        network = van_from_onnx(model, self.bundle.manifest.architecture)
        if (opset := opset_of(model)) < (oldest := settings.oldest_opset(settings.precision)):
            other = ", or use `van-deploy quantize --rest fp32`" * (settings.precision == "int8")
            raise ConversionError(
                f"The graph has opset {opset}; {settings.artifact} needs {oldest} or newer.",
                f"Export it again with --opset 20{other}.",
            )
        user_kept = fp16.fp32_nodes(model, settings.keep)
        scopes: dict[str, tuple[str, ...]] = {}  # the layers of each candidate
        if settings.precision == "int8" and settings.scope == ("auto",):
            _timing_providers(settings)  # fails early if latency cannot be measured
            scopes = {name: layers_in_scope(network.model, (name,), user_kept) for name in SCOPES}
        elif settings.precision == "int8":
            scopes = {"": layers_in_scope(network.model, settings.scopes, user_kept)}
        tensors = histogram_tensors(network, set().union(*scopes.values()), settings.target)
        images.watch.begin("Recording ranges")
        height, width = images.preprocessing.sides
        batches = images.read(images.calibration, range_batch_size(height * width))
        ranges = observe_ranges(network, (batch for batch, _ in batches), tensors)
        self.facts["calibration"] = {
            "images": len(images.calibration) - len(images.unreadable),
            "description": images.calibration.description,
            "noise": images.calibration.noise,
        }
        kept = self.nodes_to_keep(model, ranges, user_kept)
        candidates = [Candidate("fp32", "fp32", model)]
        if settings.precision == "bf16":
            candidates.append(Candidate(BF16_EMULATED, "bf16", fp16.bf16_from_fp32(model, kept)))
        elif settings.target == "tensorrt":
            fp16_kept = (
                kept if settings.rest_precision == "fp16" else fp16.default_fp32_nodes(model)
            )
            candidates.append(Candidate("fp16", "fp16", fp16.fp16_from_fp32(model, fp16_kept)))
        if scopes:
            builder = Int8Builder(model, network, ranges, settings, kept, images)
            for scope, layers in scopes.items():
                int8 = builder.build(layers)
                candidates.append(Candidate(f"int8 {scope}".strip(), "int8", int8.model, int8))
        self.write_(self.compare(candidates), ranges)

    def nodes_to_keep(
        self, model: ModelProto, ranges: Mapping[str, ChannelRange], user_kept: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Return the nodes that stay FP32: the user's, the default ones and the audit's.

        Raises:
            GateFailed: with ``strict``, the audit found further nodes.
        """
        settings = self.settings
        if settings.precision == "int8" and settings.rest_precision == "fp32":
            return user_kept
        kept = {**(fp16.default_fp32_nodes(model) if settings.keep_defaults else {}), **user_kept}
        if settings.precision != "bf16":  # BF16 has FP32's range
            audit = fp16.audit_ranges(model, ranges, kept, strict=settings.strict)
            kept |= audit["fp32_nodes"]
            self.facts["audit"] = {"images": self.facts["calibration"]["images"], **audit}
        self.facts["fp32_nodes"] = kept
        return kept

    def compare(self, candidates: Sequence[Candidate]) -> Candidate:
        """Compare the candidates with FP32 and record the rows; return the selected one."""
        settings, images = self.settings, self.images
        images.watch.begin("Comparing")
        for candidate in candidates[1:]:
            checker.check_model(candidate.model, full_check=True)  # fails only for a bug here
        size = images.preprocessing.image_size
        outputs = OutputLayout.of(self.bundle.manifest.architecture, size)
        providers = _timing_providers(settings)
        rows = compare_precisions(candidates, images, settings, outputs, providers, self.rules)
        requested = [row for row in rows if row["precision"] == settings.precision]
        chosen = min(requested, key=lambda row: (gate_rank(row), row["ms_per_image"] or 0.0))
        best, reason = recommend(rows, chosen)
        description = images.evaluation.description
        self.facts |= {
            "evaluated_on": {"images": chosen["images"], "description": description},
            "comparison": [{**row, "requested": row is chosen} for row in rows],
            "recommended": best,
            "recommendation_reason": reason,
        }
        return candidates[rows.index(chosen)]

    def check_golden(self, graph: ModelProto) -> dict[str, float]:
        """Check the new graph on the golden samples, as `verify` does; return its SQNR in dB."""
        if self.bundle.manifest.golden is None:
            return {}
        self.images.watch.begin("Checking the golden samples")
        samples, precision = golden_samples(self.bundle), self.settings.precision
        options: Any = {"method": self.settings.method, "profile": self.rules.of(precision)}
        result, sqnr = check_new_graph(graph, precision, samples, **options)
        self.facts["golden_check"] = {"images": samples.description, **plain(result)}
        return sqnr

    def write_(self, chosen: Candidate, ranges: Mapping[str, ChannelRange]) -> None:
        """Check the chosen graph, and write it, its ranges and the facts into the bundle."""
        name, graph, int8 = self.settings.artifact, chosen.model, chosen.int8
        if int8 is not None:
            self.facts |= {"method": self.settings.method, **int8.as_dict()}
        self.facts["calibration"]["unreadable"] = list(self.images.unreadable)  # of every set
        golden_db, description = self.check_golden(graph), graph_facts(graph)
        if self.facts["recommended"] == chosen.name and not _passes(self.facts):
            reason = f"{chosen.name.upper()} does not pass on the golden samples, or the budget"
            self.facts |= {"recommended": None, "recommendation_reason": reason}
        self.images.watch.begin("Writing the bundle")
        file, extra_files = f"model.{name}.onnx", [f"ranges.{name}.json"]
        with edit_bundle(self.bundle.path) as draft:
            summary = {
                "schema": "van-deploy/ranges/2",
                "ranges": {
                    tensor: [short(r.minimum.min()), short(r.maximum.max())]
                    for tensor, r in ranges.items()
                },
                "scales": {} if int8 is None else int8.scales(),
            }
            text = json.dumps(summary, indent=2)
            draft.file(extra_files[0]).write_text(text + "\n", encoding="utf-8")
            if int8 is not None and int8.plan.affines:
                extra_files.append(f"channels.{name}.npz")
                self.facts["channels"] = extra_files[1]
                channels = {  # a tensor of this graph is (the FP32 graph's - shift) / factor
                    f"{tensor}.{part}": values.astype(np.float32)
                    for tensor, affine in int8.plan.affines.items()
                    for part, values in vars(affine).items()
                }
                np.savez_compressed(draft.file(extra_files[1]), **channels)
            files = [*save_onnx(graph, draft.file(file)), *extra_files]
            draft.record(
                Artifact(
                    name=name,
                    kind="onnx",
                    precision=cast("Precision", self.settings.precision),
                    file=file,
                    files=dict.fromkeys(files, ""),
                    made_from=Origin(name="fp32", sha256=self.bundle.artifact("fp32").sha256),
                    made_with=self.cache_key(),
                    graph=description,
                    quantization=self.facts,
                    golden_sqnr_db=golden_db,
                )
            )
        self.images.watch.begin("")


def _timing_providers(settings: QuantizeSettings) -> tuple[str, ...]:
    """Return the ONNX Runtime providers to measure the target's latency with; empty for none.

    Raises:
        MissingDependency: the scope is chosen by latency, and the provider is not available.
    """
    if settings.target == "cpu":
        return ("CPUExecutionProvider",)
    if settings.scope != ("auto",):
        return ()
    if "CUDAExecutionProvider" not in require_onnxruntime().get_available_providers():
        raise MissingDependency(
            "--scope auto measures latency on a GPU with ONNX Runtime's CUDA provider, which is "
            "not available.",
            "Give a scope, such as --scope pointwise, or --target cpu.",
        )
    return ("CUDAExecutionProvider", "CPUExecutionProvider")
