"""Calibration sets: TOML files that say which images calibrate INT8, and how many."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from van_deploy.config.fields import option
from van_deploy.errors import RecipeError
from van_deploy.recipe import builtin_files, file_named
from van_deploy.schema import Settings, read_toml

FILES = "van_deploy.calibration_sets"


class ImageSelection(Settings):
    """Which images, and how many. Table ``[images]``."""

    source: Literal["folder", "npz", "digits", "noise"] = option(
        "folder",
        "A folder (one sub-folder a class, or flat), an .npz, the digits inside the package, or "
        "noise.",
    )
    path: str = option(
        "", "The folder or file, relative to the set; empty for what --images gives."
    )
    count: int = option(512, "How many at most.", ge=2)
    seed: int = option(0, "Of the choice.", ge=0)
    balanced: bool = option(
        True, "The same number of every class folder, as far as there are that many."
    )
    held_out: float = option(
        0.2,
        "Share of the chosen images that is not calibrated on but compares the methods, and "
        "evaluates the result where there are no other images.",
        ge=0,
        lt=1,
    )
    digest: str = option("", "Digest the chosen images must have; empty where it is not known.")


class CalibrationSet(Settings):
    """Which images calibrate INT8; one file of ``calibration/``."""

    description: str = option("", "What it is for, one sentence.")
    images: ImageSelection = option(ImageSelection, "Which images.")


def builtin_calibration_sets() -> dict[str, Path]:
    """Return the files of ``calibration/`` by name."""
    return builtin_files(FILES)


def calibration_set_named(name: str) -> CalibrationSet:
    """Return the built-in set ``name``, or the one in the TOML file of that path.

    Raises:
        RecipeError: there is none, or it is wrong.
    """
    path = file_named(name, FILES, "calibration set")
    found = read_toml(CalibrationSet, path, "calibration set", RecipeError)
    if not found.images.path:
        return found
    place = str(path.parent / found.images.path)
    return found.changed(images=found.images.changed(path=place))
