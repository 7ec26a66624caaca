"""What commands print with: JSON that any reader takes, tables, and silence in pipes."""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from van_deploy.cli.console import emit, print_error, remark, telling
from van_deploy.documents import plain
from van_deploy.report.document import checks_table, table


class Colour(Enum):
    """An enum, as results hold them."""

    RED = "red"


def test_plain_takes_what_results_are_made_of() -> None:
    value = {
        "sqnr_db": math.inf,
        "error": np.float32(0.5),
        "count": np.int64(3),
        "logits": np.array([[1.0, math.nan]]),
        Colour.RED: {"path": Path("a") / "b", "none": None, "yes": True},
        "list": (1, [2.5, -math.inf]),
        "colour": Colour.RED,
    }
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == {
        "sqnr_db": "inf",
        "error": 0.5,
        "count": 3,
        "logits": [[1.0, "nan"]],
        "Colour.RED": {"path": "a/b", "none": None, "yes": True},
        "list": [1, [2.5, "-inf"]],
        "colour": "red",
    }


def test_plain_refuses_what_has_no_plain_form() -> None:
    with pytest.raises(TypeError, match="object has no plain form"):
        plain({"error": object()})


def test_emit_writes_the_table_or_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"name": "van_b1", "blocks": 10}
    emit(result, as_json=True, blocks=list)
    emit(result, as_json=False, blocks=lambda r: table([r], "name = name name; blocks = blocks d"))
    out = capsys.readouterr().out
    document, shown = out.split("}\n")
    assert json.loads(document + "}") == result
    assert shown == "name    blocks\n──────────────\nvan_b1      10\n"


def test_verdicts_are_words_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        (True, "agreement", "SQNR 96.2 dB"),
        ("failed", "top-1", "[bold]3 of 8 differ"),
        (None, "engine", "no GPU here"),
    ]
    emit(checks, as_json=False, blocks=checks_table)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["PASS", "FAIL", "SKIPPED"]
    assert lines[3].endswith("[bold]3 of 8 differ")


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with telling("Loading") as tell:
        tell("Downloading", 1, 2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_remarks_and_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    remark("reused model.onnx [same weights]")
    print_error("No such file.", "Check the path.\nOr pass another.")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "reused model.onnx [same weights]\n"
        "error: No such file.\n  Check the path.\n  Or pass another.\n"
    )


HOSTILE = "\x1b]0;mine\x07\x1b[2J\x9b31mcat\u202egod\r"


def test_text_from_a_file_does_not_reach_a_terminal_as_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    emit({"name": HOSTILE}, False, lambda result: table([result], "name = name"))
    print_error(HOSTILE, HOSTILE)
    remark(HOSTILE)
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "cat" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)


def test_json_escapes_every_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"name": HOSTILE, "é": 1}, True, list)
    text = capsys.readouterr().out
    assert json.loads(text) == {"name": HOSTILE, "é": 1}
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "é" in text
