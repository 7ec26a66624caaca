"""What ONNX files, engines and packages hold, and what this machine can do, as blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from van_deploy.report.document import Block, Entry, Facts, Notice, facts, notices, table
from van_deploy.report.figures import bytes_text, listed, state_of

if TYPE_CHECKING:
    from van_deploy.engine.bundled import Cell

MOST_LAYERS, LONGEST_WARNING = 200, 160


def artefacts_blocks(descriptions: Sequence[Entry]) -> list[Block]:
    """Return what is in each artifact."""
    kinds = {"onnx": _onnx, "engine": _engine, "package": _package}
    return [block for one in descriptions for block in kinds[one["kind"]](one)]


def _onnx(one: Entry) -> list[Block]:
    graph, metadata = one["graph"], one["metadata"]
    weights = [{"weights": kind, **value} for kind, value in one["weights"].items()]
    named = {
        way: [{"name": n, **t} for n, t in graph[way].items()] for way in ("inputs", "outputs")
    }
    return [
        *facts(
            one,
            "file; size = bytes bytes; written by = producer; graph.opset; "
            "IR version = graph.ir_version; weights in = external_files",
        ),
        *_tensors(named),
        *table(weights, "weights name; values ,d; size = bytes bytes"),
        *table([*graph["operators"].items(), ("all", graph["nodes"])], "operator = 0; nodes = 1 d"),
        *([Facts(metadata, "Metadata")] if metadata else ()),
    ]


def _tensors(named: Entry) -> list[Block]:
    """Return a row each of ``inputs`` and ``outputs``; a free length is ``N``."""
    rows = [
        {**tensor, "tensor": way[:-1], "shape": ["N" if n == -1 else n for n in tensor["shape"]]}
        for way in ("inputs", "outputs")
        for tensor in named[way]
    ]
    return table(rows, "tensor name; name name; type = dtype name; shape")


def _engine(one: Entry) -> list[Block]:
    """Return whether an engine runs here, what it is, and its layers where they are known."""
    file = "file; size = plan_bytes bytes; sha256 = plan_sha256"
    sidecar = one["sidecar"]
    if sidecar is None:
        unknown = Notice("WARNING", "it has no sidecar: nothing says where this plan comes from")
        return [*facts(one, file), unknown, *_layers(one)]
    options = {k: v for k, v in sidecar["options"].items() if v not in (None, False, "none")}
    notes = "\n".join(one["build_notes"])
    return [
        *facts(
            one,
            f"engine = sidecar.name; {file}; made from = sidecar.onnx_file; "
            "of sha256 = sidecar.onnx_sha256; sidecar.precision; sidecar.backend; "
            "version = sidecar.backend_version; CUDA = sidecar.cuda",
        ),
        *facts(
            sidecar,
            "GPUs = targets; batch = options.profiles; memory on the GPU = device_memory",
            "Serves",
        ),
        *_tensors(sidecar),
        *facts(
            {**sidecar, "options": options, "log": one["log"], "notes": notes},
            "parsed in s = parse_seconds .1f; built in s = build_seconds .1f; "
            "peak memory = peak_memory_bytes bytes; parser's layers = parser_layers; "
            "on = built_on; options; warnings; log; from the log = notes",
            "Build",
        ),
        _here(one["obstacles"]),
        *_layers(one),
    ]


def _package(one: Entry) -> list[Block]:
    """Return what a package of PyTorch's Inductor is, and whether it runs here."""
    places = (
        "package = sidecar.name; file; size = sidecar.file_bytes bytes; "
        "sha256 = sidecar.file_sha256; compiled from = sidecar.onnx_file; sidecar.precision; "
        "by PyTorch = sidecar.torch; built in s = sidecar.build_seconds .1f; "
        "on = sidecar.built_on; serves = sidecar.targets; CPU features = sidecar.cpu_features; "
        "sidecar.batch; input = sidecar.input_shape; max-autotune = sidecar.max_autotune; "
        "TF32 = sidecar.tf32"
    )
    return [*facts(one, places), _here(one["obstacles"])]


def _here(obstacles: Sequence[Entry]) -> Notice:
    if not obstacles:
        return Notice("YES", "it runs on this machine")
    problems = "; ".join(obstacle["problem"] for obstacle in obstacles)
    remedies = " ".join(dict.fromkeys(obstacle["remedy"] for obstacle in obstacles))
    return Notice("NO", f"runs here: {problems}. {remedies}")


