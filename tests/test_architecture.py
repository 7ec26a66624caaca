"""Optional packages, and the cost of imports.

import-linter checks the layers, and ruff asserts, prints, exits and docstrings; both run in
``make check``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from van_deploy.bundle import Bundle

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "van_deploy"

OPTIONAL = (
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "ray"),
    *("cryptography", "uvicorn", "prometheus_client", "tritonclient"),
    *("sklearn", "skimage", "scipy", "hypothesis", "pytest"),
)
HEAVY = (
    *("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim", "numpy", "PIL", "rich"),
    *("onnxruntime", "tensorrt", "tensorrt_rtx"),
)


def run_python(*lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_module_imports_without_optional_packages() -> None:
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py"))
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    modules.remove("van_deploy.__main__")
    result = run_python(
        "import importlib, sys",
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))",  # None: as if not installed
        f"for name in {modules!r}:",
        "    module = importlib.import_module(name)",
        "    missing = [n for n in getattr(module, '__all__', ()) if not hasattr(module, n)]",
        "    if missing: raise SystemExit(f'{name}.__all__ has undefined names: {missing}')",
        "import torch",
        "if torch.cuda.is_initialized(): raise SystemExit('importing started CUDA')",
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_light_commands_import_no_heavy_package(digits_bundle: Bundle) -> None:
    result = run_python(
        "import importlib, pkgutil, sys, van_deploy, van_deploy.errors, van_deploy.model.variants",
        "from van_deploy.bundle import Bundle",
        f"assert Bundle.open({str(digits_bundle.path)!r}).manifest.preprocessing.image_size == 64",
        "import van_deploy.cli as cli",
        "for module in pkgutil.iter_modules(cli.__path__, 'van_deploy.cli.'):",
        "    importlib.import_module(module.name)",
        f"imported = [name for name in {HEAVY!r} if name in sys.modules]",
        "from typer.testing import CliRunner",
        "outputs = [CliRunner().invoke(cli.app.app, [word]).stdout for word in ('--help', 'list')]",
        f"imported += [name for name in {HEAVY!r} if name in sys.modules and name != 'rich']",
        "print(imported, all(outputs))",
    )
    assert (result.stdout, result.stderr) == ("[] True\n", "")
