"""``van-deploy build``, with the real builder of TensorRT for RTX."""

import json

import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.json_documents import edit_json
from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import nvidia_driver

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@each(
    ("options", "message"),
    [
        ("--target sm_90 --backend tensorrt-rtx", "does not build for sm_90"),
        ("--target sm_89 --version-compatible", "has no --version-compatible"),
        ("--target sm_89 --timing-cache x", "has no --timing-cache"),
        ("--target sm_89 --hardware-compatibility ampere-plus", "has no --hardware-compatibility"),
        *[("", "needs a target GPU, and none is given")] * (nvidia_driver() is None),
    ],
)
def test_unsupported_options_write_nothing(
    cli: Cli, digits_bundle: Bundle, options: str, message: str
) -> None:
    assert message in cli.fails(2, "build", digits_bundle.path, *options.split())


def test_missing_precision_is_made_and_built_for_two_targets(
    cli: Cli, copy_bundle: Copy, digits_bundle: Bundle
) -> None:
    bundle = copy_bundle(digits_bundle)
    edit_json(bundle / "manifest.json", "name", "mine")  # a network without built-in images
    refused = cli.fails(5, "build", bundle, "--target", "sm_89", "--precision", "int8")
    assert "has no artifact 'int8'; it has: fp32." in refused
    assert f"`van-deploy quantize {bundle} --precision int8`." in refused
    assert "Or give --images DIR to make it in this command." in refused
    words = ("build", bundle, "--precision", "fp16", "--target")
    result = cli(*words, "sm_86,sm_89", "--json")
    assert "fp16: not in the bundle; made as with" in result.stderr
    first, second = json.loads(result.stdout)["outcomes"]
    assert [one["cell"]["targets"] for one in (first, second)] == [["sm_86"], ["sm_89"]]
    assert (first["outcome"], first["sidecar"]["options"]["profiles"]) == ("built", ["1:2:8"])
    artifacts = Bundle.open(bundle).artifacts
    assert list(artifacts) == ["fp32", "fp16", first["engine"], second["engine"]]
    again = cli.passes(*words, "sm_86").splitlines()[-1]
    assert again.split()[:2] == ["HERE", first["engine"]]
    (other,) = cli.document(*words, "sm_86", "--batch", "1:1:1", "--force")["outcomes"]
    assert other["sidecar"]["options"]["profiles"] == ["1:1:1"]
