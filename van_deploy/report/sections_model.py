"""What networks, bundles and their ONNX files are, as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from van_deploy.report.document import (
    Block,
    Entry,
    Facts,
    Notice,
    Paragraph,
    Plot,
    checks_table,
    notices,
    table,
)
from van_deploy.report.figures import bytes_text, count_text, listed, state_of
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
    "tensors",
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
SIDES = {"center": "short side", "squash": "both sides", "border": "long side"}


def model_facts(manifest: Entry) -> Facts:
    """Return what the network is, where its weights come from, and the batches it is made for."""
    weights, config, batch = manifest["weights"], manifest["architecture"], manifest["batch"]
    seed = f", seed {weights['seed']}" if weights["seed"] is not None else ""
    names = manifest["class_names"] or ()
    shown = f" ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})" if names else ""
    place = weights["spec" if weights["format"] in {"embedded", "random"} else "path"]
    facts = {
        "model": manifest["name"],
        "weights": f"{place} ({weights['format']}{seed})",
        "sha256": weights["sha256"],
        "network": f"widths {listed(config['embed_dims'])}, depths {listed(config['depths'])}, "
        f"large kernels {listed(config['lka_kernels'])}, "
        f"{count_text(manifest['parameters'])} parameters",
        "classes": f"{config['num_classes']}{shown}",
        "batch": f"{batch['min']} to {batch['max']}, best at {batch['opt']}",
    }
    return Facts(facts)


def preprocessing_facts(values: Entry) -> Facts:
    """Return what an image goes through before the network."""
    side, mean = values["image_size"], values["mean"]
    facts = {
        "resize": f"{SIDES[values['crop_mode']]} to {values['resize_size']} pixels, "
        f"{values['interpolation']} (crop ratio {values['crop_pct']:g}), "
        f"then {side} x {side} from the centre",
        "normalise": f"mean {listed(mean)}; standard deviation {listed(values['std'])}, "
        "of values in 0..1",
        "order": f"{len(mean)} channels, (batch, channel, row, column), float32",
        "preprocessing from": values["source"],
    }
    return Facts(facts)


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


def artefacts_table(manifest: Entry, sizes: Mapping[str, int]) -> list[Block]:
    """Return one line an artifact, with its bytes from ``sizes``."""
    rows = [
        {
            "name": name,
            "bytes": sizes[name],
            "digest": entry["files"][entry["file"]][:12],
            "nodes": (entry["graph"] or {}).get("nodes"),
            **entry,
        }
        for name, entry in manifest["artefacts"].items()
    ]
    return table(
        rows,
        "artifact = name name; kind = kind name; precision = precision name; file = file name; "
        "nodes = nodes d; layers = engine.parser_layers d; size = bytes bytes; "
        "sha256 = digest name",
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
    files = {name: listed(sorted(e["files"])) for name, e in manifest["artefacts"].items()}
    return [
        model_facts(manifest),
        preprocessing_facts(manifest["preprocessing"]),
        *checks_table([*proof_rows(manifest["checks"]), *embedded]),
        *table(manifest["checks"]["agreement"]["batches"], BATCHES),
        Facts({f"files of {name}": named for name, named in files.items()}),
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
        model_facts(manifest),
        preprocessing_facts(manifest["preprocessing"]),
        *checks_table(proof_rows(manifest["checks"])),
        *artefacts_table(manifest, described["sizes"]),
        *(problems or [Notice("PASS", "every file is the manifest's")]),
        *notices("NOTE", manifest["weights"]["notes"]),
        Facts(manifest["versions"], "Made with"),
    ]


def _network(described: Entry) -> list[Block]:
    config, side = described["architecture"], described["multiply_adds_at"]
    k0, k1 = config["lka_kernels"]
    facts = {
        "model": described["name"],
        "variant": described.get("variant", described["name"]) or "none of the published ones",
        "widths": config["embed_dims"],
        "depths": config["depths"],
        "MLP ratios": config["mlp_ratios"],
        "kernels": f"{k0}x{k0}, then {k1}x{k1} with dilation {described['lka_dilation']}",
        "classes": config["num_classes"],
        "parameters": f"{described['parameters']:,}",
        "multiply-adds": f"{count_text(described['multiply_adds'])} at {side} x {side}",
    }
    notes: Sequence[str] = ()
    if described["kind"] == "variant":
        top1 = described["top1_percent"]
        facts["top-1"] = f"{top1} % (published)" if top1 else None
        facts["weights"] = described["weights"] or described["weights_note"]
        facts["on this machine"] = described["here"]
    else:
        source, names = described["source"], described["class_names"] or ()
        facts["weights"] = "{path} ({format}, under {container})".format(**source)
        facts["sha256"], notes = source["sha256"], source["notes"]
        facts["class names"] = ", ".join([*names[:8], "..."][: len(names)])
    preprocessing = preprocessing_facts(described["preprocessing"])
    return [Facts(facts), preprocessing, *notices("NOTE", notes)]


def onnx_blocks(description: Entry) -> list[Block]:
    """Return what an ONNX file holds."""
    graph = description["graph"]
    facts = {
        "file": description["file"],
        "size": bytes_text(description["bytes"]),
        "written by": description["producer"],
        "opset": f"{graph['opset']} (IR {graph['ir_version']})",
        **tensors("input", graph["inputs"]),
        **tensors("output", graph["outputs"]),
        **{
            f"weights {kind}": f"{value['values']:,} values, {bytes_text(value['bytes'])}"
            for kind, value in description["weights"].items()
        },
        "weights in": ", ".join(description["external_files"]),
    }
    metadata = {key: _line(value) for key, value in description["metadata"].items()}
    return [
        Facts(facts),
        *table([*graph["operators"].items(), ("all", graph["nodes"])], "operator = 0; nodes = 1 d"),
        *([Facts(metadata, "Metadata")] if metadata else ()),
    ]


def tensors(kind: str, found: Mapping[str, Entry]) -> dict[str, str]:
    """Return inputs or outputs as facts: type and shape of each; a free length is ``N``."""
    shapes = {
        name: listed(("N" if size == -1 else size for size in tensor["shape"]), ", ")
        for name, tensor in found.items()
    }
    return {f"{kind} {name}": f"{found[name]['dtype']} ({shapes[name]})" for name in found}


def _line(value: Any) -> str:
    """Return a value on one line: a mapping's entries, a list's first few."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = " ".join(_line(item) for item in value[:12])
        return shown if len(value) <= 12 else f"{shown} ... ({len(value)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


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
        for answer in predictions["answers"]
    ]
    columns = "image = source; class = first.name name; probability = first.probability .1%; "
    return table(rows, f"verdict = state state; {columns} then = then")
