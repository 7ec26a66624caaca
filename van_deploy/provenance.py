"""Which versions of what made an artefact: part of every manifest, and of every content key."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

from van_deploy import __version__

__all__ = ["EXPORT_TOOLS", "code_digest", "tool_versions"]

EXPORT_TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxsim", "numpy", "pillow")


def tool_versions(*distributions: str) -> dict[str, str]:
    """Return the versions of Python, this package and what is installed of ``distributions``."""
    versions = {"python": platform.python_version(), "van-deploy": __version__}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # noqa: PERF203 - each on its own
            continue
    return versions


def code_digest(*rooms: str) -> str:
    """Return a digest of the source of some rooms (``model``, ``graph``) of this package.

    The version number alone would let a changed checkout reuse stale results.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for room in rooms:
        for path in sorted((package / room).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
