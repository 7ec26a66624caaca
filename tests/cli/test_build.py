"""``van-deploy build``, with the real builder of TensorRT for RTX."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.manifest_parts import artifact_entry, network_info
from van_deploy.bundle import Bundle, edit_bundle
from van_deploy.environment.hardware import nvidia_driver

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install tensorrt-rtx-cu13)",
)


@pytest.fixture
def bundle(digits_onnx: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "van_digits"
    with edit_bundle(folder, name="van_digits") as draft:
        draft.file("model.onnx").write_bytes(digits_onnx.read_bytes())
        draft.record(artifact_entry("fp32", "onnx", "fp32", "model.onnx"))
        draft.description = network_info("van_digits")
    return folder


def test_build_for_two_targets(cli: Cli, bundle: Path) -> None:
    result = cli("build", bundle, "--target", "sm_86,sm_89", "--json")
    assert result.exit_code == 0
    first, second = json.loads(result.stdout)["outcomes"]
    assert [one["cell"]["targets"] for one in (first, second)] == [["sm_86"], ["sm_89"]]
    assert first["outcome"] == "built"
    assert first["sidecar"]["options"]["profiles"] == ["1:2:4"]
    artifacts = Bundle.open(bundle).artifacts
    engines = [name for name, artifact in artifacts.items() if artifact.kind == "engine"]
    assert engines == [first["engine"], second["engine"]]
    again = cli("build", bundle, "--target", "sm_86")
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-1].split()[:2] == ["HERE", first["engine"]]
    other = cli("build", bundle, "--target", "sm_86", "--batch", "1:1:1", "--force", "--json")
    assert json.loads(other.stdout)["outcomes"][0]["sidecar"]["options"]["profiles"] == ["1:1:1"]


@each(
    ("options", "message"),
    [
        ("--target ada", "error: '--target' is 'ada': it should be compute capabilities"),
        ("--batch 8:4:1", "error: The batch range 8:4:1 is not min <= opt <= max.\n  Giv"),
        ("--workspace lots", "error: '--workspace' is 'lots': it should be a number and a unit"),
        ("--workspace 900TiB", "is larger than the"),
        ("--optimization-level 9", "'--optimization-level' is 9: it should be less than or eq"),
        ("--target sm_90 --backend tensorrt-rtx", "does not build for sm_90"),
        ("--version-compatible", "has no --version-compatible"),
        ("--timing-cache x", "has no --timing-cache"),
        ("--hardware-compatibility ampere-plus", "has no --hardware-compatibility"),
        ("--on ray", "--on needs --matrix"),
    ],
)
def test_invalid_requests(cli: Cli, bundle: Path, options: str, message: str) -> None:
    target = () if "--target" in options else ("--target", "sm_89")
    result = cli("build", bundle, *target, *options.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (bundle / "engines").exists()


@pytest.mark.skipif(nvidia_driver() is not None, reason="there is an NVIDIA driver here")
def test_build_without_target_needs_a_gpu(cli: Cli, bundle: Path) -> None:
    result = cli("build", bundle)
    assert result.exit_code == 2
    assert "needs a target GPU, and none is given" in result.stderr


def test_missing_precision_is_made_first(
    cli: Cli, copy_bundle: Copy, digits_bundle: Bundle
) -> None:
    bundle = copy_bundle(digits_bundle)
    manifest = bundle / "manifest.json"  # of a network without built-in images
    manifest.write_text(manifest.read_text().replace('"name": "van_digits"', '"name": "mine"'))
    words = ("build", bundle, "--target", "sm_89", "--precision")
    refused = cli(*words, "int8")
    assert refused.exit_code == 5
    assert "has no artifact 'int8'; it has: fp32." in refused.stderr
    assert f"Create it with `van-deploy quantize {bundle} --precision int8`." in refused.stderr
    assert "Or give --images DIR to make it in this command." in refused.stderr
    made = cli(*words, "fp16")
    assert made.exit_code == 0
    assert "fp16: not in the bundle; made as with" in made.stderr
