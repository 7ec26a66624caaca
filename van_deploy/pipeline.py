"""The stages in order: from a recipe to a checked bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from van_deploy.bundle import Artefact, Bundle, Draft, Origin, writing
from van_deploy.checks.gates import Outcome
from van_deploy.checks.golden import GOLDEN_FILE, golden_count, images_for_golden, write_golden
from van_deploy.checks.judging import Judged, batch_sizes, judge_new
from van_deploy.checks.reference import reference_samples
from van_deploy.checks.samples import other_sizes
from van_deploy.config import Recipe
from van_deploy.data import check_images, class_names_from_file
from van_deploy.documents import plain
from van_deploy.errors import BundleError, GateFailed, InputError, UsageError
from van_deploy.files import content_key
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.graph.fold import FoldReport, Rewrites, fold_van
from van_deploy.graph.simplify import operator_counts, simplify_onnx
from van_deploy.manifest import Description, Golden, GraphFacts
from van_deploy.model.checkpoint import ALL_STAGES, EMBEDDED, LoadedVan, load_van
from van_deploy.model.variants import VARIANTS
from van_deploy.provenance import EXPORT_TOOLS, code_digest, tool_versions
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import onnxruntime_outputs, require_onnxruntime
from van_deploy.schema import validated
from van_deploy.serve.embedded import Embedded, embed_artefacts
from van_deploy.stopwatch import Progress, Stopwatch

MODEL_FILE = "model.onnx"
LABELS_FILE = "labels.txt"
PROOF_IMAGES = 2
PROOF_SIDE = 96  # pixels: enough for the large kernels to have an inside and borders
EMBED_PROOF_IMAGES = 8  # the same graph again, with known nodes before it


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


def load_for(recipe: Recipe, *, offline: bool = False) -> LoadedVan:
    """Return the network a recipe names, with the recipe's preprocessing and class names."""
    settings, export = recipe.model, recipe.export
    spec, weights = settings.name, settings.weights or None
    asked = recipe.preprocessing.model_dump()
    if export.dynamic_size is not None and asked["image_size"] is None:
        asked["image_size"] = export.dynamic_size.opt
    if weights is not None and not _is_known(spec):
        spec, weights = weights, None
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
    class_names = loaded.class_names
    if settings.labels:
        class_names = class_names_from_file(settings.labels, loaded.config.num_classes)
    name = loaded.name if weights or _is_known(spec) else settings.name or loaded.name
    return replace(loaded, name=name, class_names=class_names)


def _is_known(name: str) -> bool:
    return name in {EMBEDDED, *VARIANTS, *(a for v in VARIANTS.values() for a in v.aliases)}


