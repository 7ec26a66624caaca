"""Spoiled files, thousands of them: does the program ever do worse than say what is wrong?

Each case must end by itself with a documented outcome: the file was taken, or one of
the program's own errors, which have exit codes 1 to 5. A traceback, code that ran, a
case of more than 20 seconds, a process that dies and more than 2 GB are faults. The
cases of a kind run in a process of their own; Hypothesis shrinks the first that fails.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from reliability.kinds import KINDS, MARKER, command, make_sound_files
from reliability.spoiled import Draw, first_fault

TOTAL, LONGEST_S, MOST_BYTES = 10_000, 20.0, 2 * 10**9
EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")

Found = tuple[Counter[int], int, str]
"""How often each exit code came, the most memory in bytes, and what went wrong or ""."""


class _TooLong(BaseException):
    """A case took more than its time."""


def fuzz(kind: str, seed: int, count: int, sound: Path) -> Found:
    """Return what became of about so many cases, run in a process of their own.

    Args:
        kind: one of :data:`~reliability.kinds.KINDS`.
        seed: of Hypothesis.
        count: of cases.
        sound: folder of the sound files, which are made where they are not there.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run_cases, kind, seed, count, sound).result()
        except BrokenProcessPool:
            return Counter(), 0, f"{kind}: the process died"


def run_cases(kind: str, seed: int, count: int, sound: Path) -> Found:
    """Run cases in this process, and return what became of them."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NO_COLOR="1")
    if not sound.exists():
        sound.mkdir(parents=True)
        make_sound_files(sound)
    bundle, image = sound / "bundle", sound / "bundle/golden/0.png"
    for words in (("info", sound / "zip.pth"), ("inspect", bundle), ("predict", bundle, image)):
        if command(*words)() != 0:  # also starts what libraries start once
            return Counter(), 0, f"van-deploy {words[0]} refuses a sound file"
    from van_deploy.environment.hardware import peak_memory_bytes

    codes, executed = Counter[int](), list[str]()
    sys.addaudithook(lambda name, _: executed.append(name) if name.startswith(EXECUTES) else None)

    def case(draw: Draw) -> None:
        with tempfile.TemporaryDirectory(dir=sound) as folder:
            codes[outcome(draw, kind, sound, Path(folder), executed)] += 1

    fault = first_fault(case, seed, count)
    return codes, peak_memory_bytes(), f"{kind}: {fault}" if fault else ""


def outcome(
    draw: Draw,
    kind: str,
    sound: Path,
    folder: Path,
    executed: list[str],
    most_bytes: int = MOST_BYTES,
) -> int:
    """Return the exit code of one case.

    Args:
        draw: what Hypothesis decides.
        kind: one of :data:`~reliability.kinds.KINDS`.
        sound: folder of the sound files.
        folder: where the case may write.
        executed: what this process has executed; it is emptied before the case.
        most_bytes: of main memory that this process may ever have held after the case.

    Raises:
        AssertionError: it ended as none may.
    """
    from van_deploy.cli.app import user_error
    from van_deploy.environment.hardware import peak_memory_bytes

    def too_long(*_: object) -> None:
        raise _TooLong

    read = KINDS[kind][2](draw, sound, folder)
    executed.clear()
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    faulthandler.dump_traceback_later(3 * LONGEST_S, exit=True)  # stuck in native code
    try:
        found = read()
        code = found if isinstance(found, int) else 0
    except _TooLong:
        raise AssertionError(f"more than {LONGEST_S:.0f} s") from None
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise AssertionError(f"{type(error).__name__}: {error}"[:300]) from error
        code = known.exit_code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    if (sound / MARKER).exists() or executed:
        raise AssertionError(f"it ran something: {executed or 'the payload'}")
    if not 0 <= code <= 5 or peak_memory_bytes() > most_bytes:
        raise AssertionError(f"exit code {code}, {peak_memory_bytes() / 1e9:.1f} GB")
    return int(code)


def table(
    count: int | None, seed: int = 0, only: Sequence[str] = ()
) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row a kind, and the faults of so many cases in all."""
    rows, faults, names = [], list[str](), only or list(KINDS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-fuzz-") as folder:
        for name in names:
            share = (count or TOTAL) * KINDS[name][0] / sum(KINDS[other][0] for other in names)
            codes, peak, fault = fuzz(name, seed, round(share), Path(folder) / "sound")
            refused = {code: n for code, n in sorted(codes.items()) if code}
            told = f"{sum(refused.values())} ({', '.join(f'{c}: {n}' for c, n in refused.items())})"
            figures = [codes.total(), codes[0], told, int(bool(fault)), f"{peak / 1e9:.2f}"]
            rows.append([name, KINDS[name][1], *map(str, figures)])
            faults += [fault] if fault else []
    columns = ["file", "what was spoiled", "cases", "taken", "refused (exit code: cases)", "faults"]
    return [*columns, "peak GB"], rows, faults
