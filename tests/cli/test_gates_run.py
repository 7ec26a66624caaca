"""The command ``run``, with the real engine builder, and the GitHub Actions workflow."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from junitparser import JUnitXml

from tests.cli.conftest import ALLOW
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.model.embedded import write_digits_folder

MODEL = """
batch = "1:2:4"
model = {name = "van_digits"}
"""
RECIPE = f"""{MODEL}
precision = {{make = ["fp16", "int8"], equalize = false, bias_correction = false}}
evaluate = {{images = "labelled", limit = 40}}
[engines]
precisions = ["fp16"]
targets = ["sm_89"]
backend = "tensorrt-rtx"
optimization_level = 0
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return a recipe with all steps, in the folder of its images."""
    write_digits_folder(tmp_path / "recipes" / "labelled", "heldout", 60)
    file = tmp_path / "recipes" / "mine.toml"
    file.write_text(RECIPE)
    return file


@pytest.mark.skipif(nvidia_driver() is not None, reason="there is an NVIDIA driver here")
def test_run_does_everything_in_the_recipe(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    words: tuple[object, ...] = ("run", recipe, "--output", tmp_path / "bundle")
    cli.fails(1, *words)  # the engine is skipped, and 40 images are few
    words = (*words, "--allow-skip", "engines", ALLOW)
    report = cli.document(*words)
    fp16, int8, engine = (result["artifact"] for result in report["artifacts"])
    assert (report["passed"], fp16, int8) == (True, "fp16", "int8")
    assert engine.startswith("van_digits-fp16-sm89-rtx")
    bundle = Bundle.open(tmp_path / "bundle")
    assert (list(bundle.artifacts), bundle.problems()) == (["fp32", fp16, int8, engine], [])
    built = bundle.artifact(engine).engine
    assert built is not None
    assert [str(batch) for batch in built.profiles] == ["1:2:4"]
    verified = report["verify"]["artifacts"]
    outcomes = {name: entry["outcome"] for name, entry in verified.items()}
    assert outcomes == {"fp32": "pass", "fp16": "pass", "int8": "pass", engine: "skipped"}
    evaluated = report["evaluate"]
    assert (evaluated["count"], list(evaluated["skipped"])) == (40, [engine])
    assert set(bundle.manifest.checks) >= {"verify", "evaluate"}
    again = cli.passes(*words)
    assert "optimization level 0" in " ".join(cli.passes("inspect", bundle.path).split())
    assert "Exported: nothing changed" in again
    assert again.count("nothing changed") > 1  # the export and the engine


def test_conflicts_options_and_failed_gates(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    words = ("run", recipe, "--output", tmp_path / "bundle")
    recipe.write_text(RECIPE.replace('["fp16", "int8"]', '["int8"]'))
    conflict = "engines.precisions has 'fp16', not made by the recipe for "
    assert conflict in cli.fails(5, *words)
    for_cpu = ("--set", 'precision.make=["fp16","int8"]', "--set", "precision.target=cpu")
    conflict = "has 'int8', not made by the recipe for TensorRT."
    assert conflict in cli.fails(2, *words, *for_cpu, "--engine", "fp16,int8")
    assert not (tmp_path / "bundle").exists()
    changed = 'export = {embed_preprocess = "uint8"}\nprecision = {make = ["int8"]}\n'
    recipe.write_text(f"{MODEL}{changed}gates = {{fp16 = {{sqnr_db = 200.0}}}}")
    options = ("--precision", "fp16", "--evaluate", recipe.parent / "labelled")
    result = cli(*words, *options, "--json")
    assert result.exit_code == 1
    assert "was written and does not pass its gates." in result.stderr
    report, bundle = json.loads(result.stdout), Bundle.open(tmp_path / "bundle")
    assert report["evaluate"]["count"] == 60
    assert list(bundle.artifacts) == ["fp32", "fp16", "fp32-uint8", "fp16-uint8"]
    assert bundle.manifest.checks["verify"]["passed"] is False


@pytest.mark.slow
def test_commands_of_the_workflow_page(
    cli: Cli, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = pytest.importorskip("yaml")
    page = (repository / "docs" / "ci.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = {block.get("name"): block for block in map(yaml.safe_load, blocks)}
    *steps, upload = found["gates"]["jobs"]["check"]["steps"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.toml").write_text(f'{MODEL}precision = {{make = ["fp16"]}}')
    write_digits_folder(tmp_path / "images", "heldout", 40)
    commands = [shlex.split(os.path.expandvars(step["run"])) for step in steps if "run" in step]
    assert [words[:2] for words in commands[1:]] == [["van-deploy", "run"], ["van-deploy", "check"]]
    _, run, check = (words[1:] for words in commands)
    cli.passes(*run)
    cli.fails(5, *check)  # there is no baseline yet
    cli.passes(*check, "--update")  # once, by hand
    cli.passes(*check)
    assert (tmp_path / "summary.md").read_text().count("## ✅ van-deploy: van_digits passed") == 2
    assert JUnitXml.fromfile(upload["with"]["path"]).failures == 0
