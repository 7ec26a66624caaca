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
    result = {"name": "van_b1", "blocks": 10}
    print_result(result, as_json=True, blocks=list)
    columns = "name = name name; blocks = blocks d"
    print_result(result, as_json=False, blocks=lambda document: table([document], columns))
    checks = [(True, "SQNR", ""), ("failed", "top-1", "[bold]3 of 8 differ"), (None, "x", "no GPU")]
    print_result(checks, as_json=False, blocks=checks_table)
    with progress_bar("Loading") as progress:  # prints nothing without a terminal
        progress("Downloading", 1, 2)
    out, err = capsys.readouterr()
    document, text = out.split("}\n")
    assert json.loads(document + "}") == result
    lines = text.splitlines()
    assert lines[:3] == ["name    blocks", "──────────────", "van_b1      10"]
    assert [line.split()[0] for line in lines[-3:]] == ["PASS", "FAIL", "SKIPPED"]
    assert lines[-2].endswith("[bold]3 of 8 differ")
    assert err == ""


def test_control_characters_are_not_printed(capsys: Printed) -> None:
    print_result({"name": HOSTILE}, False, lambda result: table([result], "name = name"))
    print_error(HOSTILE, HOSTILE)
    print_note(HOSTILE)
    for text in capsys.readouterr():
        assert "cat" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)
    print_result({"name": HOSTILE, "é": 1}, True, list)
    text = capsys.readouterr().out
    assert json.loads(text) == {"name": HOSTILE, "é": 1}
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "é" in text
