"""``kill -9`` at random moments of a command."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reliability.forks import Fork
from reliability.trials import Trials, bundle_is_whole, require, van_deploy

__all__ = ["kills"]

FINISH_EVERY = 5  # killed runs, before one may finish


def kills(
    folder: Path, count: int, only: Sequence[str] = ("export", "quantize", "build", "run")
) -> list[Trials]:
    """Kill export, quantize, build and run at random moments."""
    base = folder / "base"
    require(van_deploy("export", "van_digits", "--output", base))
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
    target, log = folder / f"killed-{name}", folder / "said"
    if name in ("quantize", "build"):
        shutil.copytree(base, target)
    Fork(words(target), log).finished()  # what is done once a machine is done
    start = time.monotonic()
    code, said = Fork([*words(target)], log).finished()
    whole_s = time.monotonic() - start
    if code == 3:
        trials.skipped = said.strip().splitlines()[0]
        return trials
    shutil.rmtree(target)
    for number in range(count):
        if number % FINISH_EVERY == 0:
            shutil.rmtree(target, ignore_errors=True)
            if name in ("quantize", "build"):
                shutil.copytree(base, target)
        if _killed(Fork(words(target), log), rng.uniform(0.0, 1.1 * whole_s)):
            trials.count("killed, the bundle whole or not there yet")
        else:
            trials.count("had ended before")
        problem = bundle_is_whole(target)
        if problem:
            trials.broken.append(f"kill {number} of {name}: {problem}")
        if number % FINISH_EVERY == FINISH_EVERY - 1:
            code, said = Fork(words(target), log).finished()
            if code or bundle_is_whole(target):
                trials.broken.append(f"the run after kill {number} of {name}: {code} {said}")
            trials.count("next run succeeded" if not code else "next run failed")
            trials.tried -= 1
    return trials


def _killed(fork: Fork, after_s: float) -> bool:
    """Kill it at that moment; return whether it had not ended before."""
    until = time.monotonic() + after_s
    while fork.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    ended = fork.poll() is not None
    if not ended:
        os.kill(fork.pid, signal.SIGKILL)
    fork.finished()
    return not ended
