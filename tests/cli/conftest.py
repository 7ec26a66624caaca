"""A bundle of the digits in three precisions, to be judged through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checks.conftest import Subject, subject
from van_deploy.model.embedded import write_digits_folder

CopyOf = Callable[[Subject], Path]


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Return the digits in FP32, FP16 and INT8 with 60 labelled images; leave it as it is."""
    folder = tmp_path_factory.mktemp("judged")
    labelled = write_digits_folder(folder / "images", "heldout", 60)
    return subject(folder / "bundle", "van_digits", labelled)


@pytest.fixture
def copy_of(tmp_path: Path) -> CopyOf:
    """Return a function that copies a bundle, so that a command may write into it."""

    def copied(whole: Subject) -> Path:
        return Path(shutil.copytree(whole.bundle.path, tmp_path / "bundle"))

    return copied
