"""What is public, what may be absent, and what starting costs.

Who imports whom is import-linter's contract, and asserts, prints, exits and docstrings are
ruff's; both are in pyproject.toml and run in ``make check``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "van_deploy"

OPTIONAL = (
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "ray"),
    *("cryptography", "uvicorn", "prometheus_client", "tritonclient"),
    *("sklearn", "skimage", "scipy", "hypothesis", "pytest"),
)
HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim", "numpy", "PIL", "rich")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def public_definitions(tree: ast.Module) -> set[str]:
    """Return public functions and classes, less those that timm adds to ``__all__`` itself."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_")
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


def faults_of(tree: ast.Module) -> list[str]:
    """Return what is wrong with the ``__all__`` of a module."""
    declared, defined = declared_names(tree), public_definitions(tree)
    if declared is None:
        return ["there is no __all__"] if defined else []
    twice = {name for name in declared if declared.count(name) > 1}
    return [f"{name} stands twice in __all__" for name in sorted(twice)] + [
        f"{name} is public, but not in __all__" for name in sorted(defined - set(declared))
    ]


def imported_by(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_names_what_is_public() -> None:
    wrong = {
        path.relative_to(ROOT).as_posix(): faults
        for path in sorted(PACKAGE.rglob("*.py"))
        if (faults := faults_of(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert wrong == {}


def test_what_is_wrong_with_all_is_seen() -> None:
    assert faults_of(ast.parse("def f(): ...")) == ["there is no __all__"]
    assert faults_of(ast.parse("__all__ = ['f']\ndef f(): ...\nclass G: ...")) == [
        "G is public, but not in __all__"
    ]
    assert faults_of(ast.parse("__all__: list[str] = ['f', 'f']")) == ["f stands twice in __all__"]


def test_every_module_imports_without_optional_packages() -> None:
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py"))
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    modules.remove("van_deploy.__main__")
    result = imported_by(
        "import importlib, sys",
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))",  # None: as if not installed
        f"for name in {modules!r}:",
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
        "import van_deploy.cli.app",
        f"print([name for name in {HEAVY!r} if name in sys.modules])",
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")
