"""The glossary: terms that the field does not use are refused in code, messages and pages."""

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


def found(pattern: str, *files: str) -> str:
    """Return the lines of the checkout's files that match a regular expression of Perl's."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    words = ["git", "grep", "--untracked", "-I", "--line-number", "--perl-regexp", pattern]
    result = subprocess.run(
        [*words, "--", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, 1), result.stderr
    return result.stdout


def test_the_glossary_is_followed() -> None:
    terms = "|".join(WORDS).replace(" ", "[ _]")
    pattern = rf"(?i)(?<![^\W_])(?:{terms})(?![^\W_])"
    assert found(pattern, ":!tests/test_words.py") == ""


def test_no_file_contains_a_private_path() -> None:
    assert found("/" + "work/|/" + "root/|/" + "home/[a-z]") == ""
