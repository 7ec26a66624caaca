"""What is known of engines, and what this machine can do, as blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from van_deploy.report.document import Block, Entry, Facts, Notice, notices, table
from van_deploy.report.figures import bytes_text, listed, shown, state_of
from van_deploy.report.sections_model import onnx_blocks, tensors

if TYPE_CHECKING:
    from van_deploy.engine.fleet import Cell

__all__ = [
    "artefacts_blocks",
    "builds_blocks",
    "cell_name",
    "environment_blocks",
    "warnings_text",
]

MOST_LAYERS, LONGEST_WARNING = 200, 160


def artefacts_blocks(descriptions: Sequence[Entry]) -> list[Block]:
    """Return what is in each artifact."""
    return [block for one in descriptions for block in KINDS[one["kind"]](one)]


def _engine(one: Entry) -> list[Block]:
    """Return whether an engine runs here, what it is, and its layers where they are known."""
    sidecar, log = one["sidecar"], "\n".join(one["build_notes"])
    file = {
        "file": one["file"],
        "size": bytes_text(one["plan_bytes"]),
        "sha256": one["plan_sha256"],
        "sidecar": None if sidecar else "none: nothing says where this plan comes from",
    }
    if sidecar is None:
        return [Facts(file), *_layers(one)]
    sound = {True: "yes", False: "NO", None: "not asked: its backend is not here"}
    made = {
        "made from": f"{sidecar['onnx_file']} (sha256 {sidecar['onnx_sha256'][:12]})",
        "precision": sidecar["precision"],
        "backend": f"{sidecar['backend']} {sidecar['backend_version']}, "
        f"CUDA {sidecar['cuda'] or 'unknown'}",
        "plan is sound": sound[one["plan_is_sound"]],
    }
    return [
        Facts({"engine": sidecar["name"], **file, **made}),
        Facts(_serves(sidecar), "Serves"),
        Facts({**_built(sidecar), "log": one["log"]}, "Build"),
        _here(one["obstacles"]),
        *_layers(one),
        *([Facts({"": log}, "From the build log")] if log else ()),
    ]


def _package(one: Entry) -> list[Block]:
    """Return what a package of PyTorch's Inductor is, and whether it runs here."""
    sidecar = one["sidecar"]
    options = ["max-autotune"] * sidecar["max_autotune"] + ["TF32"] * sidecar["tf32"]
    facts = {
        "package": sidecar["name"],
        "file": one["file"],
        "size": bytes_text(sidecar["file_bytes"]),
        "sha256": sidecar["file_sha256"],
        "compiled from": f"{sidecar['onnx_file']} in {sidecar['precision']}",
        "by": f"PyTorch {sidecar['torch']} in {sidecar['build_seconds']:.1f} s, "
        f"on {sidecar['built_on']}",
        "serves": ", ".join((*sidecar["targets"], *sidecar["cpu_features"])),
        "batch": _batch(sidecar["batch"]),
        **tensors("input", {"images": {"dtype": "float32", "shape": sidecar["input_shape"]}}),
        "options": ", ".join(options),
    }
    return [Facts(facts), _here(one["obstacles"])]


KINDS: Mapping[str, Callable[[Entry], list[Block]]] = {
    "onnx": onnx_blocks,
    "engine": _engine,
    "package": _package,
}


def _batch(batch: Entry) -> str:
    return "{min}:{opt}:{max}".format(**batch)


def _serves(sidecar: Entry) -> dict[str, object]:
    memory = (
        f"{name.removesuffix('_bytes')} {bytes_text(size)}"
        for name, size in sidecar["device_memory"].items()
    )
    return {
        "GPUs": ", ".join(sidecar["targets"]),
        "batch": ", ".join(sidecar["options"]["profiles"]),
        **tensors("input", {tensor["name"]: tensor for tensor in sidecar["inputs"]}),
        **tensors("output", {tensor["name"]: tensor for tensor in sidecar["outputs"]}),
        "memory on the GPU": ", ".join(memory),
    }


def _built(sidecar: Entry) -> dict[str, object]:
    options = (
        f"{key.replace('_', ' ')} {shown(value, '')}"
        for key, value in sidecar["options"].items()
        if key not in ("profiles", "targets") and value not in (None, False, "none")
    )
    same = sidecar["reproducible"]
    return {
        "took": f"{sidecar['parse_seconds'] + sidecar['build_seconds']:.1f} s and "
        f"{bytes_text(sidecar['peak_memory_bytes'])}",
        "parser's layers": sidecar["parser_layers"],
        "on": sidecar["built_on"] or "no GPU: its backend needs none to build",
        "options": ", ".join(options),
        "same bytes twice": "not checked" if same is None else same,
        "warnings": "\n".join(f"{n} x {text}" for text, n in sidecar["warnings"].items()),
    }


def _here(obstacles: Sequence[Entry]) -> Notice:
    if not obstacles:
        return Notice("YES", "it runs on this machine")
    problems = "; ".join(obstacle["problem"] for obstacle in obstacles)
    remedies = " ".join(dict.fromkeys(obstacle["remedy"] for obstacle in obstacles))
    return Notice("NO", f"runs here: {problems}. {remedies}")


def _layers(one: Entry) -> list[Block]:
    if not one["layers"]:
        reason = one["layers_skipped"]
        if one["obstacles"]:
            reason = "only the engine's own GPU can load it and name them"
        return [Notice("SKIPPED", f"layers: {reason}")] if reason else []
    rows = [{**layer, "of": ", ".join(layer["nodes"])} for layer in one["layers"][:MOST_LAYERS]]
    columns = "layer = name; kind = kind name; precision = precision name; modules = of"
    return table(rows, columns, f"{len(one['layers'])} layers")


