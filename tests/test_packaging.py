"""The wheel, its dependencies, the cost of imports, and the Makefile.

import-linter checks the layers, and ruff asserts, prints, exits and docstrings; both run in
``make check``.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from van_deploy import __version__
from van_deploy.bundle import Bundle
from van_deploy.documents import tomllib

ROOT = Path(__file__).parent.parent
SHIPPED = {".css", ".html", ".js", ".json", ".md", ".npz", ".py", ".pyi", ".safetensors", ".toml"}
DATA_PACKAGES = {"export": "van_deploy/recipes", "calibration": "van_deploy/calibration_sets"}
RUNTIMES = ["onnxruntime", "tensorrt", "tensorrt_rtx"]
OPTIONAL = [*RUNTIMES, "openvino", "ray", "cryptography", "uvicorn", "prometheus_client"]
OPTIONAL += ["tritonclient", "sklearn", "skimage", "scipy", "hypothesis", "pytest"]
HEAVY = [*RUNTIMES, "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim"]
HEAVY += ["numpy", "PIL", "rich"]


@pytest.mark.slow
def test_wheel_contents_and_size(wheel: zipfile.ZipFile) -> None:
    """The wheel has every module and data file, the licence and the command, and no other file."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in {"van_deploy": "van_deploy", **DATA_PACKAGES}.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file()
        and (path.suffix in SHIPPED or path.name == "py.typed" or path.parent.name == "templates")
        and not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}
    }
    info = f"van_deploy-{__version__}.dist-info"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert wheel.read(f"{info}/entry_points.txt").decode().split() == [
        *("[console_scripts]", "van-deploy", "=", "van_deploy.cli.app:main")
    ]
    assert f"Version: {__version__}\n" in wheel.read(f"{info}/METADATA").decode()
    assert sum(item.compress_size for item in wheel.infolist()) < 3 * 2**20


def test_extras_have_one_onnxruntime_each_and_are_on_the_first_page() -> None:
    """The packages ``onnxruntime`` and ``onnxruntime-gpu`` have the same module."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tables = {"": project["dependencies"], **project["optional-dependencies"]}
    found = [name for name, lines in tables.items() for line in lines if "onnxruntime" in line]
    assert found == ["cpu", "gpu"]
    install = (ROOT / "README.md").read_text().partition("Install with")[2].partition("##")[0]
    assert set(tables) - {""} <= set(re.findall(r"\w+", install))


def test_make_targets_on_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        named = re.findall(r"(?m)(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"))
        assert set(named) <= targets, page.name


def run_python(*lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_module_imports_without_optional_packages() -> None:
    files = sorted(path.relative_to(ROOT) for path in ROOT.glob("van_deploy/**/*.py"))
    names = [".".join(file.with_suffix("").parts) for file in files]
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
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
