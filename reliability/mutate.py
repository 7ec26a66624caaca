"""Puts small faults into the code one by one and says which test notices each.

python -m reliability.mutate                      # the list in mutants.json, on this tree
python -m reliability.mutate --tree ../old        # the same faults in another version
python -m reliability.mutate --choose 60          # write a new list, from a fixed seed

A fault is found again by its function and by what is written there, not by its line, so
that one list fits several versions; where the function is gone, the row says so. The
tests that mirror the file run first, in a copy of the tree: the tree stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from reliability.mutants import AREAS, Mutant, choose, found_in

__all__ = ["MUTANTS", "Copy", "Row", "main", "table"]

ROOT = Path(__file__).parent.parent
MUTANTS = Path(__file__).parent / "mutants.json"
PYTHON = Path(".venv/bin/python")
LONGEST_S = 900

# Tests of other packages that are to notice as well.
FURTHER = {
    "checks": ("cli/test_gates*.py",),
    "images": ("test_images.py", "cli/test_gates_evaluate.py", "precision/test_calibration.py"),
    "data": ("cli/test_gates_evaluate.py",),
    "precision": ("cli/test_quantize.py",),
    "engine": ("cli/test_build.py", "runners/test_tensorrt.py"),
    "config": ("engine/test_*.py", "cli/test_build.py", "test_recipe.py"),
    "graph": ("test_pipeline.py",),
    "bundle": ("test_signing.py", "test_pipeline.py"),
    "": ("test_bundle.py", "checks/test_[!f]*.py", "precision/test_stage.py"),
}


@dataclass(frozen=True)
class Row:
    """What came of one mutant: ``killed``, ``survived`` or ``code removed``."""

    mutant: Mutant
    place: str
    outcome: str
    by: str
    seconds: float


# --- running the tests -----------------------------------------------------------------------


class Copy:
    """A copy of a tree to run tests in; real weights do not lie beside it, for speed."""

    def __init__(self, tree: Path, folder: Path) -> None:
        """Copy ``tree`` into ``folder``."""
        self.tree, self.path = tree, folder / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "dist")
        shutil.copytree(tree, self.path, ignore=ignored)
        self._seconds: dict[str, dict[str, float]] = {}
        self._failing: dict[str, list[str]] = {}

    def pytest(self, *words: str, limit_s: float = LONGEST_S) -> subprocess.CompletedProcess[str]:
        """Run tests in the copy, on its code."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [
                *(str(self.tree / PYTHON), "-m", "pytest", "-q", "--tb=no"),
                *("-p", "no:cacheprovider", "-m", "not slow", "-rfE", *words),
            ],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )

    def tests_for(self, path: Path) -> list[str]:
        """Return the tests that mirror a file: its doctests, its own, its package's, further."""
        inside = path.relative_to(self.tree / "van_deploy")
        package, tests = "" if len(inside.parts) == 1 else inside.parts[0], self.path / "tests"
        own = [tests / package / f"test_{path.stem}.py", tests / f"test_{package or path.stem}.py"]
        rest = sorted((tests / package).glob("test_*.py")) if package else []
        for pattern in FURTHER.get(package, ()):
            rest += sorted(tests.glob(pattern))
        named = [p.relative_to(self.path).as_posix() for p in [*own, *rest] if p.is_file()]
        seconds = self._baseline(package, named)
        unique = list(dict.fromkeys(named))
        first = [name for name in unique if self.path / name in own]
        later = sorted(set(unique) - set(first), key=lambda name: seconds.get(name, 0.0))
        return [f"van_deploy/{inside.as_posix()}", *first, *later]

    def _baseline(self, package: str, files: Sequence[str]) -> dict[str, float]:
        """Return the seconds of each test file without a fault; note the tests that fail."""
        if package not in self._seconds:
            report = self.path.parent / f"{package or 'top'}.xml"
            ran = self.pytest(*files, f"--junitxml={report}", limit_s=4 * LONGEST_S)
            self._failing[package] = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.M)
            seconds: dict[str, float] = {}
            for case in ElementTree.parse(report).iter("testcase"):
                place = (case.get("classname") or "").replace(".", "/")
                for file in files:
                    if place.startswith(file.removesuffix(".py")):
                        seconds[file] = seconds.get(file, 0.0) + float(case.get("time") or 0)
            self._seconds[package] = seconds
            for failing in self._failing[package]:
                sys.stderr.write(f"fails without a fault, left out: {failing}\n")
        return self._seconds[package]

    def judged(self, mutant: Mutant) -> Row:
        """Return what the tests say of a fault."""
        place = found_in(self.tree, mutant)
        if place is None:
            return Row(mutant, mutant.file, "code removed", "", 0.0)
        original, source, line = place
        tests = self.tests_for(original)
        left_out = [f"--deselect={name}" for names in self._failing.values() for name in names]
        target = self.path / original.relative_to(self.tree)
        sound = target.read_text(encoding="utf-8")
        begun = time.monotonic()
        try:
            target.write_text(source, encoding="utf-8")
            ran = self.pytest("-x", *left_out, *tests)
            by = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.M)
            outcome = "survived" if ran.returncode == 0 else "killed"
            if ran.returncode not in {0, 1} and not by:
                by = [f"pytest ended with {ran.returncode}"]
        except subprocess.TimeoutExpired:
            outcome, by = "killed", [f"no end in {LONGEST_S} s"]
        finally:
            target.write_text(sound, encoding="utf-8")
        where = f"{original.relative_to(self.tree / 'van_deploy').as_posix()}:{line}"
        return Row(mutant, where, outcome, "".join(by[:1]), round(time.monotonic() - begun, 1))


