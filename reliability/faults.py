"""Bad days: killed commands, full disks, read-only folders, two writers, clocks that go back.

    python -m reliability.faults                     # everything
    python -m reliability.faults --only step clock

After each the bundle must be the old one or the new one, whole, and the next run of
the same command must succeed. What this machine does not allow (a small file system
needs the right to mount one) is reported as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reliability.disks import full_disk, read_only
from reliability.steps import full_at_every_step, killed_at_every_step
from reliability.trials import Trials, bundle_is_whole, finished, require, van_deploy

__all__ = ["FAULTS"]

WRITERS = 5  # times that three processes write one bundle

CLOCK = """
import itertools, sys, time
start, steps = time.time(), itertools.count()
time.time = lambda: start - 60.0 * next(steps)
from van_deploy.cli.app import main
main()
"""


def two_writers(folder: Path, count: int) -> list[Trials]:
    """Let two processes write one bundle at the same time."""
    trials = Trials("two processes writing one bundle")
    target = folder / "shared"
    require(van_deploy("export", "van_digits", "--output", target))
    for _ in range(count):
        words = ("quantize", target, "--precision", "fp16", "--force")
        first = van_deploy(*words)
        second = van_deploy("build", target, "--target", "sm_89", "--force")
        third = van_deploy(*words)
        for process in (first, second, third):
            code, stderr = finished(process)
            if code and not (code == 5 and "was replaced while" in stderr) and code != 3:
                trials.broken.append(f"{code}: {stderr[-400:]}")
            trials.count("ended well" if not code else f"exit code {code}")
        problem = bundle_is_whole(target)
        if problem:
            trials.broken.append(problem)
    return [trials]


def clock(folder: Path, count: int) -> list[Trials]:
    """Run export, quantize and verify while the clock goes back a minute at every look."""
    trials = Trials("a clock that goes back a minute at every look")
    target = folder / "clock"
    for words in (
        ["export", "van_digits", "--output", target],
        ["quantize", target, "--precision", "fp16"],
        ["verify", target, "--no-modules"],
        ["export", "van_digits", "--output", target],
    ):
        done = subprocess.run(
            [sys.executable, "-c", CLOCK, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            trials.broken.append(f"{words[0]}: {done.returncode} {done.stderr[-400:]}")
        trials.count("ended well" if not done.returncode else f"exit code {done.returncode}")
    problem = bundle_is_whole(target)
    if problem:
        trials.broken.append(problem)
    return [trials]


def unreadable_cache(folder: Path, count: int) -> list[Trials]:
    """Run commands whose cache of downloads is a file, a loop, or not there."""
    trials = Trials("a cache of downloads that cannot be read")
    loop = folder / "loop"
    loop.symlink_to(loop)
    file = folder / "a-file"
    file.write_text("no folder")
    for home in (file, loop, file / "below", Path("/proc/1/nothing")):
        for words, allowed in (
            (["list"], {0}),
            (["info", "van_b1"], {0}),
            (["export", "van_b1", "--offline", "--output", folder / "no"], {3, 5}),
            (["export", "van_digits", "--output", folder / "yes"], {0}),
        ):
            code, stderr = finished(van_deploy(*words, HF_HOME=str(home), HF_HUB_CACHE=str(home)))
            if code not in allowed or "Traceback" in stderr:
                trials.broken.append(f"{words[0]} with {home}: {code} {stderr[-400:]}")
            trials.count("worked" if not code else f"exit code {code}")
    if (folder / "no").exists():
        trials.broken.append("an export that failed left its folder behind")
    return [trials]


FAULTS: dict[str, Callable[[Path, int], list[Trials]]] = {
    "step": killed_at_every_step,
    "full-step": full_at_every_step,
    "full-disk": full_disk,
    "read-only": read_only,
    "two-writers": two_writers,
    "clock": clock,
    "cache": unreadable_cache,
}
"""Every fault by name: takes an empty folder and a number of trials."""


def main() -> int:
    """Try the faults asked for, print a table; return 1 if anything was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], choices=list(FAULTS))
    parser.add_argument("--count", type=int, default=WRITERS, help="trials of two-writers")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: list[Trials] = []
    for name in arguments.only or FAULTS:
        with tempfile.TemporaryDirectory(prefix="van-deploy-faults-") as folder:
            found += FAULTS[name](Path(folder), arguments.count)
        for trials in found:
            for sentence in trials.broken:
                print(f"{name}: {sentence}", file=sys.stderr, flush=True)
    result = _result(found)
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return int(any(trials.broken for trials in found))


def _result(found: Sequence[Trials]) -> dict[str, Any]:
    rows = [
        [
            trials.fault,
            str(trials.tried),
            f"skipped: {trials.skipped}"
            if trials.skipped
            else ", ".join(f"{outcome}: {n}" for outcome, n in trials.outcomes.items()),
            str(len(trials.broken)),
        ]
        for trials in found
    ]
    columns = ["fault", "tried", "what happened", "broken"]
    return {"columns": columns, "rows": rows, "faults": [t for f in found for t in f.broken]}


def _text(result: dict[str, Any]) -> str:
    return "\n".join("  |  ".join(line) for line in [result["columns"], *result["rows"]])


if __name__ == "__main__":
    raise SystemExit(main())
