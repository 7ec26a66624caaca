"""Unpickling tensors and plain values, and nothing that could run.

``torch.load(weights_only=True)`` within the few harmless globals that training
scripts leave beside their tensors. A pickle that wants anything else is
refused with the name of what it wanted.
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from van_deploy.errors import CheckpointError

__all__ = ["load_pickle", "truncated"]

_HARMLESS = re.compile(  # what torch.load itself allows, plus the names below
    r"torch\.(?!nn\.modules|hub|jit|package)|collections\.(OrderedDict|defaultdict)$|_codecs\.encode$"
    r"|numpy\.|argparse\.Namespace$|mmengine\.logging\.history_buffer"
)


class _Opaque:
    """Stands in for a training log that the file holds and nobody needs."""

    def __setstate__(self, state: object) -> None:
        """Forget it."""


def _safe_globals() -> list[Any]:
    """Return what a pickle may build besides tensors: plain values, no behaviour.

    ``Namespace`` is in the official files, numpy's scalars are timm's metrics,
    and ``HistoryBuffer`` is mmengine's training log (replaced by a stand-in).
    """
    array = np.array(0.0)
    reconstruct, scalar = array.__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: list[Any] = [argparse.Namespace, np.ndarray, np.dtype]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    allowed += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    allowed += [(_Opaque, "mmengine.logging.history_buffer.HistoryBuffer")]
    return allowed


def load_pickle(path: Path, *, mapped: bool) -> Any:
    """Return what ``torch.save`` wrote, tensors and plain values only.

    Args:
        path: the file.
        mapped: leave the tensors on the disk until they are used; only for zip
            archives whose entries are stored uncompressed.

    Raises:
        CheckpointError: the pickle wants to run something, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols; an error follows where it matters
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except EOFError:
        raise truncated(path, "its pickle ends too early") from None
    except Exception as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {message}",
            "It is damaged or truncated: copy or download it again.",
        ) from None


def truncated(path: Path, how: str) -> CheckpointError:
    """Return the error for a file that ends too early."""
    return CheckpointError(
        f"The checkpoint {path} is truncated or damaged: {how}.", "Copy or download it again."
    )


def _refused(path: Path, message: str) -> CheckpointError:
    wanted = _wanted_globals(path, message)
    if any(name.startswith("torch.nn.modules.") for name in wanted):
        return CheckpointError(
            f"The file {path} holds a whole pickled network ({wanted[0]}), not its weights: "
            "loading it would run code from the file.",
            "In the program that made it, save the weights: "
            "torch.save(model.state_dict(), 'weights.pth').",
        )
    if wanted:
        return CheckpointError(
            f"The file {path} is refused: its pickle wants {', '.join(wanted[:3])}, "
            "and loading it would run code from the file.",
            "If you trust the file, load it in the program that made it and save "
            "model.state_dict() alone.",
        )
    return CheckpointError(
        f"The checkpoint {path} cannot be read: its pickle is not one that torch.save writes.",
        "It is damaged, truncated or saved another way: save it again with "
        "torch.save(model.state_dict(), 'weights.pth').",
    )


def _wanted_globals(path: Path, message: str) -> list[str]:
    """Return what the pickle wanted and may not have, in its own order.

    Reads the instructions; runs none.
    """
    first = re.search(r"GLOBAL\s+([\w.]+)", message)
    names = [first[1]] if first else []
    names += [name for name in _globals_in(path) if not _HARMLESS.match(name)]
    return list(dict.fromkeys(names))


def _globals_in(path: Path) -> Iterator[str]:
    """Yield every ``module.name`` the file's pickles mention, as far as they can be read."""
    if zipfile.is_zipfile(path):
        yield from _globals_of(io.BytesIO(_pickle_in(path)))
        return
    with path.open("rb") as file:  # the old format: several pickles, then the tensors
        yield from _globals_of(file)


def _pickle_in(archive: Path) -> bytes:
    """Return the bytes of an archive's pickle; none where they cannot be had."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = (name for name in opened.namelist() if name.endswith("/data.pkl"))
            return opened.read(next(names, ""))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, RuntimeError):
        return b""  # damaged: what it wanted cannot be named


def _globals_of(stream: Any) -> Iterator[str]:
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif "UNICODE" in opcode.name:
                    strings.append(str(argument))
                elif opcode.name in {"BINGET", "LONG_BINGET"}:
                    strings.append(memo.get(int(argument or 0), "?"))
                elif opcode.name in {"BINPUT", "LONG_BINPUT"} and strings:
                    memo[int(argument or 0)] = strings[-1]
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else "?"
    except ValueError:  # the end of the pickles, or damage
        return
