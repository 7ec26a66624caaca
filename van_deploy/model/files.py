"""Reading a weights file without running anything that is in it.

:func:`read_weights` returns the tensors and what the file says about itself,
or says in one sentence what the file is instead. Pickles go through
:mod:`~van_deploy.model.pickles`, safetensors through their own reader.
"""

from __future__ import annotations

import argparse
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from van_deploy.documents import DocumentError, json_from, require_regular_file
from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.pickles import load_pickle, truncated

__all__ = ["CONTAINERS", "SUFFIXES", "WeightsFile", "read_weights"]

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
"""Endings that make a word on the command line a path (``.pth.tar`` is a ``.tar``)."""

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training scripts put the state dict; averaged weights first, as timm does."""

_MOST_ENTRIES = 30_000  # a VAN-B6 has 3,000 tensors, and its optimizer twice as many
_MAX_UNPACKED = 8  # times the file's size; PyTorch itself writes 1


@dataclass(frozen=True)
class WeightsFile:
    """What was found in a weights file.

    Attributes:
        tensors: names as in the file to tensors, untouched.
        container: key the tensors were under, or ``top level``.
        others: further containers the file holds.
        arguments: the training script's own arguments (``args``), by name.
        metadata: whatever else the file says about itself, by name.
    """

    tensors: dict[str, Tensor]
    container: str
    others: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: Path, *, container: str | None = None) -> WeightsFile:
    """Return the tensors in a weights file and what it says about itself.

    Args:
        path: a pickle of PyTorch's, zipped or not, or a safetensors file; the
            content decides, not the name.
        container: key of the state dict to take, where the file holds several.

    Raises:
        CheckpointError: the file cannot be read or is something else.
        UsageError: the file has no such ``container``.
    """
    head, size = _peek(path)
    _refuse_foreign(path, head, size)
    if _is_safetensors(head):
        return _read_safetensors(path, head, size, container)
    if head.startswith(b"PK"):
        loaded = load_pickle(path, mapped=_inspect_zip(path, size))
    else:
        loaded = load_pickle(path, mapped=False)
    return _unpacked(path, loaded, container)


def _peek(path: Path) -> tuple[bytes, int]:
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            return file.read(512), path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no file {path}.", "Check the path of the checkpoint."
        ) from None
    except (OSError, DocumentError) as error:
        raise CheckpointError(
            f"The file {path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            "Check its permissions and the disk it is on.",
        ) from None


_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves", "Fetch the "
     "content with `git lfs pull`, or download the file from its web page."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it and pass the checkpoint inside."),
    (b"BZh", "a bzip2 archive", "Unpack it and pass the checkpoint inside."),
    (b"\xfd7zXZ", "an xz archive", "Unpack it and pass the checkpoint inside."),
    (b"\x89HDF", "an HDF5 file (Keras?)", "Pass PyTorch or safetensors weights."),
    (b"\x93NUMPY", "a NumPy array", "Pass PyTorch or safetensors weights."),
    (b"\x89PNG", "a PNG picture", "Pass PyTorch or safetensors weights."),
    (b"\xff\xd8\xff", "a JPEG picture", "Pass PyTorch or safetensors weights."),
)  # fmt: skip


def _refuse_foreign(path: Path, head: bytes, size: int) -> None:
    if size == 0:
        raise CheckpointError(f"The file {path} is empty.", "Copy or download it again.")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"The file {path} is a web page, not a checkpoint.",
            "The download was answered with a page (a login, an error, or the page about the "
            "file): download the file itself.",
        )
    for magic, what, remedy in _FOREIGN:
        if head.startswith(magic):
            raise CheckpointError(f"The file {path} is {what}.", remedy)
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"The file {path} is a tar archive.", "Unpack it and pass the checkpoint inside."
        )
    if not (head.startswith((b"PK", b"\x80")) or _is_safetensors(head)):
        raise CheckpointError(
            f"The file {path} is not a checkpoint: it begins with {head[:12]!r}.",
            "Pass a file written by torch.save or safetensors.",
        )


# --- safetensors ---------------------------------------------------------------------------


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{"


def _read_safetensors(path: Path, head: bytes, size: int, container: str | None) -> WeightsFile:
    if container is not None:
        raise _no_container(path, container, [])
    (length,) = struct.unpack("<Q", head[:8])
    if length + 8 > size:
        raise truncated(path, "its header is cut off")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        if "incomplete" in str(error).lower():
            raise truncated(path, "it holds fewer bytes than its header promises") from None
        raise CheckpointError(
            f"The safetensors file {path} cannot be read: {error}.",
            "It is damaged: copy or download it again.",
        ) from None
    return WeightsFile(tensors, "top level", metadata={k: _json(v) for k, v in metadata.items()})


def _json(text: str) -> Any:
    try:
        return json_from(text)
    except ValueError:
        return text


# --- pickles -------------------------------------------------------------------------------


def _inspect_zip(path: Path, size: int) -> bool:
    """Refuse archives that are no checkpoint; return whether tensors lie there as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise truncated(path, "its archive has no directory") from None
    names = [entry.filename for entry in entries]
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in names):
        raise CheckpointError(
            f"The file {path} is a TorchScript program, not a checkpoint.",
            "Save the weights instead: torch.save(model.state_dict(), 'weights.pth').",
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"The file {path} is a zip archive without PyTorch tensors "
            f"(it holds {', '.join(names[:3]) or 'nothing'}).",
            "Pass a file written by torch.save or safetensors.",
        )
    if len(entries) > _MOST_ENTRIES:
        raise CheckpointError(
            f"The file {path} holds {len(entries):,} tensors, more than any VAN has.",
            "Pass a file with one network's weights.",
        )
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > _MAX_UNPACKED * size:
        raise CheckpointError(
            f"The file {path} has {size:,} bytes and claims to unpack to {unpacked:,}.",
            "PyTorch writes checkpoints unpacked: this one is not to be trusted.",
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _unpacked(path: Path, loaded: Any, container: str | None) -> WeightsFile:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"The file {path} holds a {type(loaded).__name__}, not a state dict.",
            "Save the weights: torch.save(model.state_dict(), 'weights.pth').",
        )
    present = [name for name in CONTAINERS if isinstance(loaded.get(name), Mapping)]
    if container is not None and container not in present:
        raise _no_container(path, container, present)
    chosen = container or (present[0] if present else None)
    tensors = loaded[chosen] if chosen else loaded
    _check_state(path, tensors, chosen)
    rest = {} if chosen is None else {k: v for k, v in loaded.items() if k not in present}
    arguments = rest.pop("args", {})
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return WeightsFile(
        tensors=dict(tensors),
        container=chosen or "top level",
        others=tuple(name for name in present if name != chosen),
        arguments=arguments if isinstance(arguments, Mapping) else {},
        metadata={k: v for k, v in rest.items() if isinstance(k, str)},
    )


