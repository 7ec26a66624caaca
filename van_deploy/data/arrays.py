"""Archives of arrays (``.npz``) from elsewhere: opened without pickles, and no bombs."""

from __future__ import annotations

import contextlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.documents import require_regular_file

__all__ = ["DAMAGE", "opened_arrays"]

MOST_UNPACKED = 100  # times the file's size; recorded ranges have 5
ALWAYS_TAKEN_BYTES = 256 * 2**20

DAMAGE = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, MemoryError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error, OverflowError, RecursionError),
    *(SyntaxError, tokenize.TokenError),  # NumPy reads an array's header as Python
)
"""What reading a damaged archive of arrays ends with, besides ``OSError``."""


@contextlib.contextmanager
def opened_arrays(path: Path) -> Iterator[Any]:
    """Give the arrays of an archive by name; each is read when it is asked for.

    Raises:
        ValueError: it claims to unpack to very much more than it is, or holds pickles.
        OSError: it cannot be read.
    """
    require_regular_file(path)
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > max(ALWAYS_TAKEN_BYTES, MOST_UNPACKED * size):
        raise ValueError(f"it has {size:,} bytes and claims to unpack to {unpacked:,}")
    with np.load(path, allow_pickle=False) as stored:
        yield stored
