"""Run the benchmarks of this project and write their tables to docs/benchmarks.md.

    python -m benchmarks                          # all sections
    python -m benchmarks --only startup,export    # some sections; the others are not changed
    python -m benchmarks --list

Each section is a module in this folder, run in its own process, that prints a
:class:`~benchmarks.table.Table` as JSON. A section on the page is replaced as a whole, with the
date, the machine and the versions of the run.
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

from benchmarks.table import parse_options
from van_deploy.environment.hardware import cpu
from van_deploy.files import write_atomic
from van_deploy.provenance import EXPORT_TOOLS, tool_versions
from van_deploy.report.render_markdown import markdown_table

ROOT = Path(__file__).parent.parent
DATA = "../shared"  # trained weights and images, next to the checkout
PAGE = ROOT / "docs" / "benchmarks.md"
BUSY_PERCENT = 10.0  # CPU load above which the page notes that the machine was under load
TOOLS = (*EXPORT_TOOLS, "onnxruntime", "openvino", "tensorrt-rtx-cu13")
SETS = ("--calib", f"{DATA}/data/cifar10/calib", "--eval", f"{DATA}/data/cifar10/eval")
TRAINED = ("--checkpoint", f"{DATA}/checkpoints/van_b0_cifar10.pth.tar")

HEADER = """# Benchmarks

Written by `make bench` (`python -m benchmarks`). Each table names its date, machine, versions and
the command that reproduces it. Ratios are taken within one run; absolute times are those of the
machine named. GPU results are in [gpu-results.md](gpu-results.md).
"""

# Headings of the modules. The first line of a module describes its comparison.
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

# Arguments if the trained weights and images exist.
REAL_DATA = {
    "evaluate": ("--images", f"{DATA}/data/imagenet"),
    **dict.fromkeys(("gates", "precision", "ablation"), (*TRAINED, *SETS)),
}


def main() -> int:
    """Run the requested sections; return 1 if one failed."""
    options = parse_options(__doc__, only=",".join(SECTIONS), list=False, output=str(PAGE))
    names = options.only.split(",")
    if options.list:
        print("\n".join(f"{name:<12}{_description(name)}" for name in SECTIONS))
        return 0
    if unknown := set(names) - set(SECTIONS):
        raise SystemExit(f"there is no section '{min(unknown)}'; known: {', '.join(SECTIONS)}")
    return max(_run_section(name, Path(options.output)) for name in names)


def _description(name: str) -> str:
    text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    return text.splitlines()[0].lstrip("r").strip('"').replace("``", "`")


def _run_section(name: str, page: Path) -> int:
    """Run one section and write it to the page; return 1 after a failure."""
    print(f"{name}: {_description(name)}", file=sys.stderr, flush=True)
    busy, start = psutil.cpu_percent(interval=1.0), time.perf_counter()
    arguments = REAL_DATA.get(name, ()) if (ROOT / DATA).is_dir() else ()
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        print(f"{name}: failed with code {done.returncode}", file=sys.stderr)
        return 1
    seconds, processor = time.perf_counter() - start, cpu()
    memory = psutil.virtual_memory().total / 2**30
    facts = [
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s",
        f"{processor.name}, {processor.cores_allowed} cores, {memory:.0f} GiB",
        ", ".join(f"{tool} {version}" for tool, version in tool_versions(*TOOLS).items()),
        f"`python -m benchmarks --only {name}` (`{' '.join(['python', *command[1:]])}`)",
    ]
    if busy > BUSY_PERCENT:
        facts.append(f"**the machine was under load**: {busy:.0f} % busy before the start")
    table = json.loads(done.stdout)
    numeric = frozenset(
        index
        for index, cells in enumerate(zip(*table["rows"], strict=True))
        if all(re.match(r"^[-+\d.,]*(\s|$|\d)", cell) for cell in cells)
    )
    rows = markdown_table(table["columns"], table["rows"], numeric)
    parts = [f"## {SECTIONS[name]}", _description(name), _bullets(facts), rows]
    parts.append(_bullets(table["notes"]))
    write_atomic(page, _replace_section(page, name, "\n\n".join(filter(None, parts))))
    return 0


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _replace_section(page: Path, name: str, text: str) -> str:
    """Return the page with one section replaced, or added in the order of ``SECTIONS``."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    pattern = re.compile(r"<!-- begin (\w+) -->\n(.*?)\n*<!-- end \1 -->", re.DOTALL)
    sections = {**dict(pattern.findall(old)), name: text}
    blocks = [
        f"<!-- begin {key} -->\n{sections[key]}\n<!-- end {key} -->\n"
        for key in SECTIONS
        if key in sections
    ]
    return "\n".join([HEADER, *blocks])


if __name__ == "__main__":
    raise SystemExit(main())
