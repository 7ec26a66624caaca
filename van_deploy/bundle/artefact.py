"""One thing in a bundle that can be run or read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Artefact"]


@dataclass(frozen=True)
class Artefact:
    """One thing in a bundle that can be run or read.

    Attributes:
        name: what the manifest calls it: ``fp32``, ``fp16``, ``int8``, or an
            engine's name.
        kind: ``onnx`` or ``engine``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        file: the file to open, relative to the bundle.
        files: every file that belongs to it (external weights, a sidecar), with
            its SHA-256 in hexadecimal.
        made_from: ``name`` and ``sha256`` of what it was made from.
        made_with: everything that decided what is in it; its digest is ``key``.
        key: digest of ``made_with`` (see :func:`content_key`).
        facts: what is worth knowing about it: operator counts, sizes, ranges.
    """

    name: str
    kind: str
    precision: str
    file: str
    files: Mapping[str, str]
    made_from: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """SHA-256 of the file to open."""
        return self.files[self.file]
