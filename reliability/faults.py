"""Inject faults: killed commands, full disks, read-only folders, concurrent writers, odd clocks.

After each fault the bundle must be the old one or the new one, complete, and the next run of
the same command must succeed. Faults that this machine does not support (mounting a small file
system needs a privilege) are reported as skipped, with the reason.

A step is a file-system entry of the bundle that is opened for writing, created, renamed or removed;
Python's audit hooks report them. Killing at random moments rarely hits the time between two
renames; these tests go through all steps. The commands run in forks of a process that has imported
all packages, because importing takes longer than the command.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.load import run_export

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("torch", "torch._dynamo", "torch.onnx", "torchvision", "timm", "onnx", "onnxscript"),
    *("onnxsim", "onnxruntime", "tensorrt_rtx", "van_deploy.pipeline", "van_deploy.cli.make"),
]
EVENTS_NEEDING_SPACE = {"os.mkdir", "os.rename", "open", "os.link", "os.symlink"}
EVENTS = {*EVENTS_NEEDING_SPACE, "os.remove", "os.rmdir", "os.truncate"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SIZES_KIB = (64, 256, 512, 900, 1300, 1800, 2600, 3600, 5000)
STEP_LIMIT = 1000
KINDS = {"kill": "`kill -9` before", "full": "disk full from"}
# The commands that write.
COMMANDS = {
    "export": "export van_digits --output {bundle} --force",
    "quantize": "quantize {bundle} --precision fp16 --force",
    "build": "build {bundle} --target sm_89 --force",
    "run": "run van_digits --precision fp16 --output {bundle} --force",
    "report": "report {bundle}",
}
CLOCK = """
import itertools, time
start, steps = time.time(), itertools.count()
time.time = lambda: start - 60.0 * next(steps)
from van_deploy.cli.app import main
main()
"""

Result = tuple[int, str]  # exit code and stderr of a command


@dataclass
class FaultResult:
    """Result of one fault: counted outcomes, failures, and the reason if it was skipped."""

    fault: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def add(self, step: str, result: Result, bundle: Path | None, *allowed: int) -> None:
        """Count a command's exit code; other codes, tracebacks and damaged bundles are failures."""
        (code, stderr), problem = result, bundle_problem(bundle) if bundle else ""
        if problem or code not in allowed or "Traceback" in stderr:
            self.failures.append(f"{step}: {code} {problem} {stderr[-600:]}")
        self.outcomes[f"exit code {code}"] += 1

    def run(self, line: str, *allowed: int, bundle: Path, **options: Any) -> None:
        """Run a command on a bundle and add its result."""
        self.add(line, run_command(line, bundle, **options), bundle, *allowed)


