"""Runs of commands with a known exit code, and a bundle that may be changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts import Copy, Subject
from tests.conftest import Cli
from van_deploy.files import file_sha256

ALLOW = "--allow-inconclusive"  # the images of the tests are too few for INT8


def run_json(cli: Cli, *words: object, code: int = 0) -> dict[str, Any]:
    """Run a command with ``--json``, check its exit code, and return the document."""
    result = cli(*words, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def text_of(cli: Cli, *words: object, code: int = 1) -> str:
    """Run a command, check its exit code, and return its output in one line."""
    result = cli(*words)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """Apply ``change`` to the content of a JSON file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def rewrite_golden(bundle: Path, write: Callable[[Path, dict[str, Any]], object]) -> None:
    """Write other golden samples, and update the digest in the manifest.

    Args:
        bundle: its folder.
        write: receives the file and the arrays in it.
    """
    golden, manifest = bundle / "golden.npz", bundle / "manifest.json"
    before = file_sha256(golden)
    write(golden, dict(np.load(golden)))
    manifest.write_text(manifest.read_text().replace(before, file_sha256(golden)))


@pytest.fixture
def path(digits: Subject, copy_bundle: Copy) -> Path:
    """Return a copy of the bundle of van_digits."""
    return copy_bundle(digits)
