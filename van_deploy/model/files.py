"""Locate a weights file on this machine or the hub, and load it without executing code from it.

:func:`find_weights` returns a :class:`WeightsFile`: a local file, its digest (compared with the
expected one), and the JSON files beside it. A folder and the weights file in it are equivalent.
``huggingface_hub`` does downloads, caching, resuming and revisions, with the mirror in
``HF_ENDPOINT`` if it is set, and with the user's token for gated repositories.

:func:`load_file` returns the tensors and metadata in a file. Pickles are loaded with
``torch.load(weights_only=True)`` and a few harmless globals that training scripts save with their
tensors; safetensors with their own reader.
"""

import argparse
import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import safetensors
import torch
from huggingface_hub import constants, errors
from torch.torch_version import TorchVersion

from van_deploy.documents import parse_json, read_text_file, require_regular_file
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.files import file_sha256
from van_deploy.model.variants import cached_snapshot

# JSON files beside the weights, as Transformers and timm name them.
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

LICENCE = 'public weights: Apache-2.0; README: "for commercial use, please contact the authors"'
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
_NOT_FOUND_ERRORS = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
_DEFAULT_FILES = ("model.safetensors", "pytorch_model.bin")
# A model argument that ends in one of these is a path.
WEIGHTS_SUFFIX = re.compile(r"(\.(safetensors|bin|pth|pt|ckpt|tar))+$", re.IGNORECASE)
_GENERIC_STEMS = {"model", "pytorch_model", "checkpoint", "model_best", "last", "best"}


class WeightsFile(NamedTuple):
    """A weights file on this machine and the JSON files beside it.

    Attributes:
        name: default name of the network, from the file, its folder or its repository.
        path: the file.
        sha256: of its bytes; "" if it cannot be read.
        configs: content of ``config.json`` and ``preprocessor_config.json`` beside it, by name.
        is_official: whether it is from the authors' repositories on the hub.
        notes: messages for the user.
    """

    name: str
    path: Path
    sha256: str
    configs: Mapping[str, Mapping[str, Any]]
    is_official: bool = False
    notes: tuple[str, ...] = ()


def find_weights(spec: str, expect_sha256: str | None = None, offline: bool = False) -> WeightsFile:
    """Return the weights file of a path, a folder, or ``owner/name[@revision][:file]``.

    Args:
        spec: the location; without a file, the only weights file of the folder or repository.
        expect_sha256: expected digest.
        offline: use only files in the cache (also ``HF_HUB_OFFLINE=1``).

    Raises:
        UsageError: ``spec`` is none of these, or there are several weights files.
        CheckpointError: the JSON beside the weights cannot be read.
        DownloadError: no network, repository, file, permission or disk space, or the digest
            is not the one that the hub announced or the expected one.
    """
    path, repo, source = Path(os.path.expanduser(spec)), _REPO.fullmatch(spec), spec
    stem, official, note = WEIGHTS_SUFFIX.sub("", path.name), False, ""
    # Unlike Path's methods, those of os.path raise no error for long names and loops of links.
    is_file = os.path.exists(path) or (WEIGHTS_SUFFIX.search(spec) and not (repo and repo["file"]))
    if os.path.isdir(path):
        stem = Path(os.path.realpath(path)).name
        path /= _select_file([e.name for e in path.iterdir() if e.is_file()], f"{path}/")
    elif is_file or spec.startswith((".", "/", "~")):
        folder = Path(os.path.realpath(path)).parent
        stem = folder.name if stem.lower() in _GENERIC_STEMS else stem
    elif repo is None:
        message = f"'{spec}' is not an existing file, a repository (owner/name) or 'random'."
        raise UsageError(message, "Give a path, a Hugging Face repository (owner/name), or random.")
    else:
        owner, _, stem = repo["repo"].partition("/")
        path, note = _download(repo["repo"], repo["revision"] or "main", repo["file"], offline)
        official = owner.lower() == "visual-attention-network"
        source = f"{repo['repo']}/{path.name}"
    digest, blob, files = "", Path(os.path.realpath(path)), list[Path]()
    with contextlib.suppress(OSError, ValueError):  # load_file reports the error
        require_regular_file(path)  # a pipe or a device may not end
        digest = file_sha256(path)
        files = [f for f in (path.parent / CONFIG, path.parent / PROCESSOR) if f.exists()]
    # The hub names large files' blobs in its cache by their SHA-256.
    is_cached = Path(os.path.realpath(constants.HF_HUB_CACHE)) in blob.parents
    is_blob = is_cached and re.fullmatch("[0-9a-f]{64}", blob.name)
    if digest and is_blob and blob.name != digest:
        with contextlib.suppress(OSError):  # the cache may be read-only
            blob.unlink()
        message = f"{source} is damaged: its SHA-256 is {digest}, the hub announced {blob.name}."
        raise DownloadError(message, f"Remove {blob} if it still exists, and try again.")
    if digest and expect_sha256 and digest != expect_sha256.lower():
        message = f"{source} is another file: its SHA-256 is {digest}, expected: {expect_sha256}."
        raise DownloadError(message, "Check the digest and HF_ENDPOINT, or download it again.")
    name = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "van"
    notes = tuple(filter(None, (note, LICENCE if official else "")))
    return WeightsFile(name, path, digest, {f.name: _read_json(f) for f in files}, official, notes)


