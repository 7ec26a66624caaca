"""Bundles for the checks, and broken bundles with a consistent manifest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import ModelProto

import van_deploy as vd
from tests.artifacts import Copy, Subject, add_artifact
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.files import file_sha256
from van_deploy.model.van import random_van
from van_deploy.model.variants import VanConfig

Broken = Callable[..., Bundle]


def overwrite_artifact(bundle: Bundle, name: str, model: ModelProto) -> Bundle:
    """Replace an artifact's graph and update only the digests in the manifest."""
    artifact, manifest = bundle.artifact(name), bundle.path / MANIFEST
    onnx.save(model, bundle.path / artifact.file)
    digest = file_sha256(bundle.path / artifact.file)
    manifest.write_text(manifest.read_text().replace(artifact.sha256, digest))
    return Bundle.open(bundle.path)


def spoil(path: Path, name: str, fault: Callable[[ModelProto], ModelProto]) -> None:
    """Give an artifact's graph a fault, and its file in the manifest the new digest."""
    bundle = Bundle.open(path)
    overwrite_artifact(bundle, name, fault(onnx.load(bundle.verified_path(name))))


def tiny_bundle(folder: Path, classes: int, problem: str = "", **options: Any) -> Path:
    """Return the bundle of a tiny network with random weights, 32 x 32 pixels."""
    config = VanConfig((8, 12, 16, 24), (1, 1, 1, 1), (4, 4, 2, 2), num_classes=classes)
    torch.save(random_van(config, seed=3).state_dict(), folder / "tiny.pth")
    if problem:
        described = {"model_type": "van", "problem_type": problem}
        (folder / "config.json").write_text(json.dumps(described))
    weights, bundle = folder / "tiny.pth", folder / "bundle"
    return vd.export(weights, bundle, image_size=32, batch="1:2:3", **options).path


@pytest.fixture
def broken(copy_bundle: Copy, tmp_path: Path) -> Broken:
    """Return a function that replaces an artifact's graph in a copy of a bundle.

    The records of the correct graph stay in the manifest; only the digests change.
    """

    def replace(
        whole: Subject, name: str, precision: str, model: ModelProto, **more: Any
    ) -> Bundle:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        copy = Bundle.open(copy_bundle(whole, "broken"))
        if name in copy.artifacts and not more:
            return overwrite_artifact(copy, name, model)
        return add_artifact(copy, name, precision, model, **more)

    return replace
