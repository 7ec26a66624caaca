"""The wheel, its dependencies, and the Makefile."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from van_deploy import __version__
from van_deploy.documents import tomllib

ROOT = Path(__file__).parent.parent
SHIPPED = {".css", ".html", ".js", ".json", ".md", ".npz", ".py", ".pyi", ".safetensors", ".toml"}
DATA_PACKAGES = {"export": "van_deploy/recipes", "calibration": "van_deploy/calibration_sets"}


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


def test_extras_have_one_onnxruntime_each() -> None:
    """The packages ``onnxruntime`` and ``onnxruntime-gpu`` have the same module."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tables = {"": project["dependencies"], **project["optional-dependencies"]}
    found = [name for name, lines in tables.items() for line in lines if "onnxruntime" in line]
    assert found == ["cpu", "gpu"]


def test_no_file_contains_a_private_path() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    private = "|".join(("/" + "work/", "/" + "root/", "/" + "home/[a-z]"))
    words = ["git", "grep", "--untracked", "-I", "--name-only", "--extended-regexp", private]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bmake ([a-z-]+)", readme)) <= targets
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets
