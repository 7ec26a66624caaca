"""What networks, bundles, ONNX files, engines and machines are, as blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from van_deploy.report import document as doc
from van_deploy.report import sections_checks as judged
from van_deploy.report.document import Block, Entry, checks_table, notices, properties, table

BATCHES = "batch d; SQNR dB ↑ = sqnr_db .1f; batch invariance dB ↑ = invariance_db .1f"
MOST_LAYERS = 200
MOST_PROBLEMS = 20  # told one by one; --json has them all
HUB_OWNER = "Visual-Attention-Network"


def model_facts(manifest: Entry) -> list[Block]:
    """Return what the network is, where its weights come from, and the batches it is made for."""
    return properties(
        manifest,
        "model = name; weights = weights.path; weights.format; weights.seed; weights.sha256; "
        "widths = architecture.embed_dims; architecture.depths; "
        "large kernels = architecture.lka_kernels; parameters count; "
        "classes = architecture.num_classes; class_names; "
        "feature maps of stages (from 0) = architecture.out_indices; batch; image sizes = sizes",
    )


def preprocessing_facts(values: Entry) -> list[Block]:
    """Return what an image goes through before the network."""
    return properties(
        values,
        "image_size size; resized to = resize_size size; resized side = crop_mode; "
        "filter = interpolation; crop ratio = crop_pct; mean (of 0..1) = mean; "
        "standard deviation = std; preprocessing from = source",
    )


def proof_rows(checks: Entry) -> Iterator[tuple[str | bool, str, str]]:
    """Yield outcome, name and measurement of rewriting, simplification and agreement."""
    if fold := checks.get("fold"):
        said = (
            "{batchnorms_folded} BatchNorms folded, {batchnorms_left} left; {layer_scales_folded} "
            "layer scales folded, {multiplies_kept} multiplies kept; float64 relative error "
        ).format(**fold)
        error, most = float(fold["relative_error_float64"]), fold["tolerance"]
        yield fold["passed"], "rewriting", f"{said}{error:.1e} (at most {most:.0e})"
    if simple := checks.get("simplify"):
        error = simple["relative_error"]
        said = "{nodes_before} nodes to {nodes_after}: {reason}".format(**simple)
        said += f" (removed {doc.format_value(simple['removed'], '')})" * bool(simple["removed"])
        said += "" if error is None else f", relative error {float(error):.1e}"
        state = "SKIPPED" if error is None else "PASS" if simple["changed"] else "KEPT"
        yield state, "simplification", said
    if agreement := checks.get("agreement"):
        levels = (float(b["sqnr_db"]) for b in agreement["batches"] if b["sqnr_db"] is not None)
        least = min(levels, default=float("nan"))
        said = f"at least {least:.1f} dB at {_batches(agreement)}: ONNX Runtime against"
        images = agreement["images"]
        yield agreement["outcome"], "FP32 agreement", f"{said} PyTorch in float64; {images}"
    for name, embedded in checks.items():
        if name.startswith("embedded "):
            most = max(row["difference"] for row in embedded["batches"])
            allowed = f"(at most {embedded['limit']:.0e}) from {embedded['base']}"
            said = f"relative difference {most:.1e} {allowed}, at {_batches(embedded)}"
            yield "PASS", name, said


def _batches(agreement: Entry) -> str:
    return f"batch {doc.join_values((row['batch'] for row in agreement['batches']), ', ')}"


def artifacts_table(manifest: Entry, sizes: Mapping[str, int]) -> list[Block]:
    """Return one line an artifact, with its bytes from ``sizes``."""
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
    """Return how many operators of each kind every ONNX file has."""
    counts = {n: e["graph"]["operators"] for n, e in artifacts.items() if e["graph"]}
    kinds = dict.fromkeys(kind for own in counts.values() for kind in own)
    rows = [(kind, *(own.get(kind) for own in counts.values())) for kind in kinds]
    columns = "".join(f"; {name} = {index} d" for index, name in enumerate(counts, 1))
    return table(rows, f"operator = 0 name{columns}")


def export_blocks(done: Entry) -> list[Block]:
    """Return what was exported, and every precision that was made of it."""
    result, manifest = done["export"], done["manifest"]
    took = f" in {sum(result['seconds'].values()):.1f} s" if result["seconds"] else ""
    made, checks = "Reused" if result["reused"] else "Wrote", manifest["checks"]
    return [
        *model_facts(manifest),
        *preprocessing_facts(manifest["preprocessing"]),
        *checks_table(proof_rows(checks)),
        *table(checks["agreement"]["batches"], f"verdict = outcome state; {BATCHES}"),
        *artifacts_table(manifest, {}),
        doc.Paragraph(f"{made} the bundle {result['bundle']}{took} ({result['reason']})."),
        *(block for other in done["precisions"] for block in judged.quantize_blocks(other)),
    ]


def run_blocks(done: Entry) -> list[Block]:
    """Return everything a run made, and the verdicts of its gates."""
    failed = " It does not hold its gate; `van-deploy quantize` tells why."
    lines = [f"Exported: {done['export']['reason']}."]
    lines += [
        f"{made['artifact']}: {made['reason']}.{failed * (not made['passed'])}"
        for made in done["made"]
    ]
    return [
        *map(doc.Paragraph, lines),
        *judged.verify_blocks(done["verify"], (done["evaluate"] or {}).get("class_names")),
        *(judged.evaluate_blocks(done["evaluate"]) if done["evaluate"] else ()),
        doc.Paragraph(f"The bundle is {done['bundle']}."),
    ]


def info_blocks(described: Entry) -> list[Block]:
    """Return one model, checkpoint or bundle in full."""
    if described["kind"] != "bundle":
        places = (
            "model = name; variant; widths = architecture.embed_dims; architecture.depths; "
            "MLP ratios = architecture.mlp_ratios; kernels = architecture.lka_kernels; "
            "dilation = lka_dilation; classes = architecture.num_classes; parameters ,d; "
            "multiply-adds = multiply_adds count; at pixels = multiply_adds_at; "
            "top-1 % (published) = top1_percent; weights; about them = weights_note; "
            "on this machine = here; weights file = source.path; source.format; "
            "under = source.container; source.sha256; class_names"
        )
        notes = (described.get("source") or {"notes": ()})["notes"]
        preprocessing = preprocessing_facts(described["preprocessing"])
        return [*properties(described, places), *preprocessing, *notices("NOTE", notes)]
    manifest, problems = described["manifest"], described["problems"]
    said = doc.limit_lines(problems, MOST_PROBLEMS) or ["every file is the manifest's"]
    return [
        *doc.key_values({"bundle": described["path"], "written": manifest["written"]}),
        *model_facts(manifest),
        *preprocessing_facts(manifest["preprocessing"]),
        *checks_table(proof_rows(manifest["checks"])),
        *artifacts_table(manifest, described["sizes"]),
        *notices("FAIL" if problems else "PASS", said),
        *notices("NOTE", manifest["weights"]["notes"]),
        *doc.key_values(manifest["versions"], "Made with"),
    ]


def list_blocks(variants: Sequence[Entry]) -> list[Block]:
    """Return one line a variant, and remarks on them and on the columns."""
    rows, weights = [], {None: "see below", "embedded": "in this package"}
    for item in variants:
        place = str(item["weights"]).removeprefix(f"{HUB_OWNER}/")
        here = "YES" if item["here"] else None
        rows.append({**item, "here": here, "weights": weights.get(item["weights"], place)})
    remarks = {
        **{item["name"]: item["note"] for item in variants},
        "mult-adds": "multiply-adds of one square image with sides of so many pixels",
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
    """Return one line an image: its classes, or why it could not be read."""
    rows = []
    for answer in predictions["predictions"]:
        first, *others = answer["top"] or [None]
        then = ", ".join(f"{c['name']} {c['probability']:.1%}" for c in others)
        state = "FAIL" if answer["error"] else None
        rows.append((state, answer["source"], first, answer["error"] or then))
    columns = "verdict = 0 state; image = 1; class = 2.name name; 2.probability .1%; then = 3"
    return table(rows, columns)


# --- artifacts and machines --------------------------------------------------------------------


def inspect_blocks(descriptions: Sequence[Entry]) -> list[Block]:
    """Return what is in each artifact."""
    blocks = (_onnx(one) if one["kind"] == "onnx" else _built(one) for one in descriptions)
    return [block for each in blocks for block in each]


def _onnx(one: Entry) -> list[Block]:
    graph, named = one["graph"], {}
    for way in ("inputs", "outputs"):
        named[way] = [{"name": name, **tensor} for name, tensor in graph[way].items()]
    return [
        *properties(
            one,
            "file; size = bytes bytes; written by = producer; graph.opset; "
            "IR version = graph.ir_version; weights in = external_files",
        ),
        *_tensors(named),
        *table(one["weights"].items(), "weights = 0 name; 1.values ,d; size = 1.bytes bytes"),
        *table([*graph["operators"].items(), ("all", graph["nodes"])], "operator = 0; nodes = 1 d"),
        *doc.key_values(one["metadata"], "Metadata"),
    ]


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
        unknown = notices("WARNING", ["it has no sidecar: nothing says where this plan is from"])
        return [*properties(one, file), *unknown, *shown]
    off = (None, False, "none")
    options = {key: v for key, v in sidecar.get("options", {}).items() if v not in off}
    build = {**one, **sidecar, "options": options, "log": one.get("log")}
    here = "it runs on this machine"
    if one["obstacles"]:
        problems = "; ".join(obstacle["problem"] for obstacle in one["obstacles"])
        remedies = dict.fromkeys(obstacle["remedy"] for obstacle in one["obstacles"])
        here = f"runs here: {problems}. {' '.join(remedies)}"
    gone = "only the engine's own GPU can load it and name them" * bool(one["obstacles"])
    reason = (gone or one["layers_skipped"]) if "layers_skipped" in one else ""
    return [
        *properties(
            one,
            f"name = sidecar.name; {file}; size = sidecar.file_bytes bytes; "
            "sha256 = sidecar.file_sha256; made from = sidecar.onnx_file; "
            "of sha256 = sidecar.onnx_sha256; sidecar.precision; sidecar.backend; "
            "version = sidecar.backend_version; by PyTorch = sidecar.torch; CUDA = sidecar.cuda",
        ),
        *properties(
            sidecar,
            "GPUs = targets; CPU features = cpu_features; batch; batch = options.profiles; "
            "input = input_shape; memory on the GPU = device_memory",
            "Serves",
        ),
        *_tensors(sidecar),
        *properties(
            {**build, "notes": "\n".join(one.get("build_notes", ()))},
            "parsed in s = parse_seconds .1f; built in s = build_seconds .1f; "
            "peak memory = peak_memory_bytes bytes; parser's layers = parser_layers; "
            "on = built_on; options; max_autotune; tf32; warnings; log; from the log = notes",
            "Build",
        ),
        *notices("NO" if one["obstacles"] else "YES", [here]),
        *(shown or notices("SKIPPED", [f"layers: {reason}"] * bool(reason))),
    ]


def build_blocks(report: Entry) -> list[Block]:
    """Return one line an engine, below it why any failed, and what was tuned before them."""
    words = {"built": "OK", "reused": "HERE", "failed": "FAIL"}
    rows, failed, bundles = [], [], {one["cell"]["bundle"] for one in report["outcomes"]}
    for one in report["outcomes"]:
        made, name = one["sidecar"] or one["package"] or {}, cell_name(one["cell"])
        size = made.get("plan_bytes", made.get("file_bytes"))
        batch = made["options"]["profiles"] if one["sidecar"] else made.get("batch")
        row = {"state": words[one["outcome"]], "name": one["engine"] or name}
        bundle = one["cell"]["bundle"] if len(bundles) > 1 else None
        rows.append({**made, **row, "bundle": bundle, "size": size, "batch": batch})
        if one["error"]:
            failed.append(f"{name}: {one['error']['message']} {one['error']['remedy']}")
    tuned = [
        {**one, "state": "KEPT" if one["kept"] else doc.state_text(one["passed"])}
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
            "state state; bundle name; engine = name name; batch name; size bytes; "
            "build s = build_seconds .1f; memory = peak_memory_bytes bytes",
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
    tasks = environment["abilities"].items()
    able = [("NO" if lack else "YES", task, lack) for task, lack in tasks]
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
        *table(packages, "state state; package = name name; version name; is there for = enables"),
        *table(able, "here = 0 state; task = 1 name; because = 2.problem"),
        *table((one for one in packages if one["state"] != "OK"), "to have = name name; run"),
        *notices("WARNING", (f"{c['problem']}.\n{c['remedy']}" for c in environment["clashes"])),
    ]
