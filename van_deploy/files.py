"""SHA-256 of files and values, atomic writes, and checks of an ONNX file's external weights.

An ONNX file can store weights in other files and names them itself, so a hostile file could
name any file on the machine. Runtimes differ in what they refuse (TensorRT for RTX 1.7.1
follows links out of the folder), so such names are refused here, before a runtime opens the file.
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


def content_key(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of ``values`` as canonical JSON.

    >>> content_key({"b": 1, "a": [2]}) == content_key({"a": (2,), "b": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; reads in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``; a reader sees either the old file or the new one."""
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
    """Return the names of an ONNX file's external files, sorted; none if it cannot be parsed.

    A file without such names is not parsed.
    """
    if not path.stat().st_size:
        return ()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"location") < 0:  # a key of every tensor in another file
            return ()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return external_files_in(onnx.load(path, load_external_data=False))
    except DecodeError:
        return ()  # the next reader reports it


def external_files_in(model: ModelProto) -> tuple[str, ...]:
    """Return the names of external files in a graph, sorted; from tensors at any depth."""
    found = {
        entry.value
        for tensor in _tensors(model)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(found))


def check_external_files(path: Path, files: Collection[str], known: Collection[str] | None) -> None:
    """Raise unless every external file is a known file in the folder of ``path``, without links.

    Args:
        path: of the ONNX file.
        files: the names in it.
        known: the files that a manifest lists, relative to the folder; None to allow all.

    Raises:
        InputError: a file is elsewhere, does not exist, is not a file, or is not known.
    """
    for file in files:
        problem = _external_file_problem(path.parent, file, known)
        if problem:
            raise InputError(
                f"'{path}': its weights are in '{file[:200]}', {problem}.",
                "Do not use this file; create it again with `van-deploy export`.",
            )


def _external_file_problem(folder: Path, file: str, known: Collection[str] | None) -> str:
    relative = PurePosixPath(file)
    if not file.isprintable() or relative.is_absolute() or ".." in relative.parts or "\\" in file:
        return "which is outside its folder"
    place = folder
    for part in relative.parts:
        place = place / part
        if place.is_symlink():
            return "which is a link or in a linked folder"
    if known is not None and relative.as_posix() not in known:
        return "which is not in the manifest"
    return "" if place.is_file() else "which is not a file in its folder"


def _tensors(message: Any) -> Iterator[Any]:
    """Yield every tensor in a message, at any depth; protobuf limits the depth to 100."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if hasattr(value, "__len__") else (value,):
            yield from _tensors(inner)
