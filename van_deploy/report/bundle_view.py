"""A bundle's manifest as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from van_deploy.bundle import Manifest
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.weights_source import WeightsSource
from van_deploy.report.gates_view import evaluate_tables, verify_tables
from van_deploy.report.precision_view import quantized_view
from van_deploy.report.tables import (
    Column,
    bytes_text,
    checks_table,
    count_text,
    facts_table,
    rows_table,
    stack,
    verdict,
)
from van_deploy.serve.embedded import Embedded

if TYPE_CHECKING:
    from van_deploy.pipeline import ExportResult
    from van_deploy.precision.pipeline import QuantizeResult
    from van_deploy.run import RunResult

__all__ = [
    "agreement_table",
    "artefacts_table",
    "embedded_table",
    "export_view",
    "model_facts",
    "preprocessing_text",
    "proofs_table",
    "run_view",
]


def model_facts(manifest: Manifest) -> RenderableType:
    """Return what the network is and what it must be fed."""
    weights, config = manifest.weights, manifest.architecture
    facts = {
        "model": manifest.name,
        "weights": f"{_where(weights)} "
        f"({weights.format}{_seed(weights)}, sha256 {weights.sha256[:12]})",
        "network": f"widths {_list(config.embed_dims)}, depths {_list(config.depths)}, "
        f"{config.num_classes} classes, {count_text(manifest.parameters)} parameters",
        "preprocessing": preprocessing_text(manifest.preprocessing),
        "": f"from {manifest.preprocessing.source}",
        "batch": f"{manifest.batch.min} to {manifest.batch.max}, best at {manifest.batch.opt}",
    }
    return facts_table(facts)


def preprocessing_text(values: Preprocessing) -> str:
    """Return preprocessing on one line."""
    return (
        f"{values.image_size} x {values.image_size}, {values.interpolation}, "
        f"{values.geometry}, mean {_list(values.mean)}, std {_list(values.std)}"
    )


def proofs_table(checks: Mapping[str, Any]) -> RenderableType:
    """Return one line a proof: rewriting, simplification, agreement."""
    return checks_table(_proofs(checks))


def _proofs(checks: Mapping[str, Any]) -> Iterable[dict[str, object]]:
    fold = checks["fold"]
    kept = f", {fold['multiplies_kept']} multiplies kept" if fold["multiplies_kept"] else ""
    yield {
        "name": "rewriting",
        "outcome": fold["passed"],
        "detail": f"{fold['batchnorms_folded']} BatchNorms folded, {fold['batchnorms_left']} left; "
        f"{fold['layer_scales_folded']} layer scales folded{kept}; "
        f"float64 relative error {fold['relative_error_float64']:.1e} "
        f"(at most {fold['tolerance']:.0e})",
    }
    if "simplify" in checks:
        simplify = checks["simplify"]
        error = simplify["relative_error"]
        measured = f", relative error {error:.1e}" if error is not None else ""
        removed = ", ".join(f"{count} {kind}" for kind, count in simplify["removed"].items())
        yield {
            "name": "simplification",
            "outcome": True if simplify["changed"] or error is None else "kept",
            "detail": f"{simplify['nodes_before']} nodes to {simplify['nodes_after']}: "
            f"{simplify['reason']}{f' (removed {removed})' if removed else ''}{measured}",
        }
    agreement = checks["agreement"]
    count = len(agreement["batches"])
    yield {
        "name": "agreement",
        "outcome": agreement["outcome"],
        "detail": f"ONNX Runtime against PyTorch in float64, {count} batch sizes; "
        f"{agreement['images']}",
    }


def agreement_table(agreement: Mapping[str, Any]) -> RenderableType:
    """Return one line a batch size: how far the artefact is from PyTorch."""
    right = ("batch", "SQNR dB ↑", "batch invariance dB ↑")
    numbers = (Column(header, "right") for header in right)
    columns: tuple[Column | str, ...] = ("verdict", *numbers)
    rows = (
        (
            verdict(row["outcome"]),
            row["batch"],
            *(
                None if row[key] is None else f"{float(row[key]):.1f}"
                for key in ("sqnr_db", "invariance_db")
            ),
        )
        for row in agreement["batches"]
    )
    return rows_table(columns, rows)


def artefacts_table(manifest: Manifest, sizes: Mapping[str, int]) -> RenderableType:
    """Return one line an artefact: precision, nodes, size, digest.

    Args:
        manifest: the bundle's.
        sizes: bytes of each artefact, by name.
    """
    columns = (
        "artefact",
        "precision",
        "file",
        Column("nodes", "right"),
        Column("size", "right"),
        "sha256",
    )
    rows = (
        (
            name,
            entry.precision,
            entry.file,
            entry.graph.nodes if entry.graph else None,
            bytes_text(sizes[name]),
            entry.sha256[:12],
        )
        for name, entry in manifest.artefacts.items()
    )
    return stack(rows_table(columns, rows))


def embedded_table(embedded: Sequence[Embedded]) -> RenderableType:
    """Return one line a graph with preprocessing inside: how far it is from its plain one."""
    return checks_table(_embedded(item) for item in embedded)


def _embedded(item: Embedded) -> dict[str, object]:
    if item.agreement is None:
        return {"name": item.name, "outcome": "reused", "detail": f"nothing changed in {item.base}"}
    rows = item.agreement["batches"]
    largest = max(row["difference"] for row in rows)
    sizes = ", ".join(str(row["batch"]) for row in rows)
    return {
        "name": item.name,
        "outcome": True,
        "detail": f"relative difference {largest:.1e} from {item.base}, at batch {sizes}",
    }


def _where(weights: WeightsSource) -> str:
    """Return the weights' file; what ships in the package goes by its name."""
    inside = weights.format in {"embedded", "random"}
    return str(weights.spec if inside else weights.path)


def _seed(weights: WeightsSource) -> str:
    return f", seed {weights.seed}" if weights.seed is not None else ""


def _list(values: Iterable[object]) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def export_view(result: ExportResult, precisions: Iterable[QuantizeResult]) -> RenderableType:
    """Return what was exported, and every precision that was made of it."""
    manifest = result.bundle.manifest
    word = "Reused" if result.reused else "Wrote"
    took = f" in {sum(result.seconds.values()):.1f} s" if result.seconds else ""
    return stack(
        model_facts(manifest),
        proofs_table(manifest.checks),
        agreement_table(manifest.checks["agreement"]),
        artefacts_table(manifest, result.bundle.sizes()),
        embedded_table(result.embedded) if result.embedded else None,
        Text(f"{word} the bundle {result.bundle.path}{took} ({result.reason})."),
        *(quantized_view(other) for other in precisions),
    )


def run_view(result: RunResult) -> RenderableType:
    """Return everything a run made, and the verdicts of its gates."""
    bundle = result.bundle
    names = bundle.manifest.class_names
    lines = [f"Exported: {result.export.reason}."]
    lines += [
        f"{made.artefact}: {made.reason}."
        + ("" if made.passed else " It does not hold its gate; `van-deploy quantize` tells why.")
        for made in result.made
    ]
    return stack(
        Text("\n".join(lines)),
        artefacts_table(bundle.manifest, bundle.sizes()),
        verify_tables(result.verify, names),
        evaluate_tables(result.evaluate) if result.evaluate else None,
        Text(f"The bundle is {bundle.path}."),
    )
