"""The stages in order: from a recipe to a bundle that its gates have judged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

from van_deploy.bundle import Artefact, Bundle, Origin, writing
from van_deploy.checks.evaluate import evaluate_bundle
from van_deploy.checks.gates import Outcome
from van_deploy.checks.golden import (
    GOLDEN_FILE,
    golden_count,
    images_for_golden,
    reference_samples,
    samples_for,
    write_golden,
)
from van_deploy.checks.judging import batch_sizes, common, judge_new
from van_deploy.checks.samples import other_sizes
from van_deploy.checks.verify import record_check, verify_bundle
from van_deploy.config import EvaluationSettings, Recipe, RunSettings, VerifySettings
from van_deploy.data.labels import class_names_from_file
from van_deploy.data.samples import check_images
from van_deploy.documents import plain
from van_deploy.engine.bundled import REUSED, build_cells, planned_engines
from van_deploy.errors import BundleError, GateFailed, InputError, UsageError
from van_deploy.files import content_key
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.files import graph_facts, operator_counts, save_onnx, simplify_onnx
from van_deploy.graph.fold import Rewrites, fold_van
from van_deploy.manifest import Description, Golden
from van_deploy.model.checkpoint import ALL_STAGES, LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.variants import NAMES
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.provenance import EXPORT_TOOLS, code_digest, tool_versions
from van_deploy.results import ExportReport, ExportResult, Made, RunResult
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import onnxruntime_outputs, require_onnxruntime
from van_deploy.schema import validated
from van_deploy.serve.embedded import embed_artefacts
from van_deploy.stopwatch import Progress, Stopwatch, silent

MODEL_FILE, LABELS_FILE = "model.onnx", "labels.txt"
PROOF_IMAGES = 2
PROOF_SIDE = 96  # pixels: enough for the large kernels to have an inside and borders
EMBED_PROOF_IMAGES = 8  # the same graph again, with known nodes before it
TOOLS = (*EXPORT_TOOLS, "onnxruntime")


def load_for(recipe: Recipe, *, offline: bool = False, progress: Progress = silent) -> LoadedVan:
    """Return the network a recipe names, with the recipe's preprocessing and class names.

    Raises:
        VanDeployError: as :func:`~van_deploy.model.checkpoint.load_van`.
        UsageError: it is a backbone, and no feature maps are asked for.
    """
    settings, export = recipe.model, recipe.export
    known = {EMBEDDED_NAME, *NAMES}
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
    progress: Progress = silent,
) -> ExportResult:
    """Return a bundle holding ``loaded`` as a checked FP32 ONNX graph.

    Args:
        loaded: the network, from :func:`load_for`.
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
    count = golden_count(loaded.config, loaded.preprocessing)
    checked, originals = images_for_golden(loaded.name, loaded.preprocessing, source, count)
    made_with = _ingredients(loaded, recipe, rewrites, checked.inputs)
    reason = "asked to (--force)"
    if not force:
        try:
            reason = Bundle.open(output).why_anew("fp32", made_with)
        except BundleError as error:
            reason = f"not there yet ({error.message})" if output.exists() else "not there yet"
    if not reason:
        clock.begin("")
        notes, bundle = loaded.source.notes, Bundle.open(output)
        return ExportResult(bundle, True, "nothing changed", notes, clock.seconds)
    with writing(output, name=loaded.name) as draft:
        path, batches = draft.file(MODEL_FILE), batch_sizes(recipe.batch)
        model, nodes, checks = _graph_of(loaded, recipe, rewrites, checked.inputs, clock)
        facts = graph_facts(model).model_copy(update={"exported_nodes": nodes})
        files = [*save_onnx(model, path)]
        del model
        clock.begin("Running the original network in float64")
        size, sizes = loaded.preprocessing.image_size, recipe.export.dynamic_size
        samples = reference_samples(loaded, checked, other_sizes(sizes, size))
        clock.begin(f"Checking agreement at batch {', '.join(map(str, batches))}")
        judged, record = judge_new(path, "fp32", samples, batches)
        if judged.outcome is not Outcome.PASS:
            wrong = [f.message for f in judged.findings if f.outcome is Outcome.FAIL]
            raise GateFailed(
                f"The exported graph is not the network it was made from: {'; '.join(wrong[:4])}.",
                "Nothing was written. Find the cause with --no-fold and --no-simplify; "
                "if one of them helps, please report it.",
            )
        checks["agreement"] = {"images": samples.description, **plain(judged)}
        golden = None
        if recipe.export.golden != "none":
            golden = write_golden(draft, samples, originals, users=source is not None)
            files += [GOLDEN_FILE, *golden.originals]
        if loaded.class_names:
            text = "\n".join(loaded.class_names) + "\n"
            draft.file(LABELS_FILE).write_text(text, encoding="utf-8")
            files.append(LABELS_FILE)
        draft.description = _description(loaded, recipe, golden)
        draft.checks.pop("simplify", None)  # of the graph that was there before
        draft.checks.update(checks)
        draft.record(
            Artefact(
                name="fp32",
                kind="onnx",
                precision="fp32",
                file=MODEL_FILE,
                files=dict.fromkeys(files, ""),
                made_from=Origin(name="weights", sha256=loaded.source.sha256),
                made_with=made_with,
                graph=facts,
                golden_sqnr_db=record,
            )
        )
    clock.begin("")
    notes = loaded.source.notes
    return ExportResult(Bundle.open(output), False, reason, notes, clock.seconds)


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
        # Embedded graphs are artefacts of their own.
        "export": recipe.export.model_dump(mode="json", exclude={"embed_preprocess", "outputs"}),
        "batch": recipe.batch.as_dict(),
        "images checked": hashlib.sha256(inputs.tobytes()).hexdigest(),
        "code": code_digest(".", "model", "graph", "checks", "data", "runners"),
        "versions": tool_versions(*TOOLS),
    }


