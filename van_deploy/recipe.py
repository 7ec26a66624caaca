"""A recipe: the version-controlled truth of how one model is deployed.

A recipe is a TOML file. It is read once, here, into frozen dataclasses; a
mistake is reported with the file and the key. Paths in it are relative to the
file. ``export/`` holds one for each variant; a user copies one for a model of
their own. ``docs/recipe.md`` shows every table.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from van_deploy.errors import RecipeError, UsageError
from van_deploy.recipe_tables import (
    BatchRange,
    EngineSettings,
    EvaluateSettings,
    ExportSettings,
    GateProfile,
    GateSettings,
    ModelSettings,
    PrecisionSettings,
    PreprocessingSettings,
)
from van_deploy.settings import read_settings

__all__ = [
    "BatchRange",
    "EngineSettings",
    "EvaluateSettings",
    "ExportSettings",
    "GateProfile",
    "GateSettings",
    "ModelSettings",
    "PrecisionSettings",
    "PreprocessingSettings",
    "Recipe",
    "builtin_recipes",
    "read_recipe",
    "read_settings",
    "recipe_named",
]


@dataclass(frozen=True)
class Recipe:
    """Everything about one deployment; each attribute is a table of the file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    preprocessing: PreprocessingSettings = field(default_factory=PreprocessingSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    batch: BatchRange = field(default_factory=BatchRange)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    engines: EngineSettings = field(default_factory=EngineSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    gates: GateSettings = field(default_factory=GateSettings)

    def __post_init__(self) -> None:
        """Refuse engines of a precision that is not made."""
        made = ["fp32", *self.precision.make]
        if self.export.embed_preprocess != "none":
            made += [f"{name}-{self.export.embed_preprocess}" for name in made]
        missing = [name for name in self.engines.precisions if name not in made]
        if missing:
            raise UsageError(
                f"The engines want '{missing[0]}', which is not made.",
                f"Add it to `make` in [precision], or take one of: {', '.join(made)}.",
            )


def builtin_recipes() -> dict[str, Path]:
    """Return the recipes of ``export/`` by name."""
    folder = resources.files("van_deploy.recipes")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name.removesuffix(".toml"): Path(str(folder / name)) for name in names}


def recipe_named(name: str) -> Recipe:
    """Return the built-in recipe ``name``, or the one in the file of that path.

    Raises:
        RecipeError: there is none, or it is wrong.
    """
    known = builtin_recipes()
    if name in known:
        return read_recipe(known[name])
    if not name.endswith(".toml"):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        guess = f"Did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(
            f"There is no recipe called '{name}'.",
            f"{guess}Known recipes: {', '.join(known)}; one of your own is given by its path.",
        )
    return read_recipe(Path(name))


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a TOML file, every key checked.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is
            not of its kind; names the file and the key.
    """
    recipe = read_settings(Recipe, path, "recipe")
    model, precision = recipe.model, recipe.precision
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            model,
            weights=_beside(path, model.weights),
            labels=str(path.parent / model.labels) if model.labels else "",
        ),
        precision=dataclasses.replace(precision, calibration=_beside(path, precision.calibration)),
    )


def _beside(recipe: Path, named: str) -> str:
    """Return the path of a file beside the recipe, or the name as it is if there is none."""
    return str(recipe.parent / named) if named and (recipe.parent / named).exists() else named
