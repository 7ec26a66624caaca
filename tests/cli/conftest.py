"""A bundle that may be changed, and changes of the files in it."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts import Copy, Subject
from van_deploy.files import file_sha256

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
ALLOW = "--allow-inconclusive"  # the images of the tests are too few for INT8


def replace_file(bundle: Path, name: str, content: bytes, new_digest: bool = True) -> None:
    """Replace a file in a bundle, and its digest in the manifest."""
    file, manifest = bundle / name, bundle / "manifest.json"
    before = file_sha256(file)
    file.write_bytes(content)
    if new_digest:
        manifest.write_text(manifest.read_text().replace(before, file_sha256(file)))


def npz(**arrays: Any) -> bytes:
    """Return the content of a file of arrays."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.fixture
def path(digits: Subject, copy_bundle: Copy) -> Path:
    """Return a copy of the bundle of van_digits."""
    return copy_bundle(digits)
