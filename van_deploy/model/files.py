"""A weights file: found on this machine or the hub, and read without running anything in it.

:func:`find_weights` ends in a :class:`Found`: a file on this machine, its digest (checked
against the one asked for), and the JSON that stands beside it. A folder and the weights file in
it are the same. Downloads, caching, resuming and revisions are ``huggingface_hub``'s, with the
mirror in ``HF_ENDPOINT`` if there is one and the user's token for gated repositories.

:func:`load_file` returns the tensors and what the file says about itself, or says in one
sentence what is wrong. Pickles go through ``torch.load(weights_only=True)`` within the few
harmless globals that training scripts leave beside their tensors, safetensors through their own
reader.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import safetensors
import torch
from huggingface_hub import constants, errors

from van_deploy.documents import parse_json, read_text_file, require_regular_file
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.files import file_sha256
from van_deploy.model.variants import cached_snapshot

# What stands beside weights, by Transformers' and timm's names.
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

LICENCE = 'public weights: Apache-2.0; README: "for commercial use, please contact the authors"'
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
_UNKNOWN = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
_PREFERRED = ("model.safetensors", "pytorch_model.bin")
# Endings that make a word on the command line a path.
WEIGHTS = re.compile(r"(\.(safetensors|bin|pth|pt|ckpt|tar))+$", re.IGNORECASE)
_PLAIN_STEMS = {"model", "pytorch_model", "checkpoint", "model_best", "last", "best"}


class Found(NamedTuple):
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


def find_weights(word: str, expect_sha256: str | None = None, offline: bool = False) -> Found:
    """Return the weights a word names: a path, a folder, or ``owner/name[@revision][:file]``.

    Args:
        word: which; without a file, the one in the folder or repository that can be meant.
        expect_sha256: what the digest must be.
        offline: use only what is in the cache (also ``HF_HUB_OFFLINE=1``).

    Raises:
        UsageError: the word is none of these, or several files could be meant.
        CheckpointError: the JSON beside the weights cannot be read.
        DownloadError: no network, no such repository or file, no permission, no room, or
            another digest than the hub announced or than asked for.
    """
    path, repo, what = Path(word).expanduser(), _REPO.fullmatch(word), word
    stem, official, told = WEIGHTS.sub("", path.name), False, ""
    is_file = path.exists() or (WEIGHTS.search(word) and not (repo and repo["file"]))
    if path.is_dir():
        stem = path.resolve().name
        path /= _chosen_file([e.name for e in path.iterdir() if e.is_file()], f"{path}/")
    elif is_file or word.startswith((".", "/", "~")):
        stem = path.resolve().parent.name if stem.lower() in _PLAIN_STEMS else stem
    elif repo is None:
        wrong = f"'{word}' is neither a file that is here, nor a repository, nor 'random'."
        raise UsageError(wrong, "Give a path, a Hugging Face repository (owner/name), or random.")
    else:
        owner, _, stem = repo["repo"].partition("/")
        path, told = _downloaded(repo["repo"], repo["revision"] or "main", repo["file"], offline)
        official = owner.lower() == "visual-attention-network"
        what = f"{repo['repo']}/{path.name}"
    digest, blob, beside = "", path.resolve(), list[Path]()
    with contextlib.suppress(OSError):  # reading it says what is wrong
        digest = file_sha256(path)
        beside = [file for file in (path.parent / CONFIG, path.parent / PROCESSOR) if file.exists()]
    # The hub names large files' blobs by their SHA-256.
    if digest and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        with contextlib.suppress(OSError):  # a cache that may only be read
            blob.unlink()
        wrong = f"{what} is damaged: the hub announced the SHA-256 {blob.name}, it has {digest}."
        raise DownloadError(wrong, f"Remove {blob} if it is still there, and try again.")
    if digest and expect_sha256 and digest != expect_sha256.lower():
        wrong = (
            f"{what} is another file: its SHA-256 is {digest}, the expected one {expect_sha256}."
        )
        raise DownloadError(wrong, "Check the digest and HF_ENDPOINT, or get the file again.")
    name = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "van"
    notes = tuple(filter(None, (told, LICENCE if official else "")))
    return Found(name, path, digest, {f.name: _json_object(f) for f in beside}, official, notes)


def _chosen_file(names: Iterable[str], where: str) -> str:
    """Return ``model.safetensors``, else ``pytorch_model.bin``, else the only weights file."""
    names = sorted(names)
    found = [n for n in _PREFERRED if n in names][:1] or [n for n in names if WEIGHTS.search(n)]
    if len(found) != 1:
        few = ", ".join((found or names)[:10])
        wrong = f"{where[:-1]} has {len(found)} weights files that PyTorch can read, among {few}."
        raise UsageError(wrong, f"Say which, such as {where}{(found or ['weights.pth'])[0]}.")
    return found[0]


def _json_object(file: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(read_text_file(file)))
    except (OSError, ValueError, TypeError) as error:
        wrong = f"The file {file} cannot be read: {error}."
        raise CheckpointError(wrong, "Correct it, or take it out of the folder.") from None


# --- the hub ---------------------------------------------------------------------------------


def _downloaded(repo_id: str, revision: str, wanted: str | None, offline: bool) -> tuple[Path, str]:
    """Return a repository's weights, and the JSON beside them, in the cache; and what to tell."""
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    snapshot, told = cached_snapshot(repo_id, revision), ""
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
    is_here = snapshot.name == revision and wanted in names  # a commit never changes
    offline = offline or constants.HF_HUB_OFFLINE or is_here
    try:
        try:
            siblings = () if offline else api.model_info(repo_id, revision=revision).siblings
            names = [sibling.rfilename for sibling in siblings or ()] or names
        except Exception as error:  # of whatever the network is made of
            if not names or isinstance(error, _UNKNOWN):
                raise
            offline, why = True, str(error).strip().partition("\n")[0]
            told = f"the copy in the cache, since the hub cannot be asked: {why}"
        chosen = wanted or (_chosen_file(names, f"{repo_id}:") if names else _PREFERRED[0])
        folder = chosen[: chosen.rfind("/") + 1]
        beside = [folder + name for name in (CONFIG, PROCESSOR) if folder + name in names]
        get = partial(api.hf_hub_download, repo_id, revision=revision, local_files_only=offline)
        path, *_ = map(get, (chosen, *beside))
        return Path(path), told
    except UsageError:
        raise
    except Exception as error:
        # The next download begins with a new connection: this one's may be half dead.
        getattr(huggingface_hub, "close_session", lambda: None)()  # from huggingface_hub 1 on
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        what, cache = f"{repo_id}/{wanted}" if wanted else repo_id, constants.HF_HUB_CACHE
        raise DownloadError(
            f"{what} could not be had from {api.endpoint} or the cache ({cache}): {reason}",
            "Check its name, --offline, HF_ENDPOINT, the network and room on the disk; if it is "
            "private or gated: `hf auth login`. Or pass a file with --weights FILE.",
        ) from None


