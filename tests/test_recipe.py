"""Recipes: every one that ships is valid; a mistake names the file and the key."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from van_deploy.config import BatchRange, Recipe
from van_deploy.errors import RecipeError, UsageError
from van_deploy.model.variants import VARIANTS
from van_deploy.recipe import builtin_recipes, read_recipe, recipe_named
from van_deploy.run import build_options, quantize_settings


def test_there_is_a_recipe_for_every_variant_and_for_the_embedded_network() -> None:
    assert set(builtin_recipes()) == {*VARIANTS, "van_digits"}


@pytest.mark.parametrize("name", [*VARIANTS, "van_digits"])
def test_every_recipe_that_ships_reads_and_names_its_model(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.model.name == name
    assert recipe.batch == BatchRange(1, 8, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nname='x'", "has an unknown key 'modle'"),
        ("[model]\nnam='x'", "has an unknown key 'model.nam'"),
        ("[model]\nname=3", "the key 'model.name' must be a str, not 3"),
        ("model=3", "the key 'model.' must be a table, not 3"),
        ("[export]\nopset='20'", "the key 'export.opset' must be a int, not '20'"),
        ("[export]\nfold=1", "the key 'export.fold' must be a bool, not 1"),
        ("[batch]\nmin=true", "the key 'batch.min' must be a int, not True"),
        ("[batch]\nmin=4\nopt=2", "The batch range 4:2:32 is not 1 <= min <= opt <= max"),
        ("[preprocessing]\nmean=0.5", "the key 'preprocessing.mean' must be a list, not 0.5"),
        ("[preprocessing]\nmean=['a']", "the key 'preprocessing.mean' must be a float, not 'a'"),
        ("[model", "is not TOML"),
        ("[precision]\nmake='fp16'", "the key 'precision.make' must be a list, not 'fp16'"),
        ("[precision]\nmake=['int4']", "[precision]: There is no precision 'int4'"),
        ("[precision]\nimages=3", "the key 'precision.images' must be a path, not 3"),
        ("[precision]\nimages=''", "the key 'precision.images' must be a path, not ''"),
        ("[precision]\nmaxdrop=1", "has an unknown key 'precision.maxdrop'"),
        ("[engines]\nprecisions=['bf16']", "[engines]: There is no precision 'bf16'"),
        ("[engines]\nprecisions=['fp16']", "The engines want 'fp16', which is not made"),
        ("[engines]\ntarget='sm_89'", "has an unknown key 'engines.target'"),
        ("[evaluate]\nlabels='l.txt'", "[evaluate]: There are labels or a limit, and no images"),
        ("[evaluate]\nimages='x'\nlimit=0", "[evaluate]: A limit of 0 images is none"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert message in caught.value.message
    assert str(file) in caught.value.message
    assert caught.value.remedy


def test_an_unknown_key_offers_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[preprocessing]\nimagesize = 64")
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert caught.value.remedy == "Did you mean 'preprocessing.image_size'?"


def test_whole_numbers_do_for_floats_and_lists_become_tuples(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[preprocessing]\nmean=[0, 0.5, 1]\ncrop_pct=1")
    settings = read_recipe(file).preprocessing
    assert settings.mean == (0.0, 0.5, 1.0)
    assert settings.crop_pct == 1.0


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").touch()
    (tmp_path / "set.toml").touch()
    file = tmp_path / "mine.toml"
    file.write_text(
        "[model]\nweights='mine.pth'\nlabels='names.txt'\n"
        "[precision]\nmake=['fp16']\nimages='train'\ncalibration='set.toml'\n"
        "[engines]\ntiming_cache='/var/cache/timings'\n"
        "[evaluate]\nimages='val/../test'\nlabels='labels.txt'\n"
    )
    recipe = read_recipe(file)
    assert recipe.model.weights == str(tmp_path / "mine.pth")
    assert recipe.model.labels == str(tmp_path / "names.txt")
    assert recipe.precision.images == tmp_path / "train"
    assert recipe.precision.calibration == str(tmp_path / "set.toml")
    assert recipe.engines.timing_cache == Path("/var/cache/timings")
    assert recipe.evaluate.images == tmp_path / "val/../test"
    assert recipe.evaluate.labels == tmp_path / "labels.txt"


def test_names_that_are_no_files_stay_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[model]\nweights='owner/name'\n[precision]\ncalibration='imagenet-512'")
    recipe = read_recipe(file)
    assert (recipe.model.weights, recipe.precision.calibration) == ("owner/name", "imagenet-512")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("method='best'", "[precision]: There is no method called 'best'."),
        ("target='gpu'", "[precision]: There is no target called 'gpu'."),
        ("rest='int4'", "[precision]: There is no rest called 'int4'."),
    ],
)
def test_a_precision_that_makes_no_sense_is_the_recipes_fault(
    tmp_path: Path, table: str, message: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[precision]\nmake=['int8']\n{table}")
    with pytest.raises(RecipeError) as caught:
        quantize_settings(read_recipe(file).precision, "int8")
    assert caught.value.message == message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("targets=['ada']", "[engines]: 'ada' is not a target."),
        ("batch=['1:2']", "[engines]: '1:2' is not a batch range."),
        ("workspace='lots'", "[engines]: 'lots' is not a size."),
        ("optimization_level=9", "[engines]: There is no optimization level 9."),
        ("profiling='all'", "[engines]: There is no 'all'."),
        ("hardware_compatibility='any'", "[engines]: There is no 'any'."),
    ],
)
def test_an_engine_that_makes_no_sense_is_the_recipes_fault(
    tmp_path: Path, table: str, message: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[engines]\n{table}")
    recipe = read_recipe(file)
    with pytest.raises(RecipeError) as caught:
        build_options(recipe.engines, recipe.batch)
    assert caught.value.message == message
    assert caught.value.remedy


def test_every_value_of_the_tables_arrives(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[batch]\nmin=1\nopt=2\nmax=4\n"
        "[precision]\nmake=['fp16', 'int8']\nmethod='entropy'\nscope=['all']\nrest='fp32'\n"
        "keep=['block1.0']\nequalize=false\nrefine=false\nmax_drop=0.5\n"
        "[engines]\nworkspace='1GiB'\noptimization_level=2\ntf32=false\nrefit=true\n"
        "strip_weights=true\nversion_compatible=true\nprofiling='detailed'\n"
        "hardware_compatibility='ampere-plus'\n"
    )
    recipe = read_recipe(file)
    int8 = quantize_settings(recipe.precision, "int8")
    assert (int8.method, int8.scope, int8.rest, int8.keep) == (
        "entropy",
        ("all",),
        "fp32",
        ("block1.0",),
    )
    assert (int8.equalize, int8.refine, int8.max_drop) == (None, None, 0.5)
    half = quantize_settings(recipe.precision, "fp16")
    assert (half.precision, half.max_drop, half.keep) == ("fp16", None, ("block1.0",))
    options = build_options(recipe.engines, recipe.batch)
    assert options.as_dict() == {
        "profiles": ["1:2:4"],
        "targets": [],
        "hardware_compatibility": "ampere-plus",
        "version_compatible": True,
        "workspace_bytes": 2**30,
        "optimization_level": 2,
        "tf32": False,
        "strip_weights": True,
        "refit": True,
        "profiling": "detailed",
    }


def test_the_page_about_recipes_shows_a_recipe_that_reads_with_every_table(
    repository: Path, tmp_path: Path
) -> None:
    page = (repository / "docs" / "recipe.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "mine.toml"
    file.write_text(block)
    recipe = read_recipe(file)
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert set(re.findall(r"^\[(\w+)", block, re.MULTILINE)) == names
    assert recipe.precision.make == ("fp16", "int8")
    build_options(recipe.engines, recipe.batch)
    quantize_settings(recipe.precision, "int8")


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("")
    assert read_recipe(file) == Recipe()


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"There is no recipe called 'van_b9'") as caught:
        recipe_named("van_b9")
    assert "Did you mean van_b" in caught.value.remedy


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["", "1", "1:2", "a:b:c", "1:8:32:64", "1.5:2:3"])
def test_a_batch_range_is_three_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="is not a batch range"):
        BatchRange.parse(text)


@pytest.mark.parametrize("text", ["0:1:2", "4:2:8", "1:9:8", "-1:1:1"])
def test_a_batch_range_rises(text: str) -> None:
    with pytest.raises(UsageError, match="is not 1 <= min <= opt <= max"):
        BatchRange.parse(text)
