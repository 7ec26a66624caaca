"""A recipe: the version-controlled truth of how one model is deployed.

A recipe is a TOML file. It is read once, here, into the tables of
:mod:`van_deploy.config`; a mistake is reported with the file and the key. Paths in it are
relative to the file. ``export/`` holds one for each variant; a user copies one for a model
of their own. ``docs/recipe.md`` shows every key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from van_deploy.config import Recipe
from van_deploy.config.fields import InFile, key_of
from van_deploy.config.named import Changes, put_all
from van_deploy.documents import tomllib
from van_deploy.errors import RecipeError, UsageError
from van_deploy.schema import Settings, table_in, toml_tables, validated

FILES = "van_deploy.recipes"
UNCHANGED = Changes()


def builtin_files(package: str = FILES) -> dict[str, Path]:
    """Return the TOML files inside a data package by name; by default the recipes."""
    folder = resources.files(package)
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name.removesuffix(".toml"): Path(str(folder / name)) for name in names}


def file_named(name: str, package: str, what: str) -> Path:
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


def recipe_named(name: str, changes: Changes = UNCHANGED) -> Recipe:
    """Return the built-in recipe ``name``, or the one in the file of that path.

    Raises:
        RecipeError: there is none, or it is wrong.
        UsageError: a change is wrong.
    """
    return read_recipe(file_named(name, FILES, "recipe"), changes)


def recipe_for(model: str, changes: Changes = UNCHANGED) -> Recipe:
    """Return the recipe for what the user named: a recipe, or anything with weights.

    Raises:
        RecipeError: it is a recipe, and wrong.
        UsageError: a change is wrong.
    """
    if model.endswith(".toml") or model in builtin_files():
        return recipe_named(model, changes)
    tables = put_all({"model": {"weights": model}}, changes)
    return validated(Recipe, tables, error=RecipeError, spelling=changes.spelling)


def read_recipe(path: Path, changes: Changes = UNCHANGED) -> Recipe:
    """Return the recipe in a TOML file, every key checked.

    Args:
        path: the file.
        changes: values that replace the file's; paths in them are not relative to it.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is
            not of its kind; names the file and the key.
        UsageError: a change is wrong; names the option as it was written.
    """
    tables, where = toml_tables(path, "recipe", RecipeError), f"The recipe '{path}'"
    _find_files_(tables, Recipe, path.parent)
    put_all(tables, changes)
    return validated(Recipe, tables, where=where, error=RecipeError, spelling=changes.spelling)


def changes_from_text(assignments: Iterable[str], option: str = "--set") -> Changes:
    """Return the changes of a recipe written ``KEY=VALUE``.

    The value is TOML; what is none is taken as text, so that ``model.weights=mine.pth``
    needs no quotation marks.

    Raises:
        UsageError: one has no ``=``, or its key is none of a recipe.
    """
    changes = Changes()
    for text in assignments:
        key, equals, written = text.partition("=")
        place = tuple(part.strip() for part in key.split("."))
        if not equals or not all(place):
            raise UsageError(
                f"{option} '{text}' is no assignment.",
                f"Write KEY=VALUE, such as {option} engines.tf32=false.",
            )
        try:
            value = tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            value = written
        changes |= Changes({place: value}, {place: f"{option} {'.'.join(place)}"})
    return changes


def _find_files_(values: Any, schema: type[Settings], folder: Path) -> None:
    """Make the paths in a recipe's values relative to the working folder, in place."""
    for name, field in schema.model_fields.items() if isinstance(values, dict) else ():
        key = key_of(name, field)
        value, inner = values.get(key), table_in(field.annotation)
        if inner is not None:
            _find_files_(value, inner, folder)
        elif isinstance(value, str) and value:
            is_path = Path in (field.annotation, *get_args(field.annotation))
            may_be_path = any(isinstance(mark, InFile) for mark in field.metadata)
            if is_path or (may_be_path and (folder / value).exists()):
                values[key] = str(folder / value)
