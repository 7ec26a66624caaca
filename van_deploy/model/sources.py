"""Where weights come from: a file, a folder saved by Transformers, or the hub.

Everything here ends in a :class:`Found`: a file on this machine, its digest
(checked against the one asked for), and what stood beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from van_deploy.errors import DownloadError, UsageError
from van_deploy.files import file_sha256
from van_deploy.model.contract import is_official
from van_deploy.model.files import SUFFIXES
from van_deploy.model.hub import (
    CONFIG,
    PREPROCESSOR,
    Progress,
    choose_file,
    fetch_weights,
    read_json,
)

__all__ = ["LICENCE", "REPO", "Found", "find_weights", "from_hub", "on_disk"]

LICENCE = (
    "licence of the public weights: Apache-2.0; their README adds "
    '"for commercial use, please contact the authors"'
)
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<file>[\w./-]+))?")


@dataclass(frozen=True)
class Found:
    """A weights file on this machine and what stood beside it.

    Attributes:
        path: the file.
        sha256: of its bytes.
        repo_id: the hub repository it came from, or None.
        config: the ``config.json`` beside it, or None.
        processor: the ``preprocessor_config.json`` beside it, or None.
        notes: what the user should be told.
    """

    path: Path
    sha256: str
    repo_id: str | None = None
    config: Mapping[str, Any] | None = None
    processor: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def find_weights(
    word: str, offline: bool, expect_sha256: str | None, progress: Progress | None
) -> Found:
    """Return the weights a word names: a path, a folder, or ``owner/name[:file]``.

    Raises:
        UsageError: the word is none of these, or several files could be meant.
        DownloadError: the weights cannot be fetched, or have another digest.
    """
    path = Path(word).expanduser()
    if path.is_dir():
        return _in_folder(path, expect_sha256)
    repo = REPO.fullmatch(word)
    is_file = path.exists() or (word.lower().endswith(SUFFIXES) and not (repo and repo["file"]))
    if is_file or word.startswith((".", "/", "~")):
        return on_disk(path, expect_sha256)
    if repo is None:
        raise UsageError(
            f"'{word}' is neither a file that is here, nor a repository, nor 'random'.",
            "Give a path, a Hugging Face repository (owner/name), or random.",
        )
    return from_hub(repo["repo"], repo["file"], offline, expect_sha256, progress)


def from_hub(
    repo_id: str,
    filename: str | None,
    offline: bool,
    expect_sha256: str | None,
    progress: Progress | None,
) -> Found:
    """Return a repository's weights (see :func:`~van_deploy.model.hub.fetch_weights`)."""
    got = fetch_weights(
        repo_id, filename, offline=offline, expect_sha256=expect_sha256, progress=progress
    )
    notes = (*got.notes, *((LICENCE,) if is_official(repo_id) else ()))
    return Found(got.path, got.sha256, repo_id, got.config, got.preprocessor, notes)


def on_disk(path: Path, expect_sha256: str | None) -> Found:
    """Return a file and its digest; a file that cannot be read has none.

    Raises:
        DownloadError: it has another digest than the one asked for.
    """
    try:
        digest = file_sha256(path)
    except OSError:
        digest = ""  # read_weights says what is wrong
    _check_expected(str(path), digest, expect_sha256 if digest else None)
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)  # torch.hub's and OpenMMLab's way
    notes: tuple[str, ...] = ()
    if promised and digest and not digest.startswith(promised[1]):
        notes = (
            f"the file's name promises a SHA-256 that begins with {promised[1]}, but it is "
            f"{digest[:8]}…: it is not the published file, or it is damaged",
        )
    return Found(path, digest, notes=notes)


def _in_folder(folder: Path, expect_sha256: str | None) -> Found:
    names = [p.relative_to(folder).as_posix() for p in folder.iterdir() if p.is_file()]
    found = on_disk(folder / choose_file(names, str(folder)), expect_sha256)
    config, processor = (
        read_json(folder / name) if name in names else None for name in (CONFIG, PREPROCESSOR)
    )
    return replace(found, config=config, processor=processor)


def _check_expected(what: str, digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise DownloadError(
            f"{what} is not the file that was asked for: its SHA-256 is {digest}, "
            f"the expected one {expected}.",
            "Check the expected digest, or get the file again.",
        )
