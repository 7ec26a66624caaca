"""Mutation testing: put 60 small faults into the code, one at a time, and run its tests.

    python -m reliability.mutate                          # this tree
    python -m reliability.mutate --tree ../old --count 60 # another checkout, with its own tests
    python -m reliability.mutate --area gates --output rows.jsonl   # existing rows are kept

Mutants are drawn with a fixed seed, the same number in each area. The area's tests run in a copy of
the tree, those of the mutated file first; tests marked ``slow`` do not run.
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
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SEED, TIMEOUT_S = 15, 900
PYTEST = ("-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
# The files under van_deploy/ that decide whether an artifact is correct, and further files whose
# tests should notice a fault in them; the tests of a/b.py are in tests/a/test_b.py.
AREAS = {
    "gates": ("checks/*.py metrics.py intervals.py api.py", "cli/gates*.py pipeline.py"),
    "fold": ("graph/*.py", "pipeline.py"),
    "precision": ("precision/*.py", "cli/quantize.py"),
    "labels": ("data/*.py images/*.py", "cli/gates*.py precision/*.py"),
    "bundle": ("bundle/*.py files.py manifest.py signing.py", "bundle.py pipeline.py *.py"),
    "engine": ("engine/*.py", "cli/build.py runners/*.py"),
}
PAIRS: tuple[tuple[type[ast.AST], type[ast.AST]], ...] = (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn)),
    *((ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div)),
)
OPERATORS = {old: new for pair in PAIRS for old, new in (pair, pair[::-1])}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Of messages and types: a change there is no fault.
SKIPPED_FIELDS = {"exc", "cause", "returns", "decorator_list", "annotation"}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        area: a key of :data:`AREAS`.
        file: relative to ``van_deploy/``.
        line: of the changed code.
        before: the original code, as ``ast.unparse`` writes it.
        after: its replacement.
        place: the first byte of the code in the file, and the first after it.
    """

    area: str
    file: str
    line: int
    before: str
    after: str
    place: tuple[int, int]


def mutate_node(node: ast.AST) -> ast.AST | None:
    """Return the replacement of a node, or None if it is not mutated."""
    node = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        node.ops = [OPERATORS[type(node.ops[0])]()]  # type: ignore[list-item]
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 1  # type: ignore[operator]
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in FUNCTIONS:
        node.func.id = FUNCTIONS[node.func.id]  # type: ignore[attr-defined]
    elif isinstance(node, ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        return ast.Pass() if isinstance(node, ast.Raise | ast.AugAssign) else None
    return node


def mutants_of(source: bytes, area: str, file: str) -> Iterator[Mutant]:
    """Yield all mutants of a module's functions."""
    starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes: list[ast.AST] = [n for n in ast.parse(source).body if isinstance(n, definitions)]
    for node in nodes:  # grows by the inner nodes
        for name, value in () if isinstance(node, ast.JoinedStr) else ast.iter_fields(node):
            inner = [] if name in SKIPPED_FIELDS else value if isinstance(value, list) else [value]
            nodes += [n for n in inner if isinstance(n, ast.AST) and type(n) is not ast.arguments]
        new = mutate_node(node)
        if new is not None and isinstance(node, ast.expr | ast.stmt):
            first, last = node.lineno - 1, (node.end_lineno or 0) - 1
            place = (starts[first] + node.col_offset, starts[last] + (node.end_col_offset or 0))
            yield Mutant(area, file, node.lineno, ast.unparse(node), ast.unparse(new), place)


def draw_mutants(tree: Path, count: int) -> list[Mutant]:
    """Return ``count`` mutants of a tree, the same number in each area; deterministic."""
    drawn, package = list[Mutant](), tree / "van_deploy"
    for number, (area, (patterns, _)) in enumerate(AREAS.items()):
        mutants = [
            mutant
            for pattern in patterns.split()
            for path in sorted(package.glob(pattern))
            for mutant in mutants_of(path.read_bytes(), area, str(path.relative_to(package)))
        ]
        share = (count - len(drawn)) // (len(AREAS) - number)
        drawn += random.Random(f"{SEED} {area}").sample(mutants, share)
    return drawn


class TreeCopy:
    """A copy of a tree in which the tests run against one mutant at a time."""

    def __init__(self, tree: Path, folder: Path) -> None:
        """Copy ``tree`` into ``folder`` without the files of git and tools."""
        self.path, self._failing = folder / "tree", dict[str, list[str]]()
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "dist")
        shutil.copytree(tree, self.path, ignore=ignored)
        self._command = [str(tree / ".venv/bin/python"), "-m", "pytest", *PYTEST]
        own = {"PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": "1"}
        self._environment = {**os.environ, **own}

    def test(self, mutant: Mutant) -> tuple[str, str]:
        """Return ``killed`` or ``survived``, and the test that failed."""
        target, found = self.path / "van_deploy" / mutant.file, list[Path]()
        for pattern in " ".join(AREAS[mutant.area]).split():
            folder, _, name = f"tests/{pattern}".rpartition("/")
            found += sorted(self.path.glob(f"{folder}/test_{name}"))
        found.sort(key=lambda path: path.stem != f"test_{target.stem}")
        tests = [str(path) for path in dict.fromkeys(found)]
        if mutant.area not in self._failing:  # tests that fail without a mutant are not used
            self._failing[mutant.area] = self._pytest(*tests)[1]
        original, (start, end) = target.read_bytes(), mutant.place
        target.write_bytes(original[:start] + mutant.after.encode() + original[end:])
        try:
            deselected = [f"--deselect={test}" for test in self._failing[mutant.area]]
            code, failed = self._pytest("-x", *deselected, *tests)
        except subprocess.TimeoutExpired:
            return "killed", f"timeout of {TIMEOUT_S} s"
        finally:
            target.write_bytes(original)
        return ("killed", [*failed, f"pytest exited with {code}"][0]) if code else ("survived", "")

    def _pytest(self, *words: str) -> tuple[int, list[str]]:
        pipes: Any = {"capture_output": True, "text": True, "timeout": TIMEOUT_S}
        command = [*self._command, *words]
        done = subprocess.run(command, cwd=self.path, env=self._environment, check=False, **pipes)
        return done.returncode, re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)


def main() -> int:
    """Test every mutant and print the survivors; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to copy")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--area", choices=list(AREAS), help="one area only")
    parser.add_argument("--output", type=Path, help="JSON lines; existing rows are kept")
    args = parser.parse_args()
    rows = []
    if args.output and args.output.exists():
        rows = [json.loads(line) for line in args.output.read_text("utf-8").splitlines()]
    tested = [(row["file"], *row["place"], row["after"]) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        tree = TreeCopy(args.tree.resolve(), Path(folder))
        for mutant in draw_mutants(tree.path, args.count):
            key = (mutant.file, *mutant.place, mutant.after)
            if key in tested or args.area not in {None, mutant.area}:
                continue
            start = time.monotonic()
            outcome, test = tree.test(mutant)
            row = {"outcome": outcome, "by": test, "seconds": round(time.monotonic() - start, 1)}
            rows.append({**asdict(mutant), **row})
            if args.output:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            print(
                "{outcome:9} {seconds:6.1f} s  {file}:{line}  {by}".format(**rows[-1]), flush=True
            )
    survived = [row for row in rows if row["outcome"] == "survived"]
    for row in survived:
        print("survived: {file}:{line}: {before} -> {after}".format(**row))
    print(f"{len(rows) - len(survived)} of {len(rows)} killed")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
