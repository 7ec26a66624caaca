"""Files and values by their SHA-256, files written whole or not at all, and weights beside one.

An ONNX file may keep weights in other files, which it names itself, so a hostile one could
name anything on the machine. Runtimes differ in what they refuse (TensorRT for RTX 1.7.1
follows links out of the folder), so it is refused here, before any of them sees the file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from van_deploy.errors import InputError

if TYPE_CHECKING:
    from onnx import ModelProto

LOCATION = b"location"  # every tensor that is in another file spells this out


def content_key(ingredients: Mapping[str, Any]) -> str:
    """Return the SHA-256 of ``ingredients`` as canonical JSON.

    >>> content_key({"b": 1, "a": [2]}) == content_key({"a": (2,), "b": 1})
    True
    """
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def external_files(path: Path) -> tuple[str, ...]:
    """Return the names of other files in an ONNX file, sorted; none where it cannot be parsed.

    A file without any is not parsed.
    """
    if not path.stat().st_size:
        return ()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(LOCATION) < 0:
            return ()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return external_files_in(onnx.load(path, load_external_data=False))
    except DecodeError:
        return ()  # whatever reads it next says so


def external_files_in(model: ModelProto) -> tuple[str, ...]:
    """Return the names of other files in a graph, wherever in it a tensor can be, sorted."""
    found = {
        entry.value
        for tensor in _tensors(model)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(found))


def check_external_files(path: Path, files: Collection[str], named: Collection[str] | None) -> None:
    """Return if every other file is below the folder of ``path``, and no link leads out of it.

    Args:
        path: of the ONNX file.
        files: the names in it.
        named: those that somebody vouches for, relative to the folder; None for any.

    Raises:
        InputError: one is elsewhere, is not there, is no file, or nobody vouches for it.
    """
    for file in files:
        problem = _problem(path.parent, file, named)
        if problem:
            raise InputError(
                f"'{path}': its weights are in '{file[:200]}', {problem}.",
                "Do not use this file, or export it again: `van-deploy export` writes no such "
                "name.",
            )


def _problem(folder: Path, file: str, named: Collection[str] | None) -> str:
    relative = PurePosixPath(file)
    if not file.isprintable() or relative.is_absolute() or ".." in relative.parts or "\\" in file:
        return "which is outside its folder"
    place = folder
    for part in relative.parts:
        place = place / part
        if place.is_symlink():
            return "which is a link or behind one"
    if named is not None and relative.as_posix() not in named:
        return "which the manifest does not name"
    return "" if place.is_file() else "which is not beside it"


def _tensors(message: Any) -> Iterator[Any]:
    """Yield every tensor in a message, at any depth: protobuf itself limits it to 100."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if hasattr(value, "__len__") else (value,):
            yield from _tensors(inner)