def export_bundle(
    loaded: LoadedVan,
    recipe: Recipe,
    output: Path,
    *,
    images: Path | None = None,
    rewrites: Rewrites | None = None,
    force: bool = False,
    progress: Progress | None = None,
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
    batches = batch_sizes(recipe.batch)
    source = None if recipe.export.golden == "samples" else images
    count = golden_count(loaded.config, loaded.preprocessing)
    checked, originals = images_for_golden(loaded.name, loaded.preprocessing, source, count)
    inputs = checked.inputs
    made_with = _ingredients(loaded, recipe, rewrites, inputs)
    reason = _why_anew(output, made_with, force)
    if not reason:
        clock.begin("")
        bundle, notes = Bundle.open(output), loaded.source.notes
        return ExportResult(bundle, True, "nothing changed", notes, clock.seconds)
    with writing(output, name=loaded.name) as draft:
        clock.begin("Folding and proving the rewrites")
        fold = fold_van(loaded.model, _proof_images(inputs), rewrites)
        _require_fold(fold)
        clock.begin("Running the original network in float64")
        size, sizes = loaded.preprocessing.image_size, recipe.export.dynamic_size
        samples = reference_samples(loaded, checked, other_sizes(sizes, size))
        clock.begin("Exporting to ONNX")
        model = onnx_from_van(
            fold.model,
            size,
            loaded.config.in_chans,
            batch=recipe.batch.fixed,
            sizes=sizes,
            opset=recipe.export.opset,
            metadata=_metadata(loaded),
        )
        exported = operator_counts(model)
        checks: dict[str, dict[str, Any]] = {"fold": fold.as_dict()}
        if recipe.export.simplify:
            clock.begin("Simplifying")
            shown = inputs[:PROOF_IMAGES]
            model, checks["simplify"] = simplify_onnx(model, shown, onnxruntime_outputs)
        nodes = sum(exported.values())
        facts = graph_facts(model).model_copy(update={"exported_nodes": nodes})
        files = save_onnx(model, draft.file(MODEL_FILE))
        del model, fold
        clock.begin(f"Checking agreement at batch {', '.join(map(str, batches))}")
        judged, record = judge_new(draft.file(MODEL_FILE), "fp32", samples, batches)
        _require_agreement(judged)
        checks["agreement"] = {"images": samples.description, **plain(judged)}
        golden = None
        if recipe.export.golden != "none":
            golden = write_golden(draft, samples, originals, users=source is not None)
            files = [*files, GOLDEN_FILE, *golden.originals]
        draft.description = _description(loaded, recipe, golden)
        draft.checks.pop("simplify", None)  # of the graph that was there before
        draft.checks.update(checks)
        _record(draft, loaded, files, made_with, facts, record)
    clock.begin("")
    return ExportResult(Bundle.open(output), False, reason, loaded.source.notes, clock.seconds)


def embed_in_bundle(
    output: Path, loaded: LoadedVan, recipe: Recipe, images: Path | None = None
) -> tuple[Embedded, ...]:
    """Return the graphs with preprocessing inside that a recipe asks for, made where missing.

    Args:
        output: the bundle's folder; every plain graph in it gets one.
        loaded: the original network.
        recipe: says which preprocessing and which outputs.
        images: folder of images to prove them on; None for sample images.

    Raises:
        UsageError: the recipe asks for nothing to embed.
        GateFailed: an embedded graph does not answer as its plain one; nothing was written.
    """
    batches = [
        b for b in batch_sizes(recipe.batch) if b <= EMBED_PROOF_IMAGES or recipe.batch.fixed
    ]
    checked = check_images(loaded.name, loaded.preprocessing, max(batches), images)
    pixels = checked.pixels
    if pixels is None:
        raise UsageError(
            f"A graph with preprocessing inside is proved on uint8 images; '{images}' holds "
            "normalised network input.",
            "Give uint8 images, or leave --images out.",
        )
    export, bundle = recipe.export, Bundle.open(output)
    return tuple(
        embed_artefacts(bundle, pixels, export.embed_preprocess, export.outputs, batches=batches)
    )


def _require_agreement(judged: Judged) -> None:
    if judged.outcome is not Outcome.PASS:
        wrong = [f.message for f in judged.findings if f.outcome is Outcome.FAIL]
        raise GateFailed(
            f"The exported graph is not the network it was made from: {'; '.join(wrong[:4])}.",
            "Nothing was written. Find the cause with --no-fold and --no-simplify; "
            "if one of them helps, please report it.",
        )


def _require_fold(report: FoldReport) -> None:
    if not report:
        raise GateFailed(
            f"The rewritten network differs from the original by {report.relative_error:.1e} "
            "in float64, where rewriting must be exact (1e-10).",
            "Nothing was written. Export with --no-fold, and please report it.",
        )


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
        "export": {
            name: value
            for name, value in recipe.export.as_dict().items()
            if name not in {"embed_preprocess", "outputs"}  # these are artefacts of their own
        },
        "batch": recipe.batch.as_dict(),
        "images checked": hashlib.sha256(inputs.tobytes()).hexdigest(),
        "code": code_digest(".", "model", "graph", "checks", "data", "runners"),
        "versions": tool_versions(*EXPORT_TOOLS, "onnxruntime"),
    }


def _why_anew(output: Path, made_with: Mapping[str, Any], force: bool) -> str:
    """Return why the export has to be made, or "" if the one in ``output`` is this one."""
    if force:
        return "asked to (--force)"
    try:
        return Bundle.open(output).why_anew("fp32", made_with)
    except BundleError as error:
        return f"not there yet ({error.message})" if output.exists() else "not there yet"


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
        "versions": tool_versions(*EXPORT_TOOLS, "onnxruntime"),
        "golden": golden,
    }
    return validated(
        Description,
        values,
        where="A manifest cannot hold what is known of the network",
        error=InputError,
        remedy="Correct the name, the path or the metadata that it came from.",
    )


def _record(
    draft: Draft,
    loaded: LoadedVan,
    files: list[str],
    made_with: Mapping[str, Any],
    facts: GraphFacts,
    record: dict[str, float],
) -> None:
    if loaded.class_names:
        text = "\n".join(loaded.class_names) + "\n"
        draft.file(LABELS_FILE).write_text(text, encoding="utf-8")
        files = [*files, LABELS_FILE]
    draft.record(
        Artefact(
            name="fp32",
            kind="onnx",
            precision="fp32",
            file=MODEL_FILE,
            files=dict.fromkeys(files, ""),
            made_from=Origin(name="weights", sha256=loaded.source.sha256),
            made_with=dict(made_with),
            graph=facts,
            golden_sqnr_db=record,
        )
    )


def _metadata(loaded: LoadedVan) -> dict[str, str]:
    """Return what travels inside the ONNX file, for whoever meets it without its bundle."""
    source = loaded.source
    properties = {
        "van_deploy.model": loaded.name,
        "van_deploy.weights_sha256": source.sha256,
        "van_deploy.weights_format": source.format,
        "van_deploy.preprocessing": json.dumps(loaded.preprocessing.as_dict()),
        "van_deploy.architecture": json.dumps(asdict(loaded.config)),
    }
    if loaded.class_names:
        properties["van_deploy.class_names"] = json.dumps(loaded.class_names)
    return properties


def _proof_images(inputs: Images) -> Any:
    """Return the middles of the first images as a tensor: float64 convolutions are slow."""
    import torch

    starts = [max(0, (side - PROOF_SIDE) // 2) for side in inputs.shape[2:]]
    rows, columns = (slice(start, start + PROOF_SIDE) for start in starts)
    return torch.from_numpy(inputs[:PROOF_IMAGES, :, rows, columns].copy())