def _layers(one: Entry) -> list[Block]:
    if one["layers"]:
        columns = "layer = name; kind name; precision name; modules = nodes"
        return table(one["layers"][:MOST_LAYERS], columns, f"{len(one['layers'])} layers")
    gone = "only the engine's own GPU can load it and name them" if one["obstacles"] else ""
    reason = gone or one["layers_skipped"]
    return [Notice("SKIPPED", f"layers: {reason}")] if reason else []


def builds_blocks(report: Entry) -> list[Block]:
    """Return one line an engine, below it why any failed, and what was tuned before them."""
    words = {"built": "OK", "reused": "HERE", "failed": "FAIL"}
    rows, failed = [], []
    for one in report["outcomes"]:
        made, cell = one["sidecar"] or one["package"] or {}, one["cell"]
        bundle = cell["bundle"].rstrip("/").rpartition("/")[2]
        name = f"{bundle} {cell['precision']} {'+'.join(cell['targets'])}"
        row = {
            "engine": one["engine"] or made.get("name") or name,
            "state": words[one["outcome"]],
            "size": made.get("plan_bytes", made.get("file_bytes")),
            "batch": made["options"]["profiles"] if one["sidecar"] else made.get("batch"),
        }
        rows.append({**made, **row})
        if one["error"]:
            failed.append(f"{name}: {one['error']['message']} {one['error']['remedy']}")
    tuned = [
        {**one, "state": "KEPT" if one["kept"] else state_of(one["passed"])}
        for one in sorted(report["tuned"], key=lambda one: one["latency_ms"] or math.inf)
    ]
    return [
        *table(
            tuned,
            "state state; candidate; batch d; ms = latency_ms .3f; images/s = images_per_s .0f; "
            "SQNR dB ↑ = sqnr_db .1f; why not = error",
        ),
        *table(
            rows,
            "state state; engine name; batch name; size bytes; build s = build_seconds .1f; "
            "memory = peak_memory_bytes bytes",
        ),
        *notices("FAIL", failed),
    ]


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
    from packaging.utils import canonicalize_name

    from van_deploy.environment.packages import pip_command

    environment, driver = diagnosis["environment"], diagnosis["environment"]["driver"]
    packages = []
    for item in environment["components"]:
        component, version, fault = item["component"], item["version"], item["fault"]
        if version and item["distribution"] != canonicalize_name(component["install"]):
            version = f"{version} ({item['distribution']})"
        state = "FAIL" if fault else "MISSING" if version is None else "OK"
        run = fault or f"{pip_command()} install {component['install']}"
        packages.append({**component, "state": state, "version": version, "run": run})
    able = [{**one, "here": "NO" if one["shortfall"] else "YES"} for one in diagnosis["abilities"]]
    gpus = _gpus(driver) if driver else ["none: no NVIDIA driver answers"]
    return [
        *facts(
            {**environment, "gpus": "\n".join(gpus)},
            "van-deploy = van_deploy; Python = python; system; CPU = cpu.name; "
            "cores = cpu.cores; cpu.cores_allowed; CPU features = cpu.features; "
            "memory = memory.total_bytes bytes; memory free = memory.available_bytes bytes; "
            "disk free = disk.free_bytes bytes; of folder = disk.folder; GPU = gpus; "
            "PyTorch's CUDA = torch_cuda; ONNX Runtime's CUDA = onnxruntime_cuda; "
            "ONNX Runtime = providers",
        ),
        *table(packages, "state state; package = name name; version name; is there for = enables"),
        *table(able, "here state; task name; because = shortfall.problem"),
        *table((one for one in packages if one["state"] != "OK"), "to have = name name; run"),
        *notices("WARNING", (f"{c['message']}\n{c['remedy']}" for c in environment["clashes"])),
    ]


def _gpus(driver: Entry) -> list[str]:
    """Return a line a GPU, and one on the driver."""
    lines = [
        f"{gpu['name']}, SM{listed(gpu['compute_capability'] or '?', '')}, "
        f"{bytes_text(gpu['memory_bytes'] or 0)}"
        for gpu in driver["gpus"]
    ]
    hidden = [f"{driver['hidden']} more that CUDA_VISIBLE_DEVICES hides"] * bool(driver["hidden"])
    newest = listed(driver["cuda_version"], ".")
    return [*lines, *hidden, f"NVIDIA driver {driver['version']}, CUDA up to {newest}"]
