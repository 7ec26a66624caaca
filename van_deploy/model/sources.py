"""Where weights come from: a file, a folder, or the Hugging Face hub.

Everything here ends in a :class:`Found`: a file on this machine, its digest
(checked against the one asked for), and the JSON that stands beside it. A folder and
the weights file in it are the same. A download's digest is remembered, one small JSON a
file in :func:`~van_deploy.model.hub.cache_folder`; a file that comes with another one
later is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.documents import json_from, text_from
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.files import file_sha256, write_atomic
from van_deploy.model.hub import Progress, cache_folder, download, known_files
from van_deploy.model.variants import CONFIG, PROCESSOR, HubFile

LICENCE = (
    "licence of the public weights: Apache-2.0; their README adds "
    '"for commercial use, please contact the authors"'
)
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")

_PREFERRED = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pth|pt|ckpt|tar)$", re.IGNORECASE)


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
        return on_disk(path / _chosen_file(names, f"{path}/"), expect_sha256)
    repo = REPO.fullmatch(word)
    is_file = path.exists() or (_WEIGHTS.search(word) and not (repo and repo["file"]))
    if is_file or word.startswith((".", "/", "~")):
        return on_disk(path, expect_sha256)
    if repo is None:
        raise UsageError(
            f"'{word}' is neither a file that is here, nor a repository, nor 'random'.",
            "Give a path, a Hugging Face repository (owner/name), or random.",
        )
    file = HubFile(repo["repo"], repo["file"] or "", repo["revision"] or "main")
    return from_hub(file, offline, expect_sha256, progress)


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
    _require_digest(str(path), digest, expect_sha256)
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)  # torch.hub's and OpenMMLab's way
    notes: tuple[str, ...] = ()
    if promised and not digest.startswith(promised[1]):
        notes = (
            f"the file's name promises a SHA-256 that begins with {promised[1]}, but it is "
            f"{digest[:8]}…: it is not the published file, or it is damaged",
        )
    return Found(path, digest, _beside(path), notes=notes)


def from_hub(
    file: HubFile, offline: bool, expect_sha256: str | None, progress: Progress | None
) -> Found:
    """Return a repository's weights, downloaded if they are not here yet.

    Args:
        file: which; without a file name, the one that can be meant.
        offline: use only what is in the cache (also ``HF_HUB_OFFLINE=1``).
        expect_sha256: what the digest must be, whatever ``file`` says.
        progress: told how much is here.

    Raises:
        CheckpointError: the JSON beside them cannot be read.
        DownloadError: no network, no such repository or file, no permission, no
            room, or another digest than the hub announced, than asked for or than before.
        UsageError: the repository has several files that could be meant.
    """
    repo_id, revision = file.repo_id, file.revision
    names, offline, notes = known_files(file, offline)
    chosen = file.filename or _chosen_file(names, f"{repo_id}:")
    folder = chosen[: chosen.rfind("/") + 1]
    wanted = [chosen, *(folder + name for name in (CONFIG, PROCESSOR) if folder + name in names)]
    path, *_ = [download(repo_id, name, revision, offline, progress) for name in wanted]
    digest = _checked_digest(path, f"{repo_id}/{chosen}")
    _require_digest(f"{repo_id}/{chosen}", digest, expect_sha256 or file.sha256)
    at = "" if revision == "main" else f"@{revision}"
    notes += (_remembered(f"{repo_id}/{chosen}{at}", digest),)
    notes += (LICENCE,) if is_official(repo_id) else ()
    return Found(path, digest, _beside(path), repo_id, notes)


def _chosen_file(names: Iterable[str], where: str) -> str:
    """Return ``model.safetensors``, else ``pytorch_model.bin``, else the only weights file."""
    names = sorted(names)
    found = [name for name in _PREFERRED if name in names][:1]
    found = found or [name for name in names if _WEIGHTS.search(name)]
    if len(found) != 1:
        raise UsageError(
            f"{where[:-1]} has {len(found)} weights files that PyTorch can read, among "
            f"{', '.join((found or names)[:10])}.",
            f"Say which: {where}{found[0]}"
            if found
            else "Pass one with a .safetensors, .bin, .pth or .pth.tar file.",
        )
    return found[0]


def _beside(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the JSON objects beside a weights file."""
    files = [path.parent / CONFIG, path.parent / PROCESSOR]
    return {file.name: _json_object(file) for file in files if file.exists()}


def _json_object(file: Path) -> dict[str, Any]:
    try:
        return dict(json_from(text_from(file)))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The file {file} cannot be read: {error}.",
            "Correct it, or move the weights out of its folder to do without it.",
        ) from None


def _require_digest(what: str, digest: str, expected: str | None) -> None:
    if expected and digest != expected.lower():
        raise DownloadError(
            f"{what} is not the file that was asked for: its SHA-256 is {digest}, "
            f"the expected one {expected}.",
            "Check the expected digest, or the mirror in HF_ENDPOINT if one is set; or get the "
            "file again.",
        )


def _checked_digest(path: Path, what: str) -> str:
    digest, blob = file_sha256(path), path.resolve()
    # The hub names large files' blobs by their SHA-256.
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        with contextlib.suppress(OSError):  # a cache that may only be read
            blob.unlink()
        raise DownloadError(
            f"{what} is damaged: the hub announced the SHA-256 {blob.name}, the file has {digest}.",
            f"Try again once {blob} is gone, and check HF_ENDPOINT if it is set.",
        )
    return digest


def _remembered(what: str, sha256: str) -> str:
    """Compare a download with the memory, or remember it; return what to tell the user."""
    name = re.sub(r"[^\w.-]", "--", what)
    path = cache_folder() / "digests" / f"{name}.json"
    try:
        before = str(json_from(text_from(path))["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"file": what, "sha256": sha256}))
        except OSError as error:
            return f"digest {sha256[:12]}… could not be recorded in {path.parent}: {error.strerror}"
        return f"digest {sha256[:12]}… recorded: the first download on this machine"
    except (OSError, ValueError, LookupError, TypeError) as error:
        before = f"not readable ({error})"
    if before != sha256:
        raise DownloadError(
            f"{what} is not the file it was: its SHA-256 is {sha256}, and was {before} when it "
            "was first downloaded.",
            f"If the publisher replaced it and you trust that, remove {path} and try again.",
        )
    return f"digest {sha256[:12]}… as recorded at the first download"
