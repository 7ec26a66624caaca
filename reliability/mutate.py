"""Puts 60 small faults into the code, one at a time, and says which test notices each.

    python -m reliability.mutate                          # this tree
    python -m reliability.mutate --tree ../old --count 60 # another checkout, with its own tests
    python -m reliability.mutate --area gates --output rows.jsonl   # rows there are kept

A fixed seed draws the faults, as many in each area and in each by itself. The tests of the
package that holds the fault run in a copy of the tree, the file's own first; tests marked
``slow`` do not.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEED = 15
LONGEST_S = 900
TESTS = "not slow and not gpu"

AREAS = {
    "gates": ("checks/*.py", "metrics.py", "intervals.py", "api.py"),
    "fold": ("graph/*.py",),
    "precision": ("precision/*.py",),
    "labels": ("data/*.py", "images/*.py"),
    "bundle": ("bundle/*.py", "files.py", "manifest.py", "signing.py"),
    "engine": ("engine/*.py",),
}
"""Files under ``van_deploy/`` that decide whether an artifact is right."""

FURTHER = {
    "checks": ("cli/test_gates*.py",),
    "data": ("cli/test_gates*.py", "precision/*.py"),
    "precision": ("cli/test_quantize.py",),
    "engine": ("cli/test_build.py", "runners/*.py"),
    "graph": ("test_pipeline.py",),
    "bundle": ("test_signing.py", "test_pipeline.py"),
    "": ("test_*.py", "bundle/*.py", "checks/*.py", "cli/test_gates.py"),
}
"""Tests beside ``tests/<package>/`` that are to notice a fault in a package."""

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
OTHER_FUNCTION = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True, order=True)
class Mutant:
    """One fault.

    Attributes:
        area: a key of :data:`AREAS`.
        file: relative to ``van_deploy/``.
        line: of the code that is changed.
        before: that code, as ``ast.unparse`` writes it.
        after: what takes its place.
        node: its number in ``ast.walk``'s order.
    """

    area: str
    file: str
    line: int
    before: str
    after: str
    node: int


def _fault(node: ast.AST) -> ast.AST | None:
    """Return what may stand in the place of a node, or None."""
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.Compare) and len(changed.ops) == 1:
        changed.ops = [SWAPS[type(changed.ops[0])]()]  # type: ignore[list-item]
    elif isinstance(changed, ast.BinOp | ast.BoolOp) and type(changed.op) in SWAPS:
        changed.op = SWAPS[type(changed.op)]()  # type: ignore[assignment]
    elif isinstance(changed, ast.Constant) and type(changed.value) in (int, float):
        changed = ast.Constant(changed.value + 1)  # type: ignore[operator]
    elif isinstance(changed, ast.Call) and getattr(changed.func, "id", "") in OTHER_FUNCTION:
        changed.func.id = OTHER_FUNCTION[changed.func.id]  # type: ignore[attr-defined]
    elif isinstance(changed, ast.IfExp):
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
    elif isinstance(changed, ast.Raise | ast.AugAssign):
        return ast.Pass()
    else:
        return None
    return ast.fix_missing_locations(changed)


def _left_alone(module: ast.Module) -> set[int]:
    """Return the identities of nodes whose change would be no fault: texts, types, module level."""
    left = {id(n) for s in module.body if not _has_body(s) for n in ast.walk(s)}
    for node in ast.walk(module):
        inner: list[ast.AST | None] = []
        if isinstance(node, ast.JoinedStr):
            inner = [node]
        elif isinstance(node, ast.Raise):
            inner = [node.exc, node.cause]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [node.args, node.returns, *node.decorator_list]
        elif isinstance(node, ast.AnnAssign):
            inner = [node.annotation]
        left |= {id(child) for part in inner if part for child in ast.walk(part)}
    return left


def _has_body(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def mutants_of(source: str, area: str, file: str) -> Iterator[Mutant]:
    """Yield every fault that can be put into a module's functions."""
    module = ast.parse(source)
    left = _left_alone(module)
    for number, node in enumerate(ast.walk(module)):
        fault = None if id(node) in left else _fault(node)
        if fault is not None:
            line = getattr(node, "lineno", 0)
            yield Mutant(area, file, line, ast.unparse(node), ast.unparse(fault), number)


def mutated(source: str, mutant: Mutant) -> str:
    """Return a module's source with the fault in it."""
    module = ast.parse(source)
    target = next(n for number, n in enumerate(ast.walk(module)) if number == mutant.node)

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return (_fault(node) or node) if node is target else super().generic_visit(node)

    return ast.unparse(Put().visit(module)) + "\n"


