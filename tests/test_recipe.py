"""Recipes: built-in recipes, changes, and messages with the key as the user wrote it."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from supply_chain.reference import generated_files
from tests.each import each
from van_deploy import config
from van_deploy.config import BatchRange, QuantizeSettings, Recipe
from van_deploy.config import named_options as named
from van_deploy.config.named_options import EXPORT, RUN, parse_assignments, parse_changes
from van_deploy.errors import RecipeError, UsageError
from van_deploy.model.variants import VARIANTS
from van_deploy.recipe import builtin_files, read_recipe, resolve_recipe
from van_deploy.schema import validate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a recipe."""
    return tmp_path / "mine.toml"


def test_built_in_recipes_only_set_the_name() -> None:
    assert set(builtin_files()) == {*VARIANTS, "van_digits"}
    for name, file in builtin_files().items():
        for given in (name, Path(name), file):
            assert resolve_recipe(given) == Recipe.model_validate({"model": {"name": name}})
        assert re.findall(r"^\w+ *=", file.read_text(), re.MULTILINE) == ["name ="]


MISTAKES = {  # contents of a file, and a part of the message
    "[modle]\nname='x'": "the key 'modle' is unknown. Did you mean 'model'?",
    "[model]\nnam='x'": "the key 'model.nam' is unknown. Did you mean 'model.name'?",
    "[model\n": "is not TOML",
    "int=3": "the key 'int' is unknown. Known keys: ",
    "[export]\n'[x]'=3": "the key 'export.[x]' is unknown. Known keys: ",
    **dict.fromkeys((f"a={'[' * n}{']' * n}" for n in (60, 20_000)), "nested more than 40 deep"),
    ".".join("a" * 60) + " = 1": "nested more than 40 deep",
    f"a = '{'x' * 70_000}'": "it has a line of 70,006 characters",
    "[export]\nopset = 18\nopset = 20\n": "is not TOML: Cannot overwrite a value (at line 3",
    "[model]\nname=3": "'model.name' is 3: it should be a text. Give a value as",
    "model=3": "'model' is 3: it should be a table.",
    "[export]\nopset=20.0": "'export.opset' is 20.0: it should be a whole number.",
    "[batch]\nmin=true": "'batch.min' is True: it should be a whole number.",
    "[export]\nopset=40": "'export.opset' is 40: it should be less than or equal to 23.",
    "[export]\noutputs=['top5', 'top5']": "export.outputs repeats an output. Give each output",
    "[export]\nout_indices=[1]": "export.out_indices selects feature maps, and export.features is",
    "[batch]\nmin=4\nopt=2": "range 4:2:32 is not min <= opt <= max. Give three rising",
    "[preprocessing]\nmean=0.5": "'preprocessing.mean' is 0.5: it should be a list.",
    "[preprocessing]\ncrop_pct=nan": "'preprocessing.crop_pct' is nan: it should be a finite",
    "[precision]\ncalibrate_on_noise=true\nimages='x'": "and precision.images conflict. Remove one",
    "[precision]\ntarget='cpu'\nrest='fp16'": "rest fp16 is for FP16, and precision.target cpu",
    "[precision]\nbias_correction=false": "Switch off precision.equalize, too.",
    "[precision]\nscope=['auto', 'all']": "precision.scope auto times whole scopes, and conf",
    "[precision]\nmake=['bf16', 'int8']\n[export]\nopset=18": (
        "int8 in precision.make needs opset 19 or newer, and export.opset is 18. Use opset 20."
    ),
    "[precision]\nmake=['int8']\ntarget='cpu'\nimages='x'\n[engines]\nprecisions=['int8']": (
        "Add it to precision.make with precision.target tensorrt, or use one of: fp32."
    ),
    "[engines]\ntargets=['sm_89']": "engines.targets needs engines.precisions: no engine is",
    "[engines]\ntargets=['ada']": "'engines.targets.0' is 'ada': it should be compute",
    "[engines]\ntargets=['sm_89', '8.9']": "engines.targets repeats a plan.",
    "[engines]\nworkspace='lots'": "'engines.workspace' is 'lots': it should be a number",
    "[evaluate]\nclass_order='index'": "evaluate.class_order needs evaluate.images. Give",
    "[export]\nfeatures=true\n[evaluate]\nimages='x'": "and evaluate.images needs classes.",
    "[preprocessing]\nimage_size=64\n[export]\ndynamic_size='96:128:160'": (
        "image_size 64x64 is outside export.dynamic_size 96:128:160. Give a size in the"
    ),
}


