"""What is known of an engine, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

__all__ = ["builds_view", "cell_name", "engine_tables", "warnings_text"]

MOST_LAYERS = 200


def engine_tables(description: Mapping[str, Any]) -> RenderableType:
    """Return whether an engine runs here, what it is, and its layers where they are known.

    Args:
        description: from :func:`van_deploy.engine.inspect.describe_engine`.
    """
    if "name" not in description:
        return stack(facts_table(_file(description)), _layers(description))
    log = description["build notes"]
    return stack(
        facts_table({"engine": description["name"], **_file(description), **_made(description)}),
        facts_table(_serves(description), "Serves"),
        facts_table(_built(description), "Build"),
        _here(description),
        _layers(description),
        facts_table({"": "\n".join(log)}, "From the build log") if log else None,
    )


def _file(description: Mapping[str, Any]) -> dict[str, object]:
    facts = {
        "file": description["file"],
        "size": bytes_text(description["plan_bytes"]),
        "sha256": description["plan_sha256"],
    }
    if "sidecar" in description:
        facts["sidecar"] = description["sidecar"]
    return facts


def _made(description: Mapping[str, Any]) -> dict[str, object]:
    sound = {True: "yes", False: "NO", None: "not asked: its back end is not here"}
    return {
        "made from": f"{description['onnx_file']} (sha256 {description['onnx_sha256'][:12]})",
        "precision": description["precision"],
        "back end": f"{description['backend']} {description['backend_version']}, "
        f"CUDA {description['cuda'] or 'unknown'}",
        "plan is sound": sound[description["plan is sound"]],
    }


def _serves(description: Mapping[str, Any]) -> dict[str, object]:
    tensors = {
        f"{kind} {entry['name']}": f"{entry['dtype']} ({_shape(entry['shape'])})"
        for kind, entries in (("input", description["inputs"]), ("output", description["outputs"]))
        for entry in entries
    }
    options = description["options"]
    return {
        "GPUs": ", ".join(description["targets"]),
        "batch": ", ".join(_profile(profile) for profile in options["profiles"]),
        **tensors,
        "memory on the GPU": ", ".join(
            f"{name.removesuffix('_bytes')} {bytes_text(size)}"
            for name, size in description["device_memory"].items()
        )
        or None,
    }


def _built(description: Mapping[str, Any]) -> dict[str, object]:
    options = {
        key.replace("_", " "): value
        for key, value in description["options"].items()
        if key not in ("profiles", "targets") and value not in (None, False, "none")
    }
    return {
        "took": f"{description['parse_seconds'] + description['build_seconds']:.1f} s and "
        f"{bytes_text(description['peak_memory_bytes'])}",
        "parser's layers": description["parser_layers"],
        "on": description["built_on"] or "no GPU: its back end needs none to build",
        "options": ", ".join(f"{key} {_word(value)}" for key, value in options.items()) or None,
        "same bytes twice": _word(description["reproducible"]),
        "warnings": "\n".join(f"{n} x {text}" for text, n in description["warnings"].items())
        or None,
        "log": description["log"],
    }


def _here(description: Mapping[str, Any]) -> RenderableType:
    if description["runs here"]:
        return notes(["it runs on this machine"], "YES")
    remedies = " ".join(description["remedies"])
    return notes([f"runs here: {'; '.join(description['why not'])}. {remedies}"], "NO")


def _layers(description: Mapping[str, Any]) -> RenderableType | None:
    layers: Sequence[Mapping[str, Any]] = description["layers"]
    if not layers:
        reason = description["layers skipped"]
        if description.get("why not"):
            reason = "only the engine's own GPU can load it and name them"
        return notes([f"layers: {reason}"], "SKIPPED") if reason else None
    columns = (Column("layer", wrap=True), "kind", "precision", Column("modules", wrap=True))
    rows = [
        (layer["name"], layer["kind"], layer["precision"], ", ".join(layer["nodes"]))
        for layer in layers[:MOST_LAYERS]
    ]
    return rows_table(columns, rows, f"{len(layers)} layers")


def _profile(profile: Mapping[str, int] | str) -> str:
    if isinstance(profile, str):
        return profile
    return f"{profile['min']}:{profile['opt']}:{profile['max']}"


def _shape(sizes: Sequence[int]) -> str:
    return ", ".join("N" if size == -1 else str(size) for size in sizes)


def _word(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def builds_view(outcomes: Sequence[Outcome]) -> RenderableType:
    """Return one line an engine, and below it why any failed."""
    rows = []
    for outcome in outcomes:
        sidecar = outcome.sidecar
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
        )
    right = [Column(name, "right") for name in ("size", "build s", "memory")]
    table = rows_table(["", "engine", "batch", *right, "same twice"], rows)
    failures = [f"{cell_name(o.cell)}: {o.error}" for o in outcomes if o.error is not None]
    return stack(table, notes(failures, "FAIL") if failures else None)


def _same_twice(reproducible: bool | str) -> str | None:
    """Return whether a second build gave the same bytes; nothing where there was none."""
    return {"True": "yes", "False": "no"}.get(str(reproducible))


def cell_name(cell: Cell) -> str:
    """Return what an engine that has no name yet is called."""
    return f"{cell.bundle.name} {cell.precision} {cell.target}"


def warnings_text(name: str, warnings: Mapping[str, int]) -> str:
    """Return a line that sums up what TensorRT warned of; the log has the rest."""
    total = sum(warnings.values())
    first = max(warnings, key=lambda text: warnings[text])
    short = first if len(first) <= 160 else first[:157] + "..."
    return f"{name}: {total} warnings; most often: {short} (all of them are in its .log)"
