"""Bad days: killed commands, full disks, read-only folders, two writers, clocks that go back.

    python -m reliability.faults                     # everything
    python -m reliability.faults --only kill --count 20

After each the bundle must be the old one or the new one, whole, and the next run of
the same command must succeed. What this machine does not allow (a small file system
needs the right to mount one) is reported as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FAULTS", "Trials", "bundle_is_whole", "van_deploy"]

KILLS = 200
FINISH_EVERY = 5  # killed runs, before one may finish
SIZES_KIB = (64, 256, 512, 900, 1300, 1800, 2600, 3600, 5000)
READ_ONLY = "Read-only file system"

CLOCK = """
import itertools, sys, time
start, steps = time.time(), itertools.count()
time.time = lambda: start - 60.0 * next(steps)
from van_deploy.cli.app import main
main()
"""


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


# --- kill -9 --------------------------------------------------------------------------------


def kills(
    folder: Path, count: int, only: Sequence[str] = ("export", "quantize", "build", "run")
) -> list[Trials]:
    """Kill export, quantize, build and run at random moments."""
    base = folder / "base"
    _require(van_deploy("export", "van_digits", "--output", base))
    recipe = folder / "mine.toml"
    recipe.write_text('[model]\nname = "van_digits"\n', encoding="utf-8")
    commands: dict[str, Callable[[Path], list[str | Path]]] = {
        "export": lambda out: ["export", "van_digits", "--output", out, "--force"],
        "quantize": lambda out: ["quantize", out, "--precision", "fp16", "--force"],
        "build": lambda out: ["build", out, "--target", "sm_89", "--force"],
        "run": lambda out: ["run", recipe, "--precision", "fp16", "--output", out, "--force"],
    }
    made = []
    for name in only:
        print(f"kill -9 of {name}", file=sys.stderr, flush=True)
        made.append(_kills_of(name, commands[name], base, folder, -(-count // len(only))))
    return made


def _kills_of(
    name: str,
    words: Callable[[Path], list[str | Path]],
    base: Path,
    folder: Path,
    count: int,
) -> Trials:
    trials = Trials(f"`kill -9` at a random moment of `{name}`")
    rng = random.Random(name)
    target = folder / f"killed-{name}"
    if name in ("quantize", "build"):
        shutil.copytree(base, target)
    start = time.monotonic()
    code, stderr = finished(van_deploy(*words(target)))
    whole_s = time.monotonic() - start
    if code == 3:
        trials.skipped = stderr.strip().splitlines()[0]
        return trials
    shutil.rmtree(target)
    for number in range(count):
        if number % FINISH_EVERY == 0:
            shutil.rmtree(target, ignore_errors=True)
            if name in ("quantize", "build"):
                shutil.copytree(base, target)
        process = van_deploy(*words(target))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.0, 1.1 * whole_s))
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL) if not ended else None
        finished(process)
        problem = bundle_is_whole(target)
        if problem:
            trials.broken.append(f"kill {number} of {name}: {problem}")
        trials.count("had ended before" if ended else "killed, the bundle whole or not there yet")
        if number % FINISH_EVERY == FINISH_EVERY - 1:
            code, stderr = finished(van_deploy(*words(target)))
            if code or bundle_is_whole(target):
                trials.broken.append(f"the run after kill {number} of {name}: {code} {stderr}")
            trials.count("next run succeeded" if not code else "next run failed")
            trials.tried -= 1
    return trials


def _require(process: subprocess.Popen[str]) -> None:
    code, stderr = finished(process)
    if code:
        raise RuntimeError(f"a command that nothing disturbs ended with {code}: {stderr}")


# --- disks ------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Give a file system of that size, mounted on ``folder``.

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
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(
    folder: Path, count: int, only: Sequence[str] = ("export", "quantize", "build")
) -> list[Trials]:
    """Run export, quantize and build where the disk fills up at ever later writes."""
    base = folder / "full-base"
    _require(van_deploy("export", "van_digits", "--output", base))
    size = sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) // 1024
    commands: dict[str, list[str]] = {
        "export": ["export", "van_digits", "--output"],
        "quantize": ["quantize", "--precision", "fp16"],
        "build": ["build", "--target", "sm_89"],
    }
    return [_full_disk_of(name, commands[name], base, size, folder / "disk") for name in only]


def _full_disk_of(name: str, words: list[str], base: Path, used: int, disk: Path) -> Trials:
    trials = Trials(f"disk full during `{name}`, free space from {SIZES_KIB[0]} KiB up")
    for free in SIZES_KIB:
        exists = name != "export"
        try:
            with small_disk(disk, free + (used + 64 if exists else 0)):
                target = disk / "bundle"
                if exists:
                    shutil.copytree(base, target)
                temporary = disk / "tmp"
                temporary.mkdir()
                place: list[str | Path] = [target]
                command = [words[0], *(place if exists else []), *words[1:]]
                command += [] if exists else place
                code, stderr = finished(van_deploy(*command, TMPDIR=str(temporary)))
                problem = bundle_is_whole(target)
                if problem:
                    trials.broken.append(f"{free} KiB free: {problem}")
                if "Traceback" in stderr or code not in (0, 3):
                    trials.broken.append(f"{free} KiB free: {code} {stderr[-600:]}")
                trials.count("went through" if code == 0 else f"exit code {code}, nothing changed")
        except PermissionError as error:
            trials.skipped = f"no file system may be mounted here: {error}"
            return trials
    return trials


def read_only(folder: Path, count: int) -> list[Trials]:
    """Run every command that reads, and every one that writes, on a read-only bundle."""
    trials = Trials("a bundle on a read-only file system")
    base = folder / "read-only-base"
    _require(van_deploy("export", "van_digits", "--output", base))
    disk = folder / "ro"
    try:
        with small_disk(disk, 20_000):
            target = disk / "bundle"
            shutil.copytree(base, target)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            cases: Sequence[tuple[list[str | Path], set[int]]] = (
                (["info", target], {0}),
                (["inspect", target], {0}),
                (["predict", target, base / "canary.png"], {0}),
                (["verify", target, "--no-modules"], {0, 3, 5}),
                (["drift", target, "--level", "stage"], {0, 3, 5}),
                (["quantize", target, "--precision", "fp16"], {3, 5}),
                (["build", target, "--target", "sm_89"], {3, 5}),
                (["export", "van_digits", "--output", target, "--force"], {3, 5}),
            )
            for words, allowed in cases:
                code, stderr = finished(van_deploy(*words))
                if code not in allowed or "Traceback" in stderr:
                    trials.broken.append(f"{words[0]}: {code} {stderr[-400:]}")
                trials.count(f"`{words[0]}` {'works' if code == 0 else f'ends with {code}'}")
            problem = bundle_is_whole(target)
            if problem:
                trials.broken.append(problem)
    except PermissionError as error:
        trials.skipped = f"no file system may be mounted here: {error}"
    return [trials]


# --- others -------------------------------------------------------------------------------------


def two_writers(folder: Path, count: int) -> list[Trials]:
    """Let two processes write one bundle at the same time."""
    trials = Trials("two processes writing one bundle")
    target = folder / "shared"
    _require(van_deploy("export", "van_digits", "--output", target))
    for _ in range(max(1, count // 40)):
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
    "kill": kills,
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
    parser.add_argument("--count", type=int, default=KILLS, help="kills in all")
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
