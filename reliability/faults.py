"""Bad days: killed commands, full disks, read-only folders, writers side by side, odd clocks.

After each the bundle must be the old one or the new one, whole, and the next run of
the same command must succeed. What this machine does not allow (a small file system
needs the right to mount one) is reported as skipped, with the reason.

A step on the disk is an entry that is opened to write, made, renamed or removed inside the bundle;
Python's audit hooks see them. Killing at random moments hardly ever falls between two renames;
this goes through all of them. Such commands run in forks of a process that has imported
everything: what a command imports takes longer than what it does.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.load import export_test_bundle

FORKS = multiprocessing.get_context("forkserver")
IMPORTED = (
    *("torch", "torch._dynamo", "torch.onnx", "torchvision", "timm", "onnx", "onnxscript"),
    *("onnxsim", "onnxruntime", "tensorrt_rtx", "van_deploy.pipeline", "van_deploy.cli.make"),
)
NEEDS_ROOM = {"os.mkdir", "os.rename", "open", "os.link", "os.symlink"}
CHANGES = {*NEEDS_ROOM, "os.remove", "os.rmdir", "os.truncate"} - {"open"}
PATHS = (str, bytes, os.PathLike)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SIZES_KIB = (64, 256, 512, 900, 1300, 1800, 2600, 3600, 5000)
MOST_STEPS = 1000
STOPS = {"kill": "`kill -9` before", "full": "disk full from"}
COMMANDS = {
    "export": "export van_digits --output {bundle} --force",
    "quantize": "quantize {bundle} --precision fp16 --force",
    "build": "build {bundle} --target sm_89 --force",
    "run": "run van_digits --precision fp16 --output {bundle} --force",
    "report": "report {bundle}",
}
"""The commands that write."""
PREDICT = "predict {bundle} {bundle}/golden/0.png"
CLOCK = """
import itertools, time
start, steps = time.time(), itertools.count()
time.time = lambda: start - 60.0 * next(steps)
from van_deploy.cli.app import main
main()
"""


@dataclass
class Trials:
    """What became of one fault: what came out how often, what must not be, why it was not tried."""

    fault: str
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    skipped: str = ""

    def judge(
        self,
        what: str,
        ended: tuple[int, str],
        allowed: Collection[int] = (0,),
        bundle: Path | None = None,
    ) -> None:
        """Count how a command ended; another exit code, a traceback or a mixture is broken."""
        (code, said), problem = ended, bundle_is_whole(bundle) if bundle else ""
        if problem or code not in allowed or "Traceback" in said:
            self.broken.append(f"{what}: {code} {problem} {said[-600:]}")
        self.outcomes[f"exit code {code}" if code else "ended well"] += 1

    def run(self, line: str, *allowed: int, bundle: Path, **how: Any) -> None:
        """Run a command on a bundle, and judge how it ended."""
        self.judge(line, van_deploy(line, bundle, **how), allowed, bundle)


def van_deploy(
    line: str, bundle: Path, program: Sequence[str] = ("-m", "van_deploy"), **environment: str
) -> tuple[int, str]:
    """Run a command on a bundle as a process of its own; return its exit code and its stderr."""
    words = [sys.executable, *program, *words_of(line, bundle)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stderr


def words_of(line: str, bundle: Path) -> list[str]:
    """Return a command's words, its bundle filled in."""
    return [word.format(bundle=bundle) for word in line.split()]


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


def stopped_at_every_step(
    folder: Path, only: Sequence[str] = tuple(COMMANDS), kinds: Sequence[str] = tuple(STOPS)
) -> Iterator[Trials]:
    """Kill commands before each of their steps, or let the disk be full from there on."""
    base = export_test_bundle(folder / "base", "van_digits")
    FORKS.set_forkserver_preload(list(IMPORTED))  # what is not installed is left out
    for kind, name in itertools.product(kinds, only):
        trials = Trials(f"{STOPS[kind]} every step of `{name}`, on the bundle's files")
        target = folder / f"{kind}-{name}"
        for step in range(1, MOST_STEPS):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(base, target)
            ended = _forked(name, target, kind, step)
            if ended[0] == 3 and "not installed" in ended[1]:
                trials.skipped = ended[1].strip().splitlines()[0]
                break
            if ended[0] == 0:  # there was no such step any more
                break
            trials.judge(f"step {step}", ended, (3, -signal.SIGKILL), target)
            again = _forked(name, target, kind, MOST_STEPS)
            if again[0] or bundle_is_whole(target):
                trials.broken.append(f"the run after step {step}: {again}")
        else:
            trials.broken.append(f"it never came to an end in {MOST_STEPS} steps")
        yield trials


def _forked(name: str, target: Path, kind: str, step: int) -> tuple[int, str]:
    """Return the exit code of a command that is stopped at a step, and its stderr."""
    log = target.parent / "said"
    process = FORKS.Process(target=_run, args=(name, target, kind, step, log))
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text(errors="replace")


