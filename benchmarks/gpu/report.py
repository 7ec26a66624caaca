"""Runs the GPU report, part a or b, and writes its page.

    python benchmarks/gpu/report.py --part a --output DIR            # PyTorch and our kernels
    python benchmarks/gpu/report.py --part b --output DIR            # every runtime, tests, gates
    python benchmarks/gpu/report.py --part a --output DIR --only ceilings,eager-b0
    python benchmarks/gpu/report.py --part a --output DIR --rehearse # every step, small, on the CPU
    python benchmarks/gpu/report.py --page DIR [DIR...] [--kernels FILE...] > docs/gpu-results.md

van-deploy has to be installed as a wheel: nothing is imported from the checkout. Each step is
a process of its own with a time limit. Steps prepare at the same time and time one by one
(turns.py). After every step ``results.json`` and ``results.md`` are written anew, so a run
that is cut off leaves what it had. A step that does not fit the budget is not started, and
says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shutil
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
from part_a import steps_of_a
from part_b import steps_of_b
from result import plain
from step import Context, Step, kernels_step
from turns import DONE, GO, REQUEST, VARIABLE

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
        reader: puts its lines into the queue.
    """

    step: Step
    process: subprocess.Popen[str]
    started: float
    deadline: float
    log: list[str] = field(default_factory=list)
    turn_s: float = 0.0
    reader: threading.Thread | None = None


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
        self._write()

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
        environment[VARIABLE] = "1"
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.context.work,
            env=environment,
            preexec_fn=os.setpgrp,
        )
        now = time.monotonic()
        running = Running(step, process, now, now + step.limit_s)
        self.running.append(running)
        self._say(f"{step.name}: started")
        running.reader = threading.Thread(target=self._read, args=(running,), daemon=True)
        running.reader.start()

    def _read(self, running: Running) -> None:
        assert running.process.stdout is not None
        for line in running.process.stdout:
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
            elif running.step.turn_at and line.startswith(running.step.turn_at):
                running.log.append(line)
                if running is not self.holder and running not in self.waiting:
                    _signal(running, signal.SIGSTOP)
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
        if running.step.turn_at:
            _signal(running, signal.SIGCONT)
            return
        try:
            assert running.process.stdin is not None
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
                if not (other.step.turn_at and other in self.waiting):
                    _signal(other, signal.SIGCONT)

    def _ended(self, running: Running) -> None:
        if running not in self.running:
            return
        code = running.process.wait()
        self._drop(running)
        step = running.step
        if code == 0:
            self._finish(step, "done", "", running)
        elif code == step.skip_code:
            self._finish(step, "skipped", _last(running.log), running)
        else:
            self._finish(step, "failed", f"exit code {code}: {_last(running.log)}", running)

    def _kill(self, running: Running, reason: str = "the report was stopped") -> None:
        _signal(running, signal.SIGKILL)
        _signal(running, signal.SIGCONT)
        running.process.wait()
        self._drop(running)
        self._finish(running.step, "stopped", reason, running)

    def _drop(self, running: Running) -> None:
        self.running.remove(running)
        if running.reader is not None:
            running.reader.join(2)
        for pipe in (running.process.stdin, running.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.waiting = [other for other in self.waiting if other is not running]
        self._release(running)

    def _finish(self, step: Step, state: str, reason: str, running: Running | None = None) -> None:
        entry: dict[str, Any] = {
            "name": step.name,
            "about": step.about,
            "command": step.shown,
            "state": state,
            "reason": reason,
        }
        if running is not None:
            log = self.context.work / f"{step.name}.log"
            log.write_text("\n".join(running.log) + "\n", encoding="utf-8")
            entry["seconds"] = round(time.monotonic() - running.started, 1)
            entry["turn_seconds"] = round(running.turn_s, 1)
            entry["content"] = self.context.content_of(step.name)
            if state != "done":
                entry["log_end"] = running.log[-30:]
        self.done[step.name] = entry
        self._say(f"{step.name}: {state}{f' ({reason})' if reason else ''}")
        self._write()

    def _say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        self.log.append(line)
        print(line, flush=True)

    def _write(self) -> None:
        ordered = [self.done[step.name] for step in self.steps if step.name in self.done]
        document = {
            "schema": SCHEMA,
            "part": self.context.part,
            "date": self.date,
            "device": self.context.device,
            "rehearsal": self.context.rehearse,
            "seconds": round(time.monotonic() - self.start, 1),
            "command": self.context.command,
            "steps": ordered,
        }
        self.context.write("results.json", plain(document))
        (self.context.output / "results.md").write_text(page([plain(document)]), encoding="utf-8")
        (self.context.output / "log.txt").write_text("\n".join(self.log) + "\n", encoding="utf-8")


def _signal(running: Running, number: int) -> None:
    """Send a signal to a step and everything it started."""
    try:
        os.killpg(running.process.pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _last(log: Sequence[str]) -> str:
    return next((line.strip()[:300] for line in reversed(log) if line.strip()), "it said nothing")


def _archive(context: Context) -> None:
    """Put the steps' logs and JSON files into one archive."""
    with tarfile.open(context.output / "steps.tar.gz", "w:gz") as archive:
        for path in sorted(context.work.glob("*")):
            if path.is_file() and path.stat().st_size < ARCHIVE_LIMIT:
                archive.add(path, path.name)


def _device() -> str:
    """Return the first CUDA device where a driver answers, else the CPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "cpu"
    found = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return "cuda:0" if found.returncode == 0 and "GPU" in found.stdout else "cpu"


def main() -> int:
    """Run one part, or write the page of earlier runs; return 1 if a step failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("a", "b"), default="a")
    parser.add_argument("--output", type=Path, default=Path("gpu-report"))
    parser.add_argument("--only", default="", help="steps, with commas between")
    parser.add_argument("--skip", default="", help="steps to leave out, likewise")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--budget", type=float, help="seconds of the whole run")
    parser.add_argument("--kernel-budget", type=float, default=100, help="of it for kernels.py")
    parser.add_argument("--device", default="", help="cuda:N or cpu (default: cuda:0 if any)")
    parser.add_argument("--parallel", type=int, help="steps that prepare at the same time")
    parser.add_argument("--rehearse", action="store_true", help="every step, small, on the CPU")
    parser.add_argument("--bundles", type=Path, help="bundles made beforehand, for part b")
    parser.add_argument("--page", type=Path, nargs="+", help="print the page of these runs")
    parser.add_argument(
        "--kernels",
        type=Path,
        nargs="*",
        default=[],
        help="and of kernels.py on the last one's GPU",
    )
    options = parser.parse_args()
    if options.page:
        documents = [Context.read(folder / "results.json") for folder in options.page]
        for path in options.kernels:
            documents[-1]["steps"].append(kernels_step(path))
        print(page(documents), end="")
        return 0
    device = options.device or ("cpu" if options.rehearse else _device())
    context = Context.create(
        part=options.part,
        output=options.output,
        device=device,
        rehearse=options.rehearse,
        bundles=options.bundles,
        command="python benchmarks/gpu/report.py " + " ".join(sys.argv[1:]),
    )
    kernel_s = options.kernel_budget
    steps = steps_of_a(context, kernel_s) if options.part == "a" else steps_of_b(context)
    if options.list:
        for step in steps:
            print(f"{step.name:<28}{step.about}" + (f"  [skipped: {step.skip}]" * bool(step.skip)))
        return 0
    if options.only:
        wanted = options.only.split(",")
        unknown = set(wanted) - {step.name for step in steps}
        if unknown:
            parser.error(f"no step '{min(unknown)}'; --list prints them")
        steps = [step for step in steps if step.name in wanted]
    steps = [step for step in steps if step.name not in options.skip.split(",")]
    budget = options.budget or (170.0 if options.part == "a" else 290.0)
    parallel = options.parallel or max(1, min(6, (os.cpu_count() or 1) // 2))
    report = Report(context, steps, budget, parallel)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        report.run()
    finally:
        report.stop()
        _archive(context)
        print(short_table(Context.read(context.output / "results.json")), flush=True)
    return int(any(entry["state"] in ("failed", "stopped") for entry in report.done.values()))


if __name__ == "__main__":
    raise SystemExit(main())
