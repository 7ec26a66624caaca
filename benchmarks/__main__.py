"""Runs this project's benchmarks and writes their tables into docs/benchmarks.md.

    python -m benchmarks                          # everything
    python -m benchmarks --only startup,export    # some sections; the others stay as they are
    python -m benchmarks --list

Each section is a script beside this file, started as a process of its own, that prints
``columns``, ``rows``, ``claims`` and ``notes`` as JSON. A section is replaced as a whole,
with the date, the machine and the versions of that run, so one can be measured again by
itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from van_deploy.bench.machine import busy_cores
from van_deploy.environment.hardware import cpu, memory
from van_deploy.files import write_atomic
from van_deploy.provenance import EXPORT_TOOLS, tool_versions
from van_deploy.report.render_markdown import markdown_table
from van_deploy.report.sections_bench import machine_text

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
PAGE = ROOT / "docs" / "benchmarks.md"
BUSY = 0.1  # of the cores: above it, the page says that the machine was under load
TOOLS = (*EXPORT_TOOLS, "onnxruntime", "openvino", "tensorrt-rtx-cu13")

HEADER = """# Benchmarks

Every table here was written by `make bench` (`python -m benchmarks`); each says when, where
and with what, and the command that measures it again. Ratios are taken within one run,
round by round; absolute times belong to the machine they name.
"""


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        title: its heading.
        about: what is compared, one sentence.
        script: the file beside this one.
        arguments: for the script.
        real: further arguments where real weights and images lie beside the checkout;
            ``{shared}`` is their folder.
    """

    title: str
    about: str
    script: str
    arguments: tuple[str, ...] = ()
    real: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """Return the script's name and arguments, real data among them where there is any."""
        real = self.real if SHARED.is_dir() else ()
        shared = SHARED.relative_to(ROOT.parent)
        return [self.script, *self.arguments, *(a.format(shared=f"../{shared}") for a in real)]


SECTIONS: dict[str, Section] = {
    "startup": Section("Starting", "How soon the command line answers.", "startup.py", ("--json",)),
    "export": Section(
        "Exporting",
        "`van-deploy export` against a bare `torch.onnx.export` + onnxsim of the same network.",
        "export.py",
        ("--json",),
    ),
    "bench": Section(
        "Running",
        "This project's files in every run time against PyTorch's own modes.",
        "runtimes.py",
        ("--json",),
    ),
    "rivals": Section(
        "Running beside others' files",
        "This project's files against the files others would deploy (`peer:`), in the same run "
        "times. Below 1: slower than ours.",
        "rivals.py",
        ("--json",),
    ),
    "processes": Section(
        "Processes",
        "Why every process keeps its memory and why only quiet rounds count: van_b0 at batch 1 in "
        "several processes of one kind, in turns.",
        "processes.py",
        ("--json",),
    ),
    "repeat": Section(
        "Running twice",
        "`Running` for a few runners, twice in a row: how far the ratios of two runs are apart.",
        "runtimes.py",
        ("--repeat", "--json"),
    ),
    "evaluate": Section(
        "Evaluating",
        "`van-deploy evaluate` on JPEG files against a loop that feeds the same networks tensors "
        "that are ready.",
        "evaluate.py",
        ("--json",),
        real=("--images", "{shared}/data/imagenet"),
    ),
    "gates": Section(
        "Gates",
        "The gate of `van-deploy evaluate` on resamples of its images and on wrong artifacts.",
        "gates.py",
        ("--json",),
        real=(
            *("--checkpoint", "{shared}/checkpoints/van_b0_cifar10.pth.tar"),
            *("--calib", "{shared}/data/cifar10/calib", "--eval", "{shared}/data/cifar10/eval"),
        ),
    ),
    "precision": Section(
        "Precision",
        "What FP16 and INT8 cost, beside ONNX Runtime's own quantiser.",
        "precision.py",
        real=(
            *("--checkpoint", "{shared}/checkpoints/van_b0_cifar10.pth.tar"),
            *("--calib", "{shared}/data/cifar10/calib", "--eval", "{shared}/data/cifar10/eval"),
            *("--photographs", "{shared}/data/imagenet"),
        ),
    ),
    "ablation": Section(
        "Ablation",
        "What each technique brings to INT8 on both trained networks, and what it adds to a plan.",
        "ablation.py",
        real=(
            *("--checkpoint", "{shared}/checkpoints/van_b0_cifar10.pth.tar"),
            *("--calib", "{shared}/data/cifar10/calib", "--eval", "{shared}/data/cifar10/eval"),
        ),
    ),
    "serve": Section(
        "Serving",
        "`van-deploy serve` against a real Triton, its own inference and the worst bodies.",
        "serve.py",
        ("claims",),
        real=(
            *("--checkpoint", "{shared}/checkpoints/van_b0_cifar10.pth.tar"),
            *("--folders", "{shared}/data/cifar10/eval", "{shared}/data/imagenet"),
        ),
    ),
    "engines": Section(
        "Building engines",
        "TensorRT for RTX on a machine without a GPU.",
        "engines.py",
        ("--twice",),
    ),
}


