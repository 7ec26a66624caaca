"""Bundles to judge, and broken ones whose manifest vouches for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto

from tests.artifacts import Copy, Subject, put
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.files import file_sha256

Broken = Callable[..., Bundle]


def overwritten(bundle: Bundle, name: str, model: ModelProto) -> Bundle:
    """Return the bundle with another graph in an artefact's file, and only digests rewritten."""
    right = bundle.artefact(name)
    onnx.save(model, bundle.path / right.file)
    manifest = bundle.path / MANIFEST
    new = file_sha256(bundle.path / right.file)
    manifest.write_text(manifest.read_text().replace(right.sha256, new))
    return Bundle.open(bundle.path)


@pytest.fixture
def broken(copy_of: Copy, tmp_path: Path) -> Broken:
    """Return a function that puts a broken graph in the place of an artefact, in a new copy.

    What was recorded when the right one was made stays recorded: only digests are rewritten.
    """

    def replace(
        whole: Subject, name: str, precision: str, model: ModelProto, **more: Any
    ) -> Bundle:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        copy = Bundle.open(copy_of(whole, "broken"))
        if name in copy.artefacts and not more:
            return overwritten(copy, name, model)
        return put(copy, name, precision, model, **more)

    return replace