@each(("text", "message"), MISTAKES.items())
def test_mistakes_name_the_file_and_the_key(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert caught.value.message.startswith(f"The recipe '{path}'")
    assert message in f"{caught.value.message} {caught.value.remedy}"
    with pytest.raises(RecipeError, match="No such file"):
        resolve_recipe("none.toml")


def test_paths_are_relative_to_the_recipe(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.pth").touch()
    (tmp_path / "set.toml").touch()
    path.write_text(
        "[model]\nweights='mine.pth'\n[precision]\nimages='/train'\ncalibration='set.toml'\n"
        "[evaluate]\nimages='val/../test'\nlabels='labels.txt'\n"
    )
    recipe = read_recipe(path, parse_assignments(["precision.evaluate=val"]))
    assert recipe.model.weights == str(tmp_path / "mine.pth")
    assert recipe.precision.images == Path("/train")
    assert recipe.precision.calibration == str(tmp_path / "set.toml")
    assert recipe.precision.evaluate == Path("val")
    assert recipe.evaluate.images == tmp_path / "val/../test"
    assert recipe.evaluate.labels == tmp_path / "labels.txt"


def test_calibration_and_weights_are_a_path_or_a_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    Path("train").mkdir()
    train = {"calibration": "train"}
    for text, changes, sources in (
        ("calibration='imagenet-512'", {}, (None, "imagenet-512")),
        ("calibration='train'", {}, (Path("train"), None)),
        ("images='val'", train, (Path("train"), None)),
    ):
        path.write_text(f"[model]\nweights='owner/name'\n[precision]\n{text}")
        recipe = read_recipe(Path(path.name), parse_changes(RUN, changes))
        assert (recipe.model.weights, recipe.precision.sources) == ("owner/name", sources)
    Path("van_b0").touch()
    path.write_text("model = {weights = './van_b0'}")
    assert read_recipe(path.name).model.weights == "./van_b0"  # the file, not the variant


def test_fp16_ignores_options_of_int8(path: Path) -> None:
    path.write_text(
        "[precision]\nmake=['fp16', 'int8']\nmethod='minmax'\nscope=['all']\nrest='fp32'\n"
        "keep=['block1.0']\nkeep_defaults=false\nequalize=false\nmax_drop=0.5\n"
    )
    int8, half = (read_recipe(path).precision.of(name) for name in ("int8", "fp16"))
    assert (int8.method, int8.scope, int8.rest, int8.max_drop) == ("minmax", ("all",), "fp32", 0.5)
    assert half == QuantizeSettings(precision="fp16", keep=("block1.0",), keep_defaults=False)
    assert (int8.keep, int8.equalize, int8.keep_defaults) == (half.keep, False, True)


SHORT_FORMS: list[tuple[dict[str, Any], int]] = [
    ({"batch": 8}, 8),
    ({"batch": "1:2:4"}, 4),
    ({"batch": {"max": 16}}, 16),
    ({"export": {"dynamic_size": "64:96x64:128"}, "engines": {"batch": ["1", "2:4:8"]}}, 32),
]


@each("tables, largest", SHORT_FORMS)
def test_ranges_are_a_text_a_table_or_one_batch(tables: dict[str, Any], largest: int) -> None:
    assert validate(Recipe, tables).batch.max == largest
    jsonschema.validate(tables, Recipe.model_json_schema())


@each("text", ["", "1:2", "a:b:c", "1:8:32:64", "1.5:2:3", "-1:1:1", "4:2:8", "1:9:8", True, [1]])
def test_invalid_batch_ranges(text: object) -> None:
    with pytest.raises(UsageError, match=r"should be min:opt:max|is not min <= opt <= max"):
        validate(BatchRange, text)


def test_assignments(path: Path) -> None:
    engines = "[engines]\ntf32=true\nprecisions=['fp32']\ntargets=['sm_89']\n"
    path.write_text(f"batch='1:2:4'\n[preprocessing]\nmean=[0, 0.5, 1]\n{engines}")
    assignments = ["engines.tf32=false", "batch=1:2:8", "model.weights=mine.pth"]
    assignments += ["engines.precisions=[]"]  # builds none, whatever the targets
    assignments += ['precision.make=["int8"]', "gates.int8.top1_loss = 0.5"]
    recipe = read_recipe(path, parse_assignments(assignments))
    assert recipe.preprocessing.mean == (0.0, 0.5, 1.0)
    assert recipe.engines.tf32 is False
    assert recipe.batch == BatchRange(1, 2, 8)
    assert recipe.model.weights == "mine.pth"
    assert recipe.precision.make == ("int8",)
    assert recipe.gates.int8.top1_loss == 0.5


INVALID: list[tuple[object, str]] = [
    (["export.opset=40"], "'--set export.opset' is 40: it should be less than or equal to"),
    (["engines.tf23=false"], "unknown. Did you mean '--set engines.tf32'?"),
    (["tf32"], "--set 'tf32' is not an assignment. Write KEY=VALUE, such as --set engines."),
    (["batch.max=8"], "'batch.max' cannot be set: 'batch' is not a table. Set 'batch' as"),
    (["precision.calibrate_on_noise=true"], "--set precision.calibrate_on_noise and precis"),
    ({"opset": 40}, "'opset=' is 40: it should be less than or equal to 23."),
    ({"opst": 20}, "The key 'opst=' is unknown."),
    ({"batch": "1:2"}, "'batch=' is '1:2': it should be min:opt:max"),
    ({"precision": ["int4"]}, "'precision=' is 'int4': it should be 'fp16', 'bf16' or 'int8'."),
    (["engine.tf32=false"], "'--set engine.tf32' is unknown. Did you mean '--set engines.tf32'?"),
    (["export.dynamic_size.min=96"], "'export.dynamic_size.opt' is missing."),
    (
        [f"export.dynamic_size.{k}" for k in ("min=96", "opt=64", "max=96")],
        "The size range 96:64:96 is not min <= opt <= max. Give three rising values",
    ),
    (["export.set=3"], "'--set export.set' is unknown. Did you mean '--set export.opset'?"),
    (["export.opset.x=3"], "'--set export.opset.x' is {'x': 3}: it should be a whole number."),
    ({"opset": np.int64(18)}, "'opset=' is np.int64(18): it should be Python's own number or bool"),
    ({"std": np.ones(3)}, "'std=' is array([1., 1., 1.]): it should be Python's own number"),
    ({"labels": "\udcff"}, "'labels=' is '\\udcff': it should be Python's own number or bool, a"),
    ({"batch": {"mn": object()}}, "'batch.mn' is <object obj"),
]


@each(("change", "message"), INVALID)
def test_mistakes_in_changes_name_the_option(path: Path, change: Any, message: str) -> None:
    path.write_text("batch = '1:2:4'\n[precision]\nimages = 'train'\n")
    parse: Any = parse_assignments if isinstance(change, list) else partial(parse_changes, EXPORT)
    with pytest.raises(UsageError) as caught:
        read_recipe(path, parse(change))
    assert message in f"{caught.value.message} {caught.value.remedy}"


@each("name", [name for name in vars(config) if name.endswith(("Settings", "Options", "Recipe"))])
def test_every_option_has_a_description(name: str) -> None:
    options = named.named_options(getattr(config, name))
    assert [option.name for option in options.values() if not option.field.description] == []


def test_generated_files_are_current(repository: Path) -> None:
    stale = [
        path.relative_to(repository).as_posix()
        for path, text in generated_files(repository).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `python -m supply_chain.reference`"


def test_example_of_the_page_is_valid(repository: Path, path: Path) -> None:
    page = (repository / "docs" / "recipe.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path.write_text(block)
    assert read_recipe(path).precision.make == ("fp16", "int8")
    assert set(re.findall(r"^\[(\w+)", block, re.MULTILINE)) == set(Recipe.model_fields)
