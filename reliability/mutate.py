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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["Mutant", "candidates", "found_in", "main", "mutated"]

ROOT = Path(__file__).parent.parent
MUTANTS = Path(__file__).parent / "mutants.json"
SEED = 15
PYTHON = Path(".venv/bin/python")
LONGEST_S = 900

# What decides whether an artifact is right; tests of other packages that are to notice as well.
AREAS = {
    "gates": (
        *("checks/gates.py", "checks/statistics.py", "checks/verdicts.py", "checks/accuracy.py"),
        *("checks/agreement.py", "checks/overflow.py", "metrics.py"),
    ),
    "fold": ("graph/fold.py", "graph/rewritten.py"),
    "precision": ("precision/*.py",),
    "labels": ("data/*.py",),
    "bundle": ("bundle/*.py", "files.py"),
    "engine": (
        *("engine/sidecar.py", "engine/options.py", "engine/compatibility.py"),
        "engine/refusals.py",
    ),
}
FURTHER = {
    "checks": ("cli/test_gates*.py", "precision/test_stage.py"),
    "data": ("cli/test_gates_evaluate.py", "checks/test_*.py"),
    "precision": ("cli/test_quantize.py", "checks/test_*.py"),
    "engine": ("cli/test_build.py", "runners/test_tensorrt.py"),
    "config": ("engine/test_*.py", "cli/test_build.py", "test_recipe.py"),
    "graph": ("test_pipeline.py",),
    "bundle": ("test_signing.py", "test_pipeline.py"),
    "": ("test_bundle.py", "checks/test_[!f]*.py", "precision/test_stage.py"),
}
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
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
OTHER_FUNCTION = {"min": "max", "max": "min", "any": "all", "all": "any"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Mutant:
    """One fault to put into the code.

    Attributes:
        area: what it belongs to, a key of ``AREAS``.
        file: where it was chosen, relative to ``van_deploy/``.
        function: qualified name of the function or method.
        fragment: the source that is changed, as ``ast.unparse`` writes it.
        occurrence: which of the equal fragments of that function, from 0.
        becomes: the source that takes its place.
    """

    area: str
    file: str
    function: str
    fragment: str
    occurrence: int
    becomes: str


@dataclass(frozen=True)
class Row:
    """What came of one mutant: ``killed``, ``survived`` or ``code removed``."""

    mutant: Mutant
    place: str
    outcome: str
    by: str
    seconds: float


# --- faults in a syntax tree -----------------------------------------------------------------


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield every function and method with its qualified name; nested ones belong to theirs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")


def faults_of(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of ``node``."""
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.Compare) and len(changed.ops) == 1:
        changed.ops = [SWAPS[type(changed.ops[0])]()]  # type: ignore[list-item]
        yield changed
    elif isinstance(changed, ast.BinOp | ast.BoolOp) and type(changed.op) in SWAPS:
        changed.op = SWAPS[type(changed.op)]()  # type: ignore[assignment]
        yield changed
    elif isinstance(changed, ast.Constant) and isinstance(changed.value, int | float):
        if not isinstance(changed.value, bool):
            yield ast.Constant(changed.value + 1)
    elif isinstance(changed, ast.Call) and isinstance(changed.func, ast.Name):
        if changed.func.id in OTHER_FUNCTION:
            changed.func.id = OTHER_FUNCTION[changed.func.id]
            yield changed
    elif isinstance(changed, ast.If):
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
        yield changed
    elif isinstance(changed, ast.Return) and changed.value is not None:
        yield ast.Return(ast.Constant(None))
    elif isinstance(changed, ast.Raise | ast.AugAssign) or (
        isinstance(changed, ast.Expr) and isinstance(changed.value, ast.Call)
    ):
        yield ast.Pass()


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def likelihood(mutant: Mutant) -> float:
    """Return how often a kind of fault is chosen: what any call would notice seldom is."""
    if mutant.becomes == "return None":
        return 0.15
    return 0.5 if mutant.becomes == "pass" else 1.0


def fragment_of(node: ast.AST) -> str:
    """Return the source that names a node: of an ``if`` its first line alone."""
    text = ast.unparse(node)
    return text.partition("\n")[0] if isinstance(node, ast.If) else text


def statements_of(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function's body that may be changed; messages and types are left."""
    waiting: list[ast.AST] = list(getattr(function, "body", ()))
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.JoinedStr):
            continue
        yield node
        if isinstance(node, ast.Raise):  # its message is not behaviour enough
            continue
        children = ast.iter_child_nodes(node)
        if isinstance(node, ast.AnnAssign):
            children = iter([node.value] if node.value is not None else [])
        waiting[:0] = list(children)


def candidates(tree: Path, area: str) -> Iterator[Mutant]:
    """Yield every fault that can be put into the files of an area."""
    for pattern in AREAS[area]:
        for path in sorted((tree / "van_deploy").glob(pattern)):
            module = ast.parse(path.read_text(encoding="utf-8"))
            file = path.relative_to(tree / "van_deploy").as_posix()
            for name, function in functions_of(module):
                seen: dict[str, int] = {}
                for node in statements_of(function):
                    fragment = fragment_of(node)
                    occurrence = seen[fragment] = seen.get(fragment, -1) + 1
                    for fault in faults_of(node):
                        becomes = fragment_of(ast.fix_missing_locations(fault))
                        yield Mutant(area, file, name, fragment, occurrence, becomes)


def mutated(source: str, mutant: Mutant) -> tuple[str, int] | None:
    """Return the source with the fault in it and the line, or None if it has no place there."""
    try:
        module = ast.parse(source)
    except SyntaxError:  # of another Python, or a file that is just being merged
        return None
    for name, function in functions_of(module):
        if name != mutant.function:
            continue
        seen = -1
        for node in statements_of(function):
            seen += fragment_of(node) == mutant.fragment
            if seen == mutant.occurrence and fragment_of(node) == mutant.fragment:
                for fault in faults_of(node):
                    if fragment_of(ast.fix_missing_locations(fault)) == mutant.becomes:
                        line = getattr(node, "lineno", 0)
                        new = _Put(node, fault).visit(module)
                        return ast.unparse(ast.fix_missing_locations(new)) + "\n", line
    return None


class _Put(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return self.new
        return super().generic_visit(node)


def found_in(tree: Path, mutant: Mutant) -> tuple[Path, str, int] | None:
    """Return the file, its source with the fault and the line; None if the code is gone.

    A function that has moved to another file of the package is found there.
    """
    package = tree / "van_deploy"
    first = package / mutant.file
    others = (path for path in sorted(package.rglob("*.py")) if path != first)
    for path in [first, *others]:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if mutant.function.rpartition(".")[2] in text and (changed := mutated(text, mutant)):
            return path, *changed
    return None


# --- running the tests -----------------------------------------------------------------------


class Copy:
    """A copy of a tree to run tests in; real weights do not lie beside it, for speed."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.path = tree, folder / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "dist")
        shutil.copytree(tree, self.path, ignore=ignored)
        self._seconds: dict[str, dict[str, float]] = {}
        self._failing: dict[str, list[str]] = {}

    def pytest(self, *words: str, limit_s: float = LONGEST_S) -> subprocess.CompletedProcess[str]:
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


def choose(count: int, trees: Sequence[Path]) -> list[Mutant]:
    """Return ``count`` faults, as many of each area, that have a place in every tree."""
    rng = random.Random(SEED)
    chosen: list[Mutant] = []
    for index, area in enumerate(AREAS):
        share = (count - len(chosen)) // (len(AREAS) - index)
        everything = sorted(candidates(trees[0], area), key=lambda mutant: str(asdict(mutant)))
        everything.sort(key=lambda mutant: rng.random() ** (1 / likelihood(mutant)))
        by_function: dict[str, list[Mutant]] = {}
        for mutant in everything:
            if all(found_in(tree, mutant) for tree in trees[1:]):
                by_function.setdefault(mutant.function, []).append(mutant)
        found: list[Mutant] = []
        functions = sorted(by_function)
        rng.shuffle(functions)
        while len(found) < share and any(by_function.values()):  # every function in its turn
            for function in functions:
                if by_function[function] and len(found) < share:
                    found.append(by_function[function].pop())
        chosen += found
    return chosen


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
