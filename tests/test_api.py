"""The public API: its page runs, its names, and the same bytes whatever asked for them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import van_deploy as vd
from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.config import Recipe
from van_deploy.errors import UsageError
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.embedded import write_digits_folder

RECIPE = """
[model]
name = "van_digits"

[batch]
min = 1
opt = 2
max = 4

[export]
opset = 18
embed_preprocess = "uint8"

[precision]
make = ["fp16"]
"""


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    page = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    write_digits_folder(tmp_path / "digits", "heldout", 60)
    example, engines, mistake = page
    if importlib.util.find_spec("tensorrt_rtx") is None:
        engines = ""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join([example, engines, mistake])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "['fp32'] not there yet"
    assert lines[1] == "fp16 True"
    assert lines[2:4] == ["accurate enough: True", "2 rows"]
    assert re.fullmatch(r"digits/.* \[\('\d', 0\.\d+\), .*\]", lines[4])
    assert lines[-2:] == [
        "'opset=' is 40: it should be less than or equal to 23.",
        "Correct it.",
    ]
    if engines:
        assert lines[6].startswith("True van_digits-fp32-sm89-rtx")


def test_a_file_a_command_and_a_call_ask_for_the_same(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []

    def asked(recipe: Recipe, **_: object) -> LoadedVan:
        recipes.append(recipe)
        raise UsageError("asked")

    monkeypatch.setattr("van_deploy.exporting.load_for", asked)
    file = tmp_path / "mine.toml"
    file.write_text(RECIPE)
    flags = ("--batch", "1:2:4", "--opset", "18", "--embed-preprocess", "uint8")
    cli("export", file)
    cli("export", "van_digits", *flags, "--precision", "fp16")
    options = {"opset": 18, "embed_preprocess": "uint8", "precision": ["fp16"]}
    with pytest.raises(UsageError, match=r"^asked$"):
        vd.export("van_digits", batch="1:2:4", **options)  # type: ignore[arg-type]
    changes = {"batch": "1:2:4", "export.opset": 18, "export.embed_preprocess": "uint8"}
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    cli("run", file)
    cli("run", "van_digits", *sets, "--precision", "fp16")
    with pytest.raises(UsageError, match=r"^asked$"):
        vd.run_recipe("van_digits", changes={**changes, "precision.make": ["fp16"]})
    assert recipes == recipes[:1] * 6
    assert (recipes[0].batch.opt, recipes[0].export.opset) == (2, 18)


@pytest.mark.slow
def test_they_make_the_same_manifest(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    file = tmp_path / "mine.toml"
    file.write_text(RECIPE)
    assert cli("export", file, "-o", tmp_path / "file").exit_code == 0
    words = ("--batch", "1:2:4", "--opset", "18", "--embed-preprocess", "uint8")
    line = cli("export", "van_digits", "-o", tmp_path / "line", *words, "--precision", "fp16")
    assert line.exit_code == 0
    options = {"opset": 18, "embed_preprocess": "uint8", "precision": ["fp16"]}
    assert vd.export("van_digits", tmp_path / "call", batch="1:2:4", **options)  # type: ignore[arg-type]
    made = (tmp_path / "file" / "manifest.json").read_bytes()
    for name in ("line", "call"):
        assert (tmp_path / name / "manifest.json").read_bytes() == made
    assert b'"written": "2023-11-14T22:13:20+00:00"' in made


def test_no_public_name_is_a_package_s_or_a_module_s() -> None:
    folder = Path(vd.__file__).parent
    ours = {path.stem for path in folder.iterdir() if path.name != "__init__.py"}
    assert set(vd.__all__) & ours == set()
    assert {name for name in vd.__all__ if getattr(vd, name, None) is None} == set()
    assert set(vd.__all__) <= set(dir(vd))


class TestBundle:
    def test_it_sees_what_another_one_wrote(self, copy_of: Copy, digits_bundle: Bundle) -> None:
        path = copy_of(digits_bundle)
        first, second = vd.open_bundle(path), vd.open_bundle(path)
        made = first.quantize(precision="fp16", equalize=False, threads=1)
        assert (made.passed, bool(made), made.artefact) == (True, True, "fp16")
        assert second.artefacts == ["fp32", "fp16"]
        assert second.manifest.name == second.name == "van_digits"
        assert repr(second) == f"Bundle('{path}')"

    @each(
        ("options", "message"),
        [
            ({"max_drop": "1"}, "'max_drop=' is '1': it should be a number."),
            ({"precison": "fp16"}, "The key 'precison=' is unknown."),
            (
                {"precision": "fp16", "max_drop": 1.0},
                "max_drop= is for INT8, and precision= is fp16.",
            ),
            (
                {"calibrate_on_noise": True, "images": "train"},
                "calibrate_on_noise= and images= are both given.",
            ),
        ],
    )
    def test_options_are_checked_before_any_work(
        self, digits_bundle: Bundle, options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            vd.open_bundle(digits_bundle.path).quantize(**options)  # type: ignore[arg-type]
        assert caught.value.message == message

    def test_images_in_memory_are_answered_like_files(self, digits_bundle: Bundle) -> None:
        bundle = vd.open_bundle(digits_bundle.path)
        file = digits_bundle.path / "golden/0.png"
        answers = bundle.predict([file, file.read_bytes()], top_k=2)
        assert answers.passed
        assert len(answers) == 2
        assert [answer.source for answer in answers] == [str(file), "-"]
        assert answers.predictions[0].top == answers.predictions[1].top
        answers = bundle.predict(b"no image")  # is no pass
        assert (bool(answers), answers.unreadable) == (False, 1)
