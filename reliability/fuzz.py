"""Read thousands of corrupt files, and check that each ends with a documented outcome.

A file is either accepted or rejected with one of the program's errors, which have exit codes 1 to
5. A traceback, executed code, more than 20 seconds for a case, a crashed process and more than
2 GB are failures. Each kind of file has a process of its own; Hypothesis shrinks the first failure.
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

from reliability.corruption import Draw, find_failure
from reliability.kinds import KINDS, MARKER, command, make_valid_files

TOTAL, TIMEOUT_S, MEMORY_LIMIT_BYTES = 10_000, 20.0, 2 * 10**9
EXECUTION = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")

Result = tuple[Counter[int], int, str]  # cases by exit code, peak memory in bytes, failure or ""


class _Timeout(BaseException):
    """A case took longer than :data:`TIMEOUT_S`."""


def fuzz(kind: str, seed: int, count: int, valid: Path) -> Result:
    """Return the result of about ``count`` cases in a process of their own.

    Args:
        kind: one of :data:`~reliability.kinds.KINDS`.
        seed: of Hypothesis.
        count: number of cases.
        valid: folder of the valid files, which are created if they do not exist.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run_cases, kind, seed, count, valid).result()
        except BrokenProcessPool:
            return Counter(), 0, f"{kind}: the process crashed"


def run_cases(kind: str, seed: int, count: int, valid: Path) -> Result:
    """Return the result of about ``count`` cases in this process."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NO_COLOR="1")
    if not valid.exists():
        valid.mkdir(parents=True)
        make_valid_files(valid)
    bundle, image = valid / "bundle", valid / "bundle/golden/0.png"
    for words in (("info", valid / "zip.pth"), ("inspect", bundle), ("predict", bundle, image)):
        if command(*words)() != 0:  # also starts the helper processes of libraries
            return Counter(), 0, f"van-deploy {words[0]} rejects a valid file"
    from van_deploy.environment.hardware import peak_memory_bytes

    codes, executed = Counter[int](), list[str]()
    sys.addaudithook(lambda name, _: executed.append(name) if name.startswith(EXECUTION) else None)

    def case(draw: Draw) -> None:
        with tempfile.TemporaryDirectory(dir=valid) as folder:
            codes[run_case(draw, kind, valid, Path(folder), executed)] += 1

    failure = find_failure(case, seed, count)
    return codes, peak_memory_bytes(), f"{kind}: {failure}" if failure else ""


def run_case(
    draw: Draw,
    kind: str,
    valid: Path,
    folder: Path,
    executed: list[str],
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> int:
    """Return the exit code of one case.

    Args:
        draw: decides the corruption.
        kind: one of :data:`~reliability.kinds.KINDS`.
        valid: folder of the valid files.
        folder: for the files of the case.
        executed: executions seen by this process's audit hook; cleared before the case.
        memory_limit_bytes: largest peak memory of this process after the case.

    Raises:
        AssertionError: the outcome is a failure.
    """
    from van_deploy.cli.app import user_error
    from van_deploy.environment.hardware import peak_memory_bytes

    def raise_timeout(*_: object) -> None:
        raise _Timeout

    read = KINDS[kind][2](draw, valid, folder)
    executed.clear()
    signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
    faulthandler.dump_traceback_later(3 * TIMEOUT_S, exit=True)  # for a hang in native code
    try:
        result = read()
        code = result if isinstance(result, int) else 0
    except _Timeout:
        raise AssertionError(f"more than {TIMEOUT_S:.0f} s") from None
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise AssertionError(f"{type(error).__name__}: {error}"[:300]) from error
        code = known.exit_code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    if (valid / MARKER).exists() or executed:
        raise AssertionError(f"executed {executed or 'the payload'}")
    if not 0 <= code <= 5 or peak_memory_bytes() > memory_limit_bytes:
        raise AssertionError(f"exit code {code}, {peak_memory_bytes() / 1e9:.1f} GB")
    return int(code)


def table(
    count: int | None, seed: int = 0, only: Sequence[str] = ()
) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the columns, a row for each kind, and the failures of ``count`` cases in total."""
    rows, failures, names = [], list[str](), only or list(KINDS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-fuzz-") as folder:
        for name in names:
            share = (count or TOTAL) * KINDS[name][0] / sum(KINDS[other][0] for other in names)
            codes, peak, failure = fuzz(name, seed, round(share), Path(folder) / "valid")
            rejected = ", ".join(f"{code}: {n}" for code, n in sorted(codes.items()) if code)
            cells = [codes.total(), codes[0], f"{codes.total() - codes[0]} ({rejected})"]
            cells += [int(bool(failure)), f"{peak / 1e9:.2f}"]
            rows.append([name, KINDS[name][1], *map(str, cells)])
            failures += [failure] if failure else []
    columns = ["file", "corruption", "cases", "accepted", "rejected (exit code: cases)"]
    return [*columns, "failures", "peak GB"], rows, failures
