"""One fault tried many times: what came of it, and whether the bundle is whole afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Trials", "bundle_is_whole", "finished", "require", "van_deploy"]


@dataclass
class Trials:
    """What became of one fault.

    Attributes:
        fault: what was done.
        tried: how often.
        outcomes: what came out, and how often.
        broken: what must not be: one sentence each.
        skipped: why it was not tried, or "".
    """

    fault: str
    tried: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    skipped: str = ""

    def count(self, outcome: str) -> None:
        """Count one trial that ended as ``outcome``."""
        self.tried += 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


def van_deploy(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start ``van-deploy`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "van_deploy", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return a process's exit code and what it said on stderr."""
    _, stderr = process.communicate()
    return process.returncode, stderr


def bundle_is_whole(folder: Path) -> str:
    """Return what is wrong with a bundle, opened as the next command would; "" is good.

    No bundle at all is good as well: nothing was there, nothing is.
    """
    from van_deploy.bundle import MANIFEST, Bundle
    from van_deploy.errors import VanDeployError

    if not folder.exists() or (not (folder / MANIFEST).exists() and not _pending(folder)):
        strangers = _strangers(folder) if folder.exists() else []
        return f"{folder.name} has no manifest and holds {strangers}" if strangers else ""
    try:
        problems = Bundle.open(folder).problems()
    except VanDeployError as error:
        return error.message
    return "; ".join(problems)


def _pending(folder: Path) -> bool:
    return (folder / ".pending").is_dir()


def _strangers(folder: Path) -> list[str]:
    """Return what lies in a folder besides what the next writer sweeps up."""
    names = [entry.name for entry in folder.iterdir()]
    return [name for name in names if name != ".lock" and not name.startswith(".staging-")]


def require(process: subprocess.Popen[str]) -> None:
    """Return if the command ends well.

    Raises:
        RuntimeError: it does not, though nothing disturbs it.
    """
    code, stderr = finished(process)
    if code:
        raise RuntimeError(f"a command that nothing disturbs ended with {code}: {stderr}")
