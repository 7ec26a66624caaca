"""Network: inputs of each kind of artifact, supported batch sizes, and reasons to skip."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Cli
from tests.each import each
from tests.plans import PlanMaker
from van_deploy.bundle import Bundle
from van_deploy.config import RunnerSettings
from van_deploy.engine.backend import detect_host
from van_deploy.errors import BundleError, ConversionError, MissingDependency
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.runners.base import Outputs
from van_deploy.runners.network import Network, SkipReason, TensorSpec
from van_deploy.runners.pytorch import single_torch_thread, torch_errors
from van_deploy.serve.predict import predict

PLAN = "plan-sm_89"
PIXELS = np.arange(11 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(11, 64, 64, 3)


@pytest.fixture
def bundle(with_plans: PlanMaker) -> Bundle:
    return with_plans(profiles="1:1:1,4:4:6", graph="fp32-uint8")


def test_embedded_graphs_and_their_engines_take_bytes(bundle: Bundle) -> None:
    with Network(bundle, "fp32") as plain, Network(bundle, "fp32-uint8") as bytes_in:
        np.testing.assert_allclose(
            bytes_in.logits(PIXELS), plain.logits(PIXELS), rtol=1e-5, atol=1e-5
        )
    engine = Network(bundle, PLAN)
    assert (engine.runner, engine.is_engine, engine.embedding) == ("tensorrt", True, "uint8")
    assert engine.input == TensorSpec("pixels", "uint8", (64, 64, 3))


def batches_of(engine: Network) -> list[int]:
    """Return a list to which each run adds its batch; TensorRT accepts none outside profiles."""
    ran = list[int]()

    def run_all(batch: Any) -> dict[str, Any]:
        ran.append(len(batch))
        return {"logits": batch.reshape(len(batch), -1)[:, :5].astype(np.float32)}

    engine.loaded_runner = SimpleNamespace(run_all=run_all)
    return ran


@each(("rows", "batches"), [(1, [1]), (2, [4]), (4, [4]), (6, [6]), (7, [6, 1]), (9, [6, 4])])
def test_engine_batches_are_padded_or_split(bundle: Bundle, rows: int, batches: list[int]) -> None:
    engine = Network(bundle, PLAN)
    ran = batches_of(engine)
    logits = engine.logits(PIXELS[:rows])
    assert ran == batches
    np.testing.assert_array_equal(logits, PIXELS[:rows].reshape(rows, -1)[:, :5])


def test_default_batch_of_predict_is_one_that_the_engine_takes(with_plans: PlanMaker) -> None:
    engine = Network(with_plans(profiles="1:1:1"), PLAN)
    ran = batches_of(engine)
    images = [engine.bundle.path / "golden/0.png"] * 3  # the bundle's optimum is two
    assert len([*predict(engine, images, top=1)]) == sum(ran)
    assert ran == [1, 1, 1]


@each("name", ["logits", "probabilities", TOP_PROBABILITIES])
@each("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_have_no_classes(
    bundle: Bundle, name: str, value: float
) -> None:
    values = np.zeros((3, 5), np.float32)
    values[1, 4] = value
    outputs: Outputs = {name: values, TOP_CLASSES: np.zeros((3, 5), np.int64)}
    with pytest.raises(ConversionError, match="NaN or infinite values for 1 of 3 images"):
        Network(bundle, "fp32").top_classes(outputs, 2)


@pytest.mark.skipif(detect_host().gpu is not None, reason="this machine has a GPU")
def test_skip_reasons_without_a_gpu(bundle: Bundle, cli: Cli) -> None:
    assert Network(bundle, "fp32").skip_reason() is None
    no_gpu = SkipReason("engines", "engine not executed: no GPU")
    assert Network(bundle, PLAN).skip_reason() == no_gpu
    cuda = Network(bundle, "fp32", RunnerSettings(runner="ort-cuda")).skip_reason()
    assert cuda in (
        SkipReason("runtimes", "no CUDAExecutionProvider in the installed ONNX Runtime"),
        SkipReason("runtimes", "CUDAExecutionProvider finds no GPU cuda:0"),
    )
    image = bundle.path / "golden/0.png"
    for words in (("predict", bundle.path, image), ("serve", bundle.path, "--port", "0")):
        assert "CUDAExecutionProvider" in cli.fails(3, *words, "--runner", "ort-cuda")


@each(
    ("text", "kind", "message"),
    [
        ("CUDA out of memory. Tried to allocate", MissingDependency, "GPU is out of memory"),
        ("CUDA error: x\nmore", ConversionError, r"PyTorch failed \(a batch of 2\): CUDA error: x"),
        ("cuDNN error: CUDNN_STATUS", ConversionError, "cuDNN error: CUDNN_STATUS"),
        ("run() API call failed at model.h, line 1", ConversionError, "API call failed at"),
        ("a bug in this program", RuntimeError, "a bug in this program"),
    ],
)
def test_failures_of_pytorch_become_project_errors(text: str, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message), torch_errors("a batch of 2"):
        raise RuntimeError(text)


def test_threads_of_the_original_network(bundle: Bundle) -> None:
    with single_torch_thread():  # restores the number
        torch.set_num_threads(2)
        with Network(bundle, "pytorch", threads=1):
            assert torch.get_num_threads() == 1


def test_missing_artifacts_sidecars_and_backends(bundle: Bundle) -> None:
    trusting = RunnerSettings(trust_engine=True)
    with pytest.raises(BundleError, match="has no artifact 'fp8'"):
        Network(bundle, "fp8")
    (bundle.path / "engines/plan-sm_89.json").unlink()
    with pytest.raises(BundleError, match=r"json' is in the manifest, but the file is missing"):
        Network(bundle, PLAN).__enter__()
    with pytest.raises(MissingDependency):  # the plan is accepted; its backend is missing
        Network(bundle, PLAN, trusting).__enter__()
    (bundle.path / "engines/plan-sm_89.plan").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"plan-sm_89\.plan"):
        Network(bundle, PLAN, trusting).__enter__()
