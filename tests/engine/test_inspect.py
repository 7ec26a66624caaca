"""Looking at engines: with their sidecar, without it, and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Cli
from van_deploy.config import BuildOptions
from van_deploy.engine.backend import Backend
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.host import host_here
from van_deploy.engine.inspect import layers_from_json
from van_deploy.engine.sidecar import Sidecar, sidecar_path


@pytest.fixture(scope="module")
def built(
    rtx: Backend, digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Sidecar]:
    plan = tmp_path_factory.mktemp("inspect") / "digits.plan"
    options = BuildOptions(targets=("sm_89",))
    sidecar = engine_from_onnx(digits_onnx, plan, backend=rtx, options=options, precision="fp32")
    return plan, sidecar


def without_gpu() -> None:
    if host_here().gpu:
        pytest.skip("this machine has a GPU, on which the plan may load")


def test_the_sidecar_and_the_log_tell_what_it_is(cli: Cli, built: tuple[Path, Sidecar]) -> None:
    without_gpu()
    plan, sidecar = built
    text = " ".join(cli("inspect", plan).stdout.split())
    for words in (
        f"sha256 {sidecar.plan_sha256}",
        f"backend tensorrt-rtx version {sidecar.backend_version}",
        "GPUs sm_89",
        "input images float N 3 32 32",
        "output logits float N 10",
        f"parser's layers {sidecar.parser_layers}",
        "this machine has no NVIDIA GPU that answers",
        "SKIPPED layers: only the engine's own GPU can load it",
        f"After dead-layer removal: {sidecar.parser_layers} layers",
    ):
        assert words in text, words


def test_as_json(cli: Cli, built: tuple[Path, Sidecar]) -> None:
    plan, sidecar = built
    (document,) = json.loads(cli("inspect", plan, "--json").stdout)
    assert document["plan_sha256"] == sidecar.plan_sha256
    assert document["plan_is_sound"] is True
    assert document["sidecar"]["inputs"] == [
        {"name": "images", "shape": [-1, 3, 32, 32], "dtype": "float"}
    ]


def test_a_plan_without_a_sidecar(cli: Cli, built: tuple[Path, Sidecar], tmp_path: Path) -> None:
    plan = Path(shutil.copy(built[0], tmp_path))
    refused = cli("inspect", plan)
    assert refused.exit_code == 5
    assert "has no sidecar" in refused.stderr
    assert "--trust-engine" in refused.stderr
    trusted = cli("inspect", plan, "--trust-engine")
    assert trusted.exit_code == 0
    assert "nothing says where this plan comes from" in trusted.stdout
    assert built[1].plan_sha256 in trusted.stdout


def test_trust_does_not_reach_beyond_a_sidecar_that_is_there(
    cli: Cli, built: tuple[Path, Sidecar], tmp_path: Path
) -> None:
    plan = Path(shutil.copy(built[0], tmp_path))
    shutil.copy(sidecar_path(built[0]), tmp_path)
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    result = cli("inspect", plan, "--trust-engine")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "SHA-256" in result.stderr or "digest" in result.stderr


def test_layers_of_any_version() -> None:
    text = json.dumps(
        {
            "Layers": [
                "plain",
                {
                    "Name": "fused",
                    "LayerType": "gemm",
                    "Outputs": [{"Format/Datatype": "Half"}],
                    "Metadata": "[ONNX Layer: stem.proj][ONNX Layer: stem.act]",
                },
                {"Name": "new", "Outputs": [{"Datatype": "FP8"}]},
            ]
        }
    )
    plain, fused, new = layers_from_json(text)
    assert (plain.name, plain.kind, plain.nodes) == ("plain", "", ())
    assert (fused.kind, fused.precision) == ("gemm", "Half")
    assert fused.nodes == ("stem.proj", "stem.act")
    assert new.precision == "FP8"
