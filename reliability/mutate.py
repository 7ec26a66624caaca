"""Mutation testing: put 60 small faults into the code, one at a time, and run its tests.

    python -m reliability.mutate                          # this tree
    python -m reliability.mutate --tree ../old --count 60 # another checkout, with its own tests
    python -m reliability.mutate --area gates --output rows.jsonl   # existing rows are kept

Mutants are drawn with a fixed seed, the same number in each area. The tests of the mutated package
run in a copy of the tree, the tests of the mutated file first; tests marked ``slow`` do not run.
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
TIMEOUT_S = 900
PYTEST = ("-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider")

# Files under ``van_deploy/`` that decide whether an artifact is correct.
AREAS = {
    "gates": ("checks/*.py", "metrics.py", "intervals.py", "api.py"),
    "fold": ("graph/*.py",),
    "precision": ("precision/*.py",),
    "labels": ("data/*.py", "images/*.py"),
    "bundle": ("bundle/*.py", "files.py", "manifest.py", "signing.py"),
    "engine": ("engine/*.py",),
}
# Tests outside ``tests/<package>/`` that should detect a fault in a package.
FURTHER_TESTS = {
    "checks": ("cli/test_gates*.py",),
    "data": ("cli/test_gates*.py", "precision/*.py"),
    "precision": ("cli/test_quantize.py",),
    "engine": ("cli/test_build.py", "runners/*.py"),
    "graph": ("test_pipeline.py",),
    "bundle": ("test_signing.py", "test_pipeline.py"),
    "": ("test_*.py", "bundle/*.py", "checks/*.py", "cli/test_gates.py"),
}
PAIRS: tuple[tuple[type[ast.AST], type[ast.AST]], ...] = (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn)),
    *((ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div)),
)
OPERATORS = {old: new for pair in PAIRS for old, new in (pair, pair[::-1])}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True, order=True)
class Mutant:
    """One fault.

    Attributes:
        area: a key of :data:`AREAS`.
        file: relative to ``van_deploy/``.
        line: of the changed code.
        before: the original code, as ``ast.unparse`` writes it.
        after: its replacement.
        node: index of the node in the order of ``ast.walk``.
    """

    area: str
    file: str
    line: int
    before: str
    after: str
    node: int


def mutate_node(node: ast.AST) -> ast.AST | None:
    """Return the replacement of a node, or None if it is not mutated."""
    node = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        node.ops = [OPERATORS[type(node.ops[0])]()]  # type: ignore[list-item]
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node = ast.Constant(node.value + 1)  # type: ignore[operator]
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in FUNCTIONS:
        node.func.id = FUNCTIONS[node.func.id]  # type: ignore[attr-defined]
    elif isinstance(node, ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Raise | ast.AugAssign):
        return ast.Pass()
    else:
        return None
    return ast.fix_missing_locations(node)


def _excluded_nodes(module: ast.Module) -> set[int]:
    """Return the ids of nodes whose change is no fault: messages, types, module level."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    excluded: list[ast.AST | None] = [n for n in module.body if not isinstance(n, definitions)]
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            excluded.append(node)
        elif isinstance(node, ast.Raise):
            excluded += [node.exc, node.cause]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            excluded += [node.args, node.returns, *node.decorator_list]
        elif isinstance(node, ast.AnnAssign):
            excluded.append(node.annotation)
    return {id(child) for node in excluded if node for child in ast.walk(node)}


def mutants_of(source: str, area: str, file: str) -> Iterator[Mutant]:
    """Yield all mutants of a module's functions."""
    module = ast.parse(source)
    excluded = _excluded_nodes(module)
    for index, node in enumerate(ast.walk(module)):
        new = None if id(node) in excluded else mutate_node(node)
        if new is not None:
            line = getattr(node, "lineno", 0)
            yield Mutant(area, file, line, ast.unparse(node), ast.unparse(new), index)


