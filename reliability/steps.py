"""A command stopped at each of its steps on the disk: killed there, or told that the disk is full.

A step is an entry that is opened to write, made, renamed or removed inside the bundle;
Python's audit hooks see them. Killing at random moments hardly ever falls between two
renames; this goes through all of them. Commands run in forks of a process that has imported
everything: what a command imports takes longer than what it does.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reliability.trials import Trials, bundle_is_whole, require

NEEDED = (
    *("torch", "torch._dynamo", "torch.onnx", "torchvision", "timm", "onnx", "onnxscript"),
    *("onnxsim", "onnxruntime", "tensorrt_rtx", "van_deploy.pipeline"),
    "van_deploy.cli.make",
)
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
NEEDS_ROOM = {"os.mkdir", "os.rename", "open", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
BUNDLE = "BUNDLE"
COMMANDS: dict[str, tuple[str, ...]] = {
    "export": ("export", "van_digits", "--output", BUNDLE, "--force"),
    "quantize": ("quantize", BUNDLE, "--precision", "fp16", "--force"),
    "build": ("build", BUNDLE, "--target", "sm_89", "--force"),
    "run": ("run", "van_digits", "--precision", "fp16", "--output", BUNDLE, "--force"),
    "report": ("report", BUNDLE),
}
"""The commands that are stopped, with the bundle's place in them."""
MOST_STEPS = 1000
TRACEBACK = 99  # exit code of a command that raised

Stop = Callable[[str, int], None]
"""Called before each step with the audit event and the step's number."""


def killed_at_every_step(folder: Path, only: Sequence[str] = tuple(COMMANDS)) -> list[Trials]:
    """Kill commands before each of their steps, one step after the other."""

    def stop(at: int) -> Stop:
        return lambda _, number: os.kill(os.getpid(), signal.SIGKILL) if number == at else None

    return [_each_step(folder, name, stop, "`kill -9` before every step of") for name in only]


def full_at_every_step(folder: Path, only: Sequence[str] = tuple(COMMANDS)) -> list[Trials]:
    """Let the disk be full from each step of a command on."""

    def stop(at: int) -> Stop:
        def full(event: str, number: int) -> None:
            if number >= at and event in NEEDS_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return full

    return [_each_step(folder, name, stop, "disk full from every step on of") for name in only]


def _each_step(folder: Path, name: str, stop: Callable[[int], Stop], what: str) -> Trials:
    trials = Trials(f"{what} `{name}`, on the bundle's files")
    base, target = folder / "base", folder / f"stepped-{name}"
    if not base.exists():
        require("export", "van_digits", "--output", base)
    for at in range(1, MOST_STEPS):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(base, target)
        words = [str(target) if word is BUNDLE else word for word in COMMANDS[name]]
        code, said = _forked(words, target, stop(at))
        if code == 3 and "not installed" in said:
            trials.skipped = said.strip().splitlines()[0]
            return trials
        trials.judge(f"step {at}", code, said, {0, 3, -signal.SIGKILL}, target)
        if code == 0:
            return trials  # there was no such step any more
        killed = "killed" if code == -signal.SIGKILL else f"exit code {code}"
        trials.count(f"{killed}, the bundle whole")
        again, said = _forked(words, target, lambda *_: None)
        if again or bundle_is_whole(target):
            trials.broken.append(f"the run after step {at}: {again} {said[-600:]}")
    trials.broken.append(f"it never came to an end in {MOST_STEPS} steps")
    return trials


def _forked(words: Sequence[str], place: Path, stop: Stop) -> tuple[int, str]:
    """Return the exit code of a command run in a fork, and what it said on stderr."""
    for name in NEEDED:
        with contextlib.suppress(ImportError):  # tensorrt_rtx is not everywhere
            importlib.import_module(name)
    log = place.parent / "said"
    pid = os.fork()
    if pid == 0:
        _be(words, log, _watching(os.path.realpath(place), stop))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, log.read_text(errors="replace")


def _be(words: Sequence[str], log: Path, hook: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Be the command; never return."""
    code = TRACEBACK
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        import torch

        from van_deploy.cli.app import app

        torch.set_num_threads(1)
        sys.addaudithook(hook)
        app([*words, "--json"], prog_name="van-deploy", standalone_mode=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _watching(place: str, stop: Stop) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that counts what is changed below ``place``."""
    number = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            changes = isinstance(details[2], int) and details[2] & WRITING
        else:
            changes = event in CHANGES
        path = details[0] if changes else None
        if isinstance(path, (str, bytes, os.PathLike)) and os.path.realpath(
            os.fsdecode(path)
        ).startswith(place + os.sep):
            number += 1
            stop(event, number)

    return hook
