"""Output of commands: JSON, tables, notes and errors."""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from van_deploy.cli.console import print_error, print_note, print_result, progress_bar
from van_deploy.documents import plain
from van_deploy.report.document import checks_table, table

Printed = pytest.CaptureFixture[str]
Colour = Enum("Colour", {"RED": "red"})
HOSTILE = "\x1b]0;mine\x07\x1b[2J\x9b31mcat\u202egod\r"


def test_plain_converts_every_type_of_a_result() -> None:
    value = {
        "numbers": [math.inf, -math.inf, math.nan, np.float32(0.5), np.int64(3)],
        "logits": np.array([[1.0, math.nan]]),
        Colour.RED: (Path("a") / "b", None, True, 1, Colour.RED),
    }
    expected = {"numbers": ["inf", "-inf", "nan", 0.5, 3], "logits": [[1.0, "nan"]]}
    expected["Colour.RED"] = ["a/b", None, True, 1, "red"]
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain({"error": object()})


def test_output_is_a_table_or_one_json_document(capsys: Printed) -> None:
    rows = {"name": HOSTILE, "é": 1, "[bold]": 2}
    columns = "name = name name; [bold] = é d"
    with progress_bar("Loading") as progress:  # prints nothing without a terminal
        progress("Downloading", 1, 2)
    print_result(rows, as_json=False, blocks=lambda document: table([document], columns))
    print_error(HOSTILE, HOSTILE)
    print_note(HOSTILE)
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["name", "[bold]"]
    assert err.count("\n") == 3
    for text in (out, err):
        assert "cat" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)
    print_result(rows, as_json=True, blocks=list)
    text = capsys.readouterr().out
    assert json.loads(text) == rows
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "é" in text


def test_checks_have_their_state_in_front(capsys: Printed) -> None:
    checks = [(True, "SQNR", ""), ("failed", "top-1", "[bold]3 of 8 differ"), (None, "x", "no GPU")]
    print_result(checks, as_json=False, blocks=checks_table)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["PASS", "FAIL", "SKIPPED"]
    assert lines[1].endswith("[bold]3 of 8 differ")
