"""Spoiled files, thousands of them: does the program ever do worse than say what is wrong?

    python -m reliability.fuzz                        # 10,000 in all
    python -m reliability.fuzz --count 500 --only image
    python -m reliability.fuzz --only checkpoint --first 1234 --count 1   # one case again

Each case must end by itself with a documented outcome: the file was taken, or one of
the program's own errors, which have exit codes 1 to 5. A traceback, code that ran, a
case of more than 20 seconds, a process that dies and more than 2 GB are faults. The
cases run in a process of their own that is started anew where it dies.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reliability.corpus import Corpus, digest_of, scratch
from reliability.kinds import KINDS
from reliability.readers import command

__all__ = ["MIXED", "Fault", "Outcome", "fuzz"]

TOTAL = 10_000
LONGEST_S = 20.0
MOST_BYTES = 2 * 10**9
EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")
MIXED = "mixed"
WORKER = ("-m", "reliability.fuzz", "--worker")


@dataclass(frozen=True)
class Fault:
    """One case that ended as none may.

    Attributes:
        kind: of file.
        index: of the case, to run it again.
        what: what happened.
    """

    kind: str
    index: int
    what: str


@dataclass
class Outcome:
    """What became of the cases of one kind.

    Attributes:
        kind: of file.
        codes: how often each exit code came out; 0 is a file that was taken.
        slowest_s: longest time of a case.
        peak_bytes: most memory the process held.
        faults: the cases that ended otherwise.
    """

    kind: str
    codes: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)


def fuzz(kind: str, first: int, count: int, folder: Path) -> Outcome:
    """Return what became of ``count`` cases of ``kind``, beginning with number ``first``.

    Args:
        kind: one of :data:`~reliability.kinds.KINDS`, or :data:`MIXED` for all in turn.
        first: number of the first case.
        count: how many.
        folder: for the sound files, which are made where they are not there.
    """
    outcome, done = Outcome(kind), first
    _prepare(folder)
    while done < first + count:
        for event in _worker(kind, done, first + count - done, folder):
            done = int(event["index"]) + (event["event"] == "ended")
            if event["event"] == "ended":
                _count(outcome, event)
                continue
            last = event
        if done < first + count:  # the process died in the case that had begun
            how = last.get("died", "the process died")
            outcome.faults.append(Fault(kind, done, how))
            done += 1
    return outcome


def _prepare(folder: Path) -> None:
    """Make the sound files, in a process of their own.

    Raises:
        RuntimeError: they cannot be made; nothing was fuzzed.
    """
    command = [sys.executable, "-m", "reliability.fuzz", "--worker", "image", "0", "0", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the sound files cannot be made:\n{done.stderr[-2000:]}")


def _count(outcome: Outcome, event: dict[str, Any]) -> None:
    outcome.slowest_s = max(outcome.slowest_s, event["seconds"])
    outcome.peak_bytes = max(outcome.peak_bytes, event["peak"])
    if event["fault"]:
        outcome.faults.append(Fault(outcome.kind, event["index"], event["fault"]))
    else:
        outcome.codes[event["code"]] += 1


def _worker(kind: str, first: int, count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield ``began`` and ``ended`` events of cases run in a process of their own."""
    command = [sys.executable, *WORKER, kind, str(first), str(count), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    event: dict[str, Any] = {"event": "began", "index": first}
    with tempfile.TemporaryFile("w+") as chatter:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=chatter, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                event = json.loads(line)
                yield event
        if event["event"] == "began":
            chatter.seek(0)
            said = " ".join(chatter.read().split()[-40:])
            yield {**event, "died": f"the process ended with {process.returncode}: {said}"}


def _run_cases(kind: str, first: int, count: int, folder: Path) -> None:
    """Run cases in this process and tell stdout about each."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    corpus = Corpus(folder)
    executed: list[str] = []
    _warm_up(corpus)
    sys.addaudithook(lambda name, _: executed.append(name) if name.startswith(EXECUTES) else None)
    signal.signal(signal.SIGALRM, _too_long)
    for index in range(first, first + count):
        channel.write(json.dumps({"event": "began", "index": index}) + "\n")
        channel.flush()
        executed.clear()
        event = {"event": "ended", "index": index, **_case(corpus, kind, index, executed)}
        channel.write(json.dumps(event) + "\n")
        channel.flush()


def _warm_up(corpus: Corpus) -> None:
    """Read a sound file of each kind, so that what libraries start once is started."""
    for words in (("info", str(corpus.folder / "zip.pth")), ("inspect", str(corpus.bundle))):
        if command(*words)() != 0:
            raise SystemExit(f"van-deploy {' '.join(words)} refuses a sound file")
    command("predict", str(corpus.bundle), str(corpus.bundle / "golden/0.png"))()


class _TooLong(BaseException):
    """A case took more than its time."""


def _too_long(number: int, frame: object) -> None:
    raise _TooLong


def _case(corpus: Corpus, kind: str, index: int, executed: list[str]) -> dict[str, Any]:
    from van_deploy.cli.app import translated
    from van_deploy.environment.hardware import peak_memory_bytes

    fault, code = "", 0
    if kind == MIXED:
        kind = list(KINDS)[index % len(KINDS)]
    with scratch(corpus) as folder:
        read = KINDS[kind].spoil(corpus, digest_of(kind, index), folder)
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


def main() -> int:
    """Run the cases asked for, print a table; return 1 if there was a fault."""
    if sys.argv[1:2] == ["--worker"]:
        kind, first, count, folder = sys.argv[2:]
        _run_cases(kind, int(first), int(count), Path(folder))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=TOTAL, help="cases in all")
    parser.add_argument("--only", nargs="*", default=[], choices=list(KINDS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = arguments.only or list(KINDS)
    shares = sum(KINDS[name].share for name in names)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="van-deploy-fuzz-") as folder:
        for name in names:
            count = max(1, round(arguments.count * KINDS[name].share / shares))
            print(f"{name}: {count} cases", file=sys.stderr, flush=True)
            outcomes.append(fuzz(name, arguments.first, count, Path(folder) / "corpus"))
            for fault in outcomes[-1].faults:
                print(f"{fault.kind} {fault.index}: {fault.what}", file=sys.stderr, flush=True)
    result = _result(outcomes)
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return int(any(outcome.faults for outcome in outcomes))


def _result(outcomes: list[Outcome]) -> dict[str, Any]:
    rows = []
    for outcome in outcomes:
        refused = sum(n for code, n in outcome.codes.items() if code)
        codes = ", ".join(f"{code}: {n}" for code, n in sorted(outcome.codes.items()) if code)
        rows.append(
            [
                outcome.kind,
                KINDS[outcome.kind].about,
                str(refused + outcome.codes[0] + len(outcome.faults)),
                str(outcome.codes[0]),
                f"{refused} ({codes})" if codes else "0",
                str(len(outcome.faults)),
                f"{outcome.slowest_s:.2f}",
                f"{outcome.peak_bytes / 1e9:.2f}",
            ]
        )
    columns = ["file", "what was spoiled", "cases", "taken", "refused (exit code: cases)", "faults"]
    faults = [asdict(fault) for outcome in outcomes for fault in outcome.faults]
    return {"columns": [*columns, "slowest s", "peak GB"], "rows": rows, "faults": faults}


def _text(result: dict[str, Any]) -> str:
    kept = [0, 2, 3, 4, 5, 6, 7]
    lines = [result["columns"], *result["rows"]]
    return "\n".join("  ".join(f"{line[i]:<14}" for i in kept) for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
