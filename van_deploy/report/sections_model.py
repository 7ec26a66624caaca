"""What networks, bundles and their ONNX files are, as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from van_deploy.config.sizes import size_text
from van_deploy.report.document import (
    Block,
    Entry,
    Facts,
    Notice,
    Paragraph,
    Plot,
    checks_table,
    facts,
    notices,
    table,
)
from van_deploy.report.figures import bytes_text, listed, state_of
from van_deploy.report.plots import Axis, Mark, colours, rows_chart
from van_deploy.report.sections_checks import evaluate_blocks, verify_blocks
from van_deploy.report.sections_precision import quantized_blocks

__all__ = [
    "artefacts_table",
    "described_blocks",
    "export_blocks",
    "graph_blocks",
    "listed_blocks",
    "model_facts",
    "onnx_blocks",
    "predictions_blocks",
    "preprocessing_facts",
    "proof_rows",
    "run_blocks",
    "sizes_plot",
    "tensor_rows",
]

MOST_PROBLEMS = 20  # told one by one; --json has them all
HUB_OWNER = "Visual-Attention-Network"
LICENCE = (
    "The public weights are Apache-2.0; their authors add: "
    '"for commercial use, please contact the authors".'
)
BATCHES = (
    "verdict = outcome state; batch = batch d; SQNR dB ↑ = sqnr_db .1f; "
    "batch invariance dB ↑ = invariance_db .1f"
)
WAYS = ("inputs", "outputs")
TENSORS = "tensor = way name; name = name name; type = dtype name; shape = shape"


def model_facts(manifest: Entry) -> list[Block]:
    """Return what the network is, where its weights come from, and the batches it is made for."""
    return facts(
        manifest,
        "model = name; weights = weights.path; format = weights.format; seed = weights.seed; "
        "sha256 = weights.sha256; widths = architecture.embed_dims; "
        "depths = architecture.depths; large kernels = architecture.lka_kernels; "
        "parameters = parameters count; classes = architecture.num_classes; "
        "class names = class_names; feature maps of stages (from 0) = architecture.out_indices; "
        "batch = batch; image sizes = sizes",
    )


def preprocessing_facts(values: Entry) -> list[Block]:
    """Return what an image goes through before the network."""
    sizes = {key: size_text(values[key]) for key in ("image_size", "resize_size")}
    return facts(
        {**values, **sizes},
        "image size = image_size; resized to = resize_size; resized side = crop_mode; "
        "filter = interpolation; crop ratio = crop_pct; mean (of 0..1) = mean; "
        "standard deviation = std; preprocessing from = source",
    )


def proof_rows(checks: Entry) -> Iterator[tuple[str, str, str]]:
    """Yield state, name and measurement of rewriting, simplification and agreement."""
    if "fold" in checks:
        fold = checks["fold"]
        kept = f", {fold['multiplies_kept']} multiplies kept" if fold["multiplies_kept"] else ""
        detail = (
            f"{fold['batchnorms_folded']} BatchNorms folded, {fold['batchnorms_left']} left; "
            f"{fold['layer_scales_folded']} layer scales folded{kept}; float64 relative error "
            f"{float(fold['relative_error_float64']):.1e} (at most {fold['tolerance']:.0e})"
        )
        yield state_of(fold["passed"]), "rewriting", detail
    if "simplify" in checks:
        simple = checks["simplify"]
        error = simple["relative_error"]
        measured = "" if error is None else f", relative error {float(error):.1e}"
        removed = ", ".join(f"{count} {kind}" for kind, count in simple["removed"].items())
        detail = (
            f"{simple['nodes_before']} nodes to {simple['nodes_after']}: {simple['reason']}"
            f"{f' (removed {removed})' if removed else ''}{measured}"
        )
        state = "SKIPPED" if error is None else "PASS" if simple["changed"] else "KEPT"
        yield state, "simplification", detail
    if "agreement" in checks:
        agreement = checks["agreement"]
        sizes = agreement["batches"]
        levels = [float(b["sqnr_db"]) for b in sizes if b["sqnr_db"] is not None]
        detail = (
            f"{f'at least {min(levels):.1f} dB ' if levels else ''}at batch "
            f"{listed((b['batch'] for b in sizes), ', ')}: ONNX Runtime against PyTorch in "
            f"float64; {agreement['images']}"
        )
        yield state_of(agreement["outcome"]), "FP32 agreement", detail


def artefacts_table(manifest: Entry, sizes: Mapping[str, int] | None = None) -> list[Block]:
    """Return one line an artifact, with its bytes from ``sizes``."""
    rows = [
        {
            **entry,
            "name": name,
            "bytes": (sizes or {}).get(name),
            "sha256": entry["files"][entry["file"]][:12],
        }
        for name, entry in manifest["artefacts"].items()
    ]
    return table(
        rows,
        "artifact = name name; kind = kind name; precision = precision name; file = file name; "
        "nodes = graph.nodes d; layers = engine.parser_layers d; size = bytes bytes; "
        "sha256 = sha256 name",
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
    rows: dict[str, dict[str, object]] = {}
    for name, graph in graphs.items():
        for kind, count in graph["operators"].items():
            rows.setdefault(kind, {"kind": kind})[name] = count
    rows["all"] = {"kind": "all", **{name: graph["nodes"] for name, graph in graphs.items()}}
    columns = "".join(f"; {name} = {name} d" for name in graphs)
    before = graphs.get("fp32", {}).get("exported_nodes")
    said = f"{before} operators as exported from PyTorch (opset {{opset}}), {{nodes}} after."
    return [
        *([Paragraph(said.format(**graphs["fp32"]))] if before else ()),
        *table(rows.values(), f"operator = kind name{columns}"),
    ]


def export_blocks(done: Entry) -> list[Block]:
    """Return what was exported, and every precision that was made of it."""
    result, manifest = done["export"], done["manifest"]
    took = f" in {sum(result['seconds'].values()):.1f} s" if result["seconds"] else ""
    embedded = []
    for item in result["embedded"]:
        said, batches = f"nothing changed in {item['base']}", []
        if item["agreement"]:
            batches = item["agreement"]["batches"]
            said = (
                f"relative difference {max(row['difference'] for row in batches):.1e} from "
                f"{item['base']}, at batch {listed((row['batch'] for row in batches), ', ')}"
            )
        embedded.append(("PASS" if batches else "REUSED", item["name"], said))
    return [
        *model_facts(manifest),
        *preprocessing_facts(manifest["preprocessing"]),
        *checks_table([*proof_rows(manifest["checks"]), *embedded]),
        *table(manifest["checks"]["agreement"]["batches"], BATCHES),
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
    return _bundle(described) if described["kind"] == "bundle" else _network(described)


def _bundle(described: Entry) -> list[Block]:
    manifest, found = described["manifest"], described["problems"]
    more = [f"and {len(found) - MOST_PROBLEMS:,} more"] if len(found) > MOST_PROBLEMS else []
    problems = notices("FAIL", [*found[:MOST_PROBLEMS], *more])
    return [
        Facts({"bundle": described["path"], "written": manifest["written"]}),
        *model_facts(manifest),
        *preprocessing_facts(manifest["preprocessing"]),
        *checks_table(proof_rows(manifest["checks"])),
        *artefacts_table(manifest, described["sizes"]),
        *(problems or [Notice("PASS", "every file is the manifest's")]),
        *notices("NOTE", manifest["weights"]["notes"]),
        Facts(manifest["versions"], "Made with"),
    ]


def _network(described: Entry) -> list[Block]:
    source = described.get("source") or {"notes": ()}
    places = (
        "model = name; variant = variant; widths = architecture.embed_dims; "
        "depths = architecture.depths; MLP ratios = architecture.mlp_ratios; "
        "kernels = architecture.lka_kernels; dilation = lka_dilation; "
        "classes = architecture.num_classes; parameters = parameters ,d; "
        "multiply-adds = multiply_adds count; at pixels = multiply_adds_at; "
        "top-1 % (published) = top1_percent; weights = weights; about them = weights_note; "
        "on this machine = here; weights file = source.path; format = source.format; "
        "under = source.container; sha256 = source.sha256; class names = class_names"
    )
    preprocessing = preprocessing_facts(described["preprocessing"])
    return [*facts(described, places), *preprocessing, *notices("NOTE", source["notes"])]


def onnx_blocks(description: Entry) -> list[Block]:
    """Return what an ONNX file holds."""
    graph, metadata = description["graph"], description["metadata"]
    operators = [*graph["operators"].items(), ("all", graph["nodes"])]
    weights = [{"kind": kind, **value} for kind, value in description["weights"].items()]
    named = {way: [{"name": n, **tensor} for n, tensor in graph[way].items()] for way in WAYS}
    return [
        *facts(
            description,
            "file = file; size = bytes bytes; written by = producer; opset = graph.opset; "
            "IR version = graph.ir_version; weights in = external_files",
        ),
        *table(tensor_rows(named), TENSORS),
        *table(weights, "weights = kind name; values = values ,d; size = bytes bytes"),
        *table(operators, "operator = 0; nodes = 1 d"),
        *([Facts(metadata, "Metadata")] if metadata else ()),
    ]


def tensor_rows(named: Entry) -> list[Entry]:
    """Return a row each of ``inputs`` and ``outputs``; a free length is ``N``."""
    return [
        {**tensor, "way": way[:-1], "shape": ["N" if n == -1 else n for n in tensor["shape"]]}
        for way in WAYS
        for tensor in named[way]
    ]


def listed_blocks(variants: Sequence[Entry]) -> list[Block]:
    """Return one line a variant, and remarks on the columns."""
    notes = list(dict.fromkeys(item["note"] for item in variants if item["note"]))
    rows = [
        {
            **item,
            "there": "YES" if item["here"] else None,
            "place": f"no public ImageNet-1K weights [{notes.index(item['note']) + 1}]"
            if item["weights"] is None
            else "in this package"
            if item["weights"] == "embedded"
            else item["weights"].removeprefix(f"{HUB_OWNER}/"),
        }
        for item in variants
    ]
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
        "px = image_size d; top-1 % = top1_percent .1f; here = there state; weights = place"
    )
    return [*table(rows, columns), Facts(remarks)]


def predictions_blocks(predictions: Entry) -> list[Block]:
    """Return one line an image: its classes, or why it could not be read."""
    rows = [
        {
            "source": answer["source"],
            "state": "FAIL" if answer["error"] else None,
            "first": next(iter(answer["top"]), None),
            "then": answer["error"]
            or ", ".join(f"{c['name']} {c['probability']:.1%}" for c in answer["top"][1:]),
        }
        for answer in predictions["predictions"]
    ]
    columns = "image = source; class = first.name name; probability = first.probability .1%; "
    return table(rows, f"verdict = state state; {columns} then = then")
