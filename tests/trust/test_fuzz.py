"""A seeded share of `make fuzz`: spoiled files of every kind, none of which does harm."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from reliability.fuzz import fuzz, outcome
from reliability.kinds import KINDS
from reliability.spoiled import spoiled_document

CASES = 11  # of each kind


@pytest.mark.slow
def test_spoiled_files(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed, so there is no engine to spoil")
    codes = Counter[str]()
    for kind in KINDS:
        found = fuzz(kind, 1, CASES, tmp_path / "sound")  # another seed than `make fuzz` takes
        assert found["fault"] == ""
        codes.update(found["codes"])
    assert set(codes) <= set("012345")
    assert sum(n for code, n in codes.items() if code != "0") > codes.total() / 3, "few are refused"


def test_what_must_not_be_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer sees a traceback, another exit code, and code that runs."""
    executed: list[str] = []

    def fails() -> object:
        raise KeyError("x")

    for read, expected in (
        (fails, "KeyError: 'x'"),
        (lambda: 9, "exit code 9"),
        (lambda: executed.append("os.system"), r"it ran something: \['os.system'\]"),
        ((tmp_path / "executed").touch, "it ran something: the payload"),
    ):
        spoil: Any = lambda *_, read=read: read  # noqa: E731
        monkeypatch.setitem(KINDS, "image", (1, "", spoil))

        @hypothesis.settings(max_examples=1, database=None)
        @hypothesis.given(st.data())
        def case(data: st.DataObject) -> None:
            outcome(data, "image", tmp_path, tmp_path, executed)

        with pytest.raises(AssertionError, match=expected):
            case()


def test_much_is_spoiled_and_stays_bytes() -> None:
    document, found = b'{"a": [1, 2, {"b": "c"}], "d": null}', list[bool]()

    @hypothesis.settings(max_examples=50, database=None, deadline=None)
    @hypothesis.given(st.data())
    def spoil(data: st.DataObject) -> None:
        for sound, suffix in ((document, ".json"), (b"[model]\nname = 'x'\n", ".toml")):
            spoiled = spoiled_document(data.draw, sound, suffix)
            assert isinstance(spoiled, bytes)
            found.append(spoiled != sound)

    spoil()
    assert sum(found) > len(found) / 2
