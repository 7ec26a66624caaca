"""Exports a network: loads it, writes a folded FP32 graph, and checks the graph."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

from van_deploy.bundle import Artifact, Bundle, Draft, Origin, edit_bundle
from van_deploy.checks import golden
from van_deploy.checks.gates import Outcome
from van_deploy.checks.outputs import batch_sizes, check_new_graph
from van_deploy.config import Recipe
from van_deploy.data.images import Batch
from van_deploy.data.labels import class_names_from_file
from van_deploy.documents import plain
from van_deploy.errors import BundleError, GateFailed, InputError, UsageError
from van_deploy.files import content_key
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.files import graph_facts, operator_counts, save_onnx, simplify_onnx
from van_deploy.graph.fold import fold_van
from van_deploy.manifest import GoldenInfo, GraphInfo, NetworkInfo
from van_deploy.model.checkpoint import ALL_STAGES, LoadedVan, load_van
from van_deploy.model.variants import is_published
from van_deploy.provenance import EXPORT_TOOLS, code_digest, tool_versions
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import onnxruntime_outputs, require_onnxruntime
from van_deploy.schema import validate
from van_deploy.serve.embedded import EmbedResult
from van_deploy.stopwatch import Progress, Stopwatch, no_progress

MODEL_FILE, LABELS_FILE = "model.onnx", "labels.txt"
PROOF_IMAGES = 2
PROOF_SIDE = 96  # pixels: the large kernels have both an interior and borders


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        bundle: the bundle on disk.
        reused: whether the existing graph was reused because its inputs did not change.
        reason: why the graph was reused or built.
        notes: remarks about the weights.
        seconds: time of each stage that ran.
        embedded: the graphs with preprocessing inside.
    """

    bundle: Bundle
    reused: bool
    reason: str
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    embedded: tuple[EmbedResult, ...] = ()


def load_model(
    recipe: Recipe, *, offline: bool = False, progress: Progress = no_progress
) -> LoadedVan:
    """Return the network of a recipe, with the recipe's preprocessing and class names.

    Raises:
        VanDeployError: as :func:`~van_deploy.model.checkpoint.load_van`.
        UsageError: it is a bundle, or a backbone whose feature maps the recipe does not export.
    """
    settings, export = recipe.model, recipe.export
    spec, weights = settings.name, settings.weights or None
    if weights is not None and not is_published(spec):
        spec, weights = weights, None
    preprocessing = recipe.preprocessing.model_dump()
    if export.dynamic_size is not None and preprocessing["image_size"] is None:
        preprocessing["image_size"] = export.dynamic_size.opt
    if not is_published(spec) and Bundle.exists(Path(spec)):
        raise UsageError(
            f"'{spec}' is a bundle, and a bundle is made from weights.",
            "Give the weights, or use the bundle with `van-deploy quantize`, `build` or `verify`.",
        )
    progress("Loading weights")
    loaded = load_van(
        spec,
        weights=weights,
        expect_sha256=settings.sha256 or None,
        offline=offline,
        seed=settings.seed,
        container=settings.container or None,
        layer_norm_eps=settings.layer_norm_eps,
        head=settings.head or None,
        preprocessing=preprocessing,
        own_labels=bool(settings.labels),
        out_indices=(export.out_indices or ALL_STAGES) if export.features else None,
    )
    if loaded.config.out_indices and not export.features:
        raise UsageError(
            f"'{weights or spec}' is a backbone without a classification head: it has no logits.",
            "Export its feature maps with --features.",
        )
    if settings.labels:
        names = class_names_from_file(settings.labels, loaded.config.num_classes)
        loaded = replace(loaded, class_names=names)
    if settings.name and not is_published(settings.name) and loaded.source.format != "embedded":
        loaded = replace(loaded, name=settings.name)
    return loaded


