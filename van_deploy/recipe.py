"""A recipe: the version-controlled truth of how one model is deployed.

A recipe is a TOML file. It is read once, here, into frozen dataclasses; a
mistake is reported with the file and the key. ``export/`` holds one for each
variant; a user copies one for a model of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from van_deploy.errors import RecipeError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DEFAULT_GATES",
    "BatchRange",
    "ExportSettings",
    "GateProfile",
    "GateSettings",
    "ModelSettings",
    "PreprocessingSettings",
    "Recipe",
    "builtin_recipes",
    "read_recipe",
    "read_settings",
    "recipe_named",
]


Settings = typing.TypeVar("Settings")


@dataclass(frozen=True)
class ModelSettings:
    """Which network. Table ``[model]``.

    Attributes:
        name: what the bundle is called.
        weights: a variant, a path, a repository or ``random``; "" for the
            public weights of ``name``.
        sha256: digest the weights file must have; "" to record the first one seen.
        labels: file with one class name a line; "" for what the weights say.
    """

    name: str = ""
    weights: str = ""
    sha256: str = ""
    labels: str = ""


@dataclass(frozen=True)
class PreprocessingSettings:
    """What differs from the weights' own preprocessing. Table ``[preprocessing]``.

    None takes the weights' value. Names and meanings are timm's.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class ExportSettings:
    """How the graph is written. Table ``[export]``.

    Attributes:
        opset: ONNX operator set.
        fold: make the exact rewrites.
        simplify: run onnxsim, and keep its graph if it agrees.
        embed_preprocess: beside each plain graph, one with preprocessing inside:
            ``none``, ``normalize`` or ``uint8`` (see :mod:`van_deploy.graph.embed`).
        outputs: of that graph: some of ``logits``, ``probabilities``, ``top5``.
    """

    opset: int = 20
    fold: bool = True
    simplify: bool = True
    embed_preprocess: str = "none"
    outputs: tuple[str, ...] = ("logits",)

    @property
    def embeds(self) -> bool:
        """Whether a second graph is wanted, with something inside that the plain one lacks."""
        return self.embed_preprocess != "none" or self.outputs != ("logits",)


@dataclass(frozen=True)
class BatchRange:
    """The batch sizes the artefact must serve. Table ``[batch]``."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        """Refuse a range that is none."""
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"The batch range {self} is not 1 <= min <= opt <= max.",
                "Give three rising numbers, such as 1:8:32.",
            )

    def __str__(self) -> str:
        """Return ``min:opt:max``."""
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Return the range written as ``min:opt:max``.

        Raises:
            UsageError: it is not that.

        >>> BatchRange.parse("1:8:32").opt
        8
        """
        try:
            smallest, optimum, largest = (int(part) for part in text.split(":"))
        except ValueError:
            raise UsageError(
                f"'{text}' is not a batch range.", "Write min:opt:max, such as 1:8:32."
            ) from None
        return cls(smallest, optimum, largest)


@dataclass(frozen=True)
class GateProfile:
    """What an artefact of one precision must reach. Table ``[gates.fp32]`` and its like.

    A limit that is left out is derived, in the run that applies it, from
    PyTorch's own float32 noise (see ``docs/gates.md``).

    Attributes:
        margin_db: room below the noise expected at this precision, in dB.
        sqnr_db: least signal to noise ratio of the logits, in dB.
        relative: largest ``max|difference| / max|logit|``.
        cosine: least cosine similarity of any image.
        kl: largest mean divergence of the softmax, in nats.
        row_relative: largest difference of an image alone and in a batch, over ``max|logit|``.
        flip_margin: a changed prediction is a fault where PyTorch's first logit
            was ahead of its second by more than this many RMS logits.
        module_db: least signal to noise ratio that any module adds by itself, in dB.
        top1_drop: most points of top-1 (percent) that may be lost on labelled images.
    """

    margin_db: float | None = None
    sqnr_db: float | None = None
    relative: float | None = None
    cosine: float | None = None
    kl: float | None = None
    row_relative: float | None = None
    flip_margin: float | None = None
    module_db: float | None = None
    top1_drop: float | None = None


