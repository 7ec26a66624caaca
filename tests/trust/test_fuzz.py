"""A seeded share of `make fuzz`: spoiled files of every kind, none of which does harm."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from reliability.fuzz import MIXED, fuzz
from reliability.spoiled import spoiled_bytes, spoiled_json, spoiled_text

CASES = 120  # of all kinds together


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the sound files, which the first worker makes."""
    return tmp_path_factory.mktemp("fuzz") / "corpus"


@pytest.mark.slow
def test_spoiled_files(corpus: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed, so there is no engine to spoil")
    outcome = fuzz(MIXED, 1_000_000, CASES, corpus)  # others than `make fuzz` takes
    assert outcome.faults == []
    assert sum(outcome.codes.values()) == CASES
    assert set(outcome.codes) <= {0, 1, 2, 3, 4, 5}
    assert sum(n for code, n in outcome.codes.items() if code) > CASES / 3, "too little is refused"


@pytest.mark.slow
def test_what_must_not_be_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer sees a traceback, code that runs, and a process that dies."""
    from reliability import fuzz as module

    corpus = tmp_path / "corpus"
    (corpus / "bundle").mkdir(parents=True)
    (corpus / "ready").touch()
    for words, expected in (
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("import os; os.system('true')", "it ran something: ['os.system']"),
        ("import os; os.abort()", "the process ended with -6"),
    ):
        program = (
            "import sys, reliability.fuzz as fuzz\n"
            f"read = lambda: exec({words!r})\n"
            "fuzz.warm_up = lambda corpus: None\n"
            "fuzz.KINDS = {'image': (1, '', lambda *_: read)}\n"
            "fuzz.run_cases('image', 0, int(sys.argv[3]), fuzz.Path(sys.argv[4]))\n"
        )
        monkeypatch.setattr(module, "WORKER", ("-c", program))
        (fault,) = fuzz("image", 0, 1, corpus).faults
        assert fault.startswith(f"image 0: {expected}"), fault


def test_mutations_are_seeded_and_change_something() -> None:
    document = {"a": [1, 2, {"b": "c"}], "d": None}
    data, text = bytes(range(256)) * 8, "[model]\nname = 'x'\nsizes = [1, 2]\n"
    cases: list[tuple[Callable[..., object], object]] = [
        (spoiled_bytes, data),
        (spoiled_json, document),
        (spoiled_text, text),
    ]
    for spoil, sound in cases:
        first = [spoil(random.Random(i), sound) for i in range(200)]
        again = [spoil(random.Random(i), sound) for i in range(200)]
        assert repr(first) == repr(again)
        assert sum(repr(one) != repr(sound) for one in first) > 150
