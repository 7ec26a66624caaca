"""Artifacts that many tests read: each is made once in a test run, by whichever process is first.

Exporting van_digits takes three seconds of a processor and importing PyTorch four, so
no test makes its own where a copy does. :class:`MadeOnce` holds a lock while it makes
something, and at the end of the run it says which of them a test has changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from filelock import FileLock
from onnx import ModelProto

from van_deploy.bundle import Bundle, Origin, writing
from van_deploy.config import BatchRange, ExportSettings, ModelSettings, Recipe
from van_deploy.recipe import recipe_named

if TYPE_CHECKING:
    from van_deploy.data import CheckImages
    from van_deploy.model.checkpoint import LoadedVan

__all__ = [
    "BATCHES",
    "SMALL_SIZE",
    "Copy",
    "MadeOnce",
    "Subject",
    "digits_graph",
    "export_network",
    "put",
    "subject_of",
    "with_byte_graph",
    "with_precisions",
]

BATCHES = BatchRange(1, 2, 8)
SMALL_SIZE = 32
CALIBRATION_IMAGES = 48
SUBJECT_IMAGES = 16

Copy = Callable[..., Path]
State = dict[str, tuple[int, int]]


@dataclass
class MadeOnce:
    """Makes files and folders once for all processes of a test run.

    Attributes:
        root: folder that all processes of the run share.
    """

    root: Path
    _lent: dict[Path, State] = field(default_factory=dict)

    @classmethod
    def beside(cls, base: Path) -> MadeOnce:
        """Return the one of this run, from the base temporary folder of this process."""
        root = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
        (root / "made_once").mkdir(exist_ok=True)
        return cls(root / "made_once")

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the file or folder ``name``, made by ``make(path)`` if this is the first call."""
        path = self.root / name
        with FileLock(self.root / f"{name}.lock"):
            if not path.exists():
                partial = self.root / f"partial-{name}"
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                partial.rename(path)
            self._lent.setdefault(path, _state(path))
        return path

    def changed(self) -> list[str]:
        """Return the files that differ from what this process was lent."""
        return sorted(
            {
                f"{path.name}/{name}"
                for path, before in self._lent.items()
                for name, _ in before.items() ^ _state(path).items()
            }
        )


def _state(path: Path) -> State:
    """Return size and time of change of every file in ``path``; bundles' locks are left out."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    stats = {p.relative_to(path).as_posix(): p.stat() for p in files if p.name != ".lock"}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@dataclass(frozen=True)
class Subject:
    """A bundle and everything it is judged with.

    Attributes:
        bundle: with ``fp32``, ``fp16`` and ``int8``.
        loaded: the original network.
        pictures: to judge on.
        labelled: folder of labelled images.
    """

    bundle: Bundle
    loaded: LoadedVan
    pictures: CheckImages
    labelled: Path

    def graph(self, name: str) -> ModelProto:
        """Return an artefact's graph, free to be changed."""
        return onnx.load(self.bundle.verified(name))


def subject_of(folder: Path, labelled: Path) -> Subject:
    """Return a bundle that :func:`with_precisions` made, with its network and images."""
    from van_deploy.bundle.original import original_network
    from van_deploy.data import check_images

    bundle = Bundle.open(folder)
    loaded = original_network(bundle)
    pictures = check_images(loaded.name, loaded.preprocessing, SUBJECT_IMAGES, labelled)
    return Subject(bundle, loaded, pictures, labelled)


# --- what is made ----------------------------------------------------------------------------


def digits_graph(path: Path, size: int) -> None:
    """Write the embedded network, folded, as an ONNX file with a free batch."""
    import torch

    from van_deploy.graph.export import onnx_from_van
    from van_deploy.graph.fold import fold_van
    from van_deploy.model.checkpoint import load_van

    loaded = load_van("van_digits")
    folded = fold_van(loaded.model, torch.zeros(1, loaded.config.in_chans, size, size))
    onnx.save(onnx_from_van(folded.model, size, loaded.config.in_chans), path)


def export_network(folder: Path, weights: str = "van_digits") -> None:
    """Write a bundle of the embedded network, or of a checkpoint, with ``BATCHES``."""
    from van_deploy.pipeline import export_bundle, load_for

    if weights == "van_digits":
        recipe = recipe_named(weights).changed(batch=BATCHES)
    else:
        recipe = Recipe(model=ModelSettings(weights=weights), batch=BATCHES)
    export_bundle(load_for(recipe), recipe, folder)


def with_byte_graph(folder: Path, exported: Path) -> None:
    """Write a copy of a bundle that also takes bytes, and gives every output."""
    from van_deploy.pipeline import embed_in_bundle, load_for

    shutil.copytree(exported, folder)
    export = ExportSettings(embed_preprocess="uint8", outputs=("logits", "probabilities", "top5"))
    recipe = recipe_named("van_digits").changed(batch=BATCHES, export=export)
    embed_in_bundle(folder, load_for(recipe), recipe)


def with_precisions(folder: Path, exported: Path, labelled: Path) -> None:
    """Write a copy of a bundle with FP16 and INT8 graphs, calibrated on labelled images.

    Its largest batch is 6, so that six images are enough to check it.
    """
    from van_deploy.bundle.original import original_network
    from van_deploy.data import check_images
    from van_deploy.precision.half import DEFAULT_KEEP, half_from_fp32, kept_nodes
    from van_deploy.precision.initial import initial_plan
    from van_deploy.precision.quantize import qdq_from_plan
    from van_deploy.precision.ranges import record_ranges

    shutil.copytree(exported, folder)
    bundle = Bundle.open(folder)
    with writing(folder) as draft:
        batch = BatchRange(1, 4, 6)
        draft.description = bundle.manifest.model_copy(update={"batch": batch})
    bundle = Bundle.open(folder)
    loaded = original_network(bundle)
    model = onnx.load(bundle.verified("fp32"))
    kept = kept_nodes(model, DEFAULT_KEEP)
    put(bundle, "fp16", "fp16", half_from_fp32(model, kept).model)
    images = check_images(loaded.name, loaded.preprocessing, CALIBRATION_IMAGES, labelled).inputs
    plan = initial_plan(model, record_ranges(model, [images], threads=1))
    scales = {conv.activation: conv.activation_scale for conv in plan.convs.values()}
    graph = qdq_from_plan(plan, kept=kept)
    put(bundle, "int8", "int8", graph, quantization={"scales": scales})


def put(bundle: Bundle, name: str, precision: str, model: ModelProto, **more: Any) -> Bundle:
    """Return the bundle with a graph entered as an artefact, vouched for like any other."""
    from tests.described import entry
    from van_deploy.graph.files import graph_facts, save_onnx

    kind = "serving" if "embedded" in more else "onnx"
    origin = Origin(name="fp32", sha256=bundle.artefact("fp32").sha256)
    with writing(bundle.path) as draft:
        files = save_onnx(model, draft.file(f"model.{name}.onnx"))
        draft.record(
            entry(
                *(name, kind, precision, files[0], files),
                made_from=origin,
                graph=graph_facts(model),
                **more,
            )
        )
    return Bundle.open(bundle.path)
