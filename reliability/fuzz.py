"""Read thousands of corrupt files, and check that each ends with a documented outcome.

A file is either accepted or rejected with one of the program's errors, which have exit codes 1 to
5. A traceback, executed code, more than 20 seconds for a case, a crashed process and more than
2 GB are failures. Each kind of file has a process of its own; Hypothesis shrinks the first failure.
"""

import faulthandler
import os
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from benchmarks.table import run_in_process
from reliability.corruption import Draw, find_failure, one_of
from reliability.kinds import KINDS, MARKER, document, make_valid_files, run_command
from reliability.outcome import Outcome
from van_deploy.environment.hardware import peak_memory_bytes

TOTAL, TIMEOUT_S, MEMORY_LIMIT_BYTES = 10_000, 20.0, 2 * 10**9
EXECUTION = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")

Result = tuple[Counter[int], int, str]  # cases by exit code, peak memory in bytes, failure or ""


def fuzz(kind: str, seed: int, count: int, valid: Path) -> Result:
    """Return the result of about ``count`` cases in a process of their own.

    Args:
        kind: one of :data:`~reliability.kinds.KINDS`.
        seed: of Hypothesis.
        count: number of cases.
        valid: folder of the valid files, which are created if they do not exist.
    """
    try:
        return run_in_process(_run_cases, kind, seed, count, valid)
    except BrokenProcessPool:
        return Counter(), 0, f"{kind}: the process crashed"


def _run_cases(kind: str, seed: int, count: int, valid: Path) -> Result:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NO_COLOR="1")
    if not valid.exists():
        valid.mkdir(parents=True)
        make_valid_files(valid)
    codes, executed = Counter[int](), list[str]()
    for line in ("info {}/zip.pth", "inspect {}/bundle", "predict {0}/bundle {0}/image.png"):
        if run_command(*line.format(valid).split()) != 0:  # also starts libraries' own processes
            return codes, 0, f"van-deploy {line} rejects a valid file"
    sys.addaudithook(lambda name, _: executed.append(name) if name.startswith(EXECUTION) else None)

    def case(draw: Draw) -> None:
        with tempfile.TemporaryDirectory(dir=valid) as folder:
            codes[run_case(draw, kind, valid, Path(folder), executed)] += 1

    failure = find_failure(case, seed, count, TIMEOUT_S)
    return codes, peak_memory_bytes(), f"{kind}: {failure}" if failure else ""


def run_case(draw: Draw, kind: str, valid: Path, folder: Path, executed: list[str]) -> int:
    """Return the exit code of one case.

    Args:
        draw: decides the corruption.
        kind: one of :data:`~reliability.kinds.KINDS`.
        valid: folder of the valid files.
        folder: for the files of the case.
        executed: executions seen by this process's audit hook; cleared before the case.

    Raises:
        AssertionError: the outcome is a failure.
    """
    from van_deploy.cli.app import user_error

    _, _, corrupt, *readers = KINDS[kind]
    corrupt = partial(document, corrupt) if isinstance(corrupt, str) else corrupt
    path, read = corrupt(draw, valid, folder), one_of(draw, *readers)
    places = {"path": path, "it": folder / "it", "plan": path.with_suffix(".plan")}
    executed.clear()
    faulthandler.dump_traceback_later(3 * TIMEOUT_S, exit=True)  # for a hang
    try:
        code = 0
        if isinstance(read, str):
            code = run_command(*read.format(**places).split())
        else:
            read(path)
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise AssertionError(f"{type(error).__name__}: {error}"[:300]) from error
        code = known.exit_code
    faulthandler.cancel_dump_traceback_later()
    assert not executed, f"executed {executed}"
    assert not (valid / MARKER).exists(), "executed the payload"
    assert 0 <= code <= 5, f"exit code {code}"
    peak = peak_memory_bytes()
    assert peak < MEMORY_LIMIT_BYTES, f"{peak / 1e9:.1f} GB"
    return int(code)


def run(options: Namespace) -> Iterator[Outcome]:
    """Fuzz the chosen kinds of files."""
    total = sum(KINDS[name][0] for name in options.kind)
    with tempfile.TemporaryDirectory(prefix="van-deploy-fuzz-") as folder:
        for name in options.kind:
            share, description, *_ = KINDS[name]
            count = round((options.count or TOTAL) * share / total)
            codes, peak, failure = fuzz(name, options.seed, count, Path(folder) / "valid")
            what = f"{name}: {description}"
            for code, number in sorted(codes.items()):
                yield Outcome(what, f"exit code {code}", runs=number)
            yield Outcome(what, f"peak {peak / 1e9:.2f} GB", failure, 0)
