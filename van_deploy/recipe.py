"""Reads recipes and calibration sets.

A recipe is a TOML file that describes a deployment, to keep under version control. It is read
into the tables of :mod:`van_deploy.config`; a mistake is reported with the file and the key.
Paths in it are relative to the file. ``export/`` has one for each variant to copy and adapt,
and ``docs/recipe.md`` every key.

A calibration set selects the images that calibrate INT8; ``calibration/`` has the built-in ones.
"""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from van_deploy.config import Recipe
from van_deploy.config.fields import PathOrNameMarker, Table, option
from van_deploy.config.named_options import Changes, explicit_values, parse_recipe
from van_deploy.errors import RecipeError
from van_deploy.model.variants import find_variant
from van_deploy.schema import (
    Settings,
    field_key,
    is_path,
    nested_table,
    path_argument,
    read_toml_document,
    read_toml_tables,
    text_argument,
)

RECIPES, CALIBRATION_SETS = "van_deploy.recipes", "van_deploy.calibration_sets"
NO_CHANGES: Changes = {}


class ImageSelection(Table):
    """Selection of images. Table ``[images]``.

    Attributes:
        source: A folder (one sub-folder per class, or flat), an .npz, the digits in the package, or
            noise.
        path: The folder or file, relative to the set; empty for the path of --images.
        count: Maximum number of images.
        seed: Seed of the selection.
        balanced: Select the same number from every class folder, if there are enough.
        held_out: Fraction of the images that is not used to calibrate: it compares methods, and
            evaluates the result if there is no evaluation set.
        digest: Required digest of the selected images; empty if unknown.
    """

    source: Literal["folder", "npz", "digits", "noise"] = option("folder")
    path: str = option("")
    count: int = option(512, ge=2)
    seed: int = option(0, ge=0)
    balanced: bool = option(True)
    held_out: float = option(0.2, ge=0, lt=1)
    digest: str = option("")


class CalibrationSet(Table):
    """Images that calibrate INT8; one file of ``calibration/``.

    Attributes:
        description: Purpose, in one sentence.
        images: Selection of the images.
    """

    description: str = option("")
    images: ImageSelection = option(ImageSelection)


def builtin_files(package: str = RECIPES) -> dict[str, Path]:
    """Return the TOML files in a data package by name; by default the recipes."""
    folder = resources.files(package)
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name.removesuffix(".toml"): Path(str(folder / name)) for name in names}


def resolve_file(name: str, package: str, what: str) -> Path:
    """Return the path of a built-in file or of the user's own file.

    Args:
        name: of a file in the package, or a path that ends in ``.toml``.
        package: the data package.
        what: its name in messages, such as ``recipe``.

    Raises:
        RecipeError: ``name`` is neither.
    """
    known = builtin_files(package)
    if name in known:
        return known[name]
    if not name.endswith(".toml"):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        guess = f"Did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(
            f"There is no {what} called '{name}'.",
            f"{guess}Known {what}s: {', '.join(known)}; your own needs a path to a .toml file.",
        )
    return Path(name)


def load_recipe(name: str, changes: Changes = NO_CHANGES) -> Recipe:
    """Return the built-in recipe ``name``, or the recipe in a file.

    Raises:
        RecipeError: it does not exist, or is invalid.
        UsageError: a change is invalid.
    """
    return read_recipe(resolve_file(name, RECIPES, "recipe"), changes)


def resolve_recipe(model: str | Path | Recipe, changes: Changes = NO_CHANGES) -> Recipe:
    """Return the recipe for a recipe, its name or path, or for weights.

    Raises:
        RecipeError: the recipe is invalid.
        UsageError: a change is invalid, or the model is neither a text nor a path.
    """
    if isinstance(model, Recipe):
        return parse_recipe(explicit_values(model), changes)
    name = text_argument("model", model)
    if variant := find_variant(name):
        name = variant.name
    if name.endswith(".toml") or name in builtin_files():
        return load_recipe(name, changes)
    return parse_recipe({"model": {"weights": name}}, changes)


def read_recipe(path: str | Path, changes: Changes = NO_CHANGES) -> Recipe:
    """Return the validated recipe in a TOML file.

    Args:
        path: the file.
        changes: values that replace the file's; paths in them are not relative to the file.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value has the wrong type;
            names the file and the key.
        UsageError: ``path`` is no path, or a change is invalid; names the option as the user
            wrote it.
    """
    path = path_argument("path", path)
    tables = read_toml_tables(path, "recipe", RecipeError)
    if path.parent != Path():  # else the same, also "./van_b1", which is not the variant
        _resolve_paths_(tables, Recipe, path.parent)
    return parse_recipe(tables, changes, f"The recipe '{path}'")


def load_calibration_set(name: str) -> CalibrationSet:
    """Return the built-in calibration set ``name``, or the set in a TOML file.

    Raises:
        RecipeError: it does not exist, or is invalid.
    """
    path = resolve_file(name, CALIBRATION_SETS, "calibration set")
    calibration = read_toml_document(CalibrationSet, path, "calibration set", RecipeError)
    images = calibration.images
    if not images.path:
        return calibration
    return calibration.with_changes(images=images.with_changes(path=str(path.parent / images.path)))


def _resolve_paths_(values: Any, schema: type[Settings], folder: Path) -> None:
    """Make the relative paths in a recipe's values relative to the working folder, in place."""
    for name, field in schema.model_fields.items() if isinstance(values, dict) else ():
        key = field_key(name, field)
        value, inner = values.get(key), nested_table(field.annotation)
        if inner is not None:
            _resolve_paths_(value, inner, folder)
        elif isinstance(value, str) and value:
            is_path_or_name = any(isinstance(one, PathOrNameMarker) for one in field.metadata)
            if is_path(field) or (is_path_or_name and (folder / value).exists()):
                values[key] = str(folder / value)
