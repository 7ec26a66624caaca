"""Blocks that describe networks, bundles, ONNX files, engines and machines."""

import math
from collections.abc import Iterator, Mapping, Sequence

from van_deploy.documents import limit_lines
from van_deploy.report import document as doc
from van_deploy.report.document import Block, Entry, checks_table, notices, properties, table
from van_deploy.report.sections_checks import evaluate_blocks, quantize_blocks, verify_blocks

BATCHES = "batch d; SQNR dB ↑ = sqnr_db .1f; batch invariance dB ↑ = invariance_db .1f"
MAX_LAYERS, MAX_PROBLEMS = 200, 20  # in the text; --json has all
HUB_OWNER = "Visual-Attention-Network"


def model_properties(manifest: Entry) -> list[Block]:
    """Return the architecture, the source of the weights, and the batch and image sizes."""
    return properties(
        manifest,
        "model = name; weights = weights.path; weights.format; weights.seed; weights.sha256; "
        "widths = architecture.embed_dims; architecture.depths; "
        "large kernels = architecture.lka_kernels; parameters count; "
        "classes = architecture.num_classes; class_names; "
        "feature maps of stages (from 0) = architecture.out_indices; batch; image sizes = sizes",
    )


def preprocessing_properties(values: Entry) -> list[Block]:
    """Return the preprocessing of images."""
    return properties(
        values,
        "image_size size; resized to = resize_size size; resized side = crop_mode; "
        "filter = interpolation; crop ratio = crop_pct; mean (of 0..1) = mean; "
        "standard deviation = std; preprocessing from = source",
    )


def export_check_rows(checks: Entry) -> Iterator[tuple[str | bool, str, str]]:
    """Yield outcome, name and measurement of rewriting, simplification and agreement."""
    if fold := checks.get("fold"):
        message = (
            "{batchnorms_folded} BatchNorms folded, {batchnorms_left} left; {layer_scales_folded} "
            "layer scales folded, {multiplies_left} multiplies left; float64 relative error "
        ).format(**fold)
        error, limit = float(fold["relative_error_float64"]), fold["tolerance"]
        yield fold["passed"], "rewriting", f"{message}{error:.1e} (at most {limit:.0e})"
    if simplify := checks.get("simplify"):
        error = simplify["relative_error"]
        message = "{nodes_before} nodes to {nodes_after}: {reason}".format(**simplify)
        if removed := simplify["removed"]:
            message += f" (removed {doc.format_value(removed, '')})"
        message += "" if error is None else f", relative error {float(error):.1e}"
        state = "SKIPPED" if error is None else "PASS" if simplify["changed"] else "KEPT"
        yield state, "simplification", message
    if agreement := checks.get("agreement"):
        levels = (float(b["sqnr_db"]) for b in agreement["batches"] if b["sqnr_db"] is not None)
        minimum, images = min(levels, default=float("nan")), agreement["images"]
        message = f"at least {minimum:.1f} dB at {_batches_text(agreement)}: ONNX Runtime against"
        yield agreement["outcome"], "FP32 agreement", f"{message} PyTorch in float64; {images}"
    for name, embedded in checks.items():
        if name.startswith("embedded "):
            difference = max(row["difference"] for row in embedded["batches"])
            limit = f"(at most {embedded['limit']:.0e}) from {embedded['base']}"
            at = _batches_text(embedded)
            yield "PASS", name, f"relative difference {difference:.1e} {limit}, at {at}"


def _batches_text(agreement: Entry) -> str:
    return f"batch {doc.join_values((row['batch'] for row in agreement['batches']), ', ')}"


def artifacts_table(manifest: Entry, sizes: Mapping[str, int]) -> list[Block]:
    """Return a table of the artifacts; ``sizes`` has their sizes in bytes."""
    rows = [
        {**e, "name": name, "size": sizes.get(name), "sha256": e["files"][e["file"]][:12]}
        for name, e in manifest["artifacts"].items()
    ]
    return table(
        rows,
        "artifact = name name; kind name; precision name; file name; graph.nodes d; "
        "layers = engine.parser_layers d; size bytes; sha256 name",
    )