def export_bundle(
    loaded: LoadedVan,
    recipe: Recipe,
    output: Path,
    *,
    images: Path | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> ExportResult:
    """Export ``loaded`` as a checked FP32 ONNX graph into a bundle, unless nothing changed.

    Args:
        loaded: the network, from :func:`load_model`.
        recipe: how to deploy it.
        output: the bundle's folder; created if necessary.
        images: images to check on, and golden samples unless the recipe selects others;
            None for sample photographs.
        force: export even if nothing changed.
        progress: receives the name of each stage.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        BundleError: ``output`` contains something else.
        GateFailed: the graph differs from the network; nothing was written.
    """
    require_onnxruntime()
    clock = Stopwatch(progress)
    clock.begin("Preparing images")
    source = None if recipe.export.golden == "samples" else images
    count = golden.golden_count(loaded.config, loaded.preprocessing)
    batch, originals = golden.golden_images(loaded.name, loaded.preprocessing, source, count)
    key, before = _cache_key(loaded, recipe, batch.inputs), None
    try:
        before = Bundle.open(output)
        reason = "--force" if force else before.rebuild_reason("fp32", key)
    except BundleError as error:
        reason = f"new ({error.message})" if output.exists() else "new"
    if reason:
        with edit_bundle(output, name=loaded.name) as draft:
            artifact, samples = _write_checked_graph(draft, loaded, recipe, batch, clock)
            files, info = dict(artifact.files), None
            if recipe.export.golden != "none":
                info = golden.write_golden(
                    draft, samples, originals, user_images=source is not None
                )
                files |= dict.fromkeys((golden.GOLDEN_FILE, *info.originals), "")
            if loaded.class_names:
                text = "\n".join(loaded.class_names) + "\n"
                draft.file(LABELS_FILE).write_text(text, encoding="utf-8")
                files[LABELS_FILE] = ""
            draft.description = _network_info(loaded, recipe, info)
            old = draft.artifacts.get("fp32", artifact).files.get(golden.GOLDEN_FILE)
            draft.record(artifact.model_copy(update={"files": files, "made_with": key}))
            fp32, ranges = draft.artifacts["fp32"], (recipe.batch, recipe.export.dynamic_size)
            has_new_samples = old != fp32.files.get(golden.GOLDEN_FILE)
            if has_new_samples:  # records on the previous samples
                for name, other in draft.artifacts.items():
                    draft.artifacts[name] = other.model_copy(update={"golden_sqnr_db": {}})
                draft.artifacts["fp32"] = fp32
            if has_new_samples or (
                before and ranges != (before.manifest.batch, before.manifest.sizes)
            ):
                for name in ("verify", "drift"):  # of the previous samples, batches or sizes
                    draft.checks.pop(name, None)
    elif before is not None and before.manifest.weights != loaded.source:
        with edit_bundle(output) as draft:  # the weights were moved
            draft.description = _network_info(loaded, recipe, before.manifest.golden)
    clock.begin("")
    bundle, notes = Bundle.open(output), loaded.source.notes
    why = f"{reason}{bundle.removed_since(before)}" if reason else "nothing changed"
    return ExportResult(bundle, not reason, why, notes, clock.seconds)


def _write_checked_graph(
    draft: Draft, loaded: LoadedVan, recipe: Recipe, batch: Batch, clock: Stopwatch
) -> tuple[Artifact, golden.Samples]:
    """Write the FP32 graph into a draft, and compare it with the network.

    Returns:
        The manifest's entry, and the samples of the comparison.

    Raises:
        GateFailed: the graph differs from the network.
    """
    path, batches = draft.file(MODEL_FILE), batch_sizes(recipe.batch)
    model, facts, checks = _onnx_from_network(loaded, recipe, batch.inputs, clock)
    files = dict.fromkeys(save_onnx(model, path), "")
    del model  # of up to several hundred MB
    clock.begin("Running the original network in float64")
    sizes = golden.other_sizes(recipe.export.dynamic_size, loaded.preprocessing.image_size)
    samples = golden.reference_samples(loaded, batch, sizes)
    clock.begin(f"Checking agreement at batch {', '.join(map(str, batches))}")
    profile = recipe.gates.fp32
    verdict, sqnr_db = check_new_graph(path, "fp32", samples, batches, profile=profile)
    if verdict.outcome is not Outcome.PASS:
        failed = [f.message for f in verdict.findings if f.outcome is Outcome.FAIL]
        raise GateFailed(
            f"The exported graph differs from the network: {'; '.join(failed[:4])}.",
            "Nothing was written. Find the cause with --no-fold and --no-simplify; "
            "if one of them helps, please report it.",
        )
    checks["agreement"] = {"images": samples.description, **plain(verdict)}
    draft.checks.pop("simplify", None)  # of the previous graph
    draft.checks.update(checks)
    artifact = Artifact(
        name="fp32",
        kind="onnx",
        precision="fp32",
        file=MODEL_FILE,
        files=files,
        made_from=Origin(name="weights", sha256=loaded.source.sha256),
        made_with={},
        graph=facts,
        golden_sqnr_db=sqnr_db,
    )
    return artifact, samples


def _onnx_from_network(
    loaded: LoadedVan, recipe: Recipe, inputs: Images, clock: Stopwatch
) -> tuple[ModelProto, GraphInfo, dict[str, dict[str, Any]]]:
    """Return the network as ONNX, the facts of the graph, and the results of its checks."""
    clock.begin("Folding and checking the rewrites")
    middle = [max(0, (side - PROOF_SIDE) // 2) for side in inputs.shape[2:]]
    rows, columns = (slice(start, start + PROOF_SIDE) for start in middle)
    crops = inputs[:PROOF_IMAGES, :, rows, columns].copy()  # float64 convolutions are slow
    fold = fold_van(loaded.model, torch.from_numpy(crops), fold=recipe.export.fold)
    if not fold:
        raise GateFailed(
            f"The rewritten network differs from the original by {fold.relative_error:.1e} "
            "in float64; the limit is 1e-10.",
            "Nothing was written. Export with --no-fold, and please report it.",
        )
    clock.begin("Exporting to ONNX")
    metadata = {  # for users of the file without its bundle
        "van_deploy.model": loaded.name,
        "van_deploy.weights_sha256": loaded.source.sha256,
        "van_deploy.weights_format": loaded.source.format,
        "van_deploy.preprocessing": json.dumps(loaded.preprocessing.as_dict()),
        "van_deploy.architecture": json.dumps(asdict(loaded.config)),
    }
    if loaded.class_names:
        metadata["van_deploy.class_names"] = json.dumps(loaded.class_names)
    model = onnx_from_van(
        fold.model,
        loaded.preprocessing.image_size,
        loaded.config.in_chans,
        batch=recipe.batch.fixed,
        sizes=recipe.export.dynamic_size,
        opset=recipe.export.opset,
        metadata=metadata,
    )
    nodes = sum(operator_counts(model).values())
    checks: dict[str, dict[str, Any]] = {"fold": fold.as_dict()}
    if recipe.export.simplify:
        clock.begin("Simplifying")
        images = inputs[:PROOF_IMAGES]
        model, checks["simplify"] = simplify_onnx(model, images, onnxruntime_outputs)
    return model, graph_facts(model).model_copy(update={"exported_nodes": nodes}), checks


def _cache_key(loaded: LoadedVan, recipe: Recipe, inputs: Images) -> dict[str, Any]:
    """Return the inputs that determine the export and the results of its checks."""
    return {
        "name": loaded.name,
        "weights": loaded.source.sha256,
        "container": loaded.source.container,
        "architecture": asdict(loaded.config),
        "preprocessing": loaded.preprocessing.as_dict(),
        "class names": content_key({"names": loaded.class_names or ()}),
        # Graphs with preprocessing inside are separate artifacts.
        "export": recipe.export.model_dump(mode="json", exclude={"embed_preprocess", "outputs"}),
        "batch": recipe.batch.as_dict(),
        "gates": recipe.gates.fp32.as_dict(),
        "images checked": hashlib.sha256(inputs.tobytes()).hexdigest(),
        "code": code_digest(".", "model", "graph", "checks", "data", "runners"),
        "versions": tool_versions(*EXPORT_TOOLS),
    }


def _network_info(loaded: LoadedVan, recipe: Recipe, info: GoldenInfo | None) -> NetworkInfo:
    """Return the description of the network for the manifest."""
    values = {
        "name": loaded.name,
        "weights": loaded.source,
        "architecture": loaded.config,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "preprocessing": loaded.preprocessing,
        "class_names": loaded.class_names or None,
        "batch": recipe.batch,
        "sizes": recipe.export.dynamic_size,
        "versions": tool_versions(*EXPORT_TOOLS),
        "golden": info,
    }
    return validate(
        NetworkInfo,
        values,
        where="The manifest cannot store the description of the network",
        error=InputError,
        remedy="Correct the name, the path or the metadata of the checkpoint.",
    )
