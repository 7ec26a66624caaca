"""``van-deploy quantize``: its tables, its JSON, and its exit codes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks import gates
from van_deploy.model.embedded import EMBEDDED_WEIGHTS

FAST = ("--no-bias-correction", "--no-equalize", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(digits_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("quantize") / "van_digits"
    return Path(shutil.copytree(digits_bundle.path, copy))


def test_int8_prints_three_precisions_and_a_recommendation(cli: Cli, bundle: Path) -> None:
    result = cli("quantize", bundle, *FAST)
    assert result.exit_code == 0
    table, _ = result.stdout.split("evaluated on")
    words = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert [word for word in words if word[-1].isdigit()] == ["FP32", "FP16", "INT8"]
    assert "recommended             speed not measured: " in result.stdout
    judged = "102 held-out images of 512 of 1437 training images of handwritten digits"
    assert f"evaluated on            {judged}" in result.stdout
    assert "int8: built: new" in result.stderr
    again = cli("quantize", bundle, *FAST, "--json")
    assert "int8: reused: " in again.stderr
    found = json.loads(again.stdout)
    assert (found["artifact"], found["passed"]) == ("int8", True)
    row = found["facts"]["comparison"][1]
    assert row["top1_interval"][0] < row["correct"] / row["images"] <= row["top1_interval"][1]


def test_export_refuses_int8_without_images_before_it_writes(cli: Cli, tmp_path: Path) -> None:
    weights = shutil.copy(EMBEDDED_WEIGHTS, tmp_path / "mine.safetensors")
    result = cli("export", weights, "--output", tmp_path / "mine", "--precision", "int8")
    assert result.exit_code == 5
    assert "INT8 needs calibration images, and none were given." in result.stderr
    assert not (tmp_path / "mine").exists()


def test_result_below_its_gate_exits_with_1(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(gates.CLASSES["int8"], sqnr_db=90.0)
    monkeypatch.setitem(gates.CLASSES, "int8", limits)
    result = cli("quantize", bundle, "--method", "minmax", *FAST)
    assert result.exit_code == 1
    assert "INT8 fails its gate: " in " ".join(result.stdout.split())


@each(
    ("words", "code", "message"),
    [
        ("--precision int4", 2, "error: '--precision' is 'int4': it should be 'fp16', 'bf16' or"),
        ("--target cpu --precision fp16", 2, "error: FP16 is not useful for --target cpu: ONNX"),
        ("--calibration none", 5, "error: There is no calibration set called 'none'."),
        ("--scope resnet", 2, "error: The scope 'resnet' is none of pointwise"),
        ("--keep block9", 2, "error: 'block9' matches no module or node to keep in FP32."),
        ("--images /nowhere", 5, "error: '/nowhere' cannot be read: No such file"),
    ],
)
def test_invalid_requests(cli: Cli, bundle: Path, words: str, code: int, message: str) -> None:
    result = cli("quantize", bundle, *FAST, *words.split())
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
