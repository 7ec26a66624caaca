"""Text from elsewhere is read whole and strictly, or refused in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.each import each
from van_deploy.documents import DocumentError, json_from, text_from, toml_from

DEEP = "it is nested more than 40 deep"


@each(
    ("read", "text", "message"),
    [
        *((json_from, text, DEEP) for text in ("[" * 100_000, "[" * 42 + "]" * 42)),
        (json_from, '{"a": [' * 30 + "1" + "]}" * 30, DEEP),
        (json_from, '{"a": [{"b": 1, "b": 1}]}', "it gives the key 'b' twice"),
        (json_from, '{"a": "\\ud800"}', "half a character"),
        (json_from, "", "Expecting value"),
        *((toml_from, f"a = {'[' * n}{']' * n}", DEEP) for n in (60, 20_000)),
        (toml_from, ".".join("a" * 60) + " = 1", DEEP),
        (toml_from, "a = '" + "x" * 70_000 + "'", "it has a line of 70,006 characters"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, read: Callable[[Any], Any], text: str, message: str
) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(text if read is json_from else tmp_path / "x.toml")
    assert json_from("[" * 41 + "]" * 41)
    assert json_from('{"a": [1, {"b": null}], "c": 1e3}') == {"a": [1, {"b": None}], "c": 1000.0}


def test_what_is_no_text_of_a_sensible_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        text_from(tmp_path)
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DocumentError, match=r"^it is no regular file$"):
            text_from(path)
    (tmp_path / "x").write_bytes(b"12345")
    assert text_from(tmp_path / "x", 5) == "12345"
    with pytest.raises(DocumentError, match=r"^it has more than 4 bytes$"):
        text_from(tmp_path / "x", 4)
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(DocumentError, match=r"^it is not UTF-8: "):
        text_from(tmp_path / "x")
