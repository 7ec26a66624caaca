"""Runs this project's benchmarks and writes their tables into docs/benchmarks.md.

    python -m benchmarks                          # everything
    python -m benchmarks --only startup,export    # some sections; the others stay as they are
    python -m benchmarks --list

Each section is a module beside this one, run in a process of its own, that prints a
:class:`~benchmarks.table.Table` as JSON. A section is replaced as a whole, with the date,
the machine and the versions of that run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from van_deploy.environment.hardware import cpu
from van_deploy.files import write_atomic
from van_deploy.provenance import EXPORT_TOOLS, tool_versions
from van_deploy.report.render_markdown import markdown_table

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
PAGE = ROOT / "docs" / "benchmarks.md"
BUSY_PERCENT = 10.0  # above it, the page says that the machine was under load
TOOLS = (*EXPORT_TOOLS, "onnxruntime", "openvino", "tensorrt-rtx-cu13")
SETS = ("--calib", "{shared}/data/cifar10/calib", "--eval", "{shared}/data/cifar10/eval")
TRAINED = ("--checkpoint", "{shared}/checkpoints/van_b0_cifar10.pth.tar")

HEADER = """# Benchmarks

Every table here was written by `make bench` (`python -m benchmarks`); each says when, where
and with what, and the command that measures it again. Ratios are taken within one run;
absolute times belong to the machine they name. GPUs have a page of their own:
[gpu-results.md](gpu-results.md).
"""


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        title: its heading.
        about: what is compared, one sentence.
        real: arguments where trained weights and images lie beside the checkout;
            ``{shared}`` is their folder.
    """

    title: str
    about: str
    real: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Return the module's arguments, real data among them where there is any."""
        real = self.real if SHARED.is_dir() else ()
        return [word.format(shared="../shared") for word in real]


SECTIONS: dict[str, Section] = {
    "startup": Section("Starting", "How soon the command line answers, and loading a network."),
    "export": Section(
        "Exporting",
        "`van-deploy export` against a bare `torch.onnx.export` + onnxsim of the same network.",
    ),
    "running": Section(
        "Running", "A bundle's artifacts in every runtime against PyTorch's own modes, on the CPU."
    ),
    "rivals": Section(
        "Running beside others' files",
        "This project's files against the files others would deploy, in the same runtimes.",
    ),
    "evaluate": Section(
        "Evaluating",
        "`van-deploy evaluate` on JPEG files against a loop that feeds the same networks tensors "
        "that are ready.",
        real=("--images", "{shared}/data/imagenet"),
    ),
    "gates": Section(
        "Gates",
        "The gate of `van-deploy evaluate` on resamples of its images and on wrong artifacts.",
        real=(*TRAINED, *SETS),
    ),
    "precision": Section(
        "Precision",
        "What FP16 and INT8 cost, beside ONNX Runtime's own quantiser.",
        real=(*TRAINED, *SETS),
    ),
    "ablation": Section(
        "Ablation",
        "What each technique brings to INT8 on both trained networks, and what it adds to a plan.",
        real=(*TRAINED, *SETS),
    ),
    "serve": Section(
        "Serving",
        "`van-deploy serve` against a real Triton, its own inference and the worst bodies.",
    ),
    "engines": Section(
        "Building engines", "TensorRT for RTX on a machine without a GPU, every build twice."
    ),
}


def main() -> int:
    """Run the sections asked for; return 1 if one failed or missed a claim."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, commas between")
    parser.add_argument("--list", action="store_true", help="print the sections and end")
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:<12}{section.about}" for name, section in SECTIONS.items()))
        return 0
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section '{unknown[0]}'; known: {', '.join(SECTIONS)}")
    return max(_run(name, arguments.output) for name in names)


def _run(name: str, page: Path) -> int:
    """Measure one section and put it on the page; return its module's exit code."""
    section = SECTIONS[name]
    print(f"{name}: {section.about}", file=sys.stderr, flush=True)
    busy, start = psutil.cpu_percent(interval=1.0), time.perf_counter()
    command = [sys.executable, "-m", f"benchmarks.{name}", *section.words()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if not done.stdout.strip():
        print(f"{name}: failed with code {done.returncode}", file=sys.stderr)
        return 1
    took = time.perf_counter() - start
    processor, memory = cpu(), psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{tool} {version}" for tool, version in tool_versions(*TOOLS).items())
    facts = [
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {took:.0f} s",
        f"{processor.name}, {processor.cores_allowed} cores, {memory:.0f} GiB",
        versions,
        f"`python -m benchmarks --only {name}` (`{' '.join(['python', *command[1:]])}`)",
    ]
    if busy > BUSY_PERCENT:
        facts.append(f"**the machine was under load**: {busy:.0f} % busy before this began")
    listed = "\n".join(f"- {fact}" for fact in facts)
    text = "\n\n".join([f"## {section.title}", section.about, listed, _tables(done.stdout)])
    write_atomic(page, _with_section(page, name, text))
    print(f"{name}: {took:.0f} s, written to {page}", file=sys.stderr)
    return int(done.returncode != 0)


def _tables(stdout: str) -> str:
    """Return a section's JSON as Markdown: claims first, then the figures, then the notes."""
    result: Mapping[str, Any] = json.loads(stdout)
    claims = [
        (c["claim"], c["measured"], "met" if c["met"] else "**missed**") for c in result["claims"]
    ]
    numbers = frozenset(
        index
        for index in range(len(result["columns"]))
        if all(re.match(r"^[-+\d.,]*(\s|$|\d)", row[index]) for row in result["rows"])
    )
    parts = [markdown_table(("claim", "measured", ""), claims)] if claims else []
    parts.append(markdown_table(result["columns"], result["rows"], numbers))
    parts.append("\n".join(f"- {note}" for note in result["notes"]))
    return "\n\n".join(part for part in parts if part)


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
