"""What is shipped: the wheel's files, the build files, the README's commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import Cli
from van_deploy import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SHIPPED = {".css", ".html", ".js", ".json", ".md", ".npz", ".py", ".pyi", ".safetensors", ".toml"}
DATA_PACKAGES = {"export": "van_deploy/recipes", "calibration": "van_deploy/calibration_sets"}
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_wheel_holds_what_it_should_and_is_small(wheel: zipfile.ZipFile) -> None:
    """Every module and data file in the tree, the licence, the command, and nothing else."""
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


def test_one_onnxruntime_an_extra() -> None:
    """The packages ``onnxruntime`` and ``onnxruntime-gpu`` hold the same module."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tables = {"": project["dependencies"], **project["optional-dependencies"]}
    found = [name for name, lines in tables.items() for line in lines if "onnxruntime" in line]
    assert found == ["cpu", "gpu"]


def test_no_file_names_a_private_path() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    private = "|".join(("/" + "work/", "/" + "root/", "/" + "home/[a-z]"))
    words = ["git", "grep", "--untracked", "-I", "--name-only", "--extended-regexp", private]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")


def readme_commands() -> list[list[str]]:
    """Return the words of every command line in the README's ``sh`` blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "".join(SHELL_BLOCK.findall(text)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in blocks.splitlines()]
    commands = (shlex.split(line, comments=True) for line in lines)
    return [words for words in commands if words]


def test_every_command_in_the_readme_exists_with_its_options(cli: Cli) -> None:
    helped: dict[str, str] = {}
    for words in readme_commands():
        if words[0].removeprefix(".venv/bin/") != "van-deploy":
            continue
        command = words[1]
        if command not in helped:
            result = cli(*([command] if not command.startswith("-") else []), "--help")
            assert result.exit_code == 0, f"README: there is no `van-deploy {command}`"
            helped[command] = result.stdout
        for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
            known = re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helped[command])
            assert known, f"README: `van-deploy {command}` has no {option}"


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    asked = {word for words in readme_commands() if words[0] == "make" for word in words[1:]}
    assert asked <= targets
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets
