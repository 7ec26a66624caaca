"""Network: inputs of each kind of artifact, supported batch sizes, and reasons to skip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.manifest_parts import artifact_entry
from van_deploy.bundle import Bundle, Origin, edit_bundle
from van_deploy.config import BatchRange, RunnerSettings
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import BundleError, MissingDependency
from van_deploy.manifest import EngineInfo
from van_deploy.runners.network import Network, SkipReason

CUDA, TRUSTING = RunnerSettings(runner="ort-cuda"), RunnerSettings(trust_engine=True)
PIXELS = np.arange(11 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(11, 64, 64, 3)


def has_gpu() -> bool:
    driver = nvidia_driver()
    return driver is not None and bool(driver.gpus)


@pytest.fixture
def bundle(uint8_bundle: Bundle, copy_bundle: Copy) -> Bundle:
    """Return a copy of the digits bundle with the entry of an engine of the uint8 graph."""
    folder = copy_bundle(uint8_bundle)
    profiles = (BatchRange(1, 1, 1), BatchRange(4, 4, 6))
    backend = "tensorrt 10.16.1.11"
    with edit_bundle(folder) as draft:
        for name in ("e.plan", "e.json"):
            draft.file(f"engines/{name}").write_bytes(b"bytes")
        made_from = Origin(name="fp32-uint8", sha256=draft.artifacts["fp32-uint8"].sha256)
        facts = EngineInfo(backend=backend, targets=("sm_89",), profiles=profiles, parser_layers=1)
        files = ("engines/e.plan", "engines/e.json")
        draft.record(
            artifact_entry(
                "e", "engine", "fp32", files[0], files, made_from=made_from, engine=facts
            )
        )
    return Bundle.open(folder)


def test_embedded_graphs_and_their_engines_take_bytes(bundle: Bundle) -> None:
    with Network(bundle, "fp32") as plain, Network(bundle, "fp32-uint8") as bytes_in:
        assert plain.supports_batch(3)
        np.testing.assert_allclose(
            bytes_in.logits(PIXELS), plain.logits(PIXELS), rtol=1e-5, atol=1e-5
        )
    engine = Network(bundle, "e")
    assert (engine.runner, engine.is_engine, engine.embedding) == ("tensorrt", True, "uint8")
    assert (engine.input.dtype, engine.input.shape) == ("uint8", (64, 64, 3))
    assert engine.max_batch == 6
    assert [n for n in range(9) if engine.supports_batch(n)] == [1, 4, 5, 6]


class Recorder:
    """Records batch sizes instead of TensorRT, which accepts no batch outside the profiles."""

    def __init__(self, engine: Network) -> None:
        self.engine, self.batches = engine, list[int]()

    def run_all(self, batch: Any) -> dict[str, Any]:
        assert self.engine.supports_batch(len(batch))
        self.batches.append(len(batch))
        return {"logits": batch.reshape(len(batch), -1)[:, :5].astype(np.float32)}


@each(("rows", "batches"), [(1, [1]), (2, [4]), (4, [4]), (6, [6]), (7, [6, 1]), (9, [6, 4])])
def test_engine_batches_are_padded_or_split(bundle: Bundle, rows: int, batches: list[int]) -> None:
    engine = Network(bundle, "e")
    engine.loaded_runner = recorder = Recorder(engine)
    logits = engine.logits(PIXELS[:rows])
    assert recorder.batches == batches
    np.testing.assert_array_equal(logits, PIXELS[:rows].reshape(rows, -1)[:, :5])


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_skip_reasons_without_a_gpu(bundle: Bundle, cli: Cli) -> None:
    assert Network(bundle, "fp32").skip_reason() is None
    assert Network(bundle, "e").skip_reason() == SkipReason(
        "engines", "engine not executed: no GPU"
    )
    cuda = Network(bundle, "fp32", CUDA).skip_reason()
    assert cuda is not None
    assert cuda.kind == "runtimes"
    assert cuda.reason in {
        "no CUDAExecutionProvider in the installed ONNX Runtime",
        "CUDAExecutionProvider finds no GPU cuda:0",
    }
    with pytest.raises(MissingDependency), Network(bundle, "fp32", CUDA):
        pass
    image = bundle.path / "golden/0.png"
    for words in (("predict", bundle.path, image), ("serve", bundle.path, "--port", "0")):
        result = cli(*words, "--runner", "ort-cuda")
        assert result.exit_code == 3
        assert "CUDAExecutionProvider" in result.stderr


def test_missing_artifacts_sidecars_and_backends(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no artifact 'fp8'"):
        Network(bundle, "fp8")
    (bundle.path / "engines/e.json").unlink()
    with pytest.raises(BundleError, match=r"e\.json' is in the manifest, but the file is missing"):
        Network(bundle, "e").__enter__()
    with pytest.raises(MissingDependency):  # the plan is accepted; its backend is missing
        Network(bundle, "e", TRUSTING).__enter__()
    (bundle.path / "engines/e.plan").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"e\.plan"):
        Network(bundle, "e", TRUSTING).__enter__()
