"""A network exported: loaded as a recipe says, written as a folded FP32 graph, and checked."""

from __future__ import annotations

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
from van_deploy.graph.fold import Rewrites, fold_van
from van_deploy.manifest import GoldenInfo, NetworkInfo
from van_deploy.model.checkpoint import ALL_STAGES, LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.variants import VARIANT_NAMES
from van_deploy.provenance import EXPORT_TOOLS, code_digest, tool_versions
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import onnxruntime_outputs, require_onnxruntime
from van_deploy.schema import validate
from van_deploy.serve.embedded import Embedded
from van_deploy.stopwatch import Progress, Stopwatch, no_progress

MODEL_FILE, LABELS_FILE = "model.onnx", "labels.txt"
PROOF_IMAGES = 2
PROOF_SIDE = 96  # pixels: enough for the large kernels to have an inside and borders
TOOLS = (*EXPORT_TOOLS, "onnxruntime")


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        bundle: the bundle as written.
        reused: whether everything was there already, from the same ingredients.
        reason: why it was reused or made anew.
        notes: what the user should know about the weights.
        seconds: time of each stage that ran.
        embedded: the graphs with preprocessing inside that were asked for.
    """

    bundle: Bundle
    reused: bool
    reason: str
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    embedded: tuple[Embedded, ...] = ()


def load_model(
    recipe: Recipe, *, offline: bool = False, progress: Progress = no_progress
) -> LoadedVan:
    """Return the network a recipe names, with the recipe's preprocessing and class names.

    Raises:
        VanDeployError: as :func:`~van_deploy.model.checkpoint.load_van`.
        UsageError: it is a backbone, and no feature maps are asked for.
    """
    settings, export = recipe.model, recipe.export
    known = {EMBEDDED_NAME, *VARIANT_NAMES}
    spec, weights = settings.name, settings.weights or None
    if weights is not None and spec not in known:
        spec, weights = weights, None
    asked = recipe.preprocessing.model_dump()
    if export.dynamic_size is not None and asked["image_size"] is None:
        asked["image_size"] = export.dynamic_size.opt
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
        preprocessing=asked,
        own_labels=bool(settings.labels),
        out_indices=(export.out_indices or ALL_STAGES) if export.features else None,
    )
    if loaded.config.out_indices and not export.features:
        raise UsageError(
            f"'{weights or spec}' is a backbone without a classification head: it gives no logits.",
            "Export its feature maps, with --features.",
        )
    names, name = loaded.class_names, loaded.name
    if settings.labels:
        names = class_names_from_file(settings.labels, loaded.config.num_classes)
    if weights is None and spec not in known:
        name = settings.name or name
    return replace(loaded, name=name, class_names=names)


def export_bundle(
    loaded: LoadedVan,
    recipe: Recipe,
    output: Path,
    *,
    images: Path | None = None,
    rewrites: Rewrites | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> ExportResult:
    """Return a bundle holding ``loaded`` as a checked FP32 ONNX graph.

    Args:
        loaded: the network, from :func:`load_model`.
        recipe: how to deploy it.
        output: the bundle's folder, made if need be.
        images: images to check on, and the golden samples unless the recipe takes others;
            None takes sample photographs.
        rewrites: which exact rewrites to make; by default what the recipe says.
        force: make it anew even if it is there already.
        progress: told the name of each stage as it begins.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        BundleError: ``output`` cannot hold the bundle.
        GateFailed: the graph is not the network; nothing was written.
    """
    require_onnxruntime()
    if rewrites is None:
        rewrites = Rewrites() if recipe.export.fold else Rewrites.none()
    clock = Stopwatch(progress)
    clock.begin("Preparing images")
    source = None if recipe.export.golden == "samples" else images
    count = golden.golden_count(loaded.config, loaded.preprocessing)
    checked, originals = golden.golden_images(loaded.name, loaded.preprocessing, source, count)
    made_with, reason = _ingredients(loaded, recipe, rewrites, checked.inputs), "asked to (--force)"
    if not force:
        try:
            reason = Bundle.open(output).rebuild_reason("fp32", made_with)
        except BundleError as error:
            reason = f"not there yet ({error.message})" if output.exists() else "not there yet"
    if reason:
        with edit_bundle(output, name=loaded.name) as draft:
            artifact, samples = _checked_graph(draft, loaded, recipe, rewrites, checked, clock)
            files, entry = dict(artifact.files), None
            if recipe.export.golden != "none":
                entry = golden.write_golden(
                    draft, samples, originals, user_images=source is not None
                )
                files |= dict.fromkeys((golden.GOLDEN_FILE, *entry.originals), "")
            if loaded.class_names:
                text = "\n".join(loaded.class_names) + "\n"
                draft.file(LABELS_FILE).write_text(text, encoding="utf-8")
                files[LABELS_FILE] = ""
            draft.description = _description(loaded, recipe, entry)
            draft.record(artifact.model_copy(update={"files": files, "made_with": made_with}))
    clock.begin("")
    why, notes = reason or "nothing changed", loaded.source.notes
    return ExportResult(Bundle.open(output), not reason, why, notes, clock.seconds)


def _checked_graph(
    draft: Draft,
    loaded: LoadedVan,
    recipe: Recipe,
    rewrites: Rewrites,
    checked: Batch,
    clock: Stopwatch,
) -> tuple[Artifact, golden.Samples]:
    """Write the FP32 graph into a draft, and judge it; return its entry, and what it was judged on.

    Raises:
        GateFailed: it is not the network.
    """
    path, batches = draft.file(MODEL_FILE), batch_sizes(recipe.batch)
    model, nodes, checks = _graph_of(loaded, recipe, rewrites, checked.inputs, clock)
    facts = graph_facts(model).model_copy(update={"exported_nodes": nodes})
    files = dict.fromkeys(save_onnx(model, path), "")
    del model
    clock.begin("Running the original network in float64")
    sizes = golden.other_sizes(recipe.export.dynamic_size, loaded.preprocessing.image_size)
    samples = golden.reference_samples(loaded, checked, sizes)
    clock.begin(f"Checking agreement at batch {', '.join(map(str, batches))}")
    judged, record = check_new_graph(path, "fp32", samples, batches)
    if judged.outcome is not Outcome.PASS:
        wrong = [f.message for f in judged.findings if f.outcome is Outcome.FAIL]
        raise GateFailed(
            f"The exported graph is not the network it was made from: {'; '.join(wrong[:4])}.",
            "Nothing was written. Find the cause with --no-fold and --no-simplify; "
            "if one of them helps, please report it.",
        )
    checks["agreement"] = {"images": samples.description, **plain(judged)}
    draft.checks.pop("simplify", None)  # of the graph that was there before
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
        golden_sqnr_db=record,
    )
    return artifact, samples


def _graph_of(
    loaded: LoadedVan, recipe: Recipe, rewrites: Rewrites, inputs: Images, clock: Stopwatch
) -> tuple[ModelProto, int, dict[str, dict[str, Any]]]:
    """Return the network as ONNX, how many nodes were exported, and what was proved."""
    clock.begin("Folding and proving the rewrites")
    middle = [max(0, (side - PROOF_SIDE) // 2) for side in inputs.shape[2:]]
    rows, columns = (slice(start, start + PROOF_SIDE) for start in middle)
    shown = inputs[:PROOF_IMAGES, :, rows, columns].copy()  # float64 convolutions are slow
    fold = fold_van(loaded.model, torch.from_numpy(shown), rewrites)
    if not fold:
        raise GateFailed(
            f"The rewritten network differs from the original by {fold.relative_error:.1e} "
            "in float64, where rewriting must be exact (1e-10).",
            "Nothing was written. Export with --no-fold, and please report it.",
        )
    clock.begin("Exporting to ONNX")
    metadata = {  # for whoever meets the file without its bundle
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
        shown = inputs[:PROOF_IMAGES]
        model, checks["simplify"] = simplify_onnx(model, shown, onnxruntime_outputs)
    return model, nodes, checks


def _ingredients(
    loaded: LoadedVan, recipe: Recipe, rewrites: Rewrites, inputs: Images
) -> dict[str, Any]:
    """Return everything that decides what the export will hold and find."""
    return {
        "weights": loaded.source.sha256,
        "architecture": asdict(loaded.config),
        "preprocessing": loaded.preprocessing.as_dict(),
        "class names": content_key({"names": loaded.class_names}),
        "rewrites": asdict(rewrites),
        # Embedded graphs are artifacts of their own.
        "export": recipe.export.model_dump(mode="json", exclude={"embed_preprocess", "outputs"}),
        "batch": recipe.batch.as_dict(),
        "images checked": hashlib.sha256(inputs.tobytes()).hexdigest(),
        "code": code_digest(".", "model", "graph", "checks", "data", "runners"),
        "versions": tool_versions(*TOOLS),
    }


def _description(loaded: LoadedVan, recipe: Recipe, entry: GoldenInfo | None) -> NetworkInfo:
    """Return what the manifest says of the network."""
    values = {
        "name": loaded.name,
        "weights": loaded.source,
        "architecture": loaded.config,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "preprocessing": loaded.preprocessing,
        "class_names": loaded.class_names or None,
        "batch": recipe.batch,
        "sizes": recipe.export.dynamic_size,
        "versions": tool_versions(*TOOLS),
        "golden": entry,
    }
    return validate(
        NetworkInfo,
        values,
        where="A manifest cannot hold what is known of the network",
        error=InputError,
        remedy="Correct the name, the path or the metadata that it came from.",
    )
