"""Bad days: killed commands, full disks, read-only folders, two writers, clocks that go back.

After each the bundle must be the old one or the new one, whole, and the next run of
the same command must succeed. What this machine does not allow (a small file system
needs the right to mount one) is reported as skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from reliability.steps import full_at_every_step, killed_at_every_step
from reliability.trials import Trials, finished, require, van_deploy

WRITERS = 5  # times that three processes write one bundle
SIZES_KIB = (64, 256, 512, 900, 1300, 1800, 2600, 3600, 5000)
QUANTIZE = ("--precision", "fp16")
BUILD = ("--target", "sm_89")
CLOCK = """
import itertools, sys, time
start, steps = time.time(), itertools.count()
time.time = lambda: start - 60.0 * next(steps)
from van_deploy.cli.app import main
main()
"""


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    """Mount a file system of that size on ``folder``.

    Raises:
        PermissionError: this process may not mount one.
    """
    folder.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        raise PermissionError("there is no `mount` here")
    options = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    done = subprocess.run(options, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip() or "mount failed")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(folder: Path, only: Sequence[str] = ("export", "quantize", "build")) -> list[Trials]:
    """Run export, quantize and build where the disk fills up at ever later writes."""
    base, disk = folder / "full-base", folder / "disk"
    require("export", "van_digits", "--output", base)
    used = 64 + sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) // 1024
    target, found = disk / "bundle", []
    commands: dict[str, list[str | Path]] = {
        "export": ["export", "van_digits", "--output", target],
        "quantize": ["quantize", target, *QUANTIZE],
        "build": ["build", target, *BUILD],
    }
    for name in only:
        trials = Trials(f"disk full during `{name}`, free space from {SIZES_KIB[0]} KiB up")
        found.append(trials)
        for free in SIZES_KIB:
            with _tried(trials), small_disk(disk, free + (0 if name == "export" else used)):
                if name != "export":
                    shutil.copytree(base, target)
                (disk / "tmp").mkdir()
                code, said = finished(van_deploy(*commands[name], TMPDIR=str(disk / "tmp")))
                trials.judge(f"{free} KiB free", code, said, {0, 3}, target)
                trials.count("went through" if code == 0 else f"exit code {code}, nothing changed")
    return found


@contextlib.contextmanager
def _tried(trials: Trials) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        trials.skipped = f"no file system may be mounted here: {error}"


def read_only(folder: Path) -> list[Trials]:
    """Run every command that reads, and every one that writes, on a read-only bundle."""
    trials = Trials("a bundle on a read-only file system")
    base, disk = folder / "read-only-base", folder / "ro"
    target = disk / "bundle"
    require("export", "van_digits", "--output", base)
    cases: Sequence[tuple[list[str | Path], set[int]]] = (
        (["info", target], {0}),
        (["inspect", target], {0}),
        (["predict", target, base / "golden/0.png"], {0}),
        (["verify", target, "--no-modules"], {0, 3, 5}),
        (["drift", target, "--level", "stage"], {0, 3, 5}),
        (["quantize", target, *QUANTIZE], {3, 5}),
        (["build", target, *BUILD], {3, 5}),
        (["export", "van_digits", "--output", target, "--force"], {3, 5}),
    )
    with _tried(trials), small_disk(disk, 20_000):
        shutil.copytree(base, target)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for words, allowed in cases:
            code, said = finished(van_deploy(*words))
            trials.judge(str(words[0]), code, said, allowed, target)
            trials.count(f"`{words[0]}` {'works' if code == 0 else f'ends with {code}'}")
    return [trials]


def two_writers(folder: Path) -> list[Trials]:
    """Let three processes write one bundle at the same time."""
    trials = Trials("three processes writing one bundle")
    target = folder / "shared"
    require("export", "van_digits", "--output", target)
    quantize = ("quantize", target, *QUANTIZE, "--force")
    build = ("build", target, *BUILD, "--force")
    for _ in range(WRITERS):
        writers = [van_deploy(*words) for words in (quantize, build, quantize)]
        for code, said in map(finished, writers):
            replaced = code == 5 and "was replaced while" in said
            trials.judge("a writer", 0 if replaced else code, said, {0, 3})
            trials.count(_ended(code))
        trials.judge("all writers", 0, "", {0}, target)
    return [trials]


def clock(folder: Path) -> list[Trials]:
    """Run export, quantize and verify while the clock goes back a minute at every look."""
    trials = Trials("a clock that goes back a minute at every look")
    target = folder / "clock"
    export = ("export", "van_digits", "--output", target)
    verify = ("verify", target, "--no-modules")
    for words in (export, ("quantize", target, *QUANTIZE), verify, export):
        code, said = finished(van_deploy(*words, program=("-c", CLOCK)))
        trials.judge(str(words[0]), code, said, {0}, target)
        trials.count(_ended(code))
    return [trials]


def unreadable_cache(folder: Path) -> list[Trials]:
    """Run commands whose cache of downloads is a file, a loop, or not there."""
    trials = Trials("a cache of downloads that cannot be read")
    loop, file = folder / "loop", folder / "a-file"
    loop.symlink_to(loop)
    file.write_text("no folder")
    for home in (file, loop, file / "below", Path("/proc/1/nothing")):
        for words, allowed in (
            (["list"], {0}),
            (["info", "van_b1"], {0}),
            (["export", "van_b1", "--offline", "--output", folder / "no"], {3, 5}),
            (["export", "van_digits", "--output", folder / "yes"], {0}),
        ):
            code, said = finished(van_deploy(*words, HF_HOME=str(home), HF_HUB_CACHE=str(home)))
            trials.judge(f"{words[0]} with {home}", code, said, allowed)
            trials.count(_ended(code))
    if (folder / "no").exists():
        trials.broken.append("an export that failed left its folder behind")
    return [trials]


def _ended(code: int) -> str:
    return f"exit code {code}" if code else "ended well"


FAULTS: tuple[Callable[[Path], list[Trials]], ...] = (
    *(killed_at_every_step, full_at_every_step, full_disk, read_only),
    *(two_writers, clock, unreadable_cache),
)
"""Every fault; each takes an empty folder."""


def table(count: int | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row for each fault tried, and what was broken."""
    rows, broken = [], list[str]()
    for fault in FAULTS:
        with tempfile.TemporaryDirectory(prefix="van-deploy-faults-") as folder:
            found = fault(Path(folder))
        for trials in found:
            for sentence in trials.broken:
                print(f"{trials.fault}: {sentence}", file=sys.stderr, flush=True)
            outcomes = ", ".join(f"{outcome}: {n}" for outcome, n in trials.outcomes.items())
            outcomes = f"skipped: {trials.skipped}" if trials.skipped else outcomes
            tried = str(sum(trials.outcomes.values()))
            rows.append([trials.fault, tried, outcomes, str(len(trials.broken))])
            broken += trials.broken
    return ["fault", "tried", "what happened", "broken"], rows, broken
