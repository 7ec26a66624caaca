"""Runs this project's benchmarks and writes their tables into docs/benchmarks.md.

    python -m benchmarks                          # everything
    python -m benchmarks --only startup,export    # some sections; the others stay as they are
    python -m benchmarks --list

Each section is a module beside this one, run in a process of its own, that prints a
:class:`~benchmarks.table.Table` as JSON. A section is replaced as a whole, with the date,
the machine and the versions of that run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import psutil

from benchmarks.table import options
from van_deploy.environment.hardware import cpu
from van_deploy.files import write_atomic
from van_deploy.provenance import EXPORT_TOOLS, tool_versions
from van_deploy.report.render_markdown import markdown_table

ROOT = Path(__file__).parent.parent
DATA = "../shared"  # real weights and images, beside the checkout
PAGE = ROOT / "docs" / "benchmarks.md"
BUSY_PERCENT = 10.0  # above it, the page says that the machine was under load
TOOLS = (*EXPORT_TOOLS, "onnxruntime", "openvino", "tensorrt-rtx-cu13")
SETS = ("--calib", f"{DATA}/data/cifar10/calib", "--eval", f"{DATA}/data/cifar10/eval")
TRAINED = ("--checkpoint", f"{DATA}/checkpoints/van_b0_cifar10.pth.tar")

HEADER = """# Benchmarks

Written by `make bench` (`python -m benchmarks`). Each table names its date, machine, versions and
the command that reproduces it. Ratios are taken within one run; absolute times are those of the
machine named. GPU results are in [gpu-results.md](gpu-results.md).
"""


# Each module's heading. What it compares is the first line of the module.
SECTIONS = {
    "startup": "Startup time",
    "export": "Export time and memory",
    "running": "Inference speed on a CPU",
    "rivals": "Inference speed compared with other exporters",
    "evaluate": "Evaluation throughput",
    "gates": "Gate decisions on correct and incorrect artifacts",
    "precision": "Precision",
    "ablation": "INT8 ablation",
    "serve": "Serving",
    "engines": "Engine build time",
}

# Arguments where trained weights and images lie beside the checkout.
REAL = {
    "evaluate": ("--images", f"{DATA}/data/imagenet"),
    **dict.fromkeys(("gates", "precision", "ablation"), (*TRAINED, *SETS)),
}


def main() -> int:
    """Run the sections asked for; return 1 if one failed."""
    given = options(__doc__, only=",".join(SECTIONS), list=False, output=str(PAGE))
    names = given.only.split(",")
    if given.list:
        print("\n".join(f"{name:<12}{_about(name)}" for name in SECTIONS))
        return 0
    if unknown := set(names) - set(SECTIONS):
        raise SystemExit(f"there is no section '{min(unknown)}'; known: {', '.join(SECTIONS)}")
    return max(_run(name, Path(given.output)) for name in names)


def _about(name: str) -> str:
    """Return what a section compares."""
    text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    return text.splitlines()[0].lstrip("r").strip('"').replace("``", "`")


def _run(name: str, page: Path) -> int:
    """Measure one section and put it on the page; return its module's exit code."""
    print(f"{name}: {_about(name)}", file=sys.stderr, flush=True)
    busy, start = psutil.cpu_percent(interval=1.0), time.perf_counter()
    real = REAL.get(name, ()) if (ROOT / DATA).is_dir() else ()
    command = [sys.executable, "-m", f"benchmarks.{name}", *real]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        print(f"{name}: failed with code {done.returncode}", file=sys.stderr)
        return 1
    took, here, memory = time.perf_counter() - start, cpu(), psutil.virtual_memory().total / 2**30
    facts = [
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {took:.0f} s",
        f"{here.name}, {here.cores_allowed} cores, {memory:.0f} GiB",
        ", ".join(f"{tool} {version}" for tool, version in tool_versions(*TOOLS).items()),
        f"`python -m benchmarks --only {name}` (`{' '.join(['python', *command[1:]])}`)",
    ]
    if busy > BUSY_PERCENT:
        facts.append(f"**the machine was under load**: {busy:.0f} % busy before this began")
    table = json.loads(done.stdout)
    numbers = frozenset(
        index
        for index, cells in enumerate(zip(*table["rows"], strict=True))
        if all(re.match(r"^[-+\d.,]*(\s|$|\d)", cell) for cell in cells)
    )
    figures = markdown_table(table["columns"], table["rows"], numbers)
    parts = [f"## {SECTIONS[name]}", _about(name), _listed(facts), figures, _listed(table["notes"])]
    write_atomic(page, _with_section(page, name, "\n\n".join(filter(None, parts))))
    print(f"{name}: {took:.0f} s, written to {page}", file=sys.stderr)
    return 0


def _listed(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _with_section(page: Path, name: str, text: str) -> str:
    """Return the page with one section replaced, or added in the order of ``SECTIONS``."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    kept = {
        found[1]: found[2].strip("\n")
        for found in re.finditer(r"<!-- begin (\w+) -->\n(.*?)<!-- end \1 -->", old, re.DOTALL)
    }
    kept[name] = text
    blocks = [
        f"<!-- begin {key} -->\n{kept[key]}\n<!-- end {key} -->" for key in SECTIONS if key in kept
    ]
    return HEADER + "\n" + "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
