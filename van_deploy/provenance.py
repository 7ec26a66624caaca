"""Versions, source digest and time: recorded in every manifest and part of every cache key."""

import hashlib
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path

from van_deploy import __version__
from van_deploy.environment.packages import installed_version
from van_deploy.errors import UsageError

# Distributions of ONNX Runtime; usually one of them is installed.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
EXPORT_TOOLS = (
    *("torch", "timm", "onnx", "onnx-ir", "onnxscript", "onnxsim", "numpy", "pillow"),
    *ONNXRUNTIMES,
)


def tool_versions(*distributions: str) -> dict[str, str]:
    """Return the versions of Python, this package and the installed ``distributions``."""
    versions = {"python": platform.python_version(), "van-deploy": __version__}
    return versions | {n: v for n in distributions if (v := installed_version(n)) is not None}


def code_digest(*packages: str) -> str:
    """Return a digest of the source of sub-packages, such as ``model`` and ``graph``.

    With the version number alone a changed checkout would reuse stale results.
    """
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((Path(__file__).parent / package).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def current_timestamp() -> str:
    """Return the time to write into files (ISO 8601, UTC): ``SOURCE_DATE_EPOCH``, or now.

    Raises:
        UsageError: the variable is not a number of seconds.
    """
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or time.time()
    try:
        moment = datetime.fromtimestamp(int(seconds), timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"The environment variable SOURCE_DATE_EPOCH is '{seconds}', not a number of seconds.",
            "Set it to seconds since 1970, or unset it.",
        ) from None
    return moment.isoformat(timespec="seconds")