def mutated_source(source: str, mutant: Mutant) -> str:
    """Return a module's source with the mutant applied."""
    module = ast.parse(source)
    target = list(ast.walk(module))[mutant.node]

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return (mutate_node(node) or node) if node is target else self.generic_visit(node)

    return ast.unparse(Replace().visit(module)) + "\n"


def draw_mutants(tree: Path, count: int) -> list[Mutant]:
    """Return ``count`` mutants of a tree, the same number in each area; deterministic."""
    drawn, package = list[Mutant](), tree / "van_deploy"
    for number, (area, patterns) in enumerate(AREAS.items()):
        files = [path for pattern in patterns for path in sorted(package.glob(pattern))]
        mutants = [
            mutant
            for path in files
            for mutant in mutants_of(
                path.read_text("utf-8"), area, path.relative_to(package).as_posix()
            )
        ]
        rng = random.Random(f"{SEED} {area}")
        drawn += rng.sample(mutants, (count - len(drawn)) // (len(AREAS) - number))
    return drawn


class TreeCopy:
    """A copy of a tree in which the tests run against one mutant at a time."""

    def __init__(self, tree: Path, folder: Path) -> None:
        """Copy ``tree`` into ``folder`` without the files of git and tools."""
        self.tree, self.path = tree, folder / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "dist")
        shutil.copytree(tree, self.path, ignore=ignored)
        self._failing: dict[str, list[str]] = {}

    def test(self, mutant: Mutant) -> tuple[str, str, float]:
        """Return ``killed`` or ``survived``, the test that failed, and the seconds."""
        target, start = self.path / "van_deploy" / mutant.file, time.monotonic()
        package = mutant.file.rpartition("/")[0].split("/")[0]
        tests = self._tests(package, Path(mutant.file).stem)
        if package not in self._failing:  # tests that fail without a mutant are not used
            self._failing[package] = self._pytest(*tests)[1]
        original = target.read_text("utf-8")
        target.write_text(mutated_source(original, mutant), "utf-8")
        try:
            deselected = [f"--deselect={test}" for test in self._failing[package]]
            code, failed = self._pytest("-x", *deselected, *tests)
            failure = (failed or [f"pytest exited with {code}"])[0]
        except subprocess.TimeoutExpired:
            code, failure = 1, f"timeout of {TIMEOUT_S} s"
        finally:
            target.write_text(original, "utf-8")
        seconds = round(time.monotonic() - start, 1)
        return ("killed", failure, seconds) if code else ("survived", "", seconds)

    def _tests(self, package: str, stem: str) -> list[str]:
        tests = self.path / "tests"
        paths = [tests / package / f"test_{stem}.py", tests / f"test_{package or stem}.py"]
        paths += sorted((tests / package).glob("test_*.py")) if package else []
        for pattern in FURTHER_TESTS.get(package, ()):
            paths += sorted(tests.glob(pattern))
        existing = [p.relative_to(self.path).as_posix() for p in paths if p.is_file()]
        return list(dict.fromkeys(existing))

    def _pytest(self, *args: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [str(self.tree / ".venv/bin/python"), *PYTEST, "-m", "not slow and not gpu", *args],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
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
    tested = [Mutant(**row["mutant"]) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        tree = TreeCopy(args.tree.resolve(), Path(folder))
        for mutant in draw_mutants(tree.tree, args.count):
            if mutant in tested or args.area not in {None, mutant.area}:
                continue
            outcome, test, seconds = tree.test(mutant)
            row = {"mutant": asdict(mutant), "outcome": outcome, "by": test, "seconds": seconds}
            rows.append(row)
            if args.output:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            sys.stderr.write(f"{outcome:9} {seconds:6.1f} s  {mutant.file}:{mutant.line}  {test}\n")
    survived = [Mutant(**row["mutant"]) for row in rows if row["outcome"] == "survived"]
    for mutant in survived:
        print(f"survived: {mutant.file}:{mutant.line}: {mutant.before} -> {mutant.after}")
    print(f"{len(rows) - len(survived)} of {len(rows)} killed")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