def _description(loaded: LoadedVan, recipe: Recipe, golden: Golden | None) -> Description:
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
        "golden": golden,
    }
    return validated(
        Description,
        values,
        where="A manifest cannot hold what is known of the network",
        error=InputError,
        remedy="Correct the name, the path or the metadata that it came from.",
    )


def export_recipe(
    loaded: LoadedVan, recipe: Recipe, output: Path, how: RunSettings, progress: Progress = silent
) -> ExportReport:
    """Return what exporting did, and the other precisions that the recipe makes.

    Args:
        loaded: the network, from :func:`load_for`.
        recipe: what to make; engines and gates are not done here.
        output: the bundle's folder.
        how: whether to make everything anew, and images to check on, and to calibrate on where
            the recipe names none.
        progress: told what is done.

    Raises:
        VanDeployError: as :func:`run_recipe`.
    """
    clock, images, force = Stopwatch(progress), how.images, how.force
    exported = export_bundle(loaded, recipe, output, images=images, force=force, progress=progress)
    made = []
    for name in recipe.precision.make:
        settings = recipe.precision.of(name)
        if images is not None and settings.sources == (None, None):
            settings = settings.changed(images=images)
        progress(f"Making '{name}'")
        made.append(quantize_bundle(output, settings, force=force, progress=progress))
    if recipe.export.embeds:
        clock.begin("Embedding preprocessing, and proving it")
        fixed, most = recipe.batch.fixed, EMBED_PROOF_IMAGES
        batches = [size for size in batch_sizes(recipe.batch) if size <= most or fixed]
        pixels = check_images(loaded.name, loaded.preprocessing, max(batches), images).pixels
        if pixels is None:
            raise UsageError(
                f"A graph with preprocessing inside is proved on uint8 images; '{images}' holds "
                "normalised network input.",
                "Give uint8 images, or leave --images out.",
            )
        asked = recipe.export.embed_preprocess, recipe.export.outputs
        embedded = embed_artefacts(Bundle.open(output), pixels, *asked, batches=batches)
        clock.begin("")
        seconds = {**exported.seconds, **clock.seconds}
        exported = replace(exported, embedded=tuple(embedded), seconds=seconds)
    bundle = Bundle.open(output)
    return ExportReport(replace(exported, bundle=bundle), tuple(made), bundle.manifest)


def run_recipe(
    loaded: LoadedVan, recipe: Recipe, output: Path, how: RunSettings, progress: Progress = silent
) -> RunResult:
    """Return the bundle a recipe asks for, and the verdict of its gates.

    Args:
        loaded: the network, from :func:`load_for`.
        recipe: what to make, and the gates.
        output: the bundle's folder.
        how: what is skipped, runs it, and so on.
        progress: told what is done.

    Raises:
        UsageError: nothing builds the engines asked for.
        GateFailed: exporting found that the graph is not the network.
        BundleError: ``output`` cannot hold the bundle.
        ImageError: a precision needs images to calibrate on and there are none.
        MissingDependency: what builds the engines is not installed.
        ConversionError: an engine cannot be built.
    """
    engines, cells = recipe.engines, []
    if engines.precisions:  # a mistake is said before any work
        cells = planned_engines(output, engines, recipe.batch, recipe.export.dynamic_size)
    exported = export_recipe(loaded, recipe, output, how, progress)
    made = [Made(one.artefact, one.reason, one.passed) for one in exported.precisions]
    cache = engines.timing_cache
    built = build_cells(cells, timing_cache=cache, force=how.force, progress=progress)
    for outcome in built if cells else ():
        same = outcome.outcome == REUSED
        reason = "the file, options and versions are those it was built from" if same else "built"
        made.append(Made(outcome.engine, reason, passed=True))
    bundle = Bundle.open(output)
    progress("Verifying")
    samples, asked = samples_for(bundle, loaded, None), VerifySettings(**common(how))
    verify = verify_bundle(bundle, samples, asked, loaded, recipe.gates, progress)
    record_check(bundle, "verify", verify)
    evaluate = None
    if recipe.evaluate.images is not None:
        progress("Evaluating")
        settings = EvaluationSettings(**{**dict(recipe.evaluate), **common(how)})
        evaluate = evaluate_bundle(bundle, loaded, settings, recipe.gates, progress)
        record_check(bundle, "evaluate", evaluate)
    return RunResult(Bundle.open(output), exported.export, tuple(made), verify, evaluate)
