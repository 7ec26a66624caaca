"""What is known of an engine, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from van_deploy.report.tables import (
    Column,
    bytes_text,
    facts_table,
    notes,
    rows_table,
    stack,
    verdict,
)

if TYPE_CHECKING:
    from van_deploy.engine.fleet import Cell, Outcome
    from van_deploy.engine.inspect import EngineDescription
    from van_deploy.engine.package import PackageDescription
    from van_deploy.engine.sidecar import Sidecar
    from van_deploy.results import Tuned

__all__ = [
    "builds_view",
    "cell_name",
    "engine_tables",
    "package_tables",
    "tuning_view",
    "warnings_text",
]

MOST_LAYERS = 200


def engine_tables(description: EngineDescription) -> RenderableType:
    """Return whether an engine runs here, what it is, and its layers where they are known."""
    sidecar = description.sidecar
    if sidecar is None:
        unknown = {"sidecar": "none: nothing says where this plan comes from"}
        return stack(facts_table({**_file(description), **unknown}), _layers(description))
    log = description.build_notes
    return stack(
        facts_table({"engine": sidecar.name, **_file(description), **_made(description, sidecar)}),
        facts_table(_serves(sidecar), "Serves"),
        facts_table(_built(description, sidecar), "Build"),
        _here(description),
        _layers(description),
        facts_table({"": "\n".join(log)}, "From the build log") if log else None,
    )


def package_tables(description: PackageDescription) -> RenderableType:
    """Return what an Inductor package is, and whether it runs here."""
    sidecar = description.sidecar
    options = ["max-autotune"] * sidecar.max_autotune + ["TF32"] * sidecar.tf32
    facts = {
        "package": sidecar.name,
        "file": str(description.file),
        "size": bytes_text(sidecar.file_bytes),
        "sha256": sidecar.file_sha256,
        "compiled from": f"{sidecar.onnx_file} in {sidecar.precision}",
        "by": f"PyTorch {sidecar.torch} in {sidecar.build_seconds:.1f} s, on {sidecar.built_on}",
        "serves": ", ".join((*sidecar.targets, *sidecar.cpu_features)),
        "batch": str(sidecar.batch),
        "input": f"float32 ({_shape(sidecar.input_shape)})",
        "options": ", ".join(options) or None,
    }
    return stack(facts_table(facts), _here(description))


def _file(description: EngineDescription) -> dict[str, object]:
    return {
        "file": str(description.file),
        "size": bytes_text(description.plan_bytes),
        "sha256": description.plan_sha256,
    }


def _made(description: EngineDescription, sidecar: Sidecar) -> dict[str, object]:
    sound = {True: "yes", False: "NO", None: "not asked: its backend is not here"}
    return {
        "made from": f"{sidecar.onnx_file} (sha256 {sidecar.onnx_sha256[:12]})",
        "precision": sidecar.precision,
        "backend": f"{sidecar.backend} {sidecar.backend_version}, CUDA {sidecar.cuda or 'unknown'}",
        "plan is sound": sound[description.plan_is_sound],
    }


def _serves(sidecar: Sidecar) -> dict[str, object]:
    tensors = {
        f"{kind} {tensor.name}": f"{tensor.dtype} ({_shape(tensor.shape)})"
        for kind, tensors in (("input", sidecar.inputs), ("output", sidecar.outputs))
        for tensor in tensors
    }
    return {
        "GPUs": ", ".join(sidecar.targets),
        "batch": ", ".join(map(str, sidecar.profiles)),
        **tensors,
        "memory on the GPU": ", ".join(
            f"{name.removesuffix('_bytes')} {bytes_text(size)}"
            for name, size in sidecar.device_memory.items()
        )
        or None,
    }


def _built(description: EngineDescription, sidecar: Sidecar) -> dict[str, object]:
    options = {
        key.replace("_", " "): value
        for key, value in sidecar.options.as_dict().items()
        if key not in ("profiles", "targets") and value not in (None, False, "none")
    }
    return {
        "took": f"{sidecar.parse_seconds + sidecar.build_seconds:.1f} s and "
        f"{bytes_text(sidecar.peak_memory_bytes)}",
        "parser's layers": sidecar.parser_layers,
        "on": sidecar.built_on or "no GPU: its backend needs none to build",
        "options": ", ".join(f"{key} {_word(value)}" for key, value in options.items()) or None,
        "same bytes twice": _same_twice(sidecar.reproducible) or "not checked",
        "warnings": "\n".join(f"{n} x {text}" for text, n in sidecar.warnings.items()) or None,
        "log": description.log,
    }


def _here(description: EngineDescription | PackageDescription) -> RenderableType:
    if not description.obstacles:
        return notes(["it runs on this machine"], "YES")
    problems = "; ".join(obstacle.problem for obstacle in description.obstacles)
    remedies = " ".join(dict.fromkeys(obstacle.remedy for obstacle in description.obstacles))
    return notes([f"runs here: {problems}. {remedies}"], "NO")


def _layers(description: EngineDescription) -> RenderableType | None:
    if not description.layers:
        reason = description.layers_skipped
        if description.obstacles:
            reason = "only the engine's own GPU can load it and name them"
        return notes([f"layers: {reason}"], "SKIPPED") if reason else None
    columns = (Column("layer", wrap=True), "kind", "precision", Column("modules", wrap=True))
    rows = [
        (layer.name, layer.kind, layer.precision, ", ".join(layer.nodes))
        for layer in description.layers[:MOST_LAYERS]
    ]
    return rows_table(columns, rows, f"{len(description.layers)} layers")


def _shape(sizes: Sequence[int]) -> str:
    return ", ".join("N" if size == -1 else str(size) for size in sizes)


def _word(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def builds_view(outcomes: Sequence[Outcome]) -> RenderableType:
    """Return one line an engine, and below it why any failed."""
    rows = []
    for outcome in outcomes:
        sidecar, package = outcome.sidecar, outcome.package
        word = {"built": "OK", "reused": "HERE", "failed": "FAIL"}[outcome.outcome]
        rows.append(
            (
                verdict(word),
                outcome.engine or cell_name(outcome.cell),
                ", ".join(str(p) for p in sidecar.profiles) if sidecar else None,
                bytes_text(sidecar.plan_bytes) if sidecar else None,
                f"{sidecar.build_seconds:.1f}" if sidecar else None,
                bytes_text(sidecar.peak_memory_bytes) if sidecar else None,
                _same_twice(sidecar.reproducible) if sidecar else None,
            )
            if package is None
            else (
                verdict(word),
                package.name,
                str(package.batch),
                bytes_text(package.file_bytes),
                f"{package.build_seconds:.1f}",
                None,
                None,
            )
        )
    right = [Column(name, "right") for name in ("size", "build s", "memory")]
    table = rows_table(["", "engine", "batch", *right, "same twice"], rows)
    failures = [f"{cell_name(o.cell)}: {o.error}" for o in outcomes if o.error is not None]
    return stack(table, notes(failures, "FAIL") if failures else None)


def tuning_view(rows: Sequence[Tuned]) -> RenderableType:
    """Return one line a candidate, the fastest first; those that were not timed come last."""
    ordered = sorted(rows, key=lambda row: row.latency_ms or float("inf"))
    right = [Column(name, "right") for name in ("batch", "ms", "images/s", "SQNR dB ↑")]
    return rows_table(
        ["", Column("candidate", wrap=True), *right, Column("why not", wrap=True)],
        [
            (
                verdict("KEPT" if row.kept else "PASS" if row.passed else "FAIL"),
                row.candidate,
                str(row.batch) if row.batch else None,
                f"{row.latency_ms:.3f}" if row.latency_ms else None,
                f"{row.images_per_s:.0f}" if row.images_per_s else None,
                f"{row.sqnr_db:.1f}" if row.sqnr_db is not None else None,
                row.error,
            )
            for row in ordered
        ],
    )


def _same_twice(reproducible: bool | None) -> str | None:
    """Return whether a second build gave the same bytes; nothing where there was none."""
    return None if reproducible is None else _word(reproducible)


def cell_name(cell: Cell) -> str:
    """Return what an engine that has no name yet is called."""
    return f"{cell.bundle.name} {cell.precision} {cell.target}"


def warnings_text(name: str, warnings: Mapping[str, int]) -> str:
    """Return a line that sums up what TensorRT warned of; the log has the rest."""
    total = sum(warnings.values())
    first = max(warnings, key=lambda text: warnings[text])
    short = first if len(first) <= 160 else first[:157] + "..."
    return f"{name}: {total} warnings; most often: {short} (all of them are in its .log)"
