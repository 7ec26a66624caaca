"""Recipes: every one that ships is valid; a mistake names the file and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from van_deploy.errors import RecipeError, UsageError
from van_deploy.model.variants import VARIANTS
from van_deploy.recipe import BatchRange, Recipe, builtin_recipes, read_recipe, recipe_named


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
