"""The public API: its page, its names, and equal results of file, command and call."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import van_deploy as vd
from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.errors import error_of
from van_deploy.bundle import Bundle
from van_deploy.config import Recipe
from van_deploy.errors import UsageError
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.embedded import write_digits_folder

RECIPE = """batch = "1:2:4"
model = {name = "van_digits"}
export = {opset = 18, embed_preprocess = "uint8"}
precision = {make = ["fp16"]}
"""
OPTIONS: Any = {"batch": "1:2:4", "opset": 18, "embed_preprocess": "uint8", "precision": ["fp16"]}
FLAGS = "--batch 1:2:4 --opset 18 --embed-preprocess uint8 --precision fp16"


@pytest.mark.slow
def test_examples_of_the_page_run(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "api.md").read_text(encoding="utf-8")
    example, engines, mistake = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    write_digits_folder(tmp_path / "digits", "heldout", 60)
    with_engines = importlib.util.find_spec("tensorrt_rtx") is not None
    program = "\n".join([example, engines if with_engines else "", mistake])
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:4] == [*("['fp32'] new", "fp16 True", "accurate enough: True", "2 rows")]
    assert re.fullmatch(r"digits/.* \[\('\d', 0\.\d+\), .*\]", lines[4])
    assert lines[-1] == "'opset=' is 40: it should be less than or equal to 23."
    if with_engines:
        assert lines[6].startswith("True van_digits-fp32-sm89-rtx")


def test_file_command_and_call_give_the_same_recipe(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, recipes = tmp_path / "mine.toml", list[Recipe]()
    file.write_text(RECIPE)

    def record(recipe: Recipe, **_: object) -> LoadedVan:
        recipes.append(recipe)
        raise UsageError("recorded")

    monkeypatch.setattr("van_deploy.exporting.load_model", record)
    changes = {"batch": "1:2:4", "export.opset": 18, "export.embed_preprocess": "uint8"}
    sets = [f"--set={key}={value}" for key, value in changes.items()]
    cli.fails(2, "export", file)
    cli.fails(2, "run", file)
    cli.fails(2, f"export van_digits {FLAGS}")
    cli.fails(2, "run van_digits --precision fp16", *sets)
    with pytest.raises(UsageError, match="recorded"):
        vd.export("van_digits", **OPTIONS)
    with pytest.raises(UsageError, match="recorded"):
        vd.run_recipe("van_digits", changes={**changes, "precision.make": ["fp16"]})
    assert recipes == recipes[:1] * 6
    assert (recipes[0].batch.opt, recipes[0].export.opset) == (2, 18)


def test_public_names_differ_from_modules() -> None:
    folder = Path(vd.__file__).parent
    assert not set(vd.__all__) & {p.stem for p in folder.iterdir() if p.name != "__init__.py"}


def test_bundle_sees_other_changes(copy_bundle: Copy, digits_bundle: Bundle) -> None:
    path = copy_bundle(digits_bundle)
    first, second = vd.open_bundle(path), vd.open_bundle(path)
    result = first.quantize(precision="fp16", threads=1)
    assert (result.passed, bool(result), result.artifact) == (True, True, "fp16")
    assert second.artifacts == ["fp32", "fp16"]
    assert second.manifest.name == second.name == "van_digits"


WRONG_TYPES: list[tuple[Callable[[Path], object], str]] = [
    (lambda _: vd.open_bundle(cast(Any, 3)), "'path=' is 3: it should be a path."),
    (lambda path: vd.open_bundle(path, require_signature=cast(Any, 3)), "'require_signature=' is"),
    (lambda path: vd.open_bundle(path).check(cast(Any, 3)), "'baseline=' is 3: it should be a pat"),
    (lambda path: vd.open_bundle(path).report(cast(Any, 3)), "'output=' is 3: it should be a path"),
    (lambda path: vd.open_bundle(path).package(cast(Any, 3)), "'output=' is 3: it should be a pat"),
    (lambda path: vd.open_bundle(path).predict(cast(Any, 3)), "'images=' is 3: it should be a pat"),
    (lambda _: vd.export("van_digits", cast(Any, 3)), "'output=' is 3: it should be a path."),
    (lambda _: vd.export("van_digits", images=cast(Any, 3)), "'images=' is 3: it should be a path"),
    (lambda _: vd.export("van_digits", offline=cast(Any, "no")), "'offline=' is 'no': it should"),
    (lambda _: vd.run_recipe("van_digits", cast(Any, 3)), "'output=' is 3: it should be a path."),
    (lambda _: vd.run_recipe("van_digits", changes=cast(Any, {3: 4})), "'changes=' is {3: 4}: it"),
    (lambda _: vd.run_recipe("van_digits", changes=cast(Any, [])), "'changes=' is []: it should b"),
    (lambda _: vd.read_recipe(cast(Any, 3)), "'path=' is 3: it should be a path."),
    (lambda _: vd.load_van(cast(Any, 3)), "'spec=' is 3: it should be a path."),
    (lambda _: vd.open_bundle(""), "'path=' is '': it should be a path."),
    (lambda path: vd.open_bundle(path, require_signature=""), "'require_signature=' is '': it"),
    (lambda path: vd.open_bundle(path).verify(images=""), "'images=' is '': it should be a path;"),
    (lambda path: vd.open_bundle(path).evaluate("x", images="y"), "'images=' is given twice."),
    (lambda path: vd.open_bundle(path).predict(cast(Any, bytearray(2))), "'images=' is bytearray("),
    (lambda path: vd.open_bundle(path).check("x", update=cast(Any, "no")), "'update=' is 'no': it"),
    (lambda path: vd.open_bundle(path).quantize(force=cast(Any, "no")), "'force=' is 'no': it sh"),
    (lambda path: vd.open_bundle(path).build(force=cast(Any, 0)), "'force=' is 0: it should be tr"),
    (lambda path: vd.open_bundle(path).benchmark(save=cast(Any, 0)), "'save=' is 0: it should be"),
    (lambda path: vd.open_bundle(path).package(only_check=cast(Any, 1)), "'only_check=' is 1: it"),
]


@each("call, message", WRONG_TYPES)
def test_arguments_of_another_type(
    digits_bundle: Bundle, call: Callable[[Path], object], message: str
) -> None:
    assert message in error_of(UsageError, call, digits_bundle.path).message


def test_bytes_and_files_give_the_same_prediction(digits_bundle: Bundle) -> None:
    bundle, file = vd.open_bundle(digits_bundle.path), digits_bundle.path / "golden/0.png"
    with os.scandir(file.parent) as entries:
        entry: Any = next(one for one in entries if one.name == "0.png")
    predictions = bundle.predict([entry, file.read_bytes()], top_k=2)  # a path, but no Path
    assert predictions.passed
    first, second = predictions
    assert (first.source, second.source, first.top) == (str(file), "-", second.top)
    assert not bundle.predict([])
    predictions = bundle.predict(b"no image")
    assert (bool(predictions), predictions.unreadable) == (False, 1)
    assert str(next(iter(predictions)).error).startswith("The data cannot be read as an image")
