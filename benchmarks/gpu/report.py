"""Runs the GPU report, part a or b, and writes its page.

    python benchmarks/gpu/report.py --part a --output DIR            # PyTorch and our kernels
    python benchmarks/gpu/report.py --part b --output DIR            # every runtime, tests, gates
    python benchmarks/gpu/report.py --part a --output DIR --only ceilings,eager-b0
    python benchmarks/gpu/report.py --part a --output DIR --rehearse # every step, small, on the CPU
    python benchmarks/gpu/report.py --page DIR [DIR...] > docs/gpu-results.md

van-deploy has to be installed as a wheel: nothing is imported from the checkout. Each step is
a process of its own with a time limit. Steps prepare at the same time and time one by one
(result.py). After every step ``results.json`` and ``results.md`` are written anew, so a run
that is cut off leaves what it had. A step that does not fit the budget is not started, and
says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from page import page, short_table
from result import DONE, GO, REQUEST, VARIABLE, write
from steps import SKIPPED, WORK, Context, Step, steps_of_a, steps_of_b

from van_deploy.environment.hardware import nvidia_driver

SCHEMA = "van-deploy/gpu-report/1"
WRITE_UP_S = 6  # of the budget, kept for the page and the archive
ARCHIVE_LIMIT = 15_000_000
TICK_S = 0.05


@dataclass
class Running:
    """A step that was started.

    Attributes:
        step: which one.
        process: its process, the leader of a group of its own.
        started: when.
        deadline: when it is stopped; later by every turn of another step.
        log: what it printed.
        turn_s: seconds that it had the machine alone.
    """

    step: Step
    process: subprocess.Popen[str]
    started: float
    deadline: float
    log: list[str] = field(default_factory=list)
    turn_s: float = 0.0


class Report:
    """One run of the report: its steps, their turns and what they wrote.

    Args:
        context: where and how it runs.
        steps: all of this part, the most valuable first.
        budget_s: no step starts that would not fit.
        parallel: steps at the same time.
    """

    def __init__(
        self, context: Context, steps: Sequence[Step], budget_s: float, parallel: int
    ) -> None:
        """See the class."""
        self.context, self.steps, self.parallel = context, list(steps), parallel
        self.start = time.monotonic()
        self.end = self.start + budget_s - WRITE_UP_S
        self.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.done: dict[str, dict[str, Any]] = {}
        self.running: list[Running] = []
        self.waiting: list[Running] = []  # for their turn
        self.holder: Running | None = None
        self.since = 0.0
        self.lines: queue.Queue[tuple[Running, str | None]] = queue.Queue()
        self.log: list[str] = []

    def run(self) -> None:
        """Run every step that fits."""
        left = list(self.steps)
        while left or self.running:
            while left and len(self.running) < self.parallel and self.holder is None:
                step = left.pop(0)
                reason = self._refusal(step)
                if reason:
                    self._finish(step, "skipped", reason)
                else:
                    self._launch(step)
            if self.running:
                self._attend()

    def stop(self) -> None:
        """End everything that still runs."""
        for running in list(self.running):
            self._kill(running)

    def _refusal(self, step: Step) -> str:
        if step.skip:
            return step.skip
        left = self.end - time.monotonic()
        if left < step.least_s:
            return f"{left:.0f} s of the budget were left, it needs about {step.least_s:.0f}"
        return ""

    def _launch(self, step: Step) -> None:
        environment = {**os.environ, **self.context.environment, **step.environment}
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.context.work,
            env={**environment, VARIABLE: "1"},
            preexec_fn=os.setpgrp,
        )
        now = time.monotonic()
        running = Running(step, process, now, now + step.limit_s)
        self.running.append(running)
        self._say(f"{step.name}: started")
        threading.Thread(target=self._read, args=(running,), daemon=True).start()

    def _read(self, running: Running) -> None:
        with running.process.stdout as lines:
            for line in lines:
                self.lines.put((running, line.rstrip("\n")))
        self.lines.put((running, None))

    def _attend(self) -> None:
        """Handle what the running steps say, whose turn it is, and whose time is over."""
        try:
            running, line = self.lines.get(timeout=TICK_S)
        except queue.Empty:
            pass
        else:
            if line is None:
                self._ended(running)
            elif line == REQUEST:
                self.waiting.append(running)
            elif line == DONE:
                self._release(running)
            else:
                running.log.append(line)
        if self.holder is None and self.waiting:
            self._grant(self.waiting.pop(0))
        now = time.monotonic()
        for running in list(self.running):
            stopped = self.holder is not None and running is not self.holder
            if now >= self.end:
                self._kill(running, "the budget of the whole report was spent")
            elif now >= running.deadline and not stopped:
                self._kill(running, f"it took more than {running.step.limit_s:.0f} s")

    def _grant(self, running: Running) -> None:
        if running not in self.running:
            return
        self.holder, self.since = running, time.monotonic()
        for other in self.running:
            if other is not running:
                _signal(other, signal.SIGSTOP)
        try:
            running.process.stdin.write(GO + "\n")
            running.process.stdin.flush()
        except OSError:
            self._release(running)

    def _release(self, running: Running) -> None:
        if self.holder is not running:
            return
        took = time.monotonic() - self.since
        running.turn_s += took
        self.holder = None
        for other in self.running:
            if other is not running:
                other.deadline += took
                _signal(other, signal.SIGCONT)

    def _ended(self, running: Running) -> None:
        if running not in self.running:
            return
        code = running.process.wait()
        last = next((line.strip()[:300] for line in running.log[::-1] if line.strip()), "no word")
        state = {0: "done", SKIPPED: "skipped"}.get(code, "failed")
        reason = {0: "", SKIPPED: last}.get(code, f"exit code {code}: {last}")
        self._drop(running, state, reason)

    def _kill(self, running: Running, reason: str = "the report was stopped") -> None:
        _signal(running, signal.SIGKILL)
        _signal(running, signal.SIGCONT)
        running.process.wait()
        self._drop(running, "stopped", reason)

    def _drop(self, running: Running, state: str, reason: str) -> None:
        with contextlib.suppress(OSError):
            running.process.stdin.close()
        self.running.remove(running)
        self.waiting = [other for other in self.waiting if other is not running]
        self._release(running)
        self._finish(running.step, state, reason, running)

    def _finish(self, step: Step, state: str, reason: str, running: Running | None = None) -> None:
        """Keep what became of a step, and write everything anew."""
        entry: dict[str, Any] = {"name": step.name, "about": step.about, "command": step.shown}
        entry |= {"state": state, "reason": reason}
        work, output = self.context.work / f"{step.name}.json", self.context.output
        if running is not None:
            work.with_suffix(".log").write_text("\n".join(running.log) + "\n", encoding="utf-8")
            entry["seconds"] = round(time.monotonic() - running.started, 1)
            entry["turn_seconds"] = round(running.turn_s, 1)
            if work.exists():
                entry["content"] = _json(work)
            if state != "done":
                entry["log_end"] = running.log[-30:]
        self.done[step.name] = entry
        self._say(f"{step.name}: {state}{f' ({reason})' if reason else ''}")
        document = {
            "schema": SCHEMA,
            "part": self.context.part,
            "date": self.date,
            "device": self.context.device,
            "rehearsal": self.context.rehearse,
            "seconds": round(time.monotonic() - self.start, 1),
            "command": self.context.command,
            "steps": [self.done[step.name] for step in self.steps if step.name in self.done],
        }
        write(output / "results.json", document)
        (output / "results.md").write_text(page([document]), encoding="utf-8")
        (output / "log.txt").write_text("\n".join(self.log) + "\n", encoding="utf-8")

    def _say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        self.log.append(line)
        print(line, flush=True)


def _signal(running: Running, number: int) -> None:
    """Send a signal to a step and everything it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(running.process.pid, number)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _archive(context: Context) -> None:
    """Put the steps' logs and JSON files into one archive."""
    with tarfile.open(context.output / "steps.tar.gz", "w:gz") as archive:
        for path in sorted(context.work.glob("*")):
            if path.is_file() and path.stat().st_size < ARCHIVE_LIMIT:
                archive.add(path, path.name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("a", "b"), default="a")
    parser.add_argument("--output", type=Path, default=Path("gpu-report"))
    parser.add_argument("--only", default="", help="steps, with commas between")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--budget", type=float, help="seconds of the whole run")
    parser.add_argument("--device", default="", help="cuda:N or cpu (default: cuda:0 if any)")
    parser.add_argument("--parallel", type=int, help="steps that prepare at the same time")
    parser.add_argument("--rehearse", action="store_true", help="every step, small, on the CPU")
    parser.add_argument("--bundles", type=Path, default=Path(".gpu/bundles"), help="for part b")
    parser.add_argument("--page", type=Path, nargs="+", help="print the page of these runs")
    return parser.parse_args()


