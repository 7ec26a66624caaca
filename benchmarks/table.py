"""The table of a section, its place on a page, and processes that are measured."""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import psutil

from van_deploy.environment.hardware import cpu
from van_deploy.files import write_atomic
from van_deploy.provenance import EXPORT_TOOLS, tool_versions

ROOT = Path(__file__).parent.parent


@dataclass
class Table:
    """One section of the page; each row is also printed to stderr when it is added.

    Attributes:
        columns: headings, with units.
        rows: cells as text.
        notes: sentences below the table.
    """

    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, *cells: object) -> None:
        """Add a row; missing cells are empty."""
        empty = [""] * (len(self.columns) - len(cells))
        self.rows.append([str(cell) for cell in (*cells, *empty)])
        print("  ".join(self.rows[-1]), file=sys.stderr, flush=True)


def measure_process(
    command: Sequence[str],
    codes: Sequence[int] = (0,),
    stdout: IO[bytes] | int = subprocess.DEVNULL,
) -> tuple[float, int]:
    """Run a process and return its wall seconds and its peak resident bytes.

    Raises:
        RuntimeError: the exit code is not one of ``codes``.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=stdout, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in codes:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def run_van_deploy(*words: object, codes: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run a van-deploy command with ``--json``; return its document with ``peak_bytes``.

    Raises:
        RuntimeError: the exit code is not one of ``codes``.
    """
    command = [sys.executable, "-m", "van_deploy", *map(str, words), "--json"]
    with tempfile.TemporaryFile() as file:
        _, peak_bytes = measure_process(command, codes, file)
        file.seek(0)
        return {**json.load(file), "peak_bytes": peak_bytes}


def run_in_process(function: Callable[..., Any], *arguments: Any, **values: Any) -> Any:
    """Return the result of a function that runs in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **values).result()


def names_of(known: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a command-line option for comma-separated names; by default all."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := {*names} - {*known}:
            message = f"'{min(unknown)}' is not one of {', '.join(known)} (separated by commas)"
            raise argparse.ArgumentTypeError(message)
        return names

    return {"type": parse, "default": ",".join(known), "metavar": "NAME,NAME"}


def write_section(
    page: Path, name: str, command: str, seconds: float, table: str, introduction: str = ""
) -> None:
    """Write a table between the marks of its section on a page, with the facts about the run.

    Args:
        page: with ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
        name: of the section.
        command: that writes the section again.
        seconds: duration of the run.
        table: in Markdown.
        introduction: text before the facts, with an empty line at its end.

    Raises:
        ValueError: the page has no such marks.
    """
    versions = tool_versions(*EXPORT_TOOLS, "onnxruntime", "openvino", "tensorrt-rtx-cu13")
    memory = psutil.virtual_memory().total / 2**30
    section = f"""<!-- begin {name} -->
{introduction}- {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s
- {cpu().name}, {cpu().cores_allowed} cores, {memory:.0f} GiB
- {", ".join(f"{tool} {version}" for tool, version in versions.items())}
- `{command}`

{table.rstrip()}
<!-- end {name} -->"""
    text, marks = page.read_text(encoding="utf-8"), f"<!-- begin {name} -->.*<!-- end {name} -->"
    text, count = re.subn(marks, lambda _: section, text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"'{page}' has no marks of the section '{name}'")
    write_atomic(page, text)
