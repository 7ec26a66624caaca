"""Where weights come from: a file, a folder, or the Hugging Face hub.

Everything here ends in a :class:`Found`: a file on this machine, its digest (checked against
the one asked for), and the JSON that stands beside it. A folder and the weights file in it are
the same. Downloads, caching, resuming and revisions are ``huggingface_hub``'s, with the mirror
in ``HF_ENDPOINT`` if there is one and the user's token for gated repositories.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.documents import json_from, text_from
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.files import file_sha256
from van_deploy.model.variants import cached_snapshot

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
"""What stands beside weights, by Transformers' and timm's names."""

LICENCE = (
    "licence of the public weights: Apache-2.0; their README adds "
    '"for commercial use, please contact the authors"'
)
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
_PREFERRED = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = re.compile(r"(\.(safetensors|bin|pth|pt|ckpt|tar))+$", re.IGNORECASE)
_PLAIN_STEMS = {"model", "pytorch_model", "checkpoint", "model_best", "last", "best"}


@dataclass(frozen=True)
class Found:
    """A weights file on this machine and what stood beside it.

    Attributes:
        name: what to call the network: the file, or its folder or repository.
        path: the file.
        sha256: of its bytes; "" where it cannot be read.
        beside: the ``config.json`` and ``preprocessor_config.json`` beside it, by name.
        is_official: whether it came from the authors' own repositories on the hub.
        notes: what the user should be told.
    """

    name: str
    path: Path
    sha256: str
    beside: Mapping[str, Mapping[str, Any]]
    is_official: bool = False
    notes: tuple[str, ...] = ()


def find_weights(word: str, offline: bool = False, expect_sha256: str | None = None) -> Found:
    """Return the weights a word names: a path, a folder, or ``owner/name[@revision][:file]``.

    Args:
        word: which; without a file, the one in the folder or repository that can be meant.
        offline: use only what is in the cache (also ``HF_HUB_OFFLINE=1``).
        expect_sha256: what the digest must be.

    Raises:
        UsageError: the word is none of these, or several files could be meant.
        CheckpointError: the JSON beside the weights cannot be read.
        DownloadError: no network, no such repository or file, no permission, no room, or
            another digest than the hub announced or than asked for.
    """
    path, repo, what = Path(word).expanduser(), _REPO.fullmatch(word), word
    notes: tuple[str, ...] = ()
    stem, official = _WEIGHTS.sub("", path.name), False
    is_file = path.exists() or (_WEIGHTS.search(word) and not (repo and repo["file"]))
    if path.is_dir():
        stem = path.resolve().name
        path /= _chosen_file([e.name for e in path.iterdir() if e.is_file()], f"{path}/")
    elif is_file or word.startswith((".", "/", "~")):
        stem = path.resolve().parent.name if stem.lower() in _PLAIN_STEMS else stem
    elif repo is None:
        raise UsageError(
            f"'{word}' is neither a file that is here, nor a repository, nor 'random'.",
            "Give a path, a Hugging Face repository (owner/name), or random.",
        )
    else:
        owner, _, stem = repo["repo"].partition("/")
        official = owner.lower() == "visual-attention-network"
        path, notes = _downloaded(
            repo["repo"], repo["revision"] or "main", repo["file"] or "", offline
        )
        what, notes = f"{repo['repo']}/{path.name}", notes + (LICENCE,) * official
    name = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "van"
    try:
        digest = file_sha256(path)
    except OSError:
        return Found(name, path, "", {})  # reading it says what is wrong
    _check_digest(path, what, digest, expect_sha256)
    files = [file for file in (path.parent / CONFIG, path.parent / PROCESSOR) if file.exists()]
    return Found(name, path, digest, {f.name: _json_object(f) for f in files}, official, notes)


def _check_digest(path: Path, what: str, digest: str, expected: str | None) -> None:
    """Refuse a file of another digest than was asked for, or than the hub announced."""
    blob = path.resolve()
    # The hub names large files' blobs by their SHA-256.
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        with contextlib.suppress(OSError):  # a cache that may only be read
            blob.unlink()
        raise DownloadError(
            f"{what} is damaged: the hub announced the SHA-256 {blob.name}, the file has {digest}.",
            f"Try again once {blob} is gone, and check HF_ENDPOINT if it is set.",
        )
    if expected and digest != expected.lower():
        raise DownloadError(
            f"{what} is not the file that was asked for: its SHA-256 is {digest}, "
            f"the expected one {expected}.",
            "Check the expected digest, or the mirror in HF_ENDPOINT if one is set; or get the "
            "file again.",
        )


def _chosen_file(names: Iterable[str], where: str) -> str:
    """Return ``model.safetensors``, else ``pytorch_model.bin``, else the only weights file."""
    names = sorted(names)
    found = [name for name in _PREFERRED if name in names][:1]
    found = found or [name for name in names if _WEIGHTS.search(name)]
    if len(found) != 1:
        raise UsageError(
            f"{where[:-1]} has {len(found)} weights files that PyTorch can read, among "
            f"{', '.join((found or names)[:10])}.",
            f"Say which, such as {where}{(found or ['weights.pth'])[0]}.",
        )
    return found[0]


def _json_object(file: Path) -> dict[str, Any]:
    try:
        return dict(json_from(text_from(file)))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The file {file} cannot be read: {error}.",
            "Correct it, or move the weights out of its folder to do without it.",
        ) from None


# --- the hub ---------------------------------------------------------------------------------


def _downloaded(
    repo_id: str, revision: str, wanted: str, offline: bool
) -> tuple[Path, tuple[str, ...]]:
    """Return a repository's weights, and the JSON beside them, in the cache; and what to tell."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    notes: tuple[str, ...] = ()
    snapshot = cached_snapshot(repo_id, revision)
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
    is_here = snapshot.name == revision and wanted in names  # a commit never changes
    offline = offline or constants.HF_HUB_OFFLINE or is_here
    try:
        try:
            if not offline:
                siblings = api.model_info(repo_id, revision=revision).siblings or ()
                names = [sibling.rfilename for sibling in siblings]
        except Exception as error:  # of whatever the network is made of
            unknown = errors.RepositoryNotFoundError | errors.RevisionNotFoundError
            if not names or isinstance(error, unknown):
                raise
            offline, told = True, str(error).strip().partition("\n")[0]
            notes = (f"the copy in the cache, since the hub cannot be asked: {told}",)
        chosen = wanted or (_chosen_file(names, f"{repo_id}:") if names else _PREFERRED[0])
        folder = chosen[: chosen.rfind("/") + 1]
        beside = [folder + name for name in (CONFIG, PROCESSOR) if folder + name in names]
        path, *_ = [
            api.hf_hub_download(repo_id, name, revision=revision, local_files_only=offline)
            for name in (chosen, *beside)
        ]
        return Path(path), notes
    except UsageError:
        raise
    except Exception as error:
        # The next download begins with a new connection: this one's may be half dead.
        getattr(huggingface_hub, "close_session", lambda: None)()  # from huggingface_hub 1 on
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise DownloadError(
            f"{repo_id}{f'/{wanted}' if wanted else ''} could not be had from {api.endpoint} or "
            f"the cache ({constants.HF_HUB_CACHE}): {reason}",
            f"See https://huggingface.co/{repo_id}: is it spelt so, has it this file, is it "
            "private or gated (`hf auth login`)? Check the network, --offline, HF_ENDPOINT and "
            "the room on the disk; or pass a file with --weights FILE.",
        ) from None
