"""Reading a weights file without running anything that is in it.

:func:`read_weights` returns the tensors and what the file says about itself, or
says in one sentence what the file is instead. Pickles go through
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from van_deploy.documents import DocumentError, json_from, require_regular_file
from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.keys import networks_in

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
"""Endings that make a word on the command line a path (``.pth.tar`` is a ``.tar``)."""

TOP_LEVEL = "top level"

_SAVE = "Save the weights: torch.save(model.state_dict(), 'weights.pth')."
_AGAIN = "It is damaged or truncated: copy or download it again."
_MOST_ENTRIES = 30_000  # a VAN-B6 has 3,000 tensors, and its optimizer twice as many
_MAX_UNPACKED = 8  # times the file's size; PyTorch itself writes 1
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")
_SAFETENSORS = rb".{8}\{"
_FOREIGN = (  # how other files begin, and what they are
    (rb"\Z", "empty"),
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page (a login, an error, or about the file)"),
    (rb"version https://git-lfs", "a Git LFS pointer, which `git lfs pull` replaces"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar", "a gzip, bzip2, xz or tar archive, to be unpacked"),
    (rb"\x89HDF", "an HDF5 file (Keras?)"),
    (rb"(?!PK|\x80|" + _SAFETENSORS + b")", "not a checkpoint: it begins with {!r}"),
)


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
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]


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
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"The file {path} cannot be read: {reason}.", "Check its path and permissions."
        ) from None
    for pattern, what in _FOREIGN:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise CheckpointError(
                f"The file {path} is {what.format(head[:12])}.",
                "Pass a file written by torch.save or safetensors; get it again if it was one.",
            )
    if re.match(_SAFETENSORS, head, re.DOTALL):
        loaded = _from_safetensors(path)
    else:
        loaded = _from_pickle(path, mapped=head.startswith(b"PK") and _is_stored(path))
    if not isinstance(loaded, Mapping):
        what = type(loaded).__name__
        raise CheckpointError(f"The file {path} holds a {what}, not a state dict.", _SAVE)
    return _chosen(path, loaded, container)


# --- safetensors ---------------------------------------------------------------------------


def _from_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {name: _json(text) for name, text in (file.metadata() or {}).items()}
            return metadata | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"The file {path} cannot be read: {error}.", _AGAIN) from None


def _json(text: str) -> Any:
    try:
        return json_from(text)
    except ValueError:
        return text


# --- pickles -------------------------------------------------------------------------------


def _is_stored(path: Path) -> bool:
    """Return whether an archive's tensors lie there as they are, uncompressed.

    Raises:
        CheckpointError: the archive is no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"The archive {path} cannot be read: {error}.", _AGAIN) from None
    names, unpacked = [e.filename for e in entries], sum(e.file_size for e in entries)
    fault = ""
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in names):
        fault = "is a TorchScript program, not a checkpoint"
    elif not any(name.endswith("/data.pkl") for name in names):
        fault = f"is a zip archive without PyTorch tensors (it holds {', '.join(names[:3])})"
    elif len(names) > _MOST_ENTRIES or unpacked > _MAX_UNPACKED * path.stat().st_size:
        fault = (
            f"claims to unpack to {unpacked:,} bytes in {len(names):,} entries: not to be trusted"
        )
    if fault:
        raise CheckpointError(f"The file {path} {fault}.", _SAVE)
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

    Args:
        path: the file.
        mapped: leave the tensors on the disk until they are used; only for zip
            archives whose entries are stored uncompressed.

    Raises:
        CheckpointError: the pickle wants to run something, or cannot be read.
    """
    with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols; an error follows where it matters
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # whatever a damaged pickle makes torch.load raise
            refused = isinstance(error, pickle.UnpicklingError)
            message = str(error).strip() or type(error).__name__
    wanted = re.findall(r"GLOBAL\s+([\w.]+)", message)[:1] if refused else []
    with contextlib.suppress(Exception):  # no zip, or damaged: the first one is all there is
        more = torch.serialization.get_unsafe_globals_in_checkpoint(path) if refused else []
        wanted += sorted(set(more) - set(wanted))
    if not wanted:
        what = "its pickle is not one that torch.save writes" if refused else message
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {what.splitlines()[0]}.", _AGAIN
        )
    network = any(name.startswith("torch.nn.modules.") for name in wanted)
    raise CheckpointError(
        f"The file {path} {'holds a whole pickled network' if network else 'is refused'}: its "
        f"pickle wants {', '.join(wanted[:3])}, and loading it would run code from the file.",
        f"If you trust it, open it in the program that made it. {_SAVE}",
    )


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
        raise CheckpointError(f"The checkpoint {path} holds no tensors.", _SAVE)
    if container not in (None, TOP_LEVEL):
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
    """Return the tensors of a container, or those whose names begin as it goes on."""
    inside = places.get(container) or {
        name: tensor
        for place, held in places.items()
        for name, tensor in held.items()
        if (f"{place}.{name}" if place else name).startswith(f"{container}.")
    }
    if not inside:
        held_in = ", ".join(f"{place or TOP_LEVEL} ({len(held)})" for place, held in places.items())
        raise UsageError(
            f"The checkpoint {path} has no tensors under '{container}'.",
            f"It has tensors in: {held_in}.",
        )
    return inside
