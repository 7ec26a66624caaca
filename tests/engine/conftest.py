"""The real TensorRT for RTX, small real networks, and a bundle to build from."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto

from tests.artifacts import SMALL_SIZE
from tests.described import described, entry
from van_deploy.bundle import writing
from van_deploy.engine.backend import RTX, Backend, backend_named
from van_deploy.model.preprocess import OFFICIAL

BundleMaker = Callable[[str], Path]


@pytest.fixture(scope="session")
def rtx() -> Backend:
    """Return TensorRT for RTX, which builds on any machine."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed (pip install tensorrt-rtx-cu13)")
    return backend_named(RTX)


@pytest.fixture(scope="session")
def digits_graph(digits_onnx: Path) -> ModelProto:
    """Return the embedded network as an ONNX graph with a free batch, 32 pixels."""
    return onnx.load(digits_onnx)


@pytest.fixture
def graph(digits_graph: ModelProto) -> ModelProto:
    """Return a copy of that graph to spoil."""
    return copy.deepcopy(digits_graph)


@pytest.fixture
def new_bundle(digits_onnx: Path, tmp_path: Path) -> BundleMaker:
    """Return a function that makes a bundle with an FP32 file."""

    def make(name: str = "van_digits") -> Path:
        folder = tmp_path / "dist" / name
        with writing(folder, name=name) as draft:
            draft.file("model.onnx").write_bytes(digits_onnx.read_bytes())
            draft.record(entry("fp32", "onnx", "fp32", "model.onnx"))
            preprocessing = replace(OFFICIAL, image_size=SMALL_SIZE)
            draft.description = described(name, preprocessing=preprocessing)
        return folder

    return make
