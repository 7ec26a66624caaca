"""Reading a weights file without running anything that is in it.

:func:`read_weights` returns the tensors and what the file says about itself,
or says in one sentence what the file is instead. Pickles go through
:mod:`~van_deploy.model.pickles`, safetensors through their own reader.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from van_deploy.documents import DocumentError, json_from, require_regular_file
from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.keys import networks_in
from van_deploy.model.pickles import AGAIN, SAVE, TOP_LEVEL, inspect_zip, load_pickle, truncated

__all__ = ["SUFFIXES", "WeightsFile", "read_weights"]

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
"""Endings that make a word on the command line a path (``.pth.tar`` is a ``.tar``)."""

_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")


@dataclass(frozen=True)
class WeightsFile:
    """What was found in a weights file.

    Attributes:
        tensors: names as in the file to tensors, untouched.
        container: where in the file they were, keys joined by dots, or ``top level``.
        metadata: whatever else the file says about itself, by name; ``args`` as a mapping.
        notes: what the user should be told.
    """

    tensors: dict[str, Tensor]
    container: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weights(path: Path, *, container: str | None = None) -> WeightsFile:
    """Return the tensors in a weights file and what it says about itself.

    Args:
        path: a pickle of PyTorch's, zipped or not, or a safetensors file; the
            content decides, not the name.
        container: which mapping of tensors to take: its keys joined by dots, and behind
            them, if need be, the beginning of the tensors' names (``state_dict.student``).
            By default the one that holds a VAN, averaged weights before others.

    Raises:
        CheckpointError: the file cannot be read or is something else.
        UsageError: the file has no such ``container``, or several VANs and none was named.
    """
    head, size = _peek(path)
    _refuse_foreign(path, head, size)
    if _is_safetensors(head):
        tensors, metadata = _read_safetensors(path, head, size)
        loaded: Any = {**metadata, **tensors}
    else:
        mapped = head.startswith(b"PK") and inspect_zip(path, size)
        loaded = load_pickle(path, mapped)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"The file {path} holds a {type(loaded).__name__}, not a state dict.", SAVE
        )
    return _chosen(path, loaded, container)


def _peek(path: Path) -> tuple[bytes, int]:
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            return file.read(512), path.stat().st_size
    except FileNotFoundError:
        message, remedy = f"There is no file {path}.", "Check the path of the checkpoint."
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"The file {path} cannot be read: {reason}."
        remedy = "Check its permissions and the disk it is on."
    raise CheckpointError(message, remedy)


_UNPACK, _FORMAT = (
    "Unpack it and pass the checkpoint inside.",
    "Pass PyTorch or safetensors weights.",
)
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves",
     "Fetch the content with `git lfs pull`, or download the file from its web page."),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x89HDF", "an HDF5 file (Keras?)", _FORMAT),
    (b"\x93NUMPY", "a NumPy array", _FORMAT),
    (b"\x89PNG", "a PNG image", _FORMAT),
    (b"\xff\xd8\xff", "a JPEG image", _FORMAT),
)  # fmt: skip


def _refuse_foreign(path: Path, head: bytes, size: int) -> None:
    what = remedy = ""
    if size == 0:
        what, remedy = "empty", "Copy or download it again."
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "a web page, not a checkpoint"
        remedy = (
            "The download was answered with a page (a login, an error, or the page about the "
            "file): download the file itself."
        )
    elif head[257:262] == b"ustar":
        what, remedy = "a tar archive", _UNPACK
    elif found := [row for row in _FOREIGN if head.startswith(row[0])]:
        _, what, remedy = found[0]
    elif not (head.startswith((b"PK", b"\x80")) or _is_safetensors(head)):
        what = f"not a checkpoint: it begins with {head[:12]!r}"
        remedy = "Pass a file written by torch.save or safetensors."
    if what:
        raise CheckpointError(f"The file {path} is {what}.", remedy)


# --- safetensors ---------------------------------------------------------------------------


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{"


def _read_safetensors(
    path: Path, head: bytes, size: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
            f"The safetensors file {path} cannot be read: {error}.", AGAIN
        ) from None
    return tensors, {name: _json(text) for name, text in metadata.items()}


def _json(text: str) -> Any:
    try:
        return json_from(text)
    except ValueError:
        return text


# --- which tensors -------------------------------------------------------------------------


def _places(
    value: Mapping[Any, Any], where: str = "", depth: int = 2
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors of every mapping that has some, and the keys that lead to it."""
    if tensors := {str(key): inner for key, inner in value.items() if isinstance(inner, Tensor)}:
        yield where, tensors
    for key, inner in value.items():
        if depth and isinstance(inner, Mapping) and isinstance(key, str):
            yield from _places(inner, f"{where}.{key}" if where else key, depth - 1)


def _chosen(path: Path, loaded: Mapping[Any, Any], container: str | None) -> WeightsFile:
    """Return the tensors that were asked for, or the network there is."""
    places = dict(_places(loaded))
    notes: tuple[str, ...] = ()
    if not places:
        raise CheckpointError(f"The checkpoint {path} holds no tensors.", SAVE)
    if container is not None:
        where, tensors = container, _in_container(path, places, container)
    else:
        largest = max(places, key=lambda place: len(places[place]))
        found = [place for place in places if networks_in(places[place])] or [largest]
        averaged = [place for place in found if _AVERAGED.search(place)]
        if len(found) > 1 and len(averaged) != 1:
            raise UsageError(
                f"The checkpoint {path} holds several networks: {', '.join(found)}.",
                f"Say which: --container {' or --container '.join(filter(None, found))}.",
            )
        where = (averaged or found)[0]
        tensors = places[where]
        if others := ", ".join(place or TOP_LEVEL for place in found if place != where):
            notes = (
                f"the file also holds {others}: the averaged weights under {where} were taken; "
                "choose with --container",
            )
    metadata = {
        key: vars(value) if isinstance(value, argparse.Namespace) else value
        for key, value in loaded.items()
        if isinstance(key, str) and not isinstance(value, Tensor) and key not in places
    }
    return WeightsFile(tensors, where or TOP_LEVEL, metadata, notes)


def _in_container(
    path: Path, places: Mapping[str, dict[str, Tensor]], container: str
) -> dict[str, Tensor]:
    """Return the tensors of a container, or those of one whose names begin as it goes on."""
    if container in places:
        return places[container]
    for place, held in places.items():
        start = f"{container.removeprefix(f'{place}.')}."
        inside = {name: tensor for name, tensor in held.items() if name.startswith(start)}
        if inside and container.startswith(f"{place}." if place else ""):
            return inside
    held_in = ", ".join(f"{place or TOP_LEVEL} ({len(held)})" for place, held in places.items())
    raise UsageError(
        f"The checkpoint {path} has no tensors under '{container}'.",
        f"It has tensors in: {held_in}.",
    )
