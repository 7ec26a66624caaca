"""What networks, bundles and their ONNX files are, as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from van_deploy.report.document import (
    Block,
    Entry,
    Facts,
    Paragraph,
    Plot,
    checks_table,
    facts,
    notices,
    table,
)
from van_deploy.report.figures import bytes_text, listed, state_of
from van_deploy.report.plots import Axis, Mark, colours, rows_chart
from van_deploy.report.sections_checks import BATCHES, evaluate_blocks, verify_blocks
from van_deploy.report.sections_precision import quantized_blocks

MOST_PROBLEMS = 20  # told one by one; --json has them all
HUB_OWNER = "Visual-Attention-Network"
LICENCE = (
    "The public weights are Apache-2.0; their authors add: "
    '"for commercial use, please contact the authors".'
)


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


def proof_rows(checks: Entry) -> Iterator[tuple[str, str, str]]:
    """Yield state, name and measurement of rewriting, simplification and agreement."""
    if fold := checks.get("fold"):
        kept = f", {fold['multiplies_kept']} multiplies kept" if fold["multiplies_kept"] else ""
        detail = (
            f"{fold['batchnorms_folded']} BatchNorms folded, {fold['batchnorms_left']} left; "
            f"{fold['layer_scales_folded']} layer scales folded{kept}; float64 relative error "
            f"{float(fold['relative_error_float64']):.1e} (at most {fold['tolerance']:.0e})"
        )
        yield state_of(fold["passed"]), "rewriting", detail
    if simple := checks.get("simplify"):
        error = simple["relative_error"]
        detail = f"{simple['nodes_before']} nodes to {simple['nodes_after']}: {simple['reason']}"
        if simple["removed"]:
            removed = (f"{count} {kind}" for kind, count in simple["removed"].items())
            detail += f" (removed {', '.join(removed)})"
        detail += "" if error is None else f", relative error {float(error):.1e}"
        state = "SKIPPED" if error is None else "PASS" if simple["changed"] else "KEPT"
        yield state, "simplification", detail
    if agreement := checks.get("agreement"):
        levels = [float(b["sqnr_db"]) for b in agreement["batches"] if b["sqnr_db"] is not None]
        least = f"at least {min(levels):.1f} dB " if levels else ""
        detail = f"{least}at {_batches(agreement)}: ONNX Runtime against PyTorch in float64"
        yield state_of(agreement["outcome"]), "FP32 agreement", f"{detail}; {agreement['images']}"


def _batches(agreement: Entry) -> str:
    return f"batch {listed((row['batch'] for row in agreement['batches']), ', ')}"


def artefacts_table(manifest: Entry, sizes: Mapping[str, int] | None = None) -> list[Block]:
    """Return one line an artifact, with its bytes from ``sizes``."""
    rows = [
        {**e, "name": name, "size": (sizes or {}).get(name), "sha256": e["files"][e["file"]][:12]}
        for name, e in manifest["artefacts"].items()
    ]
    return table(
        rows,
        "artifact = name name; kind name; precision name; file name; graph.nodes d; "
        "layers = engine.parser_layers d; size bytes; sha256 name",
    )


def sizes_plot(sizes: Mapping[str, int]) -> list[Block]:
    """Return the artifacts' sizes as bars; nothing of a single one."""
    colour = colours(sizes)
    marks = [Mark(n, s / 2**20, text=bytes_text(s), colour=colour[n]) for n, s in sizes.items()]
    svg = rows_chart(marks, Axis("size on disk (MiB)"))
    return [Plot(svg, "Size of each artifact with all its files.")] * (len(sizes) > 1)


def graph_blocks(manifest: Entry) -> list[Block]:
    """Return how many operators of each kind every ONNX file has."""
    graphs = {n: entry["graph"] for n, entry in manifest["artefacts"].items() if entry["graph"]}
    counts = {n: {**graph["operators"], "all": graph["nodes"]} for n, graph in graphs.items()}
    kinds = dict.fromkeys(kind for graph in graphs.values() for kind in graph["operators"])
    rows = [(kind, *(own.get(kind) for own in counts.values())) for kind in (*kinds, "all")]
    columns = "".join(f"; {name} = {index} d" for index, name in enumerate(graphs, 1))
    said = "{exported_nodes} operators as exported from PyTorch (opset {opset}), {nodes} after."
    exported = graphs.get("fp32", {}).get("exported_nodes")
    return [
        *([Paragraph(said.format(**graphs["fp32"]))] if exported else ()),
        *table(rows, f"operator = 0 name{columns}"),
    ]