def _select_file(names: Iterable[str], folder: str) -> str:
    """Return ``model.safetensors``, else ``pytorch_model.bin``, else the only weights file."""
    names = sorted(names)
    candidates = [name for name in _DEFAULT_FILES if name in names][:1]
    candidates = candidates or [name for name in names if WEIGHTS_SUFFIX.search(name)]
    if len(candidates) != 1:
        files = ", ".join((candidates or names)[:10])
        message = f"{folder[:-1]} has {len(candidates)} PyTorch weights files; its files: {files}."
        remedy = f"Select one, such as {folder}{[*candidates, 'weights.pth'][0]}."
        if any(re.search(r"-\d+-of-\d+\.", name) for name in candidates):  # of Transformers
            remedy = "Save it in one file: model.save_pretrained(folder, max_shard_size='10GB')."
        raise UsageError(message, remedy)
    return candidates[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(read_text_file(file)))
    except (OSError, ValueError, TypeError) as error:
        message = f"The file {file} cannot be read: {error}."
        raise CheckpointError(message, "Correct it, or remove it from the folder.") from None


# --- the hub ---------------------------------------------------------------------------------


def _download(repo_id: str, revision: str, file: str | None, offline: bool) -> tuple[Path, str]:
    """Download a repository's weights and the JSON beside them; return their path and a note."""
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    snapshot, note = cached_snapshot(repo_id, revision), ""
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
    is_cached = snapshot.name == revision and file in names  # a commit never changes
    offline = offline or constants.HF_HUB_OFFLINE or is_cached
    try:
        try:
            siblings = () if offline else api.model_info(repo_id, revision=revision).siblings
            names = [sibling.rfilename for sibling in siblings or ()] or names
        except Exception as error:  # network libraries raise many types
            if not names or isinstance(error, _NOT_FOUND_ERRORS):
                raise
            offline, reason = True, str(error).strip().partition("\n")[0]
            note = f"the cached copy is used, since the hub is not available: {reason}"
        selected = file or (_select_file(names, f"{repo_id}:") if names else _DEFAULT_FILES[0])
        folder = selected[: selected.rfind("/") + 1]
        configs = [folder + name for name in (CONFIG, PROCESSOR) if folder + name in names]
        get = partial(api.hf_hub_download, repo_id, revision=revision, local_files_only=offline)
        path, *_ = map(get, (selected, *configs))
        return Path(path), note
    except UsageError:
        raise
    except Exception as error:
        # A broken connection may stay in the pool, so the next download opens a new one.
        getattr(huggingface_hub, "close_session", lambda: None)()  # since huggingface_hub 1
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        name, cache = f"{repo_id}/{file}" if file else repo_id, constants.HF_HUB_CACHE
        raise DownloadError(
            f"{name} is not available from {api.endpoint} or the cache ({cache}): {reason}",
            "Check its name, --offline, HF_ENDPOINT, the network and the disk space; if it is "
            "private or gated: `hf auth login`. Or pass a file with --weights FILE.",
        ) from None


# --- reading ---------------------------------------------------------------------------------

_SAVE_HINT = "Save the weights with torch.save(model.state_dict(), 'weights.pth')."
_DAMAGED_HINT = "If it is damaged or truncated, download it or save it with torch.save again."
_PLAIN_TYPES = (argparse.Namespace, defaultdict, list, datetime, timedelta, TorchVersion)
# A VAN-B6 has 3,000 tensors and its optimizer twice as many; torch.save does not compress.
_MAX_ENTRIES, _MAX_UNPACK_RATIO = 30_000, 8


