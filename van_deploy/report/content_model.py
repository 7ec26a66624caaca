"""The parts of a report about the model itself: network, artefacts, input, graph, origin."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from van_deploy.bundle import Artefact, Bundle, Manifest
from van_deploy.errors import UsageError, VanDeployError
from van_deploy.manifest import SCHEMA
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing
from van_deploy.report.document import Block, Facts, Figure, Grid, Picture, Section, Text
from van_deploy.report.svg import Axis, Bar, bar_chart
from van_deploy.report.tables import bytes_text, count_text

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "graph_section",
    "made_section",
    "model_section",
    "preprocessing_section",
    "provenance_section",
]

SHOWN_SIDE = 256  # pixels of an example picture on the page
PALETTE = {"fp32": 1, "fp16": 3, "int8": 2}


def model_section(manifest: Manifest) -> Section:
    """Return what was asked: the network, its weights and the batch range."""
    config, weights, batch = manifest.architecture, manifest.weights, manifest.batch
    seed = f", seed {weights.seed}" if weights.seed is not None else ""
    facts = {
        "Network": f"widths {_list(config.embed_dims)}; depths {_list(config.depths)}; "
        f"large kernels {_list(config.lka_kernels)}",
        "Parameters": f"{manifest.parameters:,}",
        "Weights": f"{weights.path or weights.spec} ({weights.format}{seed})",
        "SHA-256": weights.sha256,
        "Classes": _classes(manifest),
        "Batch": f"{batch.min} to {batch.max}, best at {batch.opt}",
    }
    notes = tuple(Text(f"Note: {note}.".replace("..", ".")) for note in weights.notes)
    return Section("What was asked", (Facts(facts), *notes))


def made_section(manifest: Manifest, sizes: Mapping[str, int]) -> Section:
    """Return what was made: one row an artefact, and their sizes as bars."""
    rows = tuple(
        (
            name,
            entry.kind,
            entry.precision.upper(),
            entry.file,
            _nodes(entry),
            bytes_text(sizes[name]),
            entry.made_from.name,
            entry.sha256[:16],
        )
        for name, entry in manifest.artefacts.items()
    )
    columns = ("artefact", "kind", "precision", "file", "nodes", "size", "made from", "SHA-256")
    blocks: list[Block] = [Grid(columns, rows, frozenset({4, 5}))]
    if len(sizes) > 1:
        bars = [
            Bar(name, size / 2**20, bytes_text(size), _colour(manifest, name))
            for name, size in sizes.items()
        ]
        svg = bar_chart(bars, Axis("size on disk (MiB)"), 960)
        blocks.append(Figure(svg, "Size of each artefact with all its files.", wide=True))
    return Section("What was made", tuple(blocks))


def preprocessing_section(bundle: Bundle) -> Section:
    """Return what a picture goes through, with an example before and after."""
    preprocessing = bundle.manifest.preprocessing
    side = preprocessing.image_size
    sides = {"center": "short side", "squash": "both sides", "border": "long side"}
    facts = {
        "Resize": f"{sides[preprocessing.crop_mode]} to {preprocessing.resize_size} pixels, "
        f"{preprocessing.interpolation} (crop ratio {preprocessing.crop_pct:g})",
        "Crop": f"centre, {side} x {side}",
        "Normalise": f"mean {_list(preprocessing.mean)}; standard deviation "
        f"{_list(preprocessing.std)}, of values in 0..1",
        "Order": f"{preprocessing.channels} channels, (batch, channel, row, column), float32",
        "From": preprocessing.source,
    }
    return Section("Preprocessing", (Facts(facts), *_example(bundle, preprocessing)))


def graph_section(manifest: Manifest) -> Section:
    """Return operator counts before and after each stage."""
    blocks: list[Block] = []
    stages = tuple(_stages(manifest))
    if stages:
        blocks.append(Grid(("stage", "operators", "what happened"), stages, frozenset({1})))
    graphs = {
        name: entry.graph.operators
        for name, entry in manifest.artefacts.items()
        if entry.graph is not None
    }
    kinds = sorted(
        {kind for counts in graphs.values() for kind in counts},
        key=lambda kind: -max(counts.get(kind, 0) for counts in graphs.values()),
    )
    rows = tuple((kind, *(str(c.get(kind, "")) for c in graphs.values())) for kind in kinds)
    total = ("all", *(str(sum(counts.values())) for counts in graphs.values()))
    numbers = frozenset(range(1, len(graphs) + 1))
    columns = ("operator", *graphs)
    blocks.append(Grid(columns, (*rows, total), numbers, "Operators of each ONNX file"))
    return Section("Graph", tuple(blocks))


def provenance_section(manifest: Manifest) -> Section:
    """Return where everything came from: versions, keys and digests of every file."""
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    keys = {f"Key of {name}": entry.key for name, entry in manifest.artefacts.items()}
    files = tuple(
        (name, file, digest)
        for name, entry in manifest.artefacts.items()
        for file, digest in entry.files.items()
    )
    grid = Grid(("artefact", "file", "SHA-256"), files, caption="Every file", folded=True)
    facts = {"Made with": versions, **keys, "Bundle schema": SCHEMA}
    return Section("Provenance", (Facts(facts), grid))


def _stages(manifest: Manifest) -> Iterable[tuple[str, str, str]]:
    checks, exported = manifest.checks, manifest.artefacts.get("fp32")
    fold = checks.get("fold")
    if fold:
        kept = f"; {fold['multiplies_kept']} multiplies kept" if fold["multiplies_kept"] else ""
        yield (
            "rewriting (PyTorch)",
            "",
            f"{fold['batchnorms_folded']} BatchNorms and {fold['layer_scales_folded']} layer "
            f"scales folded{kept}",
        )
    graph = exported.graph if exported else None
    if graph and graph.exported_nodes is not None:
        yield "export", str(graph.exported_nodes), f"opset {graph.opset}"
    simplify = checks.get("simplify")
    if simplify:
        removed = ", ".join(f"{n} {kind}" for kind, n in simplify["removed"].items())
        words = simplify["reason"] + (f": removed {removed}" if removed else "")
        yield "simplification", str(simplify["nodes_after"]), words
    for name, entry in manifest.artefacts.items():
        if entry.kind == "onnx" and name != "fp32":
            yield (
                name,
                _nodes(entry),
                f"made from {entry.made_from.name}",
            )
        elif entry.kind == "engine":
            yield name, _nodes(entry), "layers TensorRT's parser made"


def _nodes(entry: Artefact) -> str:
    """Return how many operators an artefact has, or layers."""
    if entry.graph is not None:
        return str(entry.graph.nodes)
    return str(entry.engine.parser_layers) if entry.engine else ""


def _example(bundle: Bundle, preprocessing: Preprocessing) -> Iterable[Block]:
    try:
        picture, described = _picture(bundle, preprocessing)
        pixels = pixels_from_image(picture, preprocessing)
    except (VanDeployError, OSError) as error:
        yield Text(f"There is no example picture: {error}")
        return
    from PIL import Image

    after = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    values = normalised(pixels[None], preprocessing)
    yield _shown(picture.convert("RGB"), f"Before: {described}, {_size(picture)}")
    yield _shown(
        after,
        f"After: {_size(after)}; normalised, its values go from {values.min():.2f} to "
        f"{values.max():.2f} about {values.mean():.2f}",
    )


def _picture(bundle: Bundle, preprocessing: Preprocessing) -> tuple[Image, str]:
    """Return the bundle's own example picture, or a sample photograph."""
    from van_deploy.data import open_image, opened, sample_set

    golden = bundle.manifest.golden
    if golden and golden.originals and (bundle.path / golden.originals[0]).is_file():
        path = bundle.path / golden.originals[0]
        described = f"the first golden sample of {golden.images}"
        return open_image(path, channels=preprocessing.channels), described
    sample = opened(sample_set("", preprocessing).items[0], preprocessing.channels)
    if sample is None:
        raise UsageError("The network takes no images.")
    return sample, "a sample photograph"


def _shown(picture: Image, caption: str) -> Picture:
    """Return a picture small enough for a page, as a data URI; tiny ones enlarged, unsmoothed."""
    from PIL import Image

    scale = SHOWN_SIDE / max(picture.size)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    if scale < 1:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small = max(picture.size) < SHOWN_SIDE
    if small:
        picture.resize((width, height), Image.Resampling.NEAREST).save(data, "PNG", optimize=True)
    else:
        picture.save(data, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    text = base64.b64encode(data.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{text}", caption, width, height)


def _size(picture: Image) -> str:
    return f"{picture.size[0]} x {picture.size[1]} pixels"


def _colour(manifest: Manifest, name: str) -> int:
    return PALETTE.get(manifest.artefacts[name].precision, 4)


def _classes(manifest: Manifest) -> str:
    names = manifest.class_names or ()
    count = manifest.architecture.num_classes
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{count_text(count)} ({shown})" if names else f"{count_text(count)}, without names"


def _list(values: Iterable[object]) -> str:
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