def _check_state(path: Path, tensors: Mapping[Any, Any], container: str | None) -> None:
    where = f"under {container} " if container else ""
    if not tensors:
        raise CheckpointError(
            f"The checkpoint {path} holds no tensors {where}at all.".replace("  ", " "),
            "Save the weights: torch.save(model.state_dict(), 'weights.pth').",
        )
    unnamed = [name for name in tensors if not isinstance(name, str)]
    if unnamed:
        raise CheckpointError(
            f"The checkpoint {path} holds tensors {where}whose names are no text "
            f"({type(unnamed[0]).__name__}).",
            "Save the weights: torch.save(model.state_dict(), 'weights.pth').",
        )
    strange = [k[:100] for k, v in tensors.items() if not isinstance(v, Tensor)]
    if strange:
        raise CheckpointError(
            f"The checkpoint {path} holds things {where}that are no tensors: "
            f"{', '.join(strange[:10])} ({len(strange)} of {len(tensors)}).",
            f"A state dict is wanted at the top level or under one of {', '.join(CONTAINERS)}.",
        )


def _no_container(path: Path, container: str, present: list[str]) -> UsageError:
    return UsageError(
        f"The checkpoint {path} has no '{container}'.",
        f"It holds {', '.join(present)}." if present else "Its tensors are at the top level.",
    )
