"""The glossary: terms that the field does not use are refused in code, messages and pages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = {
    r"free batch": "dynamic batch",
    r"run time": "runtime",
    r"pictures?": "image",
    r"judged images|judges": "evaluation set",
    r"first class": "top-1",
    r"row alone": "batch-invariance error",
    r"error it adds": "isolated SQNR",
    r"points lost": "Δtop-1",
    r"canar(?:y|ies)": "golden sample",
    r"rest of the network": "non-quantised precision",
    r"back end": "backend",
    r"rooms": "packages",
    r"contestants?": "models",
    r"keeps its memory": "malloc trimming disabled",
    r"do not pay for": "do not offset",
    r"artefacts?": "artifact",
    r"anew": "again",
    r"whoever": "the user, the caller",
    r"vouch(?:ed|es|ing)?": "verify",
}
"""A regular expression of each term that is not used, and the term that is."""


def test_the_glossary_is_followed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    words = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.py",
        "*.md",
        "*.toml",
    ]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split() if name != "tests/test_words.py"]
    pattern = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        for match in pattern.finditer(line.replace("_", " "))
    ]
    assert not found, "\n".join(found)