DEFAULT_GATES = {
    "fp32": GateProfile(margin_db=20.0, module_db=100.0, top1_drop=0.1),
    "fp16": GateProfile(margin_db=3.0, module_db=52.0, top1_drop=0.2),
    "int8": GateProfile(margin_db=25.0, module_db=8.0, top1_drop=1.0),
}
"""Set on measured networks: ``docs/gates.md`` has the figures."""


@dataclass(frozen=True)
class GateSettings:
    """What differs from :data:`DEFAULT_GATES`, by precision. Table ``[gates]``."""

    fp32: GateProfile = field(default_factory=GateProfile)
    fp16: GateProfile = field(default_factory=GateProfile)
    int8: GateProfile = field(default_factory=GateProfile)

    def of(self, precision: str) -> GateProfile:
        """Return the profile of ``fp32``, ``fp16`` or ``int8``, defaults filled in.

        Raises:
            UsageError: there is none for that precision.
        """
        if precision not in DEFAULT_GATES:
            raise UsageError(
                f"There are no gates for the precision '{precision}'.",
                f"Known: {', '.join(DEFAULT_GATES)}.",
            )
        given: GateProfile = getattr(self, precision)
        changes = {name: value for name, value in vars(given).items() if value is not None}
        return dataclasses.replace(DEFAULT_GATES[precision], **changes)


@dataclass(frozen=True)
class Recipe:
    """Everything about one deployment; each attribute is a table of the file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    preprocessing: PreprocessingSettings = field(default_factory=PreprocessingSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    batch: BatchRange = field(default_factory=BatchRange)
    gates: GateSettings = field(default_factory=GateSettings)


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
    return read_settings(Recipe, path, "recipe")


def read_settings(kind: type[Settings], path: Path, what: str) -> Settings:
    """Return the frozen dataclass ``kind`` filled from a TOML file, every key checked.

    Args:
        kind: its fields are the file's keys, those that are dataclasses its tables.
        path: the file.
        what: what errors call it, such as ``recipe``.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is
            not of its kind; names the file and the key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"The {what} '{path}' cannot be read: {reason}.", "Check the path."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"The {what} '{path}' is not TOML: {error}.", "Mend the line it names."
        ) from error
    return typing.cast("Settings", _table(kind, tables, str(path), ""))


def _table(kind: type, values: Mapping[str, Any], file: str, key: str) -> object:
    """Return the dataclass ``kind`` filled from one table."""
    if not isinstance(values, Mapping):
        raise _wrong(file, key, "a table", values)
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        raise RecipeError(
            f"'{file}' has an unknown key '{key}{unknown[0]}'.",
            f"Did you mean '{key}{near[0]}'?" if near else f"Known keys: {', '.join(hints)}.",
        )
    read = {name: _value(hints[name], value, file, key + name) for name, value in values.items()}
    try:
        return kind(**read)
    except UsageError as error:
        raise RecipeError(f"'{file}', [{key.rstrip('.')}]: {error.message}", error.remedy) from None


def _value(kind: Any, value: object, file: str, key: str) -> object:
    """Return ``value`` as the type a dataclass's field is annotated with."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _value(next(k for k in inner if k is not type(None)), value, file, key)
    if dataclasses.is_dataclass(kind):
        return _table(typing.cast("type", kind), typing.cast("Any", value), file, f"{key}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(file, key, "a list", value)
        return tuple(_value(inner[0], item, file, key) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(file, key, f"a {kind.__name__}", value)
    return value


def _wrong(file: str, key: str, wanted: str, value: object) -> RecipeError:
    return RecipeError(f"'{file}': the key '{key}' must be {wanted}, not {value!r}.", "Mend it.")
