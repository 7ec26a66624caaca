"""Which versions of what made an artifact: part of every manifest, and of every content key."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from van_deploy import __version__
from van_deploy.errors import UsageError

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


def code_digest(*packages: str) -> str:
    """Return a digest of the source of some packages of this one (``model``, ``graph``).

    The version number alone would let a changed checkout reuse stale results.
    """
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((Path(__file__).parent / package).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def current_timestamp() -> str:
    """Return the time that files are to name (ISO 8601, UTC): ``SOURCE_DATE_EPOCH``, or now.

    Raises:
        UsageError: the variable is set to something that is no number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH") or time.time()
    try:
        moment = datetime.fromtimestamp(int(given), timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"The environment variable SOURCE_DATE_EPOCH is '{given}', no number of seconds.",
            "Set it to seconds since 1970, or unset it.",
        ) from None
    return moment.isoformat(timespec="seconds")