def _context(options: argparse.Namespace) -> Context:
    """Return where to run; the working folder lies outside what is kept, and is emptied."""
    driver = nvidia_driver()
    here = "cuda:0" if driver and driver.gpus and not options.rehearse else "cpu"
    output, work = options.output.resolve(), WORK / options.part
    for folder in (output, work):
        folder.mkdir(parents=True, exist_ok=True)
    for old in work.glob("*.json"):
        old.unlink()
    command = "python benchmarks/gpu/report.py " + " ".join(sys.argv[1:])
    given = (options.device or here, options.rehearse, options.bundles.resolve(), command)
    return Context(options.part, output, work, *given)


def main() -> int:
    """Run one part, or write the page of earlier runs; return 1 if a step failed."""
    options = _arguments()
    if options.page:
        print(page([_json(folder / "results.json") for folder in options.page]), end="")
        return 0
    context = _context(options)
    steps = (steps_of_a if options.part == "a" else steps_of_b)(context)
    if options.list:
        for step in steps:
            print(f"{step.name:<28}{step.about}" + f"  [skipped: {step.skip}]" * bool(step.skip))
        return 0
    if options.only:
        wanted = options.only.split(",")
        if unknown := set(wanted) - {step.name for step in steps}:
            raise SystemExit(f"no step '{min(unknown)}'; --list prints them")
        steps = [step for step in steps if step.name in wanted]
    budget = options.budget or (170.0 if options.part == "a" else 290.0)
    parallel = options.parallel or max(1, min(6, (os.cpu_count() or 1) // 2))
    report = Report(context, steps, budget, parallel)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        report.run()
    finally:
        report.stop()
        _archive(context)
        print(short_table(_json(context.output / "results.json")), flush=True)
    return int(any(entry["state"] in ("failed", "stopped") for entry in report.done.values()))


if __name__ == "__main__":
    raise SystemExit(main())