def graph_blocks(artifacts: Entry) -> list[Block]:
    """Return the number of operators of each type in every ONNX file."""
    counts = {n: e["graph"]["operators"] for n, e in artifacts.items() if e["graph"]}
    kinds = dict.fromkeys(kind for own in counts.values() for kind in own)
    rows = [(kind, *(own.get(kind) for own in counts.values())) for kind in kinds]
    columns = "".join(f"; {name} = {index} d" for index, name in enumerate(counts, 1))
    return table(rows, f"operator = 0 name{columns}")


def export_blocks(report: Entry) -> list[Block]:
    """Return the result of an export, and of the precisions created with it."""
    result, manifest = report["export"], report["manifest"]
    duration = f" in {sum(result['seconds'].values()):.1f} s" if result["seconds"] else ""
    verb, checks = "Reused" if result["reused"] else "Wrote", manifest["checks"]
    return [
        *model_properties(manifest),
        *preprocessing_properties(manifest["preprocessing"]),
        *checks_table(export_check_rows(checks)),
        *table(checks["agreement"]["batches"], f"verdict = outcome state; {BATCHES}"),
        *artifacts_table(manifest, {}),
        doc.Paragraph(f"{verb} the bundle {result['bundle']}{duration} ({result['reason']})."),
        *(block for quantized in report["precisions"] for block in quantize_blocks(quantized)),
    ]


def run_blocks(report: Entry) -> list[Block]:
    """Return the artifacts of a run, and the verdicts of its gates."""
    failed = " It does not pass its gate; `van-deploy quantize` shows the reason."
    lines = [f"Exported: {report['export']['reason']}."]
    lines += [
        f"{artifact['artifact']}: {artifact['reason']}.{failed * (not artifact['passed'])}"
        for artifact in report["artifacts"]
    ]
    return [
        *map(doc.Paragraph, lines),
        *verify_blocks(report["verify"], (report["evaluate"] or {}).get("class_names")),
        *(evaluate_blocks(report["evaluate"]) if report["evaluate"] else ()),
        doc.Paragraph(f"The bundle is {report['bundle']}."),
    ]


def info_blocks(info: Entry) -> list[Block]:
    """Return the description of a model, checkpoint or bundle."""
    if info["kind"] != "bundle":
        columns = (
            "model = name; variant; widths = architecture.embed_dims; architecture.depths; "
            "MLP ratios = architecture.mlp_ratios; kernels = architecture.lka_kernels; "
            "dilation = lka_dilation; classes = architecture.num_classes; parameters ,d; "
            "multiply-adds = multiply_adds count; at pixels = multiply_adds_at; "
            "top-1 % (published) = top1_percent; weights; note on weights = weights_note; "
            "on this machine = here; weights file = source.path; source.format; "
            "key in checkpoint = source.container; source.sha256; class_names"
        )
        notes = (info.get("source") or {"notes": ()})["notes"]
        preprocessing = preprocessing_properties(info["preprocessing"])
        return [*properties(info, columns), *preprocessing, *notices("NOTE", notes)]
    manifest, problems = info["manifest"], info["problems"]
    messages = limit_lines(problems, MAX_PROBLEMS) or ["all files match the manifest"]
    return [
        *doc.key_values({"bundle": info["path"], "written": manifest["written"]}),
        *model_properties(manifest),
        *preprocessing_properties(manifest["preprocessing"]),
        *checks_table(export_check_rows(manifest["checks"])),
        *artifacts_table(manifest, info["sizes"]),
        *notices("FAIL" if problems else "PASS", messages),
        *notices("NOTE", manifest["weights"]["notes"]),
        *doc.key_values(manifest["versions"], "Made with"),
    ]


