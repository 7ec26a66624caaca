"""Models, artefacts and answers as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import RenderableType

from van_deploy.describe import (
    BundleDescription,
    Described,
    VariantDescription,
    WeightsDescription,
)
from van_deploy.engine.inspect import EngineDescription
from van_deploy.engine.package import PackageDescription
from van_deploy.graph.inspect import OnnxDescription
from van_deploy.manifest import TensorFacts
from van_deploy.report.bundle_view import (
    agreement_table,
    artefacts_table,
    model_facts,
    preprocessing_text,
    proofs_table,
)
from van_deploy.report.engine_view import engine_tables, package_tables
from van_deploy.report.tables import (
    Column,
    bytes_text,
    count_text,
    facts_table,
    notes,
    rows_table,
    stack,
    verdict,
)
from van_deploy.serve.predict import Prediction

__all__ = ["artefacts_view", "described_view", "predictions_table"]

MOST_PROBLEMS = 20  # told one by one; --json has them all


def described_view(described: Described) -> RenderableType:
    """Return one model or bundle in full."""
    if isinstance(described, BundleDescription):
        return _bundle_table(described)
    return _model_table(described)


def _bundle_table(described: BundleDescription) -> RenderableType:
    manifest, found = described.manifest, described.problems
    more = [f"and {len(found) - MOST_PROBLEMS:,} more"] if len(found) > MOST_PROBLEMS else []
    problems = [*found[:MOST_PROBLEMS], *more]
    return stack(
        facts_table({"bundle": described.path, "written": manifest.written}),
        model_facts(manifest),
        proofs_table(manifest.checks),
        agreement_table(manifest.checks["agreement"]),
        artefacts_table(manifest, described.sizes),
        notes(problems, "FAIL") if problems else notes(["every file is the manifest's"], "PASS"),
        notes(manifest.weights.notes, "NOTE") if manifest.weights.notes else None,
        facts_table(manifest.versions, "Made with"),
    )


def _model_table(described: VariantDescription | WeightsDescription) -> RenderableType:
    config, preprocessing = described.architecture, described.preprocessing
    k0, k1 = config.lka_kernels
    variant = described.name if described.kind == "variant" else described.variant
    facts: dict[str, object] = {
        "model": described.name,
        "variant": variant or "none of the published ones",
        "widths": " ".join(map(str, config.embed_dims)),
        "depths": " ".join(map(str, config.depths)),
        "MLP ratios": " ".join(f"{ratio:g}" for ratio in config.mlp_ratios),
        "kernels": f"{k0}x{k0}, then {k1}x{k1} with dilation {config.lka_dilation}",
        "classes": config.num_classes,
        "parameters": f"{described.parameters:,}",
        "multiply-adds": f"{count_text(described.multiply_adds)} "
        f"at {described.multiply_adds_at} x {described.multiply_adds_at}",
        "preprocessing": preprocessing_text(preprocessing),
        "": f"from {preprocessing.source}",
    }
    if isinstance(described, VariantDescription):
        top1 = described.top1_percent
        facts["top-1"] = f"{top1} % (published)" if top1 else None
        facts["weights"] = described.weights or described.weights_note
        facts["on this machine"] = described.here
        return facts_table(facts)
    source = described.source
    facts["weights"] = f"{source.path} ({source.format}, under {source.container})"
    facts["sha256"] = source.sha256
    names = described.class_names
    facts["class names"] = ", ".join([*names[:8], "..."][: len(names)]) if names else None
    return stack(facts_table(facts), notes(source.notes, "NOTE") if source.notes else None)


def artefacts_view(
    descriptions: Iterable[OnnxDescription | EngineDescription | PackageDescription],
) -> RenderableType:
    """Return what is in each artefact."""
    return stack(
        *(
            engine_tables(one)
            if one.kind == "engine"
            else package_tables(one)
            if one.kind == "package"
            else _onnx(one)
            for one in descriptions
        )
    )


def _onnx(description: OnnxDescription) -> RenderableType:
    graph = description.graph
    facts = {
        "file": str(description.file),
        "size": bytes_text(description.bytes),
        "written by": description.producer or None,
        "opset": f"{graph.opset} (IR {graph.ir_version})",
        **{f"input {name}": _tensor(value) for name, value in graph.inputs.items()},
        **{f"output {name}": _tensor(value) for name, value in graph.outputs.items()},
        **{
            f"weights {kind}": f"{value.values:,} values, {bytes_text(value.bytes)}"
            for kind, value in description.weights.items()
        },
    }
    if description.external_files:
        facts["weights in"] = ", ".join(description.external_files)
    columns = (Column("operator"), Column("nodes", "right"))
    rows = [*graph.operators.items(), ("all", graph.nodes)]
    metadata = {key: _line(value) for key, value in description.metadata.items()}
    return stack(
        facts_table(facts),
        rows_table(columns, rows),
        facts_table(metadata, "Metadata") if metadata else None,
    )


def _tensor(value: TensorFacts) -> str:
    return f"{value.dtype} ({', '.join(str(size) for size in value.shape)})"


def _line(value: object) -> str:
    """Return a value on one line: a mapping's entries, a list's first few."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = " ".join(_line(item) for item in value[:12])
        return shown if len(value) <= 12 else f"{shown} ... ({len(value)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def predictions_table(predictions: Iterable[Prediction]) -> RenderableType:
    """Return one line an image: its classes, or why it could not be read."""
    rows: list[tuple[object, ...]] = []
    for prediction in predictions:
        if prediction.error:
            rows.append((prediction.source, verdict("FAIL"), None, prediction.error))
            continue
        first, *others = prediction.top
        then = ", ".join(f"{c.name} {c.probability:.1%}" for c in others)
        rows.append((prediction.source, first.name, f"{first.probability:.1%}", then))
    columns = (
        Column("picture", wrap=True),
        Column("class", style="bold"),
        Column("probability", "right"),
        Column("then", wrap=True),
    )
    return rows_table(columns, rows)
