"""ONNX Runtime's GPU providers: refused with a reason where they would fall back to the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from van_deploy.errors import MissingDependency
from van_deploy.metrics import compare
from van_deploy.model.checkpoint import load_van
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner, require_onnxruntime

ON_GPUS = {"ort-cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}


@pytest.fixture
def model(digits_onnx: Path) -> Path:
    return digits_onnx


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_provider_that_is_not_built_in(name: str, model: Path) -> None:
    ort = require_onnxruntime()
    runner = OnnxRuntimeRunner(model, name=name)
    provider = ON_GPUS[name]
    if provider in ort.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(MissingDependency) as caught:
        runner.__enter__()
    assert caught.value.message.startswith(
        f"This ONNX Runtime ({ort.__version__}) has no {provider}; it has "
    )
    assert "onnxruntime-gpu" in caught.value.remedy
    assert caught.value.exit_code == 3


def test_a_silent_fall_back_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with onnxruntime-gpu on a machine without CUDA: it claims, warns, and uses the CPU."""
    ort = require_onnxruntime()
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA: the provider would really start")
    claimed = [*ort.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: claimed)
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(MissingDependency) as caught,
    ):
        OnnxRuntimeRunner(model, name="ort-cuda").__enter__()
    assert caught.value.message == (
        "ONNX Runtime has CUDAExecutionProvider but could not start it, and would have run on "
        "CPUExecutionProvider without a word."
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPUS)
def test_agreement_on_a_gpu(name: str, model: Path) -> None:
    loaded = load_van("van_digits")
    shape = (5, loaded.config.in_chans, 32, 32)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.inference_mode():
        expected = loaded.model(torch.from_numpy(images)).numpy()
    try:
        with OnnxRuntimeRunner(model, name=name) as runner:
            found = compare(expected, runner.run(images))
    except MissingDependency as error:
        pytest.skip(error.message)
    assert found.sqnr_db >= 50  # TF32 is on by default
    assert found.top1_agreement == 1.0
