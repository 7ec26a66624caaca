"""Where weights come from: a file, a folder, or the hub.

Everything here ends in a :class:`Found`: a file on this machine, its digest
(checked against the one asked for), and the JSON that stands beside it. A
folder and the weights file in it are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.documents import json_from, text_from
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.files import file_sha256
from van_deploy.model.digests import check_digest
from van_deploy.model.files import SUFFIXES
from van_deploy.model.hub import Progress, choose_file, fetch_weights
from van_deploy.model.variants import CONFIG, PROCESSOR, HubFile

__all__ = ["LICENCE", "REPO", "Found", "find_weights", "from_hub", "is_official", "on_disk"]

LICENCE = (
    "licence of the public weights: Apache-2.0; their README adds "
    '"for commercial use, please contact the authors"'
)
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")


@dataclass(frozen=True)
class Found:
    """A weights file on this machine and what stood beside it.

    Attributes:
        path: the file.
        sha256: of its bytes; "" where it cannot be read.
        beside: the ``config.json`` and ``preprocessor_config.json`` beside it, by name.
        repo_id: the hub repository it came from, or "".
        notes: what the user should be told.
    """

    path: Path
    sha256: str
    beside: Mapping[str, Mapping[str, Any]]
    repo_id: str = ""
    notes: tuple[str, ...] = ()


def is_official(repo_id: str) -> bool:
    """Return whether a hub repository is the authors' own."""
    return repo_id.partition("/")[0].lower() == "visual-attention-network"


def find_weights(
    word: str, offline: bool, expect_sha256: str | None, progress: Progress | None
) -> Found:
    """Return the weights a word names: a path, a folder, or ``owner/name[@revision][:file]``.

    Raises:
        UsageError: the word is none of these, or several files could be meant.
        CheckpointError: the JSON beside the weights cannot be read.
        DownloadError: the weights cannot be fetched, or have another digest.
    """
    path = Path(word).expanduser()
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
        return on_disk(path / choose_file(names, str(path)), expect_sha256)
    repo = REPO.fullmatch(word)
    is_file = path.exists() or (word.lower().endswith(SUFFIXES) and not (repo and repo["file"]))
    if is_file or word.startswith((".", "/", "~")):
        return on_disk(path, expect_sha256)
    if repo is None:
        raise UsageError(
            f"'{word}' is neither a file that is here, nor a repository, nor 'random'.",
            "Give a path, a Hugging Face repository (owner/name), or random.",
        )
    file = HubFile(repo["repo"], repo["file"] or "", repo["revision"] or "main")
    return from_hub(file, offline, expect_sha256, progress)


def from_hub(
    file: HubFile, offline: bool, expect_sha256: str | None, progress: Progress | None
) -> Found:
    """Return a repository's weights (see :func:`~van_deploy.model.hub.fetch_weights`)."""
    got, path, digest, notes = fetch_weights(
        file.repo_id,
        file.filename or None,
        revision=file.revision,
        offline=offline,
        progress=progress,
    )
    _check_expected(str(got), digest, expect_sha256 or file.sha256)
    at = "" if got.revision == "main" else f"@{got.revision}"
    remembered = check_digest(got.repo_id, got.filename + at, digest)
    licence = (LICENCE,) if is_official(got.repo_id) else ()
    return Found(path, digest, _beside(path), got.repo_id, (*notes, remembered, *licence))


def on_disk(path: Path, expect_sha256: str | None) -> Found:
    """Return a file, its digest and the JSON beside it.

    Raises:
        DownloadError: it has another digest than the one asked for.
        CheckpointError: the JSON cannot be read.
    """
    try:
        digest = file_sha256(path)
    except OSError:
        return Found(path, "", {})  # read_weights says what is wrong
    _check_expected(str(path), digest, expect_sha256)
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)  # torch.hub's and OpenMMLab's way
    notes: tuple[str, ...] = ()
    if promised and not digest.startswith(promised[1]):
        notes = (
            f"the file's name promises a SHA-256 that begins with {promised[1]}, but it is "
            f"{digest[:8]}…: it is not the published file, or it is damaged",
        )
    return Found(path, digest, _beside(path), notes=notes)


def _beside(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the JSON objects beside a weights file."""
    found = {}
    for name in (CONFIG, PROCESSOR):
        file = path.parent / name
        try:
            value = json_from(text_from(file)) if file.exists() else {}
            reason = "" if isinstance(value, dict) else "it holds no JSON object"
        except (OSError, ValueError) as error:
            reason = str(error)
        if reason:
            raise CheckpointError(
                f"The file {file} cannot be read: {reason}.",
                "Correct it, or move the weights out of its folder to do without it.",
            )
        found[name] = value
    return {name: value for name, value in found.items() if value}


def _check_expected(what: str, digest: str, expected: str | None) -> None:
    if expected and digest != expected:
        raise DownloadError(
            f"{what} is not the file that was asked for: its SHA-256 is {digest}, "
            f"the expected one {expected}.",
            "Check the expected digest, or the mirror in HF_ENDPOINT if one is set; or get the "
            "file again.",
        )
