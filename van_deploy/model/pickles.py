"""Unpickling tensors and plain values, and nothing that could run.

``torch.load(weights_only=True)`` within the few harmless globals that training
scripts leave beside their tensors. A pickle that wants anything else is
refused with the name of what it wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from van_deploy.errors import CheckpointError

__all__ = ["AGAIN", "SAVE", "TOP_LEVEL", "inspect_zip", "load_pickle", "truncated"]

SAVE = "Save the weights: torch.save(model.state_dict(), 'weights.pth')."
TOP_LEVEL = "top level"
AGAIN = "It is damaged or truncated: copy or download it again."

_MOST_ENTRIES = 30_000  # a VAN-B6 has 3,000 tensors, and its optimizer twice as many
_MAX_UNPACKED = 8  # times the file's size; PyTorch itself writes 1


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
    allowed += [(_Opaque, "mmengine.logging.history_buffer.HistoryBuffer")]
    return allowed


def load_pickle(path: Path, mapped: bool) -> Any:
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
        except pickle.UnpicklingError as error:
            raise _refused(path, str(error)) from None
        except EOFError:
            raise truncated(path, "its pickle ends too early") from None
        except Exception as error:
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"The checkpoint {path} cannot be read: {message}", AGAIN
            ) from None


def _refused(path: Path, message: str) -> CheckpointError:
    """Return the error for a pickle that wants what it may not have; nothing of it ran."""
    named = re.search(r"GLOBAL\s+([\w.]+)", message)  # the first one it met
    wanted = [named[1]] if named else []
    with contextlib.suppress(Exception):  # no zip, or damaged: the first one is all there is
        wanted = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or wanted
    remedy = f"If you trust it, open it in the program that made it. {SAVE}"
    if named and any(name.startswith("torch.nn.modules.") for name in wanted):
        return CheckpointError(
            f"The file {path} holds a whole pickled network ({named[1]}), not its weights: "
            "loading it would run code from the file.",
            remedy,
        )
    if wanted:
        return CheckpointError(
            f"The file {path} is refused: its pickle wants {', '.join(wanted[:3])}, "
            "and loading it would run code from the file.",
            remedy,
        )
    return CheckpointError(
        f"The checkpoint {path} cannot be read: its pickle is not one that torch.save writes.",
        AGAIN,
    )


def truncated(path: Path, how: str) -> CheckpointError:
    """Return the error for a file that ends too early."""
    return CheckpointError(
        f"The checkpoint {path} is truncated or damaged: {how}.", "Copy or download it again."
    )


def inspect_zip(path: Path, size: int) -> bool:
    """Return whether an archive's tensors lie there as they are, uncompressed.

    Raises:
        CheckpointError: the archive is no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise truncated(path, "its archive has no directory") from None
    names = [entry.filename for entry in entries]
    unpacked = sum(entry.file_size for entry in entries)
    fault = ""
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in names):
        fault, remedy = "is a TorchScript program, not a checkpoint", SAVE
    elif not any(name.endswith("/data.pkl") for name in names):
        held = ", ".join(names[:3]) or "nothing"
        fault = f"is a zip archive without PyTorch tensors (it holds {held})"
        remedy = "Pass a file written by torch.save or safetensors."
    elif len(entries) > _MOST_ENTRIES:
        fault = f"holds {len(entries):,} tensors, more than any VAN has"
        remedy = "Pass a file with one network's weights."
    elif unpacked > _MAX_UNPACKED * size:
        fault = f"has {size:,} bytes and claims to unpack to {unpacked:,}"
        remedy = "PyTorch writes checkpoints unpacked: this one is not to be trusted."
    if fault:
        raise CheckpointError(f"The file {path} {fault}.", remedy)
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
