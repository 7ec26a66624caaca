"""``van-deploy build``, with the real builder of TensorRT for RTX."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.artifacts import Copy
from tests.cli.conftest import edited
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import nvidia_driver

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install tensorrt-rtx-cu13)",
)


def test_build_for_two_targets(cli: Cli, copy_bundle: Copy, digits_bundle: Bundle) -> None:
    words = ("build", copy_bundle(digits_bundle), "--target")
    first, second = cli.document(*words, "sm_86,sm_89")["outcomes"]
    assert [one["cell"]["targets"] for one in (first, second)] == [["sm_86"], ["sm_89"]]
    assert (first["outcome"], first["sidecar"]["options"]["profiles"]) == ("built", ["1:2:8"])
    artifacts = Bundle.open(Path(words[1])).artifacts
    assert list(artifacts) == ["fp32", first["engine"], second["engine"]]
    again = cli(*words, "sm_86")
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-1].split()[:2] == ["HERE", first["engine"]]
    (other,) = cli.document(*words, "sm_86", "--batch", "1:1:1", "--force")["outcomes"]
    assert other["sidecar"]["options"]["profiles"] == ["1:1:1"]


@each(
    ("options", "message"),
    [
        ("sm_89 --workspace 900TiB", "is larger than the"),
        ("sm_90 --backend tensorrt-rtx", "does not build for sm_90"),
        ("sm_89 --version-compatible", "has no --version-compatible"),
        ("sm_89 --timing-cache x", "has no --timing-cache"),
        ("sm_89 --hardware-compatibility ampere-plus", "has no --hardware-compatibility"),
    ],
)
def test_unsupported_options_write_nothing(
    cli: Cli, digits_bundle: Bundle, options: str, message: str
) -> None:
    words = ("build", digits_bundle.path, "--target", *options.split())
    assert message in cli.fails(2, *words)


@pytest.mark.skipif(nvidia_driver() is not None, reason="there is an NVIDIA driver here")
def test_build_without_target_needs_a_gpu(cli: Cli, digits_bundle: Bundle) -> None:
    output = cli.fails(2, "build", digits_bundle.path)
    assert "needs a target GPU, and none is given" in output


def test_missing_precision_is_made_first(
    cli: Cli, copy_bundle: Copy, digits_bundle: Bundle
) -> None:
    bundle = copy_bundle(digits_bundle)
    with edited(bundle / "manifest.json") as manifest:
        manifest["name"] = "mine"  # a network without built-in images
    words = ("build", bundle, "--target", "sm_89", "--precision")
    refused = cli.fails(5, *words, "int8")
    assert "has no artifact 'int8'; it has: fp32." in refused
    assert f"`van-deploy quantize {bundle} --precision int8`." in refused
    assert "Or give --images DIR to make it in this command." in refused
    made = cli(*words, "fp16")
    assert made.exit_code == 0
    assert "fp16: not in the bundle; made as with" in made.stderr
