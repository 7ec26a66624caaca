"""Models, artefacts and answers as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType

from van_deploy.report.bundle_view import (
    agreement_table,
    artefacts_table,
    model_facts,
    preprocessing_text,
    proofs_table,
)
from van_deploy.report.engine_view import engine_tables
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


def described_view(result: dict[str, Any]) -> RenderableType:
    """Return one model or bundle in full."""
    return _bundle_table(result) if result["kind"] == "bundle" else _model_table(result)


def _bundle_table(result: dict[str, Any]) -> RenderableType:
    manifest = result["manifest"]
    found = result["problems"]
    more = [f"and {len(found) - MOST_PROBLEMS:,} more"] if len(found) > MOST_PROBLEMS else []
    problems = [*found[:MOST_PROBLEMS], *more]
    return stack(
        facts_table({"bundle": result["path"], "written": manifest.written}),
        model_facts(manifest),
        proofs_table(manifest.checks),
        agreement_table(manifest.checks["agreement"]),
        artefacts_table(manifest, result["sizes"]),
        notes(problems, "FAIL") if problems else notes(["every file is the manifest's"], "PASS"),
        notes(manifest.weights.notes, "NOTE") if manifest.weights.notes else None,
        facts_table(manifest.versions, "Made with"),
    )


def _model_table(result: dict[str, Any]) -> RenderableType:
    config, preprocessing = result["architecture"], result["preprocessing"]
    k0, k1 = config["lka_kernels"]
    facts: dict[str, object] = {
        "model": result["name"],
        "variant": result.get("variant", result["name"]) or "none of the published ones",
        "widths": " ".join(map(str, config["embed_dims"])),
        "depths": " ".join(map(str, config["depths"])),
        "MLP ratios": " ".join(f"{ratio:g}" for ratio in config["mlp_ratios"]),
        "kernels": f"{k0}x{k0}, then {k1}x{k1} with dilation {config['lka_dilation']}",
        "classes": config["num_classes"],
        "parameters": f"{result['parameters']:,}",
        "multiply-adds": f"{count_text(result['multiply_adds'])} "
        f"at {result['multiply_adds_at']} x {result['multiply_adds_at']}",
        "preprocessing": preprocessing_text(preprocessing),
        "": f"from {preprocessing.source}",
    }
    if result["kind"] == "variant":
        facts["top-1"] = (
            f"{result['top1_percent']} % (published)" if result["top1_percent"] else None
        )
        facts["weights"] = result["weights"] or result["weights_note"]
        facts["on this machine"] = result["here"]
        return facts_table(facts)
    source = result["source"]
    facts["weights"] = f"{source['path']} ({source['format']}, under {source['container']})"
    facts["sha256"] = source["sha256"]
    names = result["class_names"]
    facts["class names"] = ", ".join([*names[:8], "..."][: len(names)]) if names else None
    return stack(facts_table(facts), notes(source["notes"], "NOTE") if source["notes"] else None)


def artefacts_view(descriptions: list[dict[str, Any]]) -> RenderableType:
    """Return what is in each artefact."""
    return stack(*(_one(description) for description in descriptions))


def _one(description: Mapping[str, Any]) -> RenderableType:
    if description["kind"] == "onnx":
        return _onnx(description)
    return engine_tables(description)


def _onnx(description: Mapping[str, Any]) -> RenderableType:
    facts = {
        "file": description["file"],
        "size": bytes_text(description["bytes"]),
        "written by": description["producer"] or None,
        "opset": f"{description['opset']} (IR {description['ir_version']})",
        **{f"input {name}": _tensor(value) for name, value in description["inputs"].items()},
        **{f"output {name}": _tensor(value) for name, value in description["outputs"].items()},
        **{
            f"weights {kind}": f"{value['values']:,} values, {bytes_text(value['bytes'])}"
            for kind, value in description["weights"].items()
        },
    }
    if description["external_files"]:
        facts["weights in"] = ", ".join(description["external_files"])
    columns = (Column("operator"), Column("nodes", "right"))
    rows = [*description["operators"].items(), ("all", description["nodes"])]
    metadata = {key: _line(value) for key, value in description["metadata"].items()}
    return stack(
        facts_table(facts),
        rows_table(columns, rows),
        facts_table(metadata, "Metadata") if metadata else None,
    )


def _tensor(value: Mapping[str, Any]) -> str:
    return f"{value['dtype']} ({', '.join(str(size) for size in value['shape'])})"


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
