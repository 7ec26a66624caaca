"""One face for every artefact: what it takes, what it serves, what keeps it from running."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import Cli
from tests.described import entry
from tests.each import each
from van_deploy.bundle import Bundle, Origin, writing
from van_deploy.config import BatchRange
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import BundleError, MissingDependency, UsageError
from van_deploy.manifest import EngineFacts
from van_deploy.runners.network import RUNNERS, Network, Obstacle

PIXELS = np.arange(11 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(11, 64, 64, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the digits with FP16, both also taking bytes, and an entry of an engine."""
    from typer.testing import CliRunner

    from van_deploy.cli.app import app

    folder = tmp_path_factory.mktemp("network") / "van_digits"
    words = ["export", "van_digits", "--output", str(folder), "--batch", "1:2:4"]
    words += ["--precision", "fp16", "--precision", "fp16", "--embed-preprocess", "uint8"]
    words += ["--outputs", "probabilities,logits"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with writing(folder) as draft:
        for name in ("e.plan", "e.json"):
            draft.file(f"engines/{name}").write_bytes(b"bytes")
        draft.record(
            entry(
                *("e", "engine", "fp16", "engines/e.plan"),
                ("engines/e.plan", "engines/e.json"),
                made_from=Origin(name="fp16-uint8", sha256=draft.artefacts["fp16-uint8"].sha256),
                engine=EngineFacts(
                    backend="tensorrt 10.16.1.11",
                    targets=("sm_89",),
                    profiles=(BatchRange(1, 1, 1), BatchRange(4, 4, 6)),
                    parser_layers=1,
                ),
            )
        )
    return Bundle.open(folder)


def test_each_precision_has_its_graph_with_preprocessing(bundle: Bundle) -> None:
    assert list(bundle.artefacts) == ["fp32", "fp32-uint8", "fp16", "fp16-uint8", "e"]
    embedded = bundle.artefact("fp16-uint8")
    assert (embedded.kind, embedded.precision) == ("serving", "fp16")
    with Network(bundle, "fp16") as plain, Network(bundle, "fp16-uint8") as bytes_in:
        np.testing.assert_allclose(
            bytes_in.logits(PIXELS), plain.logits(PIXELS), rtol=1e-5, atol=1e-5
        )
        assert set(bytes_in.run(bytes_in.prepare(PIXELS))) == {"logits", "probabilities"}


def test_an_engine_takes_what_its_graph_took(bundle: Bundle) -> None:
    engine = Network(bundle, "e")
    assert (engine.runner, engine.is_engine, engine.embedding) == ("tensorrt", True, "uint8")
    assert (engine.input.dtype, engine.input.shape) == ("uint8", (64, 64, 3))
    assert engine.max_batch == 6
    assert [n for n in range(9) if engine.serves(n)] == [1, 4, 5, 6]


class Recorder:
    """Stands where TensorRT would, with its rule: no batch outside the profiles."""

    def __init__(self, engine: Network) -> None:
        self.engine, self.batches = engine, []  # type: ignore[var-annotated]

    def run_all(self, batch: Any) -> dict[str, Any]:
        assert self.engine.serves(len(batch))
        self.batches.append(len(batch))
        return {"logits": batch.reshape(len(batch), -1)[:, :5].astype(np.float32)}


@each(("rows", "batches"), [(1, [1]), (2, [4]), (4, [4]), (6, [6]), (7, [6, 1]), (9, [6, 4])])
def test_batches_an_engine_does_not_serve_are_filled_or_split(
    bundle: Bundle, rows: int, batches: list[int]
) -> None:
    engine = Network(bundle, "e")
    recorder = Recorder(engine)
    engine.opened = recorder
    found = engine.logits(PIXELS[:rows])
    assert recorder.batches == batches
    np.testing.assert_array_equal(found, PIXELS[:rows].reshape(rows, -1)[:, :5])


def test_what_keeps_it_from_running_here(bundle: Bundle) -> None:
    driver = nvidia_driver()
    if driver is not None and driver.gpus:
        pytest.skip("this machine has a GPU")
    assert Network(bundle, "fp32").obstacle() is None
    assert Network(bundle, "e").obstacle() == Obstacle("engines", "engine not executed: no GPU")
    cuda = Network(bundle, "fp32", runner="ort-cuda").obstacle()
    assert cuda is not None
    assert cuda.kind == "runtimes"
    assert cuda.reason in {
        "no CUDAExecutionProvider in the ONNX Runtime that is installed",
        "CUDAExecutionProvider finds no GPU cuda:0",
    }
    with pytest.raises(MissingDependency), Network(bundle, "fp32", runner="ort-cuda"):
        pass


def test_an_engine_whose_sidecar_is_gone(bundle: Bundle) -> None:
    sidecar = bundle.path / "engines" / "e.json"
    kept = sidecar.read_bytes()
    sidecar.unlink()
    try:
        with pytest.raises(BundleError, match=r"e\.json' is named in the manifest and missing"):
            Network(bundle, "e").__enter__()
        with pytest.raises(MissingDependency):  # the plan is admitted; its back end is not here
            Network(bundle, "e", trust_engine=True).__enter__()
        plan = bundle.path / "engines" / "e.plan"
        plan.write_bytes(b"other")
        with pytest.raises(BundleError, match=r"e\.plan"):
            Network(bundle, "e", trust_engine=True).__enter__()
        plan.write_bytes(b"bytes")
    finally:
        sidecar.write_bytes(kept)


def test_what_there_is_not(bundle: Bundle) -> None:
    with pytest.raises(UsageError) as caught:
        Network(bundle, runner="cuda")
    assert caught.value.remedy == f"Known: {', '.join(RUNNERS)}."
    with pytest.raises(BundleError, match="has no artefact 'fp8'"):
        Network(bundle, "fp8")


@pytest.mark.parametrize("command", ["predict", "serve"])
def test_the_commands_end_with_3_where_the_gpu_is_missing(
    cli: Cli, bundle: Bundle, command: str
) -> None:
    driver = nvidia_driver()
    if driver is not None and driver.gpus:
        pytest.skip("this machine has a GPU")
    words = [command, bundle.path]
    words += [bundle.path / "golden/0.png"] if command == "predict" else ["--port", "0"]
    result = cli(*words, "--runner", "ort-cuda")
    assert result.exit_code == 3
    assert "CUDAExecutionProvider" in result.stderr