def load_file(path: Path) -> Mapping[Any, Any]:
    """Return the content of a weights file: tensors, mappings of tensors, and plain values.

    ``path`` is a PyTorch pickle, zipped or not, or a safetensors file, whose metadata is
    merged with its tensors. The format is detected from the content.

    Raises:
        CheckpointError: the file cannot be read, has another format, or would execute code.
    """
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            head = file.read(40)
    except (OSError, ValueError) as error:
        raise _read_error(path, error, "Check its path and permissions.") from None
    if head[8:9] == b"{":
        return _load_safetensors(path)
    if not head.startswith((b"PK", b"\x80")):
        message = f"The file {path} is not a checkpoint: it begins with {head!r}."
        hint = "b'<' begins a web page, b'version https://git-lfs' a Git LFS pointer"
        raise CheckpointError(message, f"Pass a file of torch.save or safetensors ({hint}).")
    content = _load_pickle(path, mmap=head.startswith(b"PK") and _is_uncompressed_zip(path))
    if isinstance(content, Mapping):
        return content
    kind = type(content).__name__
    raise CheckpointError(f"The file {path} contains a {kind}, not a state dict.", _SAVE_HINT)


def _read_error(path: Path, reason: object, remedy: str = _DAMAGED_HINT) -> CheckpointError:
    reason = getattr(reason, "strerror", None) or reason
    return CheckpointError(f"The checkpoint {path} cannot be read: {reason}.", remedy)


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _read_error(path, error) from None
    for name, text in metadata.items():
        with contextlib.suppress(ValueError):
            metadata[name] = parse_json(text)
    return metadata | tensors


def _is_uncompressed_zip(path: Path) -> bool:
    """Return whether all entries of a zip archive are stored uncompressed.

    Raises:
        CheckpointError: the archive is damaged, or a decompression bomb.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise _read_error(path, "it is an incomplete zip archive") from None
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > _MAX_ENTRIES or unpacked > _MAX_UNPACK_RATIO * path.stat().st_size:
        claim = f"it claims to unpack to {unpacked:,} bytes in {len(entries):,} entries"
        raise _read_error(path, claim)
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _load_pickle(path: Path, *, mmap: bool) -> Any:
    """Return the content of a ``torch.save`` file, restricted to tensors and plain values.

    The plain values include those of the official files (``Namespace``), of training scripts'
    arguments (paths, dates, versions), of metrics and random states (NumPy's types) and of
    mmengine's training log (``HistoryBuffer``, loaded as ``Namespace``).
    With ``mmap`` tensors are read from the disk on first use, which needs a zip archive
    with uncompressed entries.

    Raises:
        CheckpointError: the pickle would execute code, or cannot be read.
    """
    reconstruct, scalar = np.array(0.0).__reduce__()[0], np.float64(0).__reduce__()[0]
    log = (argparse.Namespace, "mmengine.logging.history_buffer.HistoryBuffer")
    method = (lambda *_: None, "builtins.getattr")  # the log names its methods; none is looked up
    allowed: list[Any] = [*_PLAIN_TYPES, np.ndarray, np.dtype, log, method]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    for module in ("pathlib", "pathlib._local"):
        allowed += [(PurePath, f"{module}.PosixPath"), (PurePath, f"{module}.WindowsPath")]
    allowed += {type(np.dtype(kind)) for kind in np.typecodes["All"]}
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols; those that matter are errors too
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a damaged pickle makes torch.load raise many types
            message = str(error).strip() or type(error).__name__
            refused = isinstance(error, pickle.UnpicklingError)
    if not refused:
        raise _read_error(path, re.split(r"\n|\.(?:\s|$)", message)[0])
    unsafe = dict.fromkeys(re.findall(r"GLOBAL\s+([\w.]+)", message)[:1])
    # of a file that is not a zip archive, or damaged, only the first is known
    with contextlib.suppress(Exception), torch.serialization.safe_globals(allowed):
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        unsafe |= dict.fromkeys(sorted(name.removeprefix("builtins.") for name in others))
    if not unsafe:
        reason = "its pickle has more than tensors and plain values, or is not of torch.save"
        raise _read_error(path, reason)
    names = ", ".join([*unsafe][:3])
    message = f"{path} is refused: its pickle imports {names}, so loading it would execute code."
    raise CheckpointError(message, f"If you trust it, open it in its own program. {_SAVE_HINT}")
