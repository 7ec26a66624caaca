"""Small faults that can be put into the code, and where they are found in a version of it."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["AREAS", "Mutant", "candidates", "choose", "found_in", "mutated"]

SEED = 15

# What decides whether an artifact is right.
AREAS = {
    "gates": (
        *("checks/gates.py", "checks/statistics.py", "checks/verdicts.py", "checks/accuracy.py"),
        *("checks/agreement.py", "checks/overflow.py", "metrics.py"),
    ),
    "fold": ("graph/fold.py", "graph/rewritten.py"),
    "precision": ("precision/*.py",),
    "labels": ("checks/labels.py", "images/*.py", "data/*.py"),
    "bundle": ("bundle/*.py", "files.py"),
    "engine": (
        *("engine/sidecar.py", "engine/options.py", "engine/compatibility.py"),
        "engine/refusals.py",
    ),
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
                line = getattr(node, "lineno", 0)
                new = _Put(node, _fault(node, mutant.becomes)).visit(module)
                return ast.unparse(ast.fix_missing_locations(new)) + "\n", line
    return None


def _fault(node: ast.AST, becomes: str) -> ast.AST:
    """Return what is to stand in the place of ``node``; an expression may be chosen by hand."""
    for fault in faults_of(node):
        if fragment_of(ast.fix_missing_locations(fault)) == becomes:
            return fault
    return ast.parse(becomes, mode="eval").body


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
