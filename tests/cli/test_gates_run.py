"""The command ``run``, with the real engine builder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.cli.test_gates import ALLOW, fail, run_json
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.model.embedded import write_digits_folder

RECIPE = """
[model]
name = "van_digits"

[batch]
min = 1
opt = 2
max = 4

[precision]
make = ["fp16", "int8"]
equalize = false
bias_correction = false

[engines]
precisions = ["fp16"]
targets = ["sm_89"]
backend = "tensorrt-rtx"
optimization_level = 0

[evaluate]
images = "labelled"
limit = 40
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return a recipe with all steps, in the folder of its images."""
    write_digits_folder(tmp_path / "recipes" / "labelled", "heldout", 60)
    file = tmp_path / "recipes" / "mine.toml"
    file.write_text(RECIPE)
    return file


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install tensorrt-rtx-cu13)",
)
@pytest.mark.skipif(nvidia_driver() is not None, reason="there is an NVIDIA driver here")
def test_run_does_everything_in_the_recipe(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    fail(cli, "run", recipe, "--output", output)  # the engine is skipped, and 40 images are few
    words = ("run", recipe, "--output", output, "--allow-skip", "engines", *ALLOW)
    report = run_json(cli, *words)
    assert report["passed"] is True
    names = [result["artifact"] for result in report["artifacts"]]
    assert names[:2] == ["fp16", "int8"]
    assert names[2].startswith("van_digits-fp16-sm89-rtx")
    bundle = Bundle.open(output)
    assert list(bundle.artifacts) == ["fp32", *names]
    assert bundle.problems() == []
    engine = bundle.artifact(names[2]).engine
    assert engine is not None
    assert [str(batch) for batch in engine.profiles] == ["1:2:4"]
    verified = report["verify"]["artifacts"]
    outcomes = {name: entry["outcome"] for name, entry in verified.items()}
    assert outcomes == {"fp32": "pass", "fp16": "pass", "int8": "pass", names[2]: "skipped"}
    assert verified[names[2]]["reason"] == "engine not executed: no GPU"
    assert report["evaluate"]["count"] == 40
    assert list(report["evaluate"]["skipped"]) == [names[2]]
    assert set(bundle.manifest.checks) >= {"verify", "evaluate"}
    again = cli(*words)
    assert again.exit_code == 0
    assert "Exported: nothing changed" in again.stdout
    assert again.stdout.count("nothing changed") > 1  # the export and the engine
    assert "SKIPPED" in again.stdout


def test_options_override_the_recipe(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    embed = '\n[export]\nembed_preprocess = "uint8"\n'
    recipe.write_text(RECIPE.split("[engines]")[0].replace('"fp16", "int8"', '"int8"') + embed)
    words = ("--precision", "fp16", "--evaluate", recipe.parent / "labelled")
    report = run_json(cli, "run", recipe, "--output", tmp_path / "bundle", *words)
    assert [result["artifact"] for result in report["artifacts"]] == ["fp16"]
    assert report["evaluate"]["count"] == 60
    artifacts = list(Bundle.open(tmp_path / "bundle").artifacts)
    assert artifacts == ["fp32", "fp16", "fp32-uint8", "fp16-uint8"]


def test_conflicting_precisions_are_refused_before_the_export(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(RECIPE.replace('["fp16", "int8"]', '["int8"]'))
    output = fail(cli, "run", recipe, "--output", tmp_path / "bundle", code=5)
    assert "engines.precisions has 'fp16', which the recipe does not make." in output
    assert not (tmp_path / "bundle").exists()


def test_a_failed_gate_of_the_recipe_fails_the_run(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(f"{RECIPE.split('[precision]')[0]}[gates.fp32]\nsqnr_db = 200.0\n")
    output = fail(cli, "run", recipe, "--output", tmp_path / "bundle")
    assert "was written and does not pass its gates." in output
    assert Bundle.open(tmp_path / "bundle").manifest.checks["verify"]["passed"] is False
