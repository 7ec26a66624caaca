"""Inject faults: killed commands, full disks, read-only folders, concurrent writers, odd clocks.

After each fault the bundle must be the old one or the new one, complete, and the next run of
the same command must succeed. Faults that this machine does not support (mounting a small file
system needs a privilege) are reported as skipped, with the reason.

A step is a file-system entry of the bundle that is opened for writing, created, renamed or removed;
Python's audit hooks report them. Killing at random moments rarely hits the time between two
renames; these tests go through all steps. The commands run in forks of a process that has imported
all packages, because importing takes longer than the command.
"""

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reliability.load import run_export
from reliability.outcome import Outcome

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = "torch._dynamo torch.onnx torchvision timm onnxscript onnxsim onnxruntime tensorrt_rtx"
PRELOADED += " van_deploy.pipeline van_deploy.cli.make"
EVENTS_NEEDING_SPACE = {"os.mkdir", "os.rename", "open", "os.link", "os.symlink"}
EVENTS = {*EVENTS_NEEDING_SPACE, "os.remove", "os.rmdir", "os.truncate"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SIZES_KIB = (64, 256, 512, 900, 1300, 1800, 2600, 3600, 5000)
NEVER = 10**9  # no command has so many steps
KINDS = {"kill": "`kill -9` before", "full": "disk full from"}
# The commands that write.
COMMANDS = {
    "export": "export van_digits --output {bundle} --force",
    "quantize": "quantize {bundle} --precision fp16 --force",
    "build": "build {bundle} --target sm_89 --force",
    "run": "run van_digits --precision fp16 --output {bundle} --force",
    "report": "report {bundle}",
}
WRITERS = ("export", "quantize", "build")
READERS = ("info {bundle}", "inspect {bundle}", "predict {bundle} {bundle}/golden/0.png")
CHECKS = ("verify {bundle} --no-modules", "drift {bundle} --level stage")
READ_ONLY = {**dict.fromkeys(READERS, (0,)), **dict.fromkeys(CHECKS, (0, 3, 5))}
READ_ONLY |= {COMMANDS[name]: (3, 5) for name in WRITERS}
CLOCK = """
import itertools, time
start, steps = time.time(), itertools.count()
time.time = lambda: start - 60.0 * next(steps)
from van_deploy.cli.app import main
main()
"""

Result = tuple[int, str]  # exit code and stderr of a command


def check(fault: str, step: str, result: Result, bundle: Path | None, *allowed: int) -> Outcome:
    """Return the outcome; other exit codes, tracebacks and damaged bundles are failures."""
    (code, stderr), problem = result, bundle_problem(bundle) if bundle else ""
    failed = problem or code not in allowed or "Traceback" in stderr
    failure = f"{fault}: {step}: {code} {problem} {stderr[-600:]}" if failed else ""
    return Outcome(fault, f"exit code {code}", failure)


def run_command(line: str, bundle: Path, *program: str, **environment: str) -> Result:
    """Run a command on a bundle in a process of its own; return its exit code and its stderr."""
    words = [
        sys.executable,
        *(program or ("-m", "van_deploy")),
        *line.format(bundle=bundle).split(),
    ]
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
    folder: Path, commands: Iterable[str] = COMMANDS, kinds: Iterable[str] = KINDS
) -> Iterator[Outcome]:
    """Kill commands before each of their steps, or fill the disk from there on; run them again."""
    base = run_export(folder / "base", "van_digits")
    FORKS.set_forkserver_preload(PRELOADED.split())  # ignores packages that are not installed
    for kind, name in itertools.product(kinds, commands):
        fault = f"{KINDS[kind]} every step of `{name}`, on the bundle's files"
        for step in itertools.count(1):
            target = Path(shutil.copytree(base, folder / f"{kind}-{name}-{step}"))
            code, stderr = _run_in_fork(name, target, kind, step)
            if code == 0:  # the command has fewer steps
                break
            if "not installed" in stderr:
                yield Outcome(fault, f"skipped: {stderr.strip()}")
                break
            yield check(fault, f"step {step}", (code, stderr), target, 3, -signal.SIGKILL)
            again = _run_in_fork(name, target, kind, NEVER)
            yield (outcome := check(fault, f"the run after step {step}", again, target, 0))
            if outcome.failure:
                break
            shutil.rmtree(target)


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
    folder, number = os.path.realpath(target) + os.sep, itertools.count(1)

    def interrupt(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(args[0], str | bytes | os.PathLike):
            return
        reads = event == "open" and not (isinstance(args[2], int) and args[2] & WRITE_FLAGS)
        if reads or not os.path.realpath(os.fsdecode(args[0])).startswith(folder):
            return
        current = next(number)
        if kind == "kill" and current == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and current >= step and event in EVENTS_NEEDING_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(interrupt)
    app([*COMMANDS[name].format(bundle=target).split(), "--json"], prog_name="van-deploy")


def run_on_disk(
    fault: str, line: str, disk: Path, kib: int, base: Path | None, *allowed: int, ro: bool = False
) -> Outcome:
    """Run a command on a new file system, with ``kib`` KiB left beside a copy of a bundle."""
    bundle, temporary, command = disk / "bundle", disk / "tmp", ["mount", "-t", "tmpfs", "-o"]
    if base:
        kib += 64 + sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) // 1024
    disk.mkdir(exist_ok=True)
    command += [f"size={kib}k", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        return Outcome(fault, f"skipped: {mounted.stderr.strip()}")
    try:
        if base:
            shutil.copytree(base, bundle)
        temporary.mkdir()
        if ro:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        environment = {} if ro else {"TMPDIR": str(temporary)}
        return check(fault, line, run_command(line, bundle, **environment), bundle, *allowed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def full_disk(
    folder: Path, commands: Iterable[str] = WRITERS, sizes: Sequence[int] = SIZES_KIB
) -> Iterator[Outcome]:
    """Run commands that write on disks of increasing size."""
    base = run_export(folder / "base", "van_digits")
    for name, kib in itertools.product(commands, sizes):
        fault = f"disk full during `{name}`, free space from {sizes[0]} KiB up"
        copied = None if name == "export" else base
        yield run_on_disk(fault, COMMANDS[name], folder / "disk", kib, copied, 0, 3)


def read_only_disk(folder: Path) -> Iterator[Outcome]:
    """Run commands that read, and commands that write, on a read-only bundle."""
    base, fault = run_export(folder / "base", "van_digits"), "a bundle on a read-only file system"
    for line, allowed in READ_ONLY.items():
        yield run_on_disk(fault, line, folder / "disk", 20_000, base, *allowed, ro=True)


def concurrent_writers(folder: Path) -> Iterator[Outcome]:
    """Run three commands that write one bundle at the same time, five times."""
    fault, bundle = "three processes writing one bundle", run_export(folder / "b", "van_digits")
    lines = [COMMANDS[name] for name in ("quantize", "build", "quantize")]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for code, stderr in pool.map(lambda line: run_command(line, bundle), lines):
                replaced = code == 5 and "was replaced while" in stderr
                yield check(fault, "a writer", (0 if replaced else code, stderr), None, 0, 3)
            yield check(fault, "all writers", (0, ""), bundle, 0)


def clock_and_cache(folder: Path) -> Iterator[Outcome]:
    """Run commands with a clock that goes backwards, and with an unreadable cache."""
    loop, file, yes, no = (folder / name for name in ("loop", "a-file", "yes", "no"))
    loop.symlink_to(loop)
    file.write_text("not a folder")
    fault, export = "a clock that goes back a minute at every call", COMMANDS["export"]
    for line in (export, COMMANDS["quantize"], "verify {bundle} --no-modules", export):
        yield check(fault, line, run_command(line, yes, "-c", CLOCK), yes, 0)
    fault, fails = "a cache that cannot be read", "export van_b1 --offline --output {bundle}"
    for home in map(str, (file, loop, file / "below", "/proc/1/nothing")):
        cache = {"HF_HOME": home, "HF_HUB_CACHE": home}
        for line in ("list", "info van_b1", export):
            yield check(fault, line, run_command(line, yes, **cache), yes, 0)
        yield check(fault, fails, run_command(fails, no, **cache), no, 3, 5)
        if no.exists():
            yield Outcome(fault, "", "a failed export did not remove its folder")


def run(_: Namespace) -> Iterator[Outcome]:
    """Inject all faults."""
    faults = (interrupt_every_step, full_disk, read_only_disk, concurrent_writers, clock_and_cache)
    for inject in faults:
        with tempfile.TemporaryDirectory(prefix="van-deploy-faults-") as folder:
            yield from inject(Path(folder))
