"""Calibration sets: TOML files that say which images calibrate INT8, and how many."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from van_deploy.errors import RecipeError, UsageError
from van_deploy.recipe import read_settings

__all__ = [
    "CalibrationSet",
    "ImageSelection",
    "builtin_calibration_sets",
    "calibration_set_named",
]

SOURCES = ("folder", "npz", "digits", "noise")


@dataclass(frozen=True)
class ImageSelection:
    """Which images, and how many. Table ``[images]``.

    Attributes:
        source: ``folder`` (one folder a class, or flat), ``npz``, ``digits`` (the
            ones inside the package) or ``noise``.
        path: the folder or file, relative to the manifest; "" for what
            ``--images`` gives.
        count: how many at most.
        seed: of the choice.
        balanced: the same number from every class folder, as far as there are
            that many.
        held_out: share of the chosen images (0..1) that is not calibrated on but
            judges the methods, and the result where there are no other images.
        digest: what :attr:`ChosenImages.digest` must be; "" where it is not known.
    """

    source: str = "folder"
    path: str = ""
    count: int = 512
    seed: int = 0
    balanced: bool = True
    held_out: float = 0.2
    digest: str = ""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.source not in SOURCES:
            raise UsageError(
                f"There is no source of images called '{self.source}'.",
                f"Known sources: {', '.join(SOURCES)}.",
            )
        if self.count < 2:
            raise UsageError(f"{self.count} images are too few.", "Give at least 2; 512 is usual.")
        if not 0 <= self.held_out < 1:
            raise UsageError(
                f"The held-out share {self.held_out:g} is outside [0, 1).", "0.2 is usual."
            )


@dataclass(frozen=True)
class CalibrationSet:
    """One manifest of ``calibration/``.

    Attributes:
        description: what it is for, one sentence.
        images: which images.
    """

    description: str = ""
    images: ImageSelection = field(default_factory=ImageSelection)


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
        return read_settings(CalibrationSet, known[name], "calibration set")
    if not name.endswith(".toml"):
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise RecipeError(
            f"There is no calibration set called '{name}'.",
            f"{guess}Known sets: {', '.join(known)}; one of your own is given by its path.",
        )
    found = read_settings(CalibrationSet, Path(name), "calibration set")
    if found.images.path:
        path = str(Path(name).parent / found.images.path)
        found = replace(found, images=replace(found.images, path=path))
    return found