# --- reading ---------------------------------------------------------------------------------

_SAVE = "Save the weights, with torch.save(model.state_dict(), 'weights.pth')."
_AGAIN = f"If it is damaged or truncated, get it again. If it holds something else: {_SAVE}"
# A VAN-B6 has 3,000 tensors and its optimizer twice as many; PyTorch unpacks to the file's size.
_MOST_ENTRIES, _MOST_UNPACKED = 30_000, 8


def load_file(path: Path) -> Mapping[Any, Any]:
    """Return what a weights file holds: tensors, mappings of them, and plain values.

    ``path`` is a pickle of PyTorch's, zipped or not, or a safetensors file, whose metadata
    stands beside the tensors; the content decides, not the name.

    Raises:
        CheckpointError: the file cannot be read, is something else, or wants to run code.
    """
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            head = file.read(40)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "Check its path and permissions.") from None
    if head[8:9] == b"{":
        return _from_safetensors(path)
    if not head.startswith((b"PK", b"\x80")):
        wrong = f"The file {path} is not a checkpoint: it begins with {head!r}."
        what = "b'<' begins a web page, b'version https://git-lfs' a Git LFS pointer"
        raise CheckpointError(wrong, f"Pass a file of torch.save or safetensors ({what}).")
    loaded = _from_pickle(path, mapped=head.startswith(b"PK") and _is_stored(path))
    if isinstance(loaded, Mapping):
        return loaded
    what = type(loaded).__name__
    raise CheckpointError(f"The file {path} holds a {what}, not a state dict.", _SAVE)


def _unreadable(path: Path, why: object, remedy: str = _AGAIN) -> CheckpointError:
    why = getattr(why, "strerror", None) or why
    return CheckpointError(f"The checkpoint {path} cannot be read: {why}.", remedy)


def _from_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found: dict[str, Any] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from None
    for name, text in found.items():
        with contextlib.suppress(ValueError):
            found[name] = parse_json(text)
    return found | tensors


def _is_stored(path: Path) -> bool:
    """Return whether an archive's tensors lie there as they are, uncompressed.

    Raises:
        CheckpointError: the archive is damaged, or would fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        what = f"it begins as a zip archive and is not a whole one ({error})"
        raise _unreadable(path, what) from None
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > _MOST_ENTRIES or unpacked > _MOST_UNPACKED * path.stat().st_size:
        claim = f"it claims to unpack to {unpacked:,} bytes in {len(entries):,} entries"
        raise _unreadable(path, claim)
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _from_pickle(path: Path, *, mapped: bool) -> Any:
    """Return what ``torch.save`` wrote, tensors and plain values only.

    The plain values are what the official files hold (``Namespace``), timm's metrics (NumPy's
    scalars) and mmengine's training log (``HistoryBuffer``, for which a ``Namespace`` stands in).
    With ``mapped`` the tensors stay on the disk until they are used; only for zip archives
    whose entries are stored uncompressed.

    Raises:
        CheckpointError: the pickle wants to run something, or cannot be read.
    """
    reconstruct, scalar = np.array(0.0).__reduce__()[0], np.float64(0).__reduce__()[0]
    log = (argparse.Namespace, "mmengine.logging.history_buffer.HistoryBuffer")
    allowed: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, log]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    allowed += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols; an error follows where it matters
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # whatever a damaged pickle makes torch.load raise
            message = str(error).strip() or type(error).__name__
            refused = isinstance(error, pickle.UnpicklingError)
    if not refused:
        raise _unreadable(path, message.splitlines()[0])
    wanted = re.findall(r"GLOBAL\s+([\w.]+)", message)[:1]
    with contextlib.suppress(Exception):  # no zip, or damaged: the first one is all there is
        more = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        wanted += sorted(set(more) - set(wanted))
    if not wanted:
        raise _unreadable(path, "its pickle is not one that torch.save writes")
    wants = ", ".join(wanted[:3])
    wrong = f"{path} is refused: its pickle wants {wants}, and loading it would run code."
    raise CheckpointError(wrong, f"If you trust it, open it in the program that made it. {_SAVE}")
