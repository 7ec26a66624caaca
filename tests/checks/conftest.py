"""Bundles to judge, and broken ones: the digits and, where it is, the CIFAR-10 network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from tests.artifacts import Copy, Subject, put, subject_of
from van_deploy.bundle import Bundle

Broken = Callable[..., Bundle]


@pytest.fixture(scope="session")
def digits(precisions_bundle: Path, heldout_200: Path) -> Subject:
    """Return the digits' bundle; it must not be changed."""
    return subject_of(precisions_bundle, heldout_200)


@pytest.fixture
def broken(copy_of: Copy) -> Broken:
    """Return a function that puts a broken graph in the place of an artefact, in a copy."""

    def replace(
        whole: Subject, name: str, precision: str, model: ModelProto, **more: Any
    ) -> Bundle:
        if name == "int8":  # what was recorded when the right one was made stays recorded
            more = {"quantization": whole.bundle.artefact("int8").quantization, **more}
        return put(Bundle.open(copy_of(whole, "broken")), name, precision, model, **more)

    return replace
