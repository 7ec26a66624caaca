"""Reading a weights file without running anything that is in it.

:func:`load_file` returns the tensors and what the file says about itself, or
says in one sentence what is wrong. Pickles go through
``torch.load(weights_only=True)`` within the few harmless globals that training
scripts leave beside their tensors, safetensors through their own reader.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from van_deploy.documents import json_from, require_regular_file
from van_deploy.errors import CheckpointError

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
"""Endings that make a word on the command line a path (``.pth.tar`` is a ``.tar``)."""

_SAVE = "Save the weights: torch.save(model.state_dict(), 'weights.pth')."
_AGAIN = (
    "If it is damaged or truncated, get it again; if another program wrote it, save its weights: "
    "torch.save(model.state_dict(), 'weights.pth')."
)
_MOST_ENTRIES = 30_000  # a VAN-B6 has 3,000 tensors, and its optimizer twice as many
_MAX_UNPACKED = 8  # times the file's size; PyTorch itself writes 1


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
        what = getattr(error, "strerror", None) or str(error)
        raise _unreadable(path, what, "Check its path and permissions.") from None
    if head[8:9] == b"{":
        return _from_safetensors(path)
    if not head.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"The file {path} is not a checkpoint: it begins with {head!r}.",
            "Pass a file written by torch.save or safetensors. What begins with b'<' is a web page "
            "and with b'version https://git-lfs' a Git LFS pointer: get the file itself.",
        )
    loaded = _from_pickle(path, mapped=head.startswith(b"PK") and _is_stored(path))
    if not isinstance(loaded, Mapping):
        what = type(loaded).__name__
        raise CheckpointError(f"The file {path} holds a {what}, not a state dict.", _SAVE)
    return loaded


def _unreadable(path: Path, what: str, remedy: str = _AGAIN) -> CheckpointError:
    return CheckpointError(f"The checkpoint {path} cannot be read: {what}.", remedy)


def _from_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found: dict[str, Any] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _unreadable(path, str(error)) from None
    for name, text in found.items():
        with contextlib.suppress(ValueError):
            found[name] = json_from(text)
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
    if len(entries) > _MOST_ENTRIES or unpacked > _MAX_UNPACKED * path.stat().st_size:
        claim = f"it claims to unpack to {unpacked:,} bytes in {len(entries):,} entries"
        raise _unreadable(path, claim)
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


class _Opaque:
    """Stands in for a training log that the file holds and nobody needs."""

    def __setstate__(self, state: object) -> None:
        """Forget it."""


def _safe_globals() -> list[Any]:
    """Return what a pickle may build besides tensors: plain values, no behaviour.

    ``Namespace`` is in the official files, numpy's scalars are timm's metrics,
    and ``HistoryBuffer`` is mmengine's training log (replaced by a stand-in).
    """
    reconstruct, scalar = np.array(0.0).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: list[Any] = [argparse.Namespace, np.ndarray, np.dtype]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    allowed += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    return [*allowed, (_Opaque, "mmengine.logging.history_buffer.HistoryBuffer")]


def _from_pickle(path: Path, *, mapped: bool) -> Any:
    """Return what ``torch.save`` wrote, tensors and plain values only.

    With ``mapped`` the tensors stay on the disk until they are used; only for zip archives
    whose entries are stored uncompressed.

    Raises:
        CheckpointError: the pickle wants to run something, or cannot be read.
    """
    with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
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
    raise CheckpointError(
        f"The file {path} is refused: its pickle wants {', '.join(wanted[:3])}, and loading it "
        "would run code from the file.",
        f"If you trust it (a whole network?), open it in the program that made it. {_SAVE}",
    )
