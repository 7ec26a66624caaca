"""What networks, bundles and their ONNX files are, as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from van_deploy.report import document as doc
from van_deploy.report import sections_checks as judged
from van_deploy.report.document import Block, Entry, checks_table, facts, notices, table

MOST_PROBLEMS = 20  # told one by one; --json has them all
HUB_OWNER = "Visual-Attention-Network"


def model_facts(manifest: Entry) -> list[Block]:
    """Return what the network is, where its weights come from, and the batches it is made for."""
    return facts(
        manifest,
        "model = name; weights = weights.path; weights.format; weights.seed; weights.sha256; "
        "widths = architecture.embed_dims; architecture.depths; "
        "large kernels = architecture.lka_kernels; parameters count; "
        "classes = architecture.num_classes; class_names; "
        "feature maps of stages (from 0) = architecture.out_indices; batch; image sizes = sizes",
    )


def preprocessing_facts(values: Entry) -> list[Block]:
    """Return what an image goes through before the network."""
    return facts(
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
        said += f" (removed {doc.shown(simple['removed'], '')})" * bool(simple["removed"])
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
    return f"batch {doc.listed((row['batch'] for row in agreement['batches']), ', ')}"


def artefacts_table(manifest: Entry, sizes: Mapping[str, int]) -> list[Block]:
    """Return one line an artifact, with its bytes from ``sizes``."""
    rows = [
        {**e, "name": name, "size": sizes.get(name), "sha256": e["files"][e["file"]][:12]}
        for name, e in manifest["artefacts"].items()
    ]
    return table(
        rows,
        "artifact = name name; kind name; precision name; file name; graph.nodes d; "
        "layers = engine.parser_layers d; size bytes; sha256 name",
    )


def graph_blocks(artefacts: Entry) -> list[Block]:
    """Return how many operators of each kind every ONNX file has."""
    counts = {n: e["graph"]["operators"] for n, e in artefacts.items() if e["graph"]}
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
        *table(checks["agreement"]["batches"], f"verdict = outcome state; {judged.BATCHES}"),
        *artefacts_table(manifest, {}),
        doc.Paragraph(f"{made} the bundle {result['bundle']}{took} ({result['reason']})."),
        *(block for other in done["precisions"] for block in judged.quantized_blocks(other)),
    ]


def run_blocks(done: Entry) -> list[Block]:
    """Return everything a run made, and the verdicts of its gates."""
    failed = " It does not hold its gate; `van-deploy quantize` tells why."
    lines = [f"Exported: {done['export']['reason']}."]
    lines += [
        f"{made['artefact']}: {made['reason']}.{failed * (not made['passed'])}"
        for made in done["made"]
    ]
    return [
        *map(doc.Paragraph, lines),
        *judged.verify_blocks(done["verify"], (done["evaluate"] or {}).get("class_names")),
        *(judged.evaluate_blocks(done["evaluate"]) if done["evaluate"] else ()),
        doc.Paragraph(f"The bundle is {done['bundle']}."),
    ]


def described_blocks(described: Entry) -> list[Block]:
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
        return [*facts(described, places), *preprocessing, *notices("NOTE", notes)]
    manifest, problems = described["manifest"], described["problems"]
    said = doc.most(problems, MOST_PROBLEMS) or ["every file is the manifest's"]
    return [
        doc.Facts({"bundle": described["path"], "written": manifest["written"]}),
        *model_facts(manifest),
        *preprocessing_facts(manifest["preprocessing"]),
        *checks_table(proof_rows(manifest["checks"])),
        *artefacts_table(manifest, described["sizes"]),
        *notices("FAIL" if problems else "PASS", said),
        *notices("NOTE", manifest["weights"]["notes"]),
        doc.Facts(manifest["versions"], "Made with"),
    ]


def listed_blocks(variants: Sequence[Entry]) -> list[Block]:
    """Return one line a variant, and remarks on them and on the columns."""
    rows = [
        {
            **item,
            "here": "YES" if item["here"] else None,
            "weights": {None: "see below", "embedded": "in this package"}.get(
                item["weights"], str(item["weights"]).removeprefix(f"{HUB_OWNER}/")
            ),
        }
        for item in variants
    ]
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
    return [*table(rows, columns), doc.Facts(remarks)]


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
