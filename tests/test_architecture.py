"""The rules the packages keep: who imports whom, what is public, what may be absent."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "van_deploy"

# From the ground floor up: a module imports from its own room and from those before it.
ROOMS = (
    *(
        "errors",
        "documents",
        "files",
        "external_weights",
        "forms",
        "schema",
        "fields",
        "metrics",
        "environment",
        "settings",
        "recipe_tables",
        "recipe",
        "provenance",
        "signing_keys",
        "images",
    ),
    *("model", "bundle", "signing", "graph", "engine", "runners", "precision", "checks", "bench", "serve"),
    *("report", "pipeline", "run", "cli", "__main__"),
)
FOR_ALL = {
    "errors",
    "files",
    "settings",
    "recipe_tables",
    "recipe",
    "bundle",
    "provenance",
    "images",
    "environment",
}
OPTIONAL = (
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "ray"),
    *("cryptography", "starlette", "uvicorn", "prometheus_client", "tritonclient"),
    *("sklearn", "skimage", "scipy", "hypothesis", "pytest"),
)
HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim", "numpy", "PIL", "rich")
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
]
IMPORTABLE = [name for name in MODULES if name != "van_deploy.__main__"]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield every module imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "van_deploy":
                yield from (f"van_deploy.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    """Return the room a module of ours is in; the package itself is in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_broken(importer: str, imported: str) -> bool:
    """Return whether one room may not import from another."""
    if imported in FOR_ALL | {importer, "", "__version__"}:
        return False
    return ROOMS.index(imported) > ROOMS.index(importer)


def public_definitions(tree: ast.Module) -> set[str]:
    """Return public functions and classes, less those that timm adds to ``__all__`` itself."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {
        node.name
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_")
        if "register_model" not in {ast.unparse(decorator) for decorator in node.decorator_list}
    }


def declared_names(tree: ast.Module) -> list[str] | None:
    """Return the literal value of ``__all__``, or None if the module has none."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if "__all__" in names and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def imported_by(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_is_in_a_room() -> None:
    assert {room_of(name) for name in MODULES} - {""} <= set(ROOMS)


@pytest.mark.parametrize(
    ("importer", "imported", "broken"),
    [
        ("model", "cli", True),
        ("graph", "model", False),
        ("model", "graph", True),
        ("model", "bundle", False),
        ("checks", "report", True),
    ],
)
def test_the_import_rule_itself(importer: str, imported: str, broken: bool) -> None:
    assert is_broken(importer, imported) is broken


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_a_module_imports_only_from_rooms_before_its_own(path: Path) -> None:
    room = room_of(MODULES[SOURCES.index(path)])
    ours = [name for name in imports_of(tree_of(path)) if name.split(".")[0] == "van_deploy"]
    data = {"recipes", "calibration_sets"}
    rooms = {room_of(name) for name in ours} - data
    broken = sorted(other for other in rooms if room and is_broken(room, other))
    assert broken == [], f"{room} may not import from {broken}"


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_all_names_what_is_public(path: Path) -> None:
    tree = tree_of(path)
    declared, defined = declared_names(tree), public_definitions(tree)
    if path.name == "__init__.py" and declared is None:
        assert defined == set(), "a package that defines something needs __all__"
        return
    assert declared is not None, "there is no __all__"
    assert len(declared) == len(set(declared))
    assert defined <= set(declared), "public, but not in __all__"


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_only_the_command_line_and_reports_print_or_exit(path: Path) -> None:
    if room_of(MODULES[SOURCES.index(path)]) in {"cli", "report", "__main__"}:
        return
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    attributes = {ast.unparse(call) for call in calls if isinstance(call, ast.Attribute)}
    assert not names & {"print", "exit", "quit"}
    assert not attributes & {"sys.exit", "os._exit"}


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_input_is_not_checked_with_assert(path: Path) -> None:
    asserts = [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Assert)]
    assert asserts == [], f"assert in lines {asserts}"


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree) or not tree.body


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: str(path.name)
)
def test_the_command_line_imports_nothing_heavy_at_module_level(path: Path) -> None:
    for node in tree_of(path).body:  # `if TYPE_CHECKING:` blocks and functions are not entered
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = {name.split(".")[0] for name in imports_of(node)}
            assert not roots & {*HEAVY, *OPTIONAL}


def test_every_module_imports_without_optional_packages() -> None:
    result = imported_by(
        "import importlib, sys",
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))",  # None: as if not installed
        f"for name in {IMPORTABLE!r}:",
        "    module = importlib.import_module(name)",
        "    gone = [n for n in getattr(module, '__all__', ()) if not hasattr(module, n)]",
        "    if gone: raise SystemExit(f'{name}.__all__ names {gone}, which it lacks')",
        "import torch",
        "if torch.cuda.is_initialized(): raise SystemExit('importing started CUDA')",
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    result = imported_by(
        "import sys, van_deploy, van_deploy.errors, van_deploy.model.variants",
        f"print([name for name in {HEAVY!r} if name in sys.modules])",
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")
