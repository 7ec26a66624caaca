"""What a step of the GPU report is, and where it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Context", "Step"]

KERNEL_TABLES = {
    "check": "kernels against PyTorch in float64",
    "each": "kernels one by one",
    "sqnr": "the network against PyTorch in float64",
}

HERE = Path(__file__).resolve().parent
SKIPPED = 75
"""Exit code with which a step says that it cannot run here; its last line is the reason."""


@dataclass(frozen=True)
class Step:
    """One process of the report.

    Attributes:
        name: what ``--only`` calls it; its files are called so, too.
        about: one sentence for the page.
        command: what is run.
        limit_s: it is ended after so many seconds.
        least_s: it is not started with less of the budget left.
        skip: why it does not run here; "" where it does.
        turn_at: beginning of the line after which it times, for a script that takes no turns
            itself: it is held there until its turn comes, which lasts until it ends.
        environment: further variables.
        skip_code: its exit code that means "cannot run here".
    """

    name: str
    about: str
    command: Sequence[str]
    limit_s: float = 60.0
    least_s: float = 10.0
    skip: str = ""
    turn_at: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    skip_code: int = SKIPPED

    @property
    def shown(self) -> str:
        """The command as the page shows it: without the folders of this run."""
        words = ["python" if word == sys.executable else str(word) for word in self.command]
        return " ".join(
            f"benchmarks/gpu/{Path(word).name}" if word.startswith(str(HERE)) else word
            for word in words
        )


@dataclass(frozen=True)
class Context:
    """Where and how a report runs.

    Attributes:
        part: ``a`` or ``b``.
        output: what is kept: results.json, results.md, log.txt and archives.
        work: working folder of the steps, with their JSON files and logs.
        cache: of the compilers (Inductor and Triton).
        device: ``cuda:N`` or ``cpu``.
        rehearse: small sizes, and on the CPU whatever can run there.
        bundles: bundles that were made beforehand; None to make them here.
        command: how the report was started.
    """

    part: str
    output: Path
    work: Path
    cache: Path
    device: str
    rehearse: bool
    bundles: Path | None
    command: str

    @classmethod
    def create(
        cls,
        *,
        part: str,
        output: Path,
        device: str,
        rehearse: bool,
        bundles: Path | None,
        command: str,
    ) -> Context:
        """Return one with its folders made; work and cache lie outside what is kept."""
        output = output.resolve()
        work = Path("/tmp/van-gpu-report") / part
        cache = Path("/tmp/van-gpu-report/cache")
        for folder in (output, work, cache):
            folder.mkdir(parents=True, exist_ok=True)
        for old in work.glob("*.json"):
            old.unlink()
        found = bundles.resolve() if bundles else None
        return cls(part, output, work, cache, device, rehearse, found, command)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every step."""
        return {
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(min(8, os.cpu_count() or 1)),
            "OMP_NUM_THREADS": "2",  # a dozen steps with a thread a core each wait for each other
            # Inductor's own templates for convolutions cost minutes and never won: on an H200
            # cuDNN was 2.6 times faster for the stem, 80 and 400 times for two depth-wise ones.
            "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS": "ATEN",
            "TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED": "3",
            "PYTHONWARNINGS": "ignore",
        }

    def script(self, file: str, step: str, name: str, *arguments: str) -> list[str]:
        """Return the command of one step of a script beside this file."""
        out = str(self.work / f"{name}.json")
        command = [sys.executable, str(HERE / file), step, "--out", out, "--device", self.device]
        return [*command, *arguments]

    def content_of(self, name: str) -> dict[str, Any] | None:
        """Return what a step has written, if anything."""
        path = self.work / f"{name}.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return of_kernels(content) if "dtype" in content else content

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file into the output folder, whole or not at all."""
        part = self.output / f".{name}.part"
        part.write_text(json.dumps(value, indent=1), encoding="utf-8")
        part.replace(self.output / name)

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Return a JSON document."""
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document


def of_kernels(found: dict[str, Any]) -> dict[str, Any]:
    """Return what kernels.py wrote as rows, tables and notes."""
    by_step: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        by_step.setdefault(row["step"], []).append(row)
    decibel = {(row["variant"], row["plan"]): row.get("db") for row in by_step.get("sqnr", ())}
    rows = [
        {
            "network": row["variant"],
            "image_size": found["size"],
            "runner": f"kernels, plan {row['plan']}, {row['tiles']} tiles",
            "group": "van-deploy",
            "precision": found["dtype"],
            "batch": row["batch"],
            "queued_ms": row["ms"],
            "sqnr_db": decibel.get((row["variant"], row["plan"])),
            "compile_s": row.get("compile_s"),
            "note": "a CUDA graph, replayed",
        }
        for row in by_step.get("network", ())
        if row.get("ms")
    ]
    what = f"kernels, {found['dtype']}"
    tables = {
        f"{what}: {title}": [
            {
                key: value
                for key, value in row.items()
                if key not in ("step", "tried", "where", "failures")
            }
            for row in by_step[step]
        ]
        for step, title in KERNEL_TABLES.items()
        if step in by_step
    }
    for row in by_step.get("profile", ()):
        lines = [
            {"kernel": name, "calls": calls, "us": us, "percent": 100 * us / row["total_us"]}
            for name, calls, us in row["kernels"]
        ]
        place = f"{row['variant']}, {what}: plan {row['plan']}, batch {row['batch']}"
        tables[f"{place}, by kernel"] = lines
    notes = [
        f"{row['step']} {row.get('key') or row.get('plan') or ''}: {row['error']}"
        for row in found["rows"]
        if row.get("error")
    ]
    return {"rows": rows, "tables": tables, "notes": notes, "facts": found}


def kernels_step(path: Path) -> dict[str, Any]:
    """Return a file of kernels.py, started by hand, as a step of a report."""
    found = Context.read(path)
    return {
        "name": "kernels-by-hand",
        "about": "This project's kernels.",
        "command": "python benchmarks/gpu/kernels.py",
        "state": "done",
        "reason": "",
        "seconds": max((row.get("at_s", 0.0) for row in found["rows"]), default=None),
        "content": of_kernels(found),
    }