def _run(name: str, target: Path, kind: str, step: int, log: Path) -> None:
    import torch

    from van_deploy.cli.app import app

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.addaudithook(_stopping(os.path.realpath(target), kind, step))
    app([*words_of(COMMANDS[name], target), "--json"], prog_name="van-deploy")


def _stopping(place: str, kind: str, step: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that counts what is changed below ``place``, and stops it there."""
    number = itertools.count(1)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & WRITING
        if not (writes or event in CHANGES) or not isinstance(details[0], PATHS):
            return
        if not os.path.realpath(os.fsdecode(details[0])).startswith(place + os.sep):
            return
        at = next(number)
        if kind == "kill" and at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and at >= step and event in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return hook


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    """Mount a file system of that size on ``folder``.

    Raises:
        OSError: this process may not mount one.
    """
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(
    folder: Path, only: Sequence[str] = ("export", "quantize", "build"), sizes: Any = SIZES_KIB
) -> Iterator[Trials]:
    """Run commands that write where the disk fills up at ever later writes."""
    base, disk = export_test_bundle(folder / "full-base", "van_digits"), folder / "disk"
    used = 64 + sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) // 1024
    for name in only:
        trials = Trials(f"disk full during `{name}`, free space from {sizes[0]} KiB up")
        try:
            for free in sizes:
                with small_disk(disk, free + (0 if name == "export" else used)):
                    if name != "export":
                        shutil.copytree(base, disk / "bundle")
                    (disk / "tmp").mkdir()
                    full: Any = {"bundle": disk / "bundle", "TMPDIR": str(disk / "tmp")}
                    trials.run(COMMANDS[name], 0, 3, **full)
        except OSError as error:
            trials.skipped = str(error)
        yield trials


def read_only(folder: Path) -> Iterator[Trials]:
    """Run every command that reads, and every one that writes, on a read-only bundle."""
    trials, disk = Trials("a bundle on a read-only file system"), folder / "ro"
    base = export_test_bundle(folder / "base", "van_digits")
    try:
        with small_disk(disk, 20_000):
            bundle = Path(shutil.copytree(base, disk / "bundle"))
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            for line in ("info {bundle}", "inspect {bundle}", PREDICT):
                trials.run(line, 0, bundle=bundle)
            for line in ("verify {bundle} --no-modules", "drift {bundle} --level stage"):
                trials.run(line, 0, 3, 5, bundle=bundle)
            for name in ("quantize", "build", "export"):
                trials.run(COMMANDS[name], 3, 5, bundle=bundle)
    except OSError as error:
        trials.skipped = str(error)
    yield trials


def two_writers(folder: Path) -> Iterator[Trials]:
    """Let three processes write one bundle at the same time, five times."""
    trials = Trials("three processes writing one bundle")
    bundle = export_test_bundle(folder / "shared", "van_digits")
    lines = [COMMANDS[name] for name in ("quantize", "build", "quantize")]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for code, said in pool.map(lambda line: van_deploy(line, bundle), lines):
                replaced = code == 5 and "was replaced while" in said
                trials.judge("a writer", (0 if replaced else code, said), (0, 3))
            trials.judge("all writers", (0, ""), bundle=bundle)
    yield trials


def odd_places(folder: Path) -> Iterator[Trials]:
    """Run commands while the clock goes back a minute at every look, and with a spoiled cache."""
    loop, file = folder / "loop", folder / "a-file"
    trials, export = Trials("a clock that goes back a minute at every look"), COMMANDS["export"]
    for line in (export, COMMANDS["quantize"], "verify {bundle} --no-modules", export):
        trials.run(line, 0, bundle=folder / "clock", program=("-c", CLOCK))
    yield trials
    loop.symlink_to(loop)
    file.write_text("no folder")
    for home in map(str, (file, loop, file / "below", "/proc/1/nothing")):
        trials, cache = (
            Trials("a cache that cannot be read"),
            {"HF_HOME": home, "HF_HUB_CACHE": home},
        )
        for line in ("list", "info van_b1", export):
            trials.run(line, 0, bundle=folder / "yes", **cache)
        trials.run("export van_b1 --offline --output {bundle}", 3, 5, bundle=folder / "no", **cache)
        if (folder / "no").exists():
            trials.broken.append("an export that failed left its folder behind")
        yield trials


def table(count: int | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row for each fault tried, and what was broken."""
    rows, broken = [], list[str]()
    for fault in (stopped_at_every_step, full_disk, read_only, two_writers, odd_places):
        with tempfile.TemporaryDirectory(prefix="van-deploy-faults-") as folder:
            for trials in fault(Path(folder)):
                outcomes = ", ".join(f"{outcome}: {n}" for outcome, n in trials.outcomes.items())
                outcomes = f"skipped: {trials.skipped}" if trials.skipped else outcomes
                figures = [str(trials.outcomes.total()), outcomes, str(len(trials.broken))]
                rows.append([trials.fault, *figures])
                broken += [f"{trials.fault}: {sentence}" for sentence in trials.broken]
    return ["fault", "tried", "what happened", "broken"], rows, broken
