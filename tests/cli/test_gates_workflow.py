"""The commands of the GitHub Actions workflow in ``docs/ci.md``."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

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


@pytest.mark.slow
def test_workflow_commands(
    cli: Cli, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = pytest.importorskip("yaml")
    page = (repository / "docs" / "ci.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = {block.get("name"): block for block in map(yaml.safe_load, blocks)}
    job = found["gates"]["jobs"]["check"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.toml").write_text(RECIPE)
    write_digits_folder(tmp_path / "images", "heldout", 40)
    steps = [os.path.expandvars(step["run"]) for step in job["steps"] if "run" in step]
    install, run, check = map(shlex.split, steps)
    assert install[:2] == ["pip", "install"]
    assert run[:2] == ["van-deploy", "run"]
    assert cli(*run[1:]).exit_code == 0
    assert check[:2] == ["van-deploy", "check"]
    assert cli(*check[1:]).exit_code == 5  # there is no baseline yet
    assert cli(*check[1:], "--update").exit_code == 0  # once, by hand
    result = cli(*check[1:])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "summary.md").read_text().count("## ✅ van-deploy: van_digits passed") == 2
    uploaded = job["steps"][-1]["with"]["path"]
    assert JUnitXml.fromfile(uploaded).failures == 0
