"""Calibration sets: TOML files that say which images calibrate INT8, and how many."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Literal

from van_deploy.config.fields import option
from van_deploy.errors import RecipeError
from van_deploy.schema import Settings, read_toml

__all__ = [
    "CalibrationSet",
    "ImageSelection",
    "builtin_calibration_sets",
    "calibration_set_named",
]


class ImageSelection(Settings):
    """Which images, and how many. Table ``[images]``."""

    source: Literal["folder", "npz", "digits", "noise"] = option(
        "folder", "folder (one folder a class, or flat), npz, digits (in the package) or noise."
    )
    path: str = option("", "Folder or file, relative to the set; what --images gives by default.")
    count: int = option(512, "How many at most.", ge=2)
    seed: int = option(0, "Of the choice.")
    balanced: bool = option(True, "The same number from every class folder, as far as there are.")
    held_out: float = option(
        0.2,
        "Share of the chosen images that is not calibrated on but judges the methods, and the "
        "result where there are no other images.",
        ge=0,
        lt=1,
    )
    digest: str = option("", "What the digest of the chosen images must be, where it is known.")


class CalibrationSet(Settings):
    """One manifest of ``calibration/``."""

    description: str = option("", "What it is for, one sentence.")
    images: ImageSelection = option(ImageSelection, "Which images.")


def builtin_calibration_sets() -> dict[str, Path]:
    """Return the manifests of ``calibration/`` by name."""
    folder = resources.files("van_deploy.calibration_sets")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name.removesuffix(".toml"): Path(str(folder / name)) for name in names}


def calibration_set_named(name: str) -> CalibrationSet:
    """Return the built-in set ``name``, or the one in the TOML file of that path.

    Raises:
        RecipeError: there is none, or it is wrong.
    """
    known = builtin_calibration_sets()
    if name in known:
        return read_toml(CalibrationSet, known[name], "calibration set", RecipeError)
    if not name.endswith(".toml"):
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise RecipeError(
            f"There is no calibration set called '{name}'.",
            f"{guess}Known sets: {', '.join(known)}; one of your own is given by its path.",
        )
    found = read_toml(CalibrationSet, Path(name), "calibration set", RecipeError)
    if found.images.path:
        path = str(Path(name).parent / found.images.path)
        found = found.changed(images=found.images.changed(path=path))
    return found
