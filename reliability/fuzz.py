"""Spoiled files, thousands of them: does the program ever do worse than say what is wrong?

Each case must end by itself with a documented outcome: the file was taken, or one of
the program's own errors, which have exit codes 1 to 5. A traceback, code that ran, a
case of more than 20 seconds, a process that dies and more than 2 GB are faults. The
cases run in a process of their own that is started anew where it dies.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.corpus import Corpus, scratch
from reliability.kinds import KINDS, command
from reliability.spoiled import generator_of

TOTAL, LONGEST_S, MOST_BYTES = 10_000, 20.0, 2 * 10**9
EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")
MIXED = "mixed"
WORKER = ("-m", "reliability.fuzz")


@dataclass
class Outcome:
    """What became of the cases of one kind.

    Attributes:
        codes: how often each exit code came out; 0 is a file that was taken.
        slowest_s: longest time of a case.
        peak_bytes: most memory the process held.
        faults: of the cases that ended as none may, each with its number.
    """

    codes: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_bytes: int = 0
    faults: list[str] = field(default_factory=list)


def fuzz(kind: str, first: int, count: int, folder: Path) -> Outcome:
    """Return what became of ``count`` cases of ``kind``, beginning with number ``first``.

    Args:
        kind: one of :data:`~reliability.kinds.KINDS`, or :data:`MIXED` for all in turn.
        first: number of the first case.
        count: how many.
        folder: for the sound files, which are made where they are not there.

    Raises:
        RuntimeError: these cannot be made; nothing was fuzzed.
    """
    outcome, done = Outcome(), first
    for ended in _worker(kind, 0, 0, folder):
        raise RuntimeError(f"the sound files cannot be made: {ended['fault']}")
    while done < first + count:
        for ended in _worker(kind, done, first + count - done, folder):
            outcome.slowest_s = max(outcome.slowest_s, ended["seconds"])
            outcome.peak_bytes = max(outcome.peak_bytes, ended["peak"])
            if ended["fault"]:
                outcome.faults.append(f"{kind} {done}: {ended['fault']}")
            else:
                outcome.codes[ended["code"]] += 1
            done += 1
    return outcome


def _worker(kind: str, first: int, count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield how cases ended in a process of their own, up to the one in which it dies."""
    words = [sys.executable, *WORKER, kind, str(first), str(count), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    with tempfile.TemporaryFile("w+") as chatter:
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=chatter, text=True, env=environment
        ) as process:
            yield from map(json.loads, process.stdout or ())
        if process.returncode:
            chatter.seek(0)
            said = " ".join(chatter.read().split()[-40:])
            fault = f"the process ended with {process.returncode}: {said}"
            yield {"code": 0, "seconds": 0.0, "peak": 0, "fault": fault}


def run_cases(kind: str, first: int, count: int, folder: Path) -> None:
    """Run cases in this process, and write a line of JSON on standard output for each."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    corpus, executed = Corpus(folder), list[str]()
    warm_up(corpus)
    sys.addaudithook(lambda name, _: executed.append(name) if name.startswith(EXECUTES) else None)
    signal.signal(signal.SIGALRM, _too_long)
    for index in range(first, first + count):
        channel.write(json.dumps(_case(corpus, kind, index, executed)) + "\n")
        channel.flush()


def warm_up(corpus: Corpus) -> None:
    """Read a sound file of each kind, so that what libraries start once is started."""
    image = corpus.bundle / "golden/0.png"
    for words in (
        ("info", corpus.folder / "zip.pth"),
        ("inspect", corpus.bundle),
        ("predict", corpus.bundle, image),
    ):
        if command(*words)() != 0:
            raise SystemExit(f"van-deploy {words[0]} refuses a sound file")


class _TooLong(BaseException):
    """A case took more than its time."""


def _too_long(number: int, frame: object) -> None:
    raise _TooLong


def _case(corpus: Corpus, kind: str, index: int, executed: list[str]) -> dict[str, Any]:
    from van_deploy.cli.app import translated
    from van_deploy.environment.hardware import peak_memory_bytes

    fault, code = "", 0
    kind = list(KINDS)[index % len(KINDS)] if kind == MIXED else kind
    with scratch(corpus) as folder:
        read = KINDS[kind][2](corpus, generator_of(kind, index), folder)
        executed.clear()
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        faulthandler.dump_traceback_later(3 * LONGEST_S, exit=True)  # stuck in native code
        start = time.perf_counter()
        try:
            found = read()
            code = found if isinstance(found, int) and not isinstance(found, bool) else 0
        except _TooLong:
            fault = f"more than {LONGEST_S:.0f} s"
        except Exception as error:
            known = translated(error)
            code = known.exit_code if known else 0
            fault = "" if known else f"{type(error).__name__}: {error}"[:300]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        seconds = time.perf_counter() - start
    peak = peak_memory_bytes()
    if corpus.marker.exists() or executed:
        fault = f"it ran something: {executed or 'the payload'}"
    elif not fault and not 0 <= code <= 5:
        fault = f"exit code {code}"
    elif not fault and peak > MOST_BYTES:
        fault = f"{peak / 1e9:.1f} GB"
    return {"code": code, "seconds": seconds, "peak": peak, "fault": fault}


def table(
    count: int | None, first: int = 0, only: Sequence[str] = ()
) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row a kind, and the faults of so many cases in all."""
    rows, faults, names = [], list[str](), only or list(KINDS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-fuzz-") as folder:
        for name in names:
            share = KINDS[name][0] / sum(KINDS[other][0] for other in names)
            cases = max(1, round((count or TOTAL) * share))
            print(f"{name}: {cases} cases", file=sys.stderr, flush=True)
            found = fuzz(name, first, cases, Path(folder) / "corpus")
            codes = {code: n for code, n in sorted(found.codes.items()) if code}
            refused = f"{sum(codes.values())} ({', '.join(f'{c}: {n}' for c, n in codes.items())})"
            figures = [str(cases), str(found.codes[0]), refused, str(len(found.faults))]
            figures += [f"{found.slowest_s:.2f}", f"{found.peak_bytes / 1e9:.2f}"]
            rows.append([name, KINDS[name][1], *figures])
            faults += found.faults
    columns = ["file", "what was spoiled", "cases", "taken", "refused (exit code: cases)", "faults"]
    return [*columns, "slowest s", "peak GB"], rows, faults


if __name__ == "__main__":
    run_cases(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
