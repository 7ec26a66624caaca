"""A bundle's manifest as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from van_deploy.bundle import Manifest
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.weights_source import WeightsSource
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

__all__ = [
    "agreement_table",
    "artefacts_table",
    "embedded_table",
    "model_facts",
    "preprocessing_text",
    "proofs_table",
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
        f"crop {values.crop_pct:g}, mean {_list(values.mean)}, std {_list(values.std)}"
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
    batches = agreement["batches"]
    yield {
        "name": "agreement",
        "outcome": agreement["passed"],
        "detail": f"{agreement['runner']} against {agreement['reference']}, "
        f"{sum(entry['images'] for entry in batches)} answers; {agreement['images']}",
    }


def agreement_table(agreement: Mapping[str, Any]) -> RenderableType:
    """Return one line a batch size: how far the artefact is from PyTorch."""
    columns = (
        "verdict",
        Column("batch", "right"),
        Column("max error", "right"),
        Column("mean error", "right"),
        Column("relative", "right"),
        Column("cosine", "right"),
        Column("SQNR dB", "right"),
        Column("same top-1", "right"),
        Column("row alone", "right"),
    )
    rows = (
        (
            verdict(entry["passed"]),
            entry["batch"],
            f"{entry['max_abs']:.1e}",
            f"{entry['mean_abs']:.1e}",
            f"{entry['relative']:.1e}",
            f"{entry['cosine']:.7f}",
            f"{float(entry['sqnr_db']):.1f}",
            f"{100 * entry['top1_agreement']:.1f} %",
            f"{entry['row_relative']:.0e}",
        )
        for entry in agreement["batches"]
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
    plain = max(row["plain"] for row in rows)
    pytorch = [row["pytorch"] for row in rows if "pytorch" in row]
    against = f", {max(pytorch):.1e} from PyTorch" if pytorch else ""
    sizes = ", ".join(str(row["batch"]) for row in rows)
    return {
        "name": item.name,
        "outcome": True,
        "detail": f"relative difference {plain:.1e} from {item.base}{against}, at batch {sizes}",
    }


def _where(weights: WeightsSource) -> str:
    """Return the weights' file; what ships in the package goes by its name."""
    inside = weights.format in {"embedded", "random"}
    return str(weights.spec if inside else weights.path)


def _seed(weights: WeightsSource) -> str:
    return f", seed {weights.seed}" if weights.seed is not None else ""


def _list(values: Iterable[object]) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