def list_blocks(variants: Sequence[Entry]) -> list[Block]:
    """Return a table of the variants, and remarks on the variants and columns."""
    rows, weights = [], {None: "see below", "embedded": "in this package"}
    for item in variants:
        repository = str(item["weights"]).removeprefix(f"{HUB_OWNER}/")
        here = "YES" if item["here"] else None
        rows.append({**item, "here": here, "weights": weights.get(item["weights"], repository)})
    remarks = {
        **{item["name"]: item["note"] for item in variants},
        "mult-adds": "multiply-adds of one square image with sides of px pixels",
        "top-1": f"{variants[0]['top1_on']}, as published; van_digits: {variants[-1]['top1_on']}",
        "weights": f"files in repositories of https://huggingface.co/{HUB_OWNER}",
        "licence": "The public weights are Apache-2.0; their authors add: "
        '"for commercial use, please contact the authors".',
    }
    columns = (
        "variant = name name; params = parameters count; mult-adds = multiply_adds count; "
        "px = image_size d; top-1 % = top1_percent .1f; here state; weights"
    )
    return [*table(rows, columns), *doc.key_values(remarks)]


def predictions_blocks(predictions: Entry) -> list[Block]:
    """Return a table of the images with their top classes, or the reason of a failure."""
    rows = []
    for prediction in predictions["predictions"]:
        first, *others = prediction["top"] or [None]
        text = ", ".join(f"{c['name']} {c['probability']:.1%}" for c in others)
        state = "FAIL" if prediction["error"] else None
        rows.append((state, prediction["source"], first, prediction["error"] or text))
    columns = "verdict = 0 state; image = 1; class = 2.name name; 2.probability .1%; next = 3"
    return table(rows, columns)


# --- artifacts and machines --------------------------------------------------------------------


def inspect_blocks(descriptions: Sequence[Entry]) -> list[Block]:
    """Return the description of each artifact."""
    blocks = list[Block]()
    for one in descriptions:
        blocks += _onnx_blocks(one) if one["kind"] == "onnx" else _engine_blocks(one)
    return blocks


def _onnx_blocks(one: Entry) -> list[Block]:
    graph, named = one["graph"], {}
    for way in ("inputs", "outputs"):
        named[way] = [{"name": name, **tensor} for name, tensor in graph[way].items()]
    return [
        *properties(
            one,
            "file; size = bytes bytes; written by = producer; graph.opset; "
            "IR version = graph.ir_version; weights in = external_files",
        ),
        *_tensors_table(named),
        *table(one["weights"].items(), "weights = 0 name; 1.values ,d; size = 1.bytes bytes"),
        *table([*graph["operators"].items(), ("all", graph["nodes"])], "operator = 0; nodes = 1 d"),
        *doc.key_values(one["metadata"], "Metadata"),
    ]


def _tensors_table(named: Entry) -> list[Block]:
    """Return a table of ``inputs`` and ``outputs``; a dynamic length is ``N``."""
    rows = [
        {**tensor, "tensor": way[:-1], "shape": ["N" if n == -1 else n for n in tensor["shape"]]}
        for way in ("inputs", "outputs")
        for tensor in named.get(way, ())
    ]
    return table(rows, "tensor name; name name; type = dtype name; shape")


