"""Artifacts that many tests read: each is made once per test run, by the first process.

Exporting van_digits takes three seconds and importing PyTorch four, so tests use copies.
:class:`ArtifactCache` has a lock for each artifact, and reports changed artifacts at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from filelock import FileLock
from onnx import ModelProto

import van_deploy as vd
from tests.json_documents import edit_json
from tests.manifest_parts import artifact_entry
from van_deploy.bundle import MANIFEST, Bundle, Origin, edit_bundle
from van_deploy.config import BatchRange

if TYPE_CHECKING:
    from van_deploy.checks.golden import Samples
    from van_deploy.model.checkpoint import LoadedVan
    from van_deploy.model.variants import VanConfig

BATCHES = BatchRange(1, 2, 8)
CALIBRATION_IMAGES = 48

Copy = Callable[..., Path]
State = dict[str, tuple[int, int]]


@dataclass
class ArtifactCache:
    """Files and folders that all processes of a test run share.

    Attributes:
        root: the shared folder.
    """

    root: Path
    _states: dict[Path, State] = field(default_factory=dict)

    @classmethod
    def in_folder(cls, base: Path) -> ArtifactCache:
        """Return the cache of this run, from the base temporary folder of this process."""
        root = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
        (root / "artifact_cache").mkdir(exist_ok=True)
        return cls(root / "artifact_cache")

    def __call__(
        self, name: str, make: Callable[..., object], *arguments: Any, **options: Any
    ) -> Path:
        """Return the file or folder ``name``; the first call makes it with ``make(path, ...)``."""
        path = self.root / name
        with FileLock(self.root / f"{name}.lock"):
            if not path.exists():
                partial = self.root / f"partial-{name}"
                shutil.rmtree(partial, ignore_errors=True)
                make(partial, *arguments, **options)
                partial.rename(path)
            self._states.setdefault(path, _state(path))
        return path

    def changed(self) -> list[str]:
        """Return the files that changed since this process first used them."""
        return sorted(
            {
                f"{path.name}/{name}"
                for path, before in self._states.items()
                for name, _ in before.items() ^ _state(path).items()
            }
        )


def _state(path: Path) -> State:
    """Return size and time of change of every file in ``path``, without locks of bundles."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    stats = {p.relative_to(path).as_posix(): p.stat() for p in files if p.name != ".lock"}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@dataclass(frozen=True)
class Subject:
    """A bundle under test, with its reference and images.

    Attributes:
        bundle: with ``fp32``, ``fp16`` and ``int8``.
        loaded: the original network.
        samples: its golden samples.
        labelled: folder of labelled images.
    """

    bundle: Bundle
    loaded: LoadedVan
    samples: Samples
    labelled: Path

    def graph(self, name: str) -> ModelProto:
        """Return a new copy of an artifact's graph."""
        return onnx.load(self.bundle.verified_path(name))


def load_subject(folder: Path, labelled: Path) -> Subject:
    """Return a bundle of :func:`export_precisions` with its network and images."""
    from van_deploy.checks.golden import golden_samples
    from van_deploy.runners.network import original_network

    bundle = Bundle.open(folder)
    return Subject(bundle, original_network(bundle), golden_samples(bundle), labelled)


def export_network(
    folder: Path, weights: Path | str = "van_digits", images: Path | None = None, **options: Any
) -> None:
    """Write a bundle of the embedded network, or of a checkpoint, with ``BATCHES``."""
    vd.export(weights, folder, images=images, batch=str(BATCHES), **options)


def export_precisions(folder: Path, exported: Path, labelled: Path) -> None:
    """Write a copy of a bundle with FP16 and INT8 graphs, calibrated on labelled images.

    Its largest batch is 6: six images are enough to check it.
    """
    from van_deploy.checks.golden import golden_samples
    from van_deploy.checks.outputs import check_new_graph
    from van_deploy.data.samples import verification_images
    from van_deploy.precision.fp16 import default_fp32_nodes, fp16_from_fp32
    from van_deploy.runners.network import original_network

    shutil.copytree(exported, folder)
    edit_json(folder / MANIFEST, "batch", {"min": 1, "opt": 4, "max": 6})
    bundle = Bundle.open(folder)
    loaded = original_network(bundle)
    model = onnx.load(bundle.verified_path("fp32"))
    kept = default_fp32_nodes(model)
    images = verification_images(loaded.name, loaded.preprocessing, CALIBRATION_IMAGES, labelled)
    int8 = int8_graph(model, loaded.config, [images.inputs])
    graphs = {"fp16": fp16_from_fp32(model, kept), "int8": int8}
    for name, graph in graphs.items():
        _, record = check_new_graph(graph, name, golden_samples(bundle))
        add_artifact(bundle, name, name, graph, golden_sqnr_db=record)


def int8_graph(
    model: ModelProto, config: VanConfig, batches: Sequence[npt.NDArray[np.float32]]
) -> ModelProto:
    """Return a folded graph with its 1x1 convolutions in INT8 for TensorRT."""
    from van_deploy.graph.export import van_from_onnx
    from van_deploy.precision.fp16 import default_fp32_nodes
    from van_deploy.precision.plan import (
        QuantizationPlan,
        histogram_tensors,
        layers_in_scope,
        make_plan,
    )
    from van_deploy.precision.qdq import qdq_for_tensorrt
    from van_deploy.precision.scales import observe_ranges

    network = van_from_onnx(model, config)
    layers = layers_in_scope(network.model, ("pointwise",))
    ranges = observe_ranges(network, batches, histogram_tensors(network, layers, "tensorrt"))
    plan = make_plan(QuantizationPlan(network), ranges, layers)
    return qdq_for_tensorrt(model, plan, kept=default_fp32_nodes(model))


def add_artifact(
    bundle: Bundle, name: str, precision: str, model: ModelProto, **more: Any
) -> Bundle:
    """Add a graph to the manifest of a bundle as an artifact."""
    from van_deploy.graph.files import graph_facts, save_onnx

    kind = "serving" if "embedded" in more else "onnx"
    more |= {"made_from": origin_of(bundle, "fp32"), "graph": graph_facts(model)}
    with edit_bundle(bundle.path) as draft:
        files = save_onnx(model, draft.file(f"model.{name}.onnx"))
        draft.record(artifact_entry(name, kind, precision, files[0], files, **more))
    return Bundle.open(bundle.path)


def origin_of(bundle: Bundle, name: str) -> Origin:
    """Return an artifact of a bundle as the origin of another one."""
    return Origin(name=name, sha256=bundle.artifact(name).sha256)
