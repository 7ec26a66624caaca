"""``van-deploy quantize``, and ``build`` with the real builder of TensorRT for RTX."""

import json
from dataclasses import replace

import pytest

from tests.artifacts import Copy
from tests.cli.conftest import HAS_RTX
from tests.conftest import Cli
from tests.json_documents import edit_json
from van_deploy.bundle import Bundle
from van_deploy.checks import gates
from van_deploy.cli.console import print_result
from van_deploy.report.sections_checks import quantize_blocks


def test_int8_prints_three_precisions_and_a_recommendation(
    cli: Cli,
    copy_bundle: Copy,
    digits_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--no-bias-correction", "--no-equalize", "--threads", 1)
    command = ("quantize", copy_bundle(digits_bundle), *options)
    result = cli(*command)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.partition("evaluated on")[0].splitlines()]
    assert [words[0] for words in lines if words[-1:] == ["PASS"]] == ["FP16", "INT8"]
    assert "recommended             speed not measured: " in result.stdout
    judged = "102 held-out images of 512 of 1437 training images of handwritten digits"
    assert f"evaluated on            {judged}" in result.stdout
    assert "int8: built: new" in result.stderr
    assert "int8: reused: " in cli(*command).stderr
    found = cli.document(*command)
    assert (found["artifact"], found["passed"]) == ("int8", True)
    row = found["facts"]["comparison"][-1]
    top1, (low, high) = row["correct"] / row["images"], row["top1_interval"]
    assert low < top1 <= high
    # The largest numbers of a VAN still fit a pipe, and the reason of exit code 1 is shown.
    row.update(size_bytes=123 << 20, ms_per_image=116.06)
    found["facts"]["golden_check"]["findings"][0].update(outcome="inconclusive", message="odd")
    print_result(found, as_json=False, blocks=quantize_blocks)
    text = capsys.readouterr().out
    (words,) = (line.split() for line in text.splitlines() if line.startswith("INT8"))
    assert words[:3] == ["INT8", "123.0", "MiB"]
    shown = f"{100 * top1:.2f} {100 * low:.2f} to {100 * high:.2f} 116.06 PASS"
    assert words[-6:] == shown.split()
    assert "INCONCLUSIVE  SQNR: odd" in text
    limits = replace(gates.CLASSES["int8"], sqnr_db=90.0)
    monkeypatch.setitem(gates.CLASSES, "int8", limits)
    assert "INT8 fails its gate: " in cli.fails(1, *command, "--method", "minmax")


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT for RTX is not installed")
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
