"""``van-deploy quantize``: its tables, its JSON, and its exit codes."""

from dataclasses import replace

import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
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
