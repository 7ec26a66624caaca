"""Mutation testing: put 60 small faults into the code, one at a time, and run its tests.

    python -m reliability.mutate                          # this tree
    python -m reliability.mutate --tree ../old --count 60 # another checkout, with its own tests
    python -m reliability.mutate --area gates --output rows.jsonl   # existing rows are kept

Mutants are drawn with a fixed seed, the same number in each area. The area's tests run in a copy of
the tree, those of the mutated file first; tests marked ``slow`` do not run.
"""

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
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SEED, TIMEOUT_S = 15, 900
PYTEST = ("-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
IGNORED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "dist")
# The files under van_deploy/ that decide whether an artifact is correct, and further files whose
# tests should notice a fault in them; the tests of a/b.py are in tests/a/test_b.py.
AREAS = {
    "gates": ("checks/*.py metrics.py intervals.py api.py", "cli/gates*.py pipeline.py"),
    "fold": ("graph/*.py", "pipeline.py"),
    "precision": ("precision/*.py", "cli/make.py"),
    "labels": ("data/*.py", "cli/gates*.py precision/*.py"),
    "bundle": ("bundle/*.py files.py manifest.py signing.py", "bundle.py pipeline.py *.py"),
    "engine": ("engine/*.py", "cli/make.py runners/*.py"),
}
PAIRS: tuple[tuple[type[ast.AST], type[ast.AST]], ...] = (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn)),
    *((ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div)),
)
OPERATORS = {old: new for pair in PAIRS for old, new in (pair, pair[::-1])}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Of messages and types: a change there is no fault.
SKIPPED_FIELDS = {"exc", "cause", "returns", "decorator_list", "annotation"}

# A fault: ``area``, ``file`` (relative to van_deploy/), ``line``, code ``before`` and ``after`` as
# ast.unparse writes it, its first byte in the file (``start``) and the first after it (``end``).
Mutant = dict[str, Any]


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
            start, end = starts[first] + node.col_offset, starts[last] + (node.end_col_offset or 0)
            mutant = {"area": area, "file": file, "line": node.lineno, "start": start, "end": end}
            yield {**mutant, "before": ast.unparse(node), "after": ast.unparse(new)}


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


def run_pytest(python: Path, tree: Path, *words: str) -> tuple[int, list[str]]:
    """Run tests in a tree; return the exit code and the tests that failed."""
    own = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    options: Any = {"capture_output": True, "text": True, "env": {**os.environ, **own}}
    command = [str(python), "-m", "pytest", *PYTEST, *words]
    done = subprocess.run(command, cwd=tree, timeout=TIMEOUT_S, check=False, **options)
    return done.returncode, re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)


def test_mutant(
    mutant: Mutant, python: Path, tree: Path, failing: dict[str, list[str]]
) -> tuple[str, str]:
    """Return ``killed`` or ``survived``, and the test that failed.

    Args:
        mutant: the fault.
        python: runs the tests.
        tree: the copy in which the fault is put.
        failing: by area, the tests that fail without a mutant, which are not used; is extended.

    Raises:
        RuntimeError: the tests do not run without a mutant either.
    """
    target, area, found = tree / "van_deploy" / mutant["file"], mutant["area"], list[Path]()
    for pattern in " ".join(AREAS[area]).split():
        folder, _, name = f"tests/{pattern}".rpartition("/")
        found += sorted(tree.glob(f"{folder}/test_{name}"))
    found.sort(key=lambda path: path.stem != f"test_{target.stem}")
    tests = [str(path) for path in dict.fromkeys(found)]
    if area not in failing:
        status, failing[area] = run_pytest(python, tree, *tests)
        if status > bool(failing[area]):
            raise RuntimeError(f"without a mutant, pytest exits with {status} for {area}")
    deselected = [f"--deselect={test}" for test in failing[area]]
    original, code = target.read_bytes(), mutant["after"].encode()
    target.write_bytes(original[: mutant["start"]] + code + original[mutant["end"] :])
    try:
        status, failed = run_pytest(python, tree, "-x", *deselected, *tests)
    except subprocess.TimeoutExpired:
        status, failed = 1, [f"timeout of {TIMEOUT_S} s"]
    finally:
        target.write_bytes(original)
    failure = [*failed, f"pytest exited with {status}"][0]
    return ("killed", failure) if status else ("survived", "")


def main() -> int:
    """Test every mutant and print the survivors; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to copy")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--area", choices=list(AREAS), help="one area only")
    parser.add_argument("--output", type=Path, help="JSON lines; existing rows are kept")
    args = parser.parse_args()
    rows, failing, python = [], dict[str, list[str]](), args.tree.resolve() / ".venv/bin/python"
    if args.output and args.output.exists():
        rows = [json.loads(line) for line in args.output.read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(args.tree, Path(folder) / "tree", ignore=IGNORED))
        for mutant in draw_mutants(tree, args.count):
            tested = any(mutant.items() <= row.items() for row in rows)
            if tested or args.area not in {None, mutant["area"]}:
                continue
            start = time.monotonic()
            outcome, test = test_mutant(mutant, python, tree, failing)
            seconds = round(time.monotonic() - start, 1)
            rows.append({**mutant, "outcome": outcome, "by": test, "seconds": seconds})
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