def run_command(
    line: str, bundle: Path, program: Sequence[str] = ("-m", "van_deploy"), **environment: str
) -> Result:
    """Run a command on a bundle in a process of its own; return its exit code and its stderr."""
    words = [sys.executable, *program, *(word.format(bundle=bundle) for word in line.split())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stderr


def bundle_problem(folder: Path) -> str:
    """Return the problem of a bundle that the next command opens, or "".

    A folder without a bundle is correct if it contains only files that the next writer removes.
    """
    from van_deploy.bundle import MANIFEST, Bundle
    from van_deploy.errors import VanDeployError

    if not (folder / MANIFEST).exists() and not (folder / ".pending").is_dir():
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
        names = [n for n in names if n != ".lock" and not n.startswith(".staging-")]
        return f"{folder.name} has no manifest and contains {names}" if names else ""
    try:
        return "; ".join(Bundle.open(folder).problems())
    except VanDeployError as error:
        return error.message


def interrupt_every_step(
    folder: Path, commands: Sequence[str] = tuple(COMMANDS), kinds: Sequence[str] = tuple(KINDS)
) -> Iterator[FaultResult]:
    """Kill commands before each of their steps, or fill the disk from there on."""
    base = run_export(folder / "base", "van_digits")
    FORKS.set_forkserver_preload(PRELOADED)  # ignores packages that are not installed
    for kind, name in itertools.product(kinds, commands):
        result = FaultResult(f"{KINDS[kind]} every step of `{name}`, on the bundle's files")
        target = folder / f"{kind}-{name}"
        for step in range(1, STEP_LIMIT):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(base, target)
            code, stderr = _run_in_fork(name, target, kind, step)
            if code == 3 and "not installed" in stderr:
                result.skipped = stderr.strip().splitlines()[0]
                break
            if code == 0:  # the command has fewer steps
                break
            result.add(f"step {step}", (code, stderr), target, 3, -signal.SIGKILL)
            code, stderr = _run_in_fork(name, target, kind, STEP_LIMIT)
            if code or bundle_problem(target):
                result.failures.append(f"the run after step {step}: {code} {stderr}")
        else:
            result.failures.append(f"more than {STEP_LIMIT} steps")
        yield result


def _run_in_fork(name: str, target: Path, kind: str, step: int) -> Result:
    """Return the exit code and the stderr of a command that is interrupted at a step."""
    log = target.parent / "stderr"
    process = FORKS.Process(target=_run_interrupted, args=(name, target, kind, step, log))
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text(errors="replace")


def _run_interrupted(name: str, target: Path, kind: str, step: int, log: Path) -> None:
    import torch

    from van_deploy.cli.app import app

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.addaudithook(_interruption(os.path.realpath(target), kind, step))
    words = [word.format(bundle=target) for word in COMMANDS[name].split()]
    app([*words, "--json"], prog_name="van-deploy")


def _interruption(folder: str, kind: str, step: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that counts the changes in ``folder`` and interrupts one of them."""
    number = itertools.count(1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITE_FLAGS):
            return
        if not os.path.realpath(os.fsdecode(args[0])).startswith(folder + os.sep):
            return
        current = next(number)
        if kind == "kill" and current == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and current >= step and event in EVENTS_NEEDING_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return hook


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    """Mount a file system of ``kib`` KiB on ``folder``.

    Raises:
        OSError: this process has no permission to mount one.
    """
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"cannot mount a file system: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(
    folder: Path, commands: Sequence[str] = ("export", "quantize", "build"), sizes: Any = SIZES_KIB
) -> Iterator[FaultResult]:
    """Run commands that write on disks of increasing size."""
    base, disk = run_export(folder / "full-base", "van_digits"), folder / "disk"
    used = 64 + sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) // 1024
    for name in commands:
        result = FaultResult(f"disk full during `{name}`, free space from {sizes[0]} KiB up")
        try:
            for free in sizes:
                with small_disk(disk, free + (0 if name == "export" else used)):
                    if name != "export":
                        shutil.copytree(base, disk / "bundle")
                    (disk / "tmp").mkdir()
                    paths: Any = {"bundle": disk / "bundle", "TMPDIR": str(disk / "tmp")}
                    result.run(COMMANDS[name], 0, 3, **paths)
        except OSError as error:
            result.skipped = str(error)
        yield result


def read_only_disk(folder: Path) -> Iterator[FaultResult]:
    """Run commands that read, and commands that write, on a read-only bundle."""
    result, disk = FaultResult("a bundle on a read-only file system"), folder / "ro"
    base = run_export(folder / "base", "van_digits")
    lines: dict[tuple[int, ...], tuple[str, ...]] = {
        (0,): ("info {bundle}", "inspect {bundle}", "predict {bundle} {bundle}/golden/0.png"),
        (0, 3, 5): ("verify {bundle} --no-modules", "drift {bundle} --level stage"),
        (3, 5): (COMMANDS["quantize"], COMMANDS["build"], COMMANDS["export"]),
    }
    try:
        with small_disk(disk, 20_000):
            bundle = Path(shutil.copytree(base, disk / "bundle"))
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            for allowed, line in ((codes, line) for codes in lines for line in lines[codes]):
                result.run(line, *allowed, bundle=bundle)
    except OSError as error:
        result.skipped = str(error)
    yield result


def concurrent_writers(folder: Path) -> Iterator[FaultResult]:
    """Run three commands that write one bundle at the same time, five times."""
    result = FaultResult("three processes writing one bundle")
    bundle = run_export(folder / "shared", "van_digits")
    lines = [COMMANDS[name] for name in ("quantize", "build", "quantize")]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for code, stderr in pool.map(lambda line: run_command(line, bundle), lines):
                replaced = code == 5 and "was replaced while" in stderr
                result.add("a writer", (0 if replaced else code, stderr), None, 0, 3)
            result.add("all writers", (0, ""), bundle, 0)
    yield result


def clock_and_cache(folder: Path) -> Iterator[FaultResult]:
    """Run commands with a clock that goes backwards, and with an unreadable cache."""
    loop, file, export = folder / "loop", folder / "a-file", COMMANDS["export"]
    result = FaultResult("a clock that goes back a minute at every call")
    for line in (export, COMMANDS["quantize"], "verify {bundle} --no-modules", export):
        result.run(line, 0, bundle=folder / "clock", program=("-c", CLOCK))
    yield result
    loop.symlink_to(loop)
    file.write_text("not a folder")
    result = FaultResult("a cache that cannot be read")
    for home in map(str, (file, loop, file / "below", "/proc/1/nothing")):
        cache = {"HF_HOME": home, "HF_HUB_CACHE": home}
        for line in ("list", "info van_b1", export):
            result.run(line, 0, bundle=folder / "yes", **cache)
        result.run("export van_b1 --offline --output {bundle}", 3, 5, bundle=folder / "no", **cache)
        if (folder / "no").exists():
            result.failures.append("a failed export did not remove its folder")
    yield result


def table(count: int | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row for each fault, and the failures."""
    rows, failures = [], list[str]()
    faults = (interrupt_every_step, full_disk, read_only_disk, concurrent_writers, clock_and_cache)
    for inject in faults:
        with tempfile.TemporaryDirectory(prefix="van-deploy-faults-") as folder:
            for result in inject(Path(folder)):
                outcomes = ", ".join(f"{outcome}: {n}" for outcome, n in result.outcomes.items())
                outcomes = f"skipped: {result.skipped}" if result.skipped else outcomes
                total, failed = result.outcomes.total(), len(result.failures)
                rows.append([result.fault, str(total), outcomes, str(failed)])
                failures += [f"{result.fault}: {message}" for message in result.failures]
    return ["fault", "runs", "outcomes", "failures"], rows, failures
