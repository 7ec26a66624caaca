"""Weights from the Hugging Face hub: found, downloaded, checked.

Downloads go through ``huggingface_hub``: cached, resumed where a connection
drops, from the mirror in ``HF_ENDPOINT`` if there is one, with the user's token
for gated repositories. ``locate_weights`` and the cache's place need neither
the network nor any heavy import.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from van_deploy.documents import json_from, text_from
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.digests import check_digest, hub_cache
from van_deploy.model.hub_errors import clear_errors, not_cached
from van_deploy.model.variants import HubFile, Variant, variant_named

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = [
    "HubWeights",
    "Progress",
    "choose_file",
    "fetch_weights",
    "hub_cache",
    "locate_weights",
    "read_json",
]

Progress = Callable[[str, int, "int | None"], None]
"""Called with a file's name, the bytes that are here, and those there will be (or None)."""

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_PREFERRED = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pth|pt|ckpt|pth\.tar)$", re.IGNORECASE)
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class HubWeights:
    """A weights file from the hub, on this machine.

    Attributes:
        file: repository and name of the file.
        path: where it is.
        sha256: of its bytes.
        config: the repository's ``config.json``, if it has one.
        preprocessor: its ``preprocessor_config.json``, if it has one.
        notes: what the user should be told.
    """

    file: HubFile
    path: Path
    sha256: str
    config: Mapping[str, Any] | None
    preprocessor: Mapping[str, Any] | None
    notes: tuple[str, ...]


def locate_weights(variant: str | Variant) -> Path | None:
    """Return where a variant's public weights are on this machine, or None.

    Looks in the hub's cache only: no network, nothing heavy imported.

    Raises:
        UsageError: there is no such variant.
    """
    known = variant_named(variant) if isinstance(variant, str) else variant
    if known.weights is None:
        return None
    snapshot = _snapshot(known.weights.repo_id)
    path = snapshot / known.weights.filename if snapshot else None
    return path if path and path.is_file() else None


def fetch_weights(
    repo_id: str,
    filename: str | None = None,
    *,
    offline: bool = False,
    expect_sha256: str | None = None,
    progress: Progress | None = None,
) -> HubWeights:
    """Return a repository's weights, downloaded if they are not here yet.

    Args:
        repo_id: ``owner/name``.
        filename: the file to take; without it, the one that can be meant.
        offline: use only what is in the cache (also ``HF_HUB_OFFLINE=1``).
        expect_sha256: what the file's digest must be.
        progress: told how much is here.

    Raises:
        DownloadError: no network, no such repository or file, no permission, no
            room, or another digest than expected, announced or remembered.
        UsageError: the repository has several files that could be meant.
    """
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    names = [filename] if filename else _list_files(repo_id, offline=offline)
    chosen = filename or choose_file(names, repo_id)
    path = _download(repo_id, chosen, offline=offline, progress=progress)
    digest = _checked_digest(path, HubFile(repo_id, chosen), expect_sha256)
    note = check_digest(repo_id, chosen, digest)
    beside = dict.fromkeys((CONFIG, PREPROCESSOR)) | {
        name: read_json(_download(repo_id, name, offline=offline, progress=None))
        for name in (CONFIG, PREPROCESSOR)
        if name in names
    }
    return HubWeights(
        HubFile(repo_id, chosen), path, digest, beside[CONFIG], beside[PREPROCESSOR], (note,)
    )


def choose_file(names: Iterable[str], where: str) -> str:
    """Return the one weights file among ``names`` that can be meant.

    ``model.safetensors`` before ``pytorch_model.bin``, else the only one there is.

    Raises:
        UsageError: there is none, or several; they are listed.
    """
    names = sorted(names)
    for name in _PREFERRED:
        if name in names:
            return name
    found = [name for name in names if _WEIGHTS.search(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"{where} has no weights that PyTorch can read (it has {', '.join(names[:8])}).",
            "Pass a repository with a .safetensors, .bin, .pth or .pth.tar file.",
        )
    raise UsageError(
        f"{where} has {len(found)} weights files: {', '.join(found[:10])}.",
        f"Say which: {where}:{found[0]}",
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: the file holds no JSON object.
    """
    try:
        value = json_from(text_from(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The file {path} cannot be read: {error}.", "Download it again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"The file {path} holds no JSON object.", "Download it again.")
    return value


def _snapshot(repo_id: str) -> Path | None:
    """Return the cached snapshot of a repository's main branch."""
    folder = hub_cache() / f"models--{repo_id.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return folder / "snapshots" / commit


def _list_files(repo_id: str, *, offline: bool) -> list[str]:
    if not offline:
        with clear_errors(repo_id, None):
            info = _api().model_info(repo_id)
            return [sibling.rfilename for sibling in info.siblings or ()]
    snapshot = _snapshot(repo_id)
    files = [p for p in snapshot.rglob("*") if p.is_file()] if snapshot else []
    if snapshot is None or not files:
        raise not_cached(repo_id, None)
    return [path.relative_to(snapshot).as_posix() for path in files]


def _download(repo_id: str, name: str, *, offline: bool, progress: Progress | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    snapshot = _snapshot(repo_id)
    with clear_errors(repo_id, name):
        if not offline and not (snapshot and (snapshot / name).exists()):
            # Asked once, so that a dead network is told at once: hf_hub_download (2.4) repeats
            # its question for 23 s.
            get_hf_file_metadata(hf_hub_url(repo_id, name, endpoint=endpoint), endpoint=endpoint)
        path = hf_hub_download(
            repo_id,
            name,
            cache_dir=hub_cache(),
            endpoint=endpoint,
            local_files_only=offline,
            tqdm_class=_progress_class(name, progress),
        )
    return Path(path)


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _progress_class(name: str, progress: Progress | None) -> Any:
    """Return a progress bar for huggingface_hub that draws nothing and reports."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reported(tqdm):  # type: ignore[type-arg, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]
            self.total = options.get("total")
            self.n = options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress is not None:
                progress(name, int(self.n), self.total)

    return Reported


def _checked_digest(path: Path, file: HubFile, expected: str | None) -> str:
    from van_deploy.files import file_sha256

    digest, blob = file_sha256(path), path.resolve()
    # The hub names large files' blobs by their SHA-256.
    if _SHA256.fullmatch(blob.name) and blob.name != digest:
        remedy = "Remove that file and try again."
        with contextlib.suppress(OSError):  # a cache that may only be read
            blob.unlink()
            remedy = "It was removed from the cache: try again, and check HF_ENDPOINT if it is set."
        raise DownloadError(
            f"{file} is damaged: the hub announced the SHA-256 {blob.name}, "
            f"the file at {blob} has {digest}.",
            remedy,
        )
    if expected is not None and digest != expected.lower():
        raise DownloadError(
            f"{file} is not the file that was asked for: its SHA-256 is {digest}, "
            f"the expected one {expected.lower()}.",
            "Check the expected digest, or the mirror in HF_ENDPOINT if one is set.",
        )
    return digest
