"""Where downloads are kept, and the memory of each one's digest when it first came.

One small JSON a file, in ``$VAN_DEPLOY_CACHE``, else in the user's cache
folder. A file that comes with another digest later is refused.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import tempfile
from pathlib import Path

from van_deploy.documents import json_from, text_from
from van_deploy.errors import DownloadError
from van_deploy.files import write_atomic

__all__ = ["cache_folder", "check_digest", "hub_cache", "user_cache"]


def cache_folder() -> Path:
    """Return this program's cache folder (it may not exist).

    ``$VAN_DEPLOY_CACHE``, else ``$XDG_CACHE_HOME/van-deploy``, else
    ``~/.cache/van-deploy``, else, where nobody has a home, a folder of this
    user's in the system's temporary one.
    """
    if own := os.environ.get("VAN_DEPLOY_CACHE"):
        return Path(own)
    return _shared_cache() / "van-deploy"


def _shared_cache() -> Path:
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(shared) if shared else user_cache()


def user_cache() -> Path:
    """Return ``~/.cache``, or a folder in the temporary one where there is no home."""
    home = os.path.expanduser("~")
    if home != "~" and Path(home).is_dir():
        return Path(home) / ".cache"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"cache-{user}"


def hub_cache() -> Path:
    """Return the hub's cache folder, as ``huggingface_hub`` would choose it now."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(os.path.expandvars(cache)).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    return _shared_cache() / "huggingface" / "hub"


def check_digest(repo_id: str, filename: str, sha256: str) -> str:
    """Compare a download with the memory, or remember it; return what to tell the user.

    Raises:
        DownloadError: the file was different when it first came, or the memory
            cannot be read.
    """
    name = re.sub(r"[^\w.-]", "--", f"{repo_id}/{filename}")
    path = cache_folder() / "digests" / f"{name}.json"
    try:
        remembered = json_from(text_from(path))["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        record = json.dumps({"repo_id": repo_id, "filename": filename, "sha256": sha256})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, record)
        except OSError as error:
            return f"digest {sha256[:12]}… could not be recorded in {path.parent}: {error.strerror}"
        return f"digest {sha256[:12]}… recorded: the first download on this machine"
    except (OSError, ValueError, LookupError, TypeError):
        remembered = None
    if not isinstance(remembered, str) or not re.fullmatch("[0-9a-f]{64}", remembered):
        raise DownloadError(
            f"The recorded digest {path} cannot be read.", "Remove that file and try again."
        )
    if remembered != sha256:
        raise DownloadError(
            f"{repo_id}/{filename} is not the file it was: its SHA-256 is {sha256}, "
            f"and was {remembered} when it was first downloaded.",
            f"If the publisher replaced it and you trust that, remove {path} and try again.",
        )
    return f"digest {sha256[:12]}… as recorded at the first download"
