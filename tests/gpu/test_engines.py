"""Packages and plans on a GPU: built, verified, and compared with Polygraphy's runner."""

import os
from pathlib import Path

import numpy as np
import pytest

import van_deploy
from tests.gpu.cases import Digits, build_plan, require_cuda_provider
from van_deploy.config import BatchRange
from van_deploy.engine.backend import RTX, Backend, detect_host
from van_deploy.engine.inspect import describe_engine
from van_deploy.runners.tensorrt import TensorRtRunner


@pytest.mark.gpu
def test_package_is_built_verified_and_reused(digits: Digits) -> None:
    bundle = van_deploy.open_bundle(digits.bundle.path)
    first, second = (bundle.build(backend="inductor", precisions=["fp16"]) for _ in range(2))
    assert first.outcomes[0].package is not None
    assert first.outcomes[0].package.targets == (detect_host().target,)
    assert second.outcomes[0].outcome == "reused"
    report = bundle.verify(artifacts=[first.outcomes[0].engine])
    assert report.passed


@pytest.mark.gpu
def test_bundle_is_verified_by_onnxruntime_on_the_gpu(digits: Digits) -> None:
    require_cuda_provider()
    bundle = van_deploy.open_bundle(digits.bundle.path)
    assert bundle.verify(runner="ort-cuda", artifacts=["fp32", "fp16", "int8"]).passed


@pytest.fixture(scope="module")
def plan(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backend]:
    """Return a plan of the FP32 graph, without TF32, for this machine's GPU, and its backend."""
    folder, graph = tmp_path_factory.mktemp("plan"), digits.bundle.verified_path("fp32")
    return build_plan(folder, "fp32", graph, profiles=(BatchRange(1, 4, 8),))


@pytest.mark.gpu
def test_plan_agrees_with_polygraphy(
    plan: tuple[Path, Backend], digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's runner is an independent reference with the same plan and the same images."""
    path, backend = plan
    if backend.name == RTX:
        monkeypatch.setitem(os.environ, "POLYGRAPHY_USE_TENSORRT_RTX", "1")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    with TensorRtRunner(path) as ours:
        logits = ours.run(digits.images)
    with TrtRunner(EngineFromBytes(path.read_bytes())) as theirs:
        expected = theirs.infer({"images": digits.images})["logits"]
        np.testing.assert_array_equal(logits, np.asarray(expected))


@pytest.mark.gpu
def test_plan_memory_is_freed(plan: tuple[Path, Backend], digits: Digits) -> None:
    from cuda.bindings import runtime

    def run_once() -> None:
        with TensorRtRunner(plan[0]) as opened:
            opened.run(digits.images)

    run_once()  # allocates the permanent memory of CUDA and TensorRT
    before = int(runtime.cudaMemGetInfo()[1])
    for _ in range(5):
        run_once()
    assert before - int(runtime.cudaMemGetInfo()[1]) < 16 << 20


@pytest.mark.gpu
def test_layers_have_the_names_of_pytorch_modules(plan: tuple[Path, Backend]) -> None:
    description = describe_engine(plan[0])
    assert not description.obstacles
    assert "block1" in " ".join(f"{layer.name} {layer.nodes}" for layer in description.layers)