def chosen(tree: Path, count: int) -> list[Mutant]:
    """Return ``count`` faults of a tree, as many in each area: the same for the same files."""
    found = list[Mutant]()
    for number, (area, patterns) in enumerate(AREAS.items()):
        files = [path for each in patterns for path in sorted((tree / "van_deploy").glob(each))]
        every = [
            mutant
            for path in files
            for mutant in mutants_of(
                path.read_text("utf-8"), area, path.relative_to(tree / "van_deploy").as_posix()
            )
        ]
        rng = random.Random(f"{SEED} {area}")
        found += rng.sample(every, (count - len(found)) // (len(AREAS) - number))
    return found


class Copy:
    """A copy of a tree whose tests run against one fault after the other."""

    def __init__(self, tree: Path, folder: Path) -> None:
        """Copy ``tree`` into ``folder``, without what git and tools keep there."""
        self.tree, self.path = tree, folder / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "dist")
        shutil.copytree(tree, self.path, ignore=ignored)
        self._failing: dict[str, list[str]] = {}

    def outcome(self, mutant: Mutant) -> tuple[str, str, float]:
        """Return ``killed`` or ``survived``, the test that noticed, and the seconds."""
        target, begun = self.path / "van_deploy" / mutant.file, time.monotonic()
        tests = self._tests(Path(mutant.file))
        package = Path(mutant.file).parts[0] if "/" in mutant.file else ""
        if package not in self._failing:  # what fails without a fault says nothing of one
            self._failing[package] = self._pytest(*tests)[1]
        sound = target.read_text("utf-8")
        target.write_text(mutated(sound, mutant), "utf-8")
        try:
            left_out = [f"--deselect={test}" for test in self._failing[package]]
            code, failed = self._pytest("-x", *left_out, *tests)
            noticed = (failed or [f"pytest ended with {code}"])[0]
        except subprocess.TimeoutExpired:
            code, noticed = 1, f"no end in {LONGEST_S} s"
        finally:
            target.write_text(sound, "utf-8")
        seconds = round(time.monotonic() - begun, 1)
        return ("killed", noticed, seconds) if code else ("survived", "", seconds)

    def _tests(self, file: Path) -> list[str]:
        package, tests = file.parts[0] if len(file.parts) > 1 else "", self.path / "tests"
        own = [tests / package / f"test_{file.stem}.py", tests / f"test_{package or file.stem}.py"]
        rest = sorted((tests / package).glob("test_*.py")) if package else []
        for pattern in FURTHER.get(package, ()):
            rest += sorted(tests.glob(pattern))
        found = [p.relative_to(self.path).as_posix() for p in [*own, *rest] if p.is_file()]
        return list(dict.fromkeys(found))

    def _pytest(self, *words: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [
                str(self.tree / ".venv/bin/python"),
                "-m",
                "pytest",
                "-q",
                "--tb=no",
                "-rfE",
                "-p",
                "no:cacheprovider",
                "-m",
                TESTS,
                *words,
            ],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST_S,
        )
        return done.returncode, re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)


def main() -> int:
    """Run every mutant and print the table; return 1 if one survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to copy")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--area", choices=list(AREAS), help="one area only")
    parser.add_argument("--output", type=Path, help="JSON lines of the rows; those there are kept")
    arguments = parser.parse_args()
    tree, output, rows = arguments.tree.resolve(), arguments.output, []
    if output and output.exists():
        rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    known = [Mutant(**row["mutant"]) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        spoiled = Copy(tree, Path(folder))
        for mutant in chosen(tree, arguments.count):
            if mutant in known or arguments.area not in {None, mutant.area}:
                continue
            outcome, by, seconds = spoiled.outcome(mutant)
            rows.append(
                {"mutant": asdict(mutant), "outcome": outcome, "by": by, "seconds": seconds}
            )
            if output:
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            sys.stderr.write(f"{outcome:9} {seconds:6.1f} s  {mutant.file}:{mutant.line}  {by}\n")
    survived = [row for row in rows if row["outcome"] == "survived"]
    for row in survived:
        at = Mutant(**row["mutant"])
        sys.stdout.write(f"survived: {at.file}:{at.line}: {at.before} -> {at.after}\n")
    sys.stdout.write(f"{len(rows) - len(survived)} of {len(rows)} killed\n")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