def builds_blocks(report: Entry) -> list[Block]:
    """Return one line an engine, and below it why any failed."""
    words = {"built": "OK", "reused": "HERE", "failed": "FAIL"}
    rows = []
    for one in report["outcomes"]:
        name, made = one["engine"] or _cell(one["cell"]), one["sidecar"]
        if made:
            made = {**made, "batch": made["options"]["profiles"], "bytes": made["plan_bytes"]}
        elif one["package"]:
            made, name = one["package"], one["package"]["name"]
            made = {**made, "batch": _batch(made["batch"]), "bytes": made["file_bytes"]}
        rows.append({"state": words[one["outcome"]], "name": name, "made": made})
    failed = [
        f"{_cell(one['cell'])}: {one['error']['message']} {one['error']['remedy']}"
        for one in report["outcomes"]
        if one["error"]
    ]
    columns = (
        "state = state state; engine = name name; batch = made.batch name; "
        "size = made.bytes bytes; build s = made.build_seconds .1f; "
        "memory = made.peak_memory_bytes bytes; same twice = made.reproducible name"
    )
    tuned = [
        {**one, "state": "KEPT" if one["kept"] else state_of(one["passed"])}
        for one in sorted(report["tuned"], key=lambda one: one["latency_ms"] or math.inf)
    ]
    return [
        *table(
            tuned,
            "state = state state; candidate = candidate; batch = batch d; ms = latency_ms .3f; "
            "images/s = images_per_s .0f; SQNR dB ↑ = sqnr_db .1f; why not = error",
        ),
        *table(rows, columns),
        *notices("FAIL", failed),
    ]


def _cell(cell: Entry) -> str:
    bundle = cell["bundle"].rstrip("/").rpartition("/")[2]
    return f"{bundle} {cell['precision']} {'+'.join(cell['targets'])}"


def cell_name(cell: Cell) -> str:
    """Return what an engine that has no name yet is called."""
    return f"{cell.bundle.name} {cell.precision} {cell.target}"


def warnings_text(name: str, warnings: Mapping[str, int]) -> str:
    """Return a line that sums up what TensorRT warned of; the log has the rest."""
    first = max(warnings, key=lambda text: warnings[text])
    short = first if len(first) <= LONGEST_WARNING else first[: LONGEST_WARNING - 3] + "..."
    total = sum(warnings.values())
    return f"{name}: {total} warnings; most often: {short} (all of them are in its .log)"


# --- doctor ------------------------------------------------------------------------------------


def environment_blocks(diagnosis: Entry) -> list[Block]:
    """Return the machine, the packages, what can be done here, and what clashes."""
    from van_deploy.environment.packages import canonical_name, pip_command

    environment = diagnosis["environment"]
    packages = []
    for item in environment["components"]:
        component, version, fault = item["component"], item["version"], item["fault"]
        usual = item["distribution"] == canonical_name(component["install"])
        packages.append(
            {
                "state": "FAIL" if fault else "MISSING" if version is None else "OK",
                "version": version
                if usual or not version
                else f"{version} ({item['distribution']})",
                "run": fault or f"{pip_command()} install {component['install']}",
                "of": component,
            }
        )
    able = [{**one, "here": "NO" if one["shortfall"] else "YES"} for one in diagnosis["abilities"]]
    missing = [one for one in packages if one["state"] != "OK"]
    return [
        Facts(_machine(environment)),
        *table(
            packages,
            "state = state state; package = of.name name; version = version name; "
            "is there for = of.enables",
        ),
        *table(able, "here = here state; task = task name; because = shortfall.problem"),
        *table(missing, "to have = of.name name; run = run"),
        *notices("WARNING", (f"{c['message']}\n{c['remedy']}" for c in environment["clashes"])),
    ]


def _machine(environment: Entry) -> dict[str, Any]:
    cpu, memory, disk = environment["cpu"], environment["memory"], environment["disk"]
    total, free = (
        "unknown" if memory[key] is None else bytes_text(memory[key])
        for key in ("total_bytes", "available_bytes")
    )
    return {
        "van-deploy": environment["van_deploy"],
        "Python": f"{environment['python']} on {environment['system']}",
        "CPU": f"{cpu['name']}, {cpu['cores_allowed']} of {cpu['cores']} cores allowed",
        "CPU features": listed(cpu["features"]) or "none of those that speed up inference",
        "memory": f"{total}, {free} free",
        "disk": f"{bytes_text(disk['free_bytes'])} free in {disk['folder']}",
        "GPU": "\n".join(_gpu_lines(environment["driver"])),
        "PyTorch's CUDA": environment["torch_cuda"] or "none",
        "ONNX Runtime's CUDA": environment["onnxruntime_cuda"] or "none",
        "ONNX Runtime": ", ".join(environment["providers"]) or "no providers",
    }


def _gpu_lines(driver: Entry | None) -> Iterator[str]:
    if driver is None:
        yield "none: no NVIDIA driver answers"
        return
    for gpu in driver["gpus"]:
        size, capability = gpu["memory_bytes"], gpu["compute_capability"]
        kind = "SM?" if capability is None else f"SM{listed(capability, '')}"
        yield f"{gpu['name']}, {kind}{'' if size is None else f', {bytes_text(size)}'}"
    if driver["hidden"]:
        yield f"{driver['hidden']} more that CUDA_VISIBLE_DEVICES hides"
    yield f"NVIDIA driver {driver['version']}, CUDA up to {listed(driver['cuda_version'], '.')}"