def _engine_blocks(one: Entry) -> list[Block]:
    """Return the facts of an engine or a package, whether it runs here, and its layers."""
    file = "file; size = plan_bytes bytes; sha256 = plan_sha256"
    sidecar, layers = one["sidecar"], one.get("layers") or ()
    columns, title = "layer = name; kind name; precision name; nodes", f"{len(layers)} layers"
    layer_table = table(layers[:MAX_LAYERS], columns, title)
    if sidecar is None:
        warning = notices("WARNING", ["it has no sidecar: the origin of this plan is unknown"])
        skipped = [f"layers: {one['layers_skipped']}"] * bool(one["layers_skipped"])
        return [*properties(one, file), *warning, *(layer_table or notices("SKIPPED", skipped))]
    options = sidecar.get("options", {}).items()
    options = {key: v for key, v in options if v is not False and v not in (None, "none")}
    build = {**one, **sidecar, "options": options, "log": one.get("log")}
    here = "it runs on this machine"
    if one["obstacles"]:
        problems = "; ".join(obstacle["problem"] for obstacle in one["obstacles"])
        remedies = dict.fromkeys(obstacle["remedy"] for obstacle in one["obstacles"])
        here = f"runs here: {problems}. {' '.join(remedies)}"
    obstacle = "only the engine's own GPU can load it and list them" * bool(one["obstacles"])
    reason = (obstacle or one["layers_skipped"]) if "layers_skipped" in one else ""
    return [
        *properties(
            one,
            f"name = sidecar.name; {file}; size = sidecar.file_bytes bytes; "
            "sha256 = sidecar.file_sha256; built from = sidecar.onnx_file; "
            "ONNX sha256 = sidecar.onnx_sha256; sidecar.precision; sidecar.backend; "
            "version = sidecar.backend_version; PyTorch = sidecar.torch; CUDA = sidecar.cuda",
        ),
        *properties(
            sidecar,
            "runs on = targets; CPU features = cpu_features; batch; batch = options.profiles; "
            "input = input_shape; memory on the GPU = device_memory",
            "Serves",
        ),
        *_tensors_table(sidecar),
        *properties(
            {**build, "notes": "\n".join(one.get("build_notes", ()))},
            "parsed in s = parse_seconds .1f; built in s = build_seconds .1f; "
            "peak memory = peak_memory_bytes bytes; parser's layers = parser_layers; "
            "built on = built_on; options; max_autotune; tf32; warnings; log; log messages = notes",
            "Build",
        ),
        *notices("NO" if one["obstacles"] else "YES", [here]),
        *(layer_table or notices("SKIPPED", [f"layers: {reason}"] * bool(reason))),
    ]


def build_blocks(report: Entry) -> list[Block]:
    """Return the tuning candidates, a table of the engines, and the failures."""
    states = {"built": "OK", "reused": "HERE", "failed": "FAIL"}
    bundles = {one["cell"]["bundle"] for one in report["outcomes"]}
    rows, failed, replaced = [], [], []
    for one in report["outcomes"]:
        record, name = one["sidecar"] or one["package"] or {}, cell_name(one["cell"])
        size = record.get("plan_bytes", record.get("file_bytes"))
        batch = record["options"]["profiles"] if one["sidecar"] else record.get("batch")
        row = {"state": states[one["outcome"]], "name": one["engine"] or name}
        bundle = one["cell"]["bundle"] if len(bundles) > 1 else None
        rows.append({**record, **row, "bundle": bundle, "size": size, "batch": batch})
        if one["replaced"]:
            replaced.append(f"{one['engine']} replaced the one with {one['replaced']}")
        if one["error"]:
            failed.append(f"{name}: {one['error']['message']} {one['error']['remedy']}")
    tuned = [
        {**one, "state": "SELECTED" if one["selected"] else doc.state_text(one["passed"])}
        for one in sorted(report["tuned"], key=lambda one: one["latency_ms"] or math.inf)
    ]
    return [
        *table(
            tuned,
            "state state; candidate; batch d; ms = latency_ms .3f; images/s = images_per_s .0f; "
            "SQNR dB ↑ = sqnr_db .1f; reason = error",
        ),
        *table(
            rows,
            "state state; bundle name; engine = name name; batch name; size bytes; "
            "build s = build_seconds .1f; memory = peak_memory_bytes bytes",
        ),
        *notices("WARNING", replaced),
        *notices("FAIL", failed),
    ]


def cell_name(cell: Entry) -> str:
    """Return a name for an engine that is not built yet."""
    bundle = cell["bundle"].rstrip("/").rpartition("/")[2]
    return f"{bundle} {cell['precision']} {'+'.join(cell['targets'])}"


def environment_blocks(environment: Entry) -> list[Block]:
    """Return the machine, its GPUs and packages, the available tasks, and version conflicts."""
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
    tasks = environment["abilities"].items()
    rows = [("NO" if obstacle else "YES", task, obstacle) for task, obstacle in tasks]
    return [
        *properties(
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
        *table(packages, "state state; package = name name; version name; needed for = enables"),
        *table(rows, "available = 0 state; task = 1 name; reason = 2.problem"),
        *table((one for one in packages if one["state"] != "OK"), "missing = name name; run"),
        *notices("WARNING", (f"{c['problem']}.\n{c['remedy']}" for c in environment["clashes"])),
    ]
