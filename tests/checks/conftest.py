"""Bundles to judge: the digits and, where it is, the CIFAR-10 network, in FP32, FP16 and INT8."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto

from tests.described import entry
from van_deploy.bundle import Bundle, Origin, writing
from van_deploy.bundle.original import original_network
from van_deploy.checks.pictures import Pictures, pictures_to_check
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.embedded import write_digits_folder
from van_deploy.model.pixels import normalised
from van_deploy.pipeline import export_bundle, load_for
from van_deploy.precision.half import DEFAULT_KEEP, half_from_fp32, kept_nodes
from van_deploy.precision.initial import initial_plan
from van_deploy.precision.quantize import qdq_from_plan
from van_deploy.precision.ranges import record_ranges
from van_deploy.recipe import BatchRange, ModelSettings, Recipe

BATCHES = BatchRange(1, 4, 6)
CALIBRATION_IMAGES = 48


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
    pictures: Pictures
    labelled: Path

    def graph(self, name: str) -> ModelProto:
        """Return an artefact's graph, free to be changed."""
        return onnx.load(self.bundle.verified(name))


Broken = Callable[..., Bundle]


def put(bundle: Bundle, name: str, precision: str, model: ModelProto, **more: Any) -> Bundle:
    """Return the bundle with a graph entered as an artefact, vouched for like any other."""
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


def quantized(bundle: Bundle, loaded: LoadedVan, pictures: Pictures) -> Bundle:
    """Return the bundle with FP16 and INT8 graphs from the precision room's own parts."""
    model = onnx.load(bundle.verified("fp32"))
    kept = kept_nodes(model, DEFAULT_KEEP)
    bundle = put(bundle, "fp16", "fp16", half_from_fp32(model, kept).model)
    images = normalised(pictures.pixels, loaded.preprocessing)
    plan = initial_plan(model, record_ranges(model, [images], threads=1))
    scales = {conv.activation: conv.activation_scale for conv in plan.convs.values()}
    return put(
        bundle, "int8", "int8", qdq_from_plan(plan, kept=kept), quantization={"scales": scales}
    )


def subject(folder: Path, weights: str, labelled: Path) -> Subject:
    """Return the subject made from weights, judged on a folder of images."""
    recipe = Recipe(model=ModelSettings(name=weights), batch=BATCHES)
    if "/" in weights:
        recipe = Recipe(model=ModelSettings(weights=weights), batch=BATCHES)
    loaded = load_for(recipe)
    export_bundle(loaded, recipe, folder)
    bundle = Bundle.open(folder)
    everything = pictures_to_check(loaded.name, loaded.preprocessing, CALIBRATION_IMAGES, labelled)
    bundle = quantized(bundle, loaded, everything)
    pictures = Pictures(everything.pixels[:16], everything.names[:16], everything.described)
    return Subject(bundle, original_network(bundle), pictures, labelled)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Return the digits' bundle; it must not be changed."""
    folder = tmp_path_factory.mktemp("digits")
    labelled = write_digits_folder(folder / "images", "heldout", 200)
    return subject(folder / "bundle", "van_digits", labelled)


@pytest.fixture(scope="session")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Return the bundle of the shared van_b0; it must not be changed."""
    weights = shared / "checkpoints" / "van_b0_cifar10.pth.tar"
    labelled = shared / "data" / "cifar10" / "eval"
    return subject(tmp_path_factory.mktemp("cifar") / "bundle", str(weights), labelled)


@pytest.fixture
def broken(tmp_path: Path) -> Broken:
    """Return a function that puts a broken graph in the place of an artefact, in a copy."""

    def replace(
        whole: Subject, name: str, precision: str, model: ModelProto, **more: Any
    ) -> Bundle:
        copy = tmp_path / "broken"
        shutil.copytree(whole.bundle.path, copy)
        if name == "int8":  # what was recorded when the right one was made stays recorded
            more = {"quantization": whole.bundle.artefact("int8").quantization, **more}
        return put(Bundle.open(copy), name, precision, model, **more)

    return replace
