"""Recipes, the version-controlled truth of how models are deployed, and calibration sets.

A recipe is a TOML file. It is read once, here, into the tables of
:mod:`van_deploy.config`; a mistake is reported with the file and the key. Paths in it are
relative to the file. ``export/`` holds one for each variant; a user copies one for a model
of their own. ``docs/recipe.md`` shows every key.

A calibration set says which images calibrate INT8, and how many; ``calibration/`` holds some.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from van_deploy.config import Recipe
from van_deploy.config.fields import PathOrNameMarker, Table, option
from van_deploy.config.named_options import Change, Changes, explicit_values, recipe_from_tables
from van_deploy.documents import tomllib
from van_deploy.errors import RecipeError, UsageError
from van_deploy.schema import (
    Settings,
    field_key,
    nested_table,
    read_toml_document,
    read_toml_tables,
)

RECIPES, CALIBRATION_SETS = "van_deploy.recipes", "van_deploy.calibration_sets"
NO_CHANGES: Changes = {}


class ImageSelection(Table):
    """Which images, and how many. Table ``[images]``.

    Attributes:
        source: A folder (one sub-folder a class, or flat), an .npz, the digits inside the package,
            or noise.
        path: The folder or file, relative to the set; empty for what --images gives.
        count: How many at most.
        seed: Of the choice.
        balanced: The same number of every class folder, as far as there are that many.
        held_out: Share of the chosen images that is not calibrated on but compares the methods,
            and evaluates the result where there are no other images.
        digest: Digest the chosen images must have; empty where it is not known.
    """

    source: Literal["folder", "npz", "digits", "noise"] = option("folder")
    path: str = option("")
    count: int = option(512, ge=2)
    seed: int = option(0, ge=0)
    balanced: bool = option(True)
    held_out: float = option(0.2, ge=0, lt=1)
    digest: str = option("")


class CalibrationSet(Table):
    """Which images calibrate INT8; one file of ``calibration/``.

    Attributes:
        description: What it is for, one sentence.
        images: Which images.
    """

    description: str = option("")
    images: ImageSelection = option(ImageSelection)


def builtin_files(package: str = RECIPES) -> dict[str, Path]:
    """Return the TOML files inside a data package by name; by default the recipes."""
    folder = resources.files(package)
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name.removesuffix(".toml"): Path(str(folder / name)) for name in names}


def resolve_file(name: str, package: str, what: str) -> Path:
    """Return the file inside a data package that ``name`` means, or the path that it is.

    Args:
        name: of a file in the package, or a path that ends in ``.toml``.
        package: the data package.
        what: what errors call such a file, such as ``recipe``.

    Raises:
        RecipeError: it is neither.
    """
    known = builtin_files(package)
    if name in known:
        return known[name]
    if not name.endswith(".toml"):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        guess = f"Did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(
            f"There is no {what} called '{name}'.",
            f"{guess}Known {what}s: {', '.join(known)}; one of your own is given by its path.",
        )
    return Path(name)


def load_recipe(name: str, changes: Changes = NO_CHANGES) -> Recipe:
    """Return the built-in recipe ``name``, or the one in the file of that path.

    Raises:
        RecipeError: there is none, or it is wrong.
        UsageError: a change is wrong.
    """
    return read_recipe(resolve_file(name, RECIPES, "recipe"), changes)


def resolve_recipe(model: str | Path | Recipe, changes: Changes = NO_CHANGES) -> Recipe:
    """Return the recipe for what the user gave: a recipe, its name, or anything with weights.

    Raises:
        RecipeError: it is a recipe, and wrong.
        UsageError: a change is wrong.
    """
    if isinstance(model, Recipe):
        return recipe_from_tables(explicit_values(model), changes)
    name = str(model)
    if name.endswith(".toml") or name in builtin_files():
        return load_recipe(name, changes)
    return recipe_from_tables({"model": {"weights": name}}, changes)


def read_recipe(path: Path, changes: Changes = NO_CHANGES) -> Recipe:
    """Return the recipe in a TOML file, every key checked.

    Args:
        path: the file.
        changes: values that replace the file's; paths in them are not relative to it.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is
            not of its kind; names the file and the key.
        UsageError: a change is wrong; names the option as it was written.
    """
    tables = read_toml_tables(path, "recipe", RecipeError)
    _find_files_(tables, Recipe, path.parent)
    return recipe_from_tables(tables, changes, f"The recipe '{path}'")


def parse_assignments(assignments: Iterable[str]) -> Changes:
    """Return the changes of a recipe written ``KEY=VALUE``.

    The value is TOML; what is none is taken as text, so that ``model.weights=mine.pth``
    needs no quotation marks.

    Raises:
        UsageError: one has no ``=``, or its key is none of a recipe.
    """
    changes: Changes = {}
    for text in assignments:
        key, equals, given = text.partition("=")
        place = tuple(part.strip() for part in key.split("."))
        if not equals or not all(place):
            raise UsageError(
                f"--set '{text}' is no assignment.",
                "Write KEY=VALUE, such as --set engines.tf32=false.",
            )
        try:
            value = tomllib.loads(f"value = {given}")["value"]
        except tomllib.TOMLDecodeError:
            value = given
        changes[place] = Change(value, f"--set {'.'.join(place)}")
    return changes


def load_calibration_set(name: str) -> CalibrationSet:
    """Return the built-in set ``name``, or the one in the TOML file of that path.

    Raises:
        RecipeError: there is none, or it is wrong.
    """
    path = resolve_file(name, CALIBRATION_SETS, "calibration set")
    found = read_toml_document(CalibrationSet, path, "calibration set", RecipeError)
    if not found.images.path:
        return found
    place = str(path.parent / found.images.path)
    return found.with_changes(images=found.images.with_changes(path=place))


def _find_files_(values: Any, schema: type[Settings], folder: Path) -> None:
    """Make the paths in a recipe's values relative to the working folder, in place."""
    for name, field in schema.model_fields.items() if isinstance(values, dict) else ():
        key = field_key(name, field)
        value, inner = values.get(key), nested_table(field.annotation)
        if inner is not None:
            _find_files_(value, inner, folder)
        elif isinstance(value, str) and value:
            is_path = Path in (field.annotation, *get_args(field.annotation))
            may_be_path = any(isinstance(mark, PathOrNameMarker) for mark in field.metadata)
            if is_path or (may_be_path and (folder / value).exists()):
                values[key] = str(folder / value)
