"""The field's own words: what the project once called things does not come back."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {
    "free batch": "dynamic batch",
    "run time": "runtime",
    "picture": "image",
    "first class": "top-1 class",
    "canary": "golden sample",
    "back end": "backend",
    "contestant": "model",
    "row alone": "batch-invariance error",
    "points lost": "Δtop-1",
    "judged images": "evaluation set",
}
"""What is not written, and what is."""


def test_the_glossary() -> None:
    pattern = re.compile("|".join(rf"\b{word}s?\b" for word in WORDS), re.IGNORECASE)
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("van_deploy/**/*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert not found, found