def export_blocks(done: Entry) -> list[Block]:
    """Return what was exported, and every precision that was made of it."""
    result, manifest = done["export"], done["manifest"]
    took = f" in {sum(result['seconds'].values()):.1f} s" if result["seconds"] else ""
    embedded = []
    for item in result["embedded"]:
        agreed, said = item["agreement"], f"nothing changed in {item['base']}"
        if agreed:
            most = max(row["difference"] for row in agreed["batches"])
            said = f"relative difference {most:.1e} from {item['base']}, at {_batches(agreed)}"
        embedded.append(("PASS" if agreed else "REUSED", item["name"], said))
    return [
        *model_facts(manifest),
        *preprocessing_facts(manifest["preprocessing"]),
        *checks_table([*proof_rows(manifest["checks"]), *embedded]),
        *table(manifest["checks"]["agreement"]["batches"], f"verdict = outcome state; {BATCHES}"),
        *artefacts_table(manifest),
        Paragraph(
            f"{'Reused' if result['reused'] else 'Wrote'} the bundle {result['bundle']}{took} "
            f"({result['reason']})."
        ),
        *(block for other in done["precisions"] for block in quantized_blocks(other)),
    ]


def run_blocks(done: Entry) -> list[Block]:
    """Return everything a run made, and the verdicts of its gates."""
    failed = " It does not hold its gate; `van-deploy quantize` tells why."
    lines = [f"Exported: {done['export']['reason']}."]
    lines += [
        f"{made['artefact']}: {made['reason']}.{'' if made['passed'] else failed}"
        for made in done["made"]
    ]
    return [
        *map(Paragraph, lines),
        *verify_blocks(done["verify"], (done["evaluate"] or {}).get("class_names")),
        *(evaluate_blocks(done["evaluate"]) if done["evaluate"] else ()),
        Paragraph(f"The bundle is {done['bundle']}."),
    ]


# --- descriptions ------------------------------------------------------------------------------


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
    manifest, found = described["manifest"], described["problems"]
    more = len(found) - MOST_PROBLEMS
    problems = [*found[:MOST_PROBLEMS], *[f"and {more:,} more"] * (more > 0)]
    return [
        Facts({"bundle": described["path"], "written": manifest["written"]}),
        *model_facts(manifest),
        *preprocessing_facts(manifest["preprocessing"]),
        *checks_table(proof_rows(manifest["checks"])),
        *artefacts_table(manifest, described["sizes"]),
        *notices("FAIL" if found else "PASS", problems or ["every file is the manifest's"]),
        *notices("NOTE", manifest["weights"]["notes"]),
        Facts(manifest["versions"], "Made with"),
    ]


def listed_blocks(variants: Sequence[Entry]) -> list[Block]:
    """Return one line a variant, and remarks on the columns."""
    notes = list(dict.fromkeys(item["note"] for item in variants if item["note"]))
    rows = []
    for item in variants:
        place = (item["weights"] or "").removeprefix(f"{HUB_OWNER}/")
        if item["weights"] is None:
            place = f"no public ImageNet-1K weights [{notes.index(item['note']) + 1}]"
        here = "YES" if item["here"] else None
        rows.append({**item, "here": here, "weights": place.replace("embedded", "in this package")})
    first, inside = variants[0], variants[-1]
    remarks = {
        **{f"[{number}]": note for number, note in enumerate(notes, 1)},
        "mult-adds": "multiply-adds of one square image with sides of so many pixels",
        "top-1": f"{first['top1_on']}, as published; {inside['name']}: {inside['top1_on']}",
        "weights": f"files in repositories of https://huggingface.co/{HUB_OWNER}",
        "licence": LICENCE,
    }
    columns = (
        "variant = name name; params = parameters count; mult-adds = multiply_adds count; "
        "px = image_size d; top-1 % = top1_percent .1f; here state; weights"
    )
    return [*table(rows, columns), Facts(remarks)]


def predictions_blocks(predictions: Entry) -> list[Block]:
    """Return one line an image: its classes, or why it could not be read."""
    rows = []
    for answer in predictions["predictions"]:
        others = ", ".join(f"{c['name']} {c['probability']:.1%}" for c in answer["top"][1:])
        state = "FAIL" if answer["error"] else None
        first = next(iter(answer["top"]), None)
        rows.append((state, answer["source"], first, answer["error"] or others))
    columns = "verdict = 0 state; image = 1; class = 2.name name; probability = 2.probability .1%; "
    return table(rows, f"{columns}then = 3")