def main() -> int:
    """Run the sections asked for; return 1 if one failed or missed a claim."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="sections, with commas between")
    parser.add_argument("--list", action="store_true", help="print the sections and end")
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if arguments.list:
        for name, section in SECTIONS.items():
            print(f"{name:<12}{section.about}")
        return 0
    names = [name for name in arguments.only.split(",") if name] or list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section '{unknown[0]}'; known: {', '.join(SECTIONS)}")
    return max(_run(name, arguments.output) for name in names)


def _run(name: str, page: Path) -> int:
    """Measure one section and put it on the page; return its script's exit code."""
    section = SECTIONS[name]
    script = Path(__file__).with_name(section.script)
    if not script.exists():
        print(f"{name}: benchmarks/{section.script} is not there", file=sys.stderr)
        return 1
    print(f"{name}: {section.about}", file=sys.stderr, flush=True)
    busy = busy_cores()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), *section.command()[1:]],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    took = time.perf_counter() - start
    if not done.stdout.strip():
        print(f"{name}: failed with code {done.returncode}", file=sys.stderr)
        return 1
    body = _structured(done.stdout)
    text = "\n\n".join([_heading(name, section, took, busy), body])
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, _with_section(page, name, text))
    print(f"{name}: {took:.0f} s, written to {page}", file=sys.stderr)
    return int(done.returncode != 0)


def _heading(name: str, section: Section, took: float, busy: float | None) -> str:
    processor = cpu()
    machine = {
        "cpu": {
            "name": processor.name,
            "cores_allowed": processor.cores_allowed,
            "features": processor.features,
        },
        "gpus": [],
    }
    total = memory().total_bytes
    versions = ", ".join(f"{name} {version}" for name, version in tool_versions(*TOOLS).items())
    lines = [
        f"## {section.title}",
        "",
        section.about,
        "",
        f"- {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {took:.0f} s",
        f"- {machine_text(machine)}" + (f", {total / 2**30:.0f} GiB" if total else ""),
        f"- {versions}",
        f"- `python -m benchmarks --only {name}`"
        f" (`python benchmarks/{' '.join(section.command())}`)",
    ]
    if busy is not None and busy > BUSY * processor.cores_allowed:
        lines.append(
            f"- **the machine was under load**: {busy:.1f} of {processor.cores_allowed} cores "
            "were busy before this began; absolute times are too long"
        )
    return "\n".join(lines)


def _structured(stdout: str) -> str:
    """Return a script's JSON as Markdown: claims first, then the figures, then the notes."""
    result: Mapping[str, Any] = json.loads(stdout)
    claims = [
        (c["claim"], c["measured"], "met" if c["met"] else "**missed**") for c in result["claims"]
    ]
    parts = []
    if claims:
        parts.append(markdown_table(("claim", "measured", ""), claims))
    numbers = frozenset(
        index
        for index in range(len(result["columns"]))
        if all(re.match(r"^[-+\d.,]*(\s|$|\d)", row[index]) for row in result["rows"])
    )
    parts.append(markdown_table(result["columns"], result["rows"], numbers))
    if result["notes"]:
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    return "\n\n".join(parts)


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
