"""What ONNX files, engines and packages hold, and what this machine can do, as blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from van_deploy.report import document as doc
from van_deploy.report.document import Block, Entry, facts, notices, table

MOST_LAYERS = 200


def artefacts_blocks(descriptions: Sequence[Entry]) -> list[Block]:
    """Return what is in each artifact."""
    blocks = (_onnx(one) if one["kind"] == "onnx" else _built(one) for one in descriptions)
    return [block for each in blocks for block in each]


def _onnx(one: Entry) -> list[Block]:
    graph = one["graph"]
    return [
        *facts(
            one,
            "file; size = bytes bytes; written by = producer; graph.opset; "
            "IR version = graph.ir_version; weights in = external_files",
        ),
        *_tensors({way: _named(graph[way]) for way in ("inputs", "outputs")}),
        *table(_named(one["weights"]), "weights = name name; values ,d; size = bytes bytes"),
        *table([*graph["operators"].items(), ("all", graph["nodes"])], "operator = 0; nodes = 1 d"),
        *[doc.Facts(one["metadata"], "Metadata")] * bool(one["metadata"]),
    ]


def _named(entries: Entry) -> list[Entry]:
    return [{"name": name, **entry} for name, entry in entries.items()]


def _tensors(named: Entry) -> list[Block]:
    """Return a row each of ``inputs`` and ``outputs``; a free length is ``N``."""
    rows = [
        {**tensor, "tensor": way[:-1], "shape": ["N" if n == -1 else n for n in tensor["shape"]]}
        for way in ("inputs", "outputs")
        for tensor in named.get(way, ())
    ]
    return table(rows, "tensor name; name name; type = dtype name; shape")


def _built(one: Entry) -> list[Block]:
    """Return what an engine or a package is, whether it runs here, and its layers if known."""
    file = "file; size = plan_bytes bytes; sha256 = plan_sha256"
    sidecar, layers = one["sidecar"], one.get("layers") or ()
    said = f"{len(layers)} layers"
    shown = table(layers[:MOST_LAYERS], "layer = name; kind name; precision name; nodes", said)
    if sidecar is None:
        unknown = doc.Notice("WARNING", "it has no sidecar: nothing says where this plan is from")
        return [*facts(one, file), unknown, *shown]
    off = (None, False, "none")
    options = {key: v for key, v in sidecar.get("options", {}).items() if v not in off}
    build = {**one, **sidecar, "options": options, "log": one.get("log")}
    gone = "only the engine's own GPU can load it and name them" * bool(one["obstacles"])
    reason = (gone or one["layers_skipped"]) if "layers_skipped" in one else ""
    return [
        *facts(
            one,
            f"name = sidecar.name; {file}; size = sidecar.file_bytes bytes; "
            "sha256 = sidecar.file_sha256; made from = sidecar.onnx_file; "
            "of sha256 = sidecar.onnx_sha256; sidecar.precision; sidecar.backend; "
            "version = sidecar.backend_version; by PyTorch = sidecar.torch; CUDA = sidecar.cuda",
        ),
        *facts(
            sidecar,
            "GPUs = targets; CPU features = cpu_features; batch; batch = options.profiles; "
            "input = input_shape; memory on the GPU = device_memory",
            "Serves",
        ),
        *_tensors(sidecar),
        *facts(
            {**build, "notes": "\n".join(one.get("build_notes", ()))},
            "parsed in s = parse_seconds .1f; built in s = build_seconds .1f; "
            "peak memory = peak_memory_bytes bytes; parser's layers = parser_layers; "
            "on = built_on; options; max_autotune; tf32; warnings; log; from the log = notes",
            "Build",
        ),
        _here(one["obstacles"]),
        *(shown or notices("SKIPPED", [f"layers: {reason}"] * bool(reason))),
    ]


def _here(obstacles: Sequence[Entry]) -> Block:
    if not obstacles:
        return doc.Notice("YES", "it runs on this machine")
    problems = "; ".join(obstacle["problem"] for obstacle in obstacles)
    remedies = " ".join(dict.fromkeys(obstacle["remedy"] for obstacle in obstacles))
    return doc.Notice("NO", f"runs here: {problems}. {remedies}")


def builds_blocks(report: Entry) -> list[Block]:
    """Return one line an engine, below it why any failed, and what was tuned before them."""
    words = {"built": "OK", "reused": "HERE", "failed": "FAIL"}
    rows, failed = [], []
    for one in report["outcomes"]:
        made, name = one["sidecar"] or one["package"] or {}, cell_name(one["cell"])
        row = {
            "state": words[one["outcome"]],
            "name": one["engine"] or name,
            "size": made.get("plan_bytes", made.get("file_bytes")),
            "batch": made["options"]["profiles"] if one["sidecar"] else made.get("batch"),
        }
        rows.append({**made, **row})
        if one["error"]:
            failed.append(f"{name}: {one['error']['message']} {one['error']['remedy']}")
    tuned = [
        {**one, "state": "KEPT" if one["kept"] else doc.state_of(one["passed"])}
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
            "state state; engine = name name; batch name; size bytes; build s = build_seconds .1f; "
            "memory = peak_memory_bytes bytes",
        ),
        *notices("FAIL", failed),
    ]


def cell_name(cell: Entry) -> str:
    """Return what an engine that has no name yet is called."""
    bundle = cell["bundle"].rstrip("/").rpartition("/")[2]
    return f"{bundle} {cell['precision']} {'+'.join(cell['targets'])}"


def environment_blocks(environment: Entry) -> list[Block]:
    """Return the machine, the packages, what can be done here, and what clashes."""
    from packaging.utils import canonicalize_name

    from van_deploy.environment.packages import pip_command

    driver, packages = environment["driver"] or {"gpus": ()}, []
    for item in environment["components"]:
        version, fault = item["version"], item["fault"]
        if version and item["distribution"] != canonicalize_name(item["install"]):
            version = f"{version} ({item['distribution']})"
        state = "FAIL" if fault else "MISSING" if version is None else "OK"
        run = fault or f"{pip_command()} install {item['install']}"
        packages.append({**item, "state": state, "version": version, "run": run})
    able = [
        {"here": "NO" if lack else "YES", "task": task, "shortfall": lack}
        for task, lack in environment["abilities"].items()
    ]
    return [
        *facts(
            environment,
            "van-deploy = van_deploy; Python = python; system; CPU = cpu.name; "
            "cores = cpu.cores; cpu.cores_allowed; CPU features = cpu.features; "
            "memory = memory.total_bytes bytes; memory free = memory.available_bytes bytes; "
            "NVIDIA driver = driver.version; CUDA up to = driver.cuda_version dotted; "
            "hidden by CUDA_VISIBLE_DEVICES = driver.hidden; PyTorch's CUDA = torch_cuda; "
            "ONNX Runtime's CUDA = onnxruntime_cuda; ONNX Runtime = providers",
        ),
        *table(
            driver["gpus"],
            "GPU = name name; compute_capability dotted; memory = memory_bytes bytes",
        ),
        *table(packages, "state state; package = name name; version name; is there for = enables"),
        *table(able, "here state; task name; because = shortfall.problem"),
        *table((one for one in packages if one["state"] != "OK"), "to have = name name; run"),
        *notices("WARNING", (f"{c['problem']}.\n{c['remedy']}" for c in environment["clashes"])),
    ]