# --- the list and the table ------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, with the sums before it."""
    counts = {
        outcome: sum(row.outcome == outcome for row in rows)
        for outcome in ("killed", "survived", "code removed")
    }
    lines = [
        ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
        "",
        "| place | function | mutation | outcome | by | seconds |",
        "|---|---|---|---|---|---:|",
    ]
    for row in rows:
        mutant = row.mutant
        change = f"`{mutant.fragment}` → `{mutant.becomes}`".replace("|", "\\|").replace("\n", " ")
        by = row.by.removeprefix("tests/")
        lines.append(
            f"| {row.place} | {mutant.function} | {change} | {row.outcome} | {by} | {row.seconds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run every mutant and print the table; return 0, whatever survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to spoil a copy of")
    parser.add_argument("--area", choices=list(AREAS), help="one area only")
    parser.add_argument("--output", type=Path, help="JSON lines of the rows; those there are kept")
    parser.add_argument("--choose", type=int, metavar="N", help="write a new list instead")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="trees it must fit, too")
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    if arguments.choose:
        chosen = choose(arguments.choose, [tree, *arguments.also])
        MUTANTS.write_text(json.dumps([asdict(m) for m in chosen], indent=1) + "\n", "utf-8")
        sys.stdout.write(f"{len(chosen)} faults in {MUTANTS}\n")
        return 0
    mutants = [Mutant(**entry) for entry in json.loads(MUTANTS.read_text(encoding="utf-8"))]
    mutants = [m for m in mutants if arguments.area in {None, m.area}]
    kept: dict[Mutant, Row] = {}
    if arguments.output and arguments.output.exists():
        for line in arguments.output.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            row = Row(**{**entry, "mutant": Mutant(**entry["mutant"])})
            kept[row.mutant] = row
    with tempfile.TemporaryDirectory() as folder:
        spoiled = Copy(tree, Path(folder))
        rows = []
        for mutant in mutants:
            row = kept.get(mutant) or spoiled.judged(mutant)
            rows.append(row)
            if arguments.output and mutant not in kept:
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            sys.stderr.write(f"{row.outcome:12} {row.seconds:6.1f} s  {row.place}  {row.by}\n")
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
