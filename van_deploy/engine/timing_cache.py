"""TensorRT's timing cache in a file that several builds may share.

A build reads the file when it starts. When it ends it takes the lock, combines
what it learnt with what others have written since, and replaces the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from van_deploy.errors import ConversionError, InputError
from van_deploy.files import write_atomic

LOCK_WAIT_S = 60.0


def attach_(config: Any, path: Path) -> Any:
    """Give a builder's configuration the cache in ``path``, empty if there is no file yet.

    Returns:
        The cache; it must live until the build is over.

    Raises:
        InputError: TensorRT refuses the file: it is damaged, or of another GPU or version.
    """
    cache = config.create_timing_cache(read(path))
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"TensorRT refuses the timing cache '{path}'; it is of another GPU or version, "
            "or damaged.",
            "Name another file with --timing-cache: one for each GPU and version.",
        )
    return cache


def save(config: Any, cache: Any, path: Path) -> None:
    """Combine ``cache`` with what ``path`` holds by now, and replace the file."""

    def combined(now: bytes) -> bytes:
        other = config.create_timing_cache(now)
        if other is not None and now:
            cache.combine(other, False)
        return bytes(memoryview(cache.serialize()))

    merge_into_file(path, combined)


def merge_into_file(path: Path, combined: Any) -> None:
    """Replace the bytes of ``path`` by ``combined(its bytes)`` while no other process can.

    Raises:
        ConversionError: another process has held the lock for :data:`LOCK_WAIT_S` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_WAIT_S):
            write_atomic(path, combined(read(path)))
    except Timeout as error:
        raise ConversionError(
            f"Another build has held the timing cache '{path}' for over {LOCK_WAIT_S:.0f} s.",
            "Wait for it to end, or name another file with --timing-cache.",
        ) from error


def read(path: Path) -> bytes:
    """Return the file's bytes; none if it is not there."""
    return path.read_bytes() if path.exists() else b""
