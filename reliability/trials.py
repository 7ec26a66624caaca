"""One fault tried many times: what came of it, and whether the bundle is whole afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Trials:
    """What became of one fault.

    Attributes:
        fault: what was done.
        outcomes: what came out, and how often.
        broken: what must not be: one sentence each.
        skipped: why it was not tried, or "".
    """

    fault: str
    outcomes: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    skipped: str = ""

    def count(self, outcome: str) -> None:
        """Count one trial that ended as ``outcome``."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def judge(
        self,
        what: str,
        code: int,
        said: str,
        allowed: Collection[int],
        bundle: Path | None = None,
    ) -> None:
        """Add what is broken: another exit code, a traceback, a bundle that is not whole."""
        problem = bundle_is_whole(bundle) if bundle else ""
        if problem:
            self.broken.append(f"{what}: {problem}")
        if code not in allowed or "Traceback" in said:
            self.broken.append(f"{what}: {code} {said[-600:]}")


def van_deploy(
    *words: str | Path, program: tuple[str, ...] = ("-m", "van_deploy"), **environment: str
) -> subprocess.Popen[str]:
    """Start ``van-deploy`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return a process's exit code and what it said on stderr."""
    _, stderr = process.communicate()
    return process.returncode, stderr


def require(*words: str | Path) -> None:
    """Return if the command ends well.

    Raises:
        RuntimeError: it does not, though nothing disturbs it.
    """
    code, stderr = finished(van_deploy(*words))
    if code:
        raise RuntimeError(f"a command that nothing disturbs ended with {code}: {stderr}")


def bundle_is_whole(folder: Path) -> str:
    """Return what is wrong with a bundle, opened as the next command would; "" is good.

    No bundle at all is good as well: nothing was there, nothing is. What the next writer sweeps
    up is no harm.
    """
    from van_deploy.bundle import MANIFEST, Bundle
    from van_deploy.errors import VanDeployError

    if not (folder / MANIFEST).exists() and not (folder / ".pending").is_dir():
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
        strangers = [n for n in names if n != ".lock" and not n.startswith(".staging-")]
        return f"{folder.name} has no manifest and holds {strangers}" if strangers else ""
    try:
        return "; ".join(Bundle.open(folder).problems())
    except VanDeployError as error:
        return error.message
