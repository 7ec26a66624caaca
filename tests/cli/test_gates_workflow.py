"""The GitHub Actions workflow of ``docs/ci.md``: it is one, and its commands do what it says."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from junitparser import JUnitXml

from tests.conftest import Cli
from van_deploy.model.embedded import write_digits_folder

RECIPE = """
[model]
name = "van_digits"

[batch]
min = 1
opt = 2
max = 4

[precision]
make = ["fp16"]
"""


@pytest.fixture(scope="module")
def workflow(repository: Path) -> dict[Any, Any]:
    """Return the workflow in the page, parsed."""
    yaml = pytest.importorskip("yaml")
    page = (repository / "docs" / "ci.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    documents: list[dict[Any, Any]] = [yaml.safe_load(block) for block in blocks]
    (gates,) = (document for document in documents if document.get("name") == "gates")
    return gates


def commands(workflow: dict[Any, Any]) -> list[list[str]]:
    """Return the words of each command, as the shell of a step splits them."""
    steps = workflow["jobs"]["check"]["steps"]
    return [shlex.split(os.path.expandvars(step["run"])) for step in steps if "run" in step]


def test_it_has_the_shape_of_a_workflow(workflow: dict[Any, Any]) -> None:
    assert set(workflow) == {"name", True, "jobs"}  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    assert set(job) == {"runs-on", "steps"}
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


@pytest.mark.slow
def test_its_commands_run(
    cli: Cli, workflow: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.toml").write_text(RECIPE)
    write_digits_folder(tmp_path / "images", "heldout", 40)
    install, run, check = commands(workflow)
    assert install[:2] == ["pip", "install"]
    assert run[:2] == ["van-deploy", "run"]
    assert cli(*run[1:]).exit_code == 0
    assert check[:2] == ["van-deploy", "check"]
    assert cli(*check[1:]).exit_code == 5  # there is no baseline yet
    assert cli(*check[1:], "--update").exit_code == 0  # as the page says, by hand, once
    result = cli(*check[1:])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "summary.md").read_text().count("## ✅ van-deploy: van_digits passed") == 2
    uploaded = workflow["jobs"]["check"]["steps"][-1]["with"]["path"]
    assert JUnitXml.fromfile(uploaded).failures == 0
