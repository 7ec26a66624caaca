"""What an option is made of: its help, its place on the command line, and kinds of values."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic.fields import FieldInfo

from van_deploy.schema import Contradiction, Settings

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{u}{s}": 1024**p for p, u in enumerate("kmgt", 1) for s in ("ib", "b", "")},
}


@dataclass(frozen=True)
class Shown:
    """How the command line shows an option.

    Attributes:
        flags: such as ``--output`` and ``-o``; empty for the key with dashes.
        panel: heading it stands under in the help; None for its table's ``PANEL``.
        metavar: what stands for its value; "" for the kind of value.
        default: the default in words, where the value itself says nothing.
        commas: whether a list may be written with commas, besides repeating the option.
    """

    flags: tuple[str, ...] = ()
    panel: str | None = None
    metavar: str = ""
    default: str = ""
    commas: bool = True

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add nothing to the JSON Schema of the field: pydantic asks."""


def option(
    default: Any,
    text: str,
    *,
    key: str = "",
    flags: Sequence[str] = (),
    panel: str | None = None,
    metavar: str = "",
    shown_default: str = "",
    commas: bool = True,
    **limits: Any,
) -> Any:
    """Return the field of one option; everything about it is said here.

    Args:
        default: its value where nothing is given, or what makes it; ``...`` where something
            must be given.
        text: what it does, one or two sentences: the help everywhere.
        key: what files and keyword arguments call it; "" for the attribute's name.
        flags: see :class:`Shown`.
        panel: see :class:`Shown`.
        metavar: see :class:`Shown`.
        shown_default: :attr:`Shown.default`.
        commas: see :class:`Shown`.
        limits: such as ``ge=1``; pydantic's names.
    """
    made = {"default_factory": default} if callable(default) else {"default": default}
    return pydantic.Field(
        **made,
        description=text,
        validation_alias=key or None,
        json_schema_extra=Shown(tuple(flags), panel, metavar, shown_default, commas),
        **limits,
    )


def shown(field: FieldInfo) -> Shown:
    """Return how the command line shows a field."""
    extra: object = field.json_schema_extra
    return extra if isinstance(extra, Shown) else Shown()


def key_of(name: str, field: FieldInfo) -> str:
    """Return what files and keyword arguments call a field."""
    return field.validation_alias if isinstance(field.validation_alias, str) else name


def given_of(table: Settings, *names: str) -> str:
    """Return the first of these fields that is not its default, as a contradiction's placeholder.

    >>> given_of(BatchRange(opt=4), "min", "opt", "max"), given_of(BatchRange(), "min")
    ('{opt}', '')
    """
    fields = type(table).model_fields
    given = (name for name in names if getattr(table, name) != fields[name].get_default())
    return next((f"{{{key_of(name, fields[name])}}}" for name in given), "")


def range_text(limits: Mapping[str, float]) -> str:
    """Return limits in words.

    >>> range_text({"ge": 17, "le": 23}), range_text({"gt": 0}), range_text({})
    ('17 to 23', 'above 0', '')
    """
    low = f"{limits['ge']:g}" if "ge" in limits else ""
    if "gt" in limits:
        low = f"above {limits['gt']:g}"
    if "le" not in limits:
        return f"from {low}" if "ge" in limits else low
    joined = "to" if "ge" in limits else "up to"
    return f"{low}{',' if 'gt' in limits else ''} {joined} {limits['le']:g}".strip()


class InFile:
    """Marks a text that names a file beside the recipe if there is one of that name."""


FileOrName = Annotated[str, InFile()]
"""A path, or the name of something else (a repository, a calibration set)."""


class BatchRange(Settings):
    """The batch sizes an artefact must serve. Table ``[batch]``; written ``min:opt:max``, too.

    One size alone, ``8``, makes a static graph, which takes batches of 8 only.
    """

    min: int = option(1, "Smallest batch.", ge=1)
    opt: int = option(8, "Batch that engines are optimised for.", ge=1)
    max: int = option(32, "Largest batch.", ge=1)

    if TYPE_CHECKING:

        def __init__(self, min: int = 1, opt: int = 8, max: int = 32) -> None: ...

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", value.strip(), re.ASCII)
        if match is None:
            raise ValueError("should be min:opt:max, such as 1:8:32, or one size")
        sizes = [int(size or match[1]) for size in match.groups()]
        return dict(zip(("min", "opt", "max"), sizes, strict=True))

    @pydantic.model_validator(mode="after")
    def _rises(self) -> BatchRange:
        if not self.min <= self.opt <= self.max:
            raise Contradiction(
                f"The batch range {self} is not min <= opt <= max.",
                "Give three rising numbers, such as 1:8:32.",
            )
        return self

    @property
    def fixed(self) -> int | None:
        """The one batch size of a static graph; None where the batch is dynamic."""
        return self.max if self.min == self.max else None

    def __str__(self) -> str:
        """Return ``min:opt:max``."""
        return f"{self.min}:{self.opt}:{self.max}"


class HardwareCompatibility(str, enum.Enum):
    """Which other GPUs a plan of TensorRT is made for. TensorRT's own names."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"


class Profiling(str, enum.Enum):
    """How much of itself a plan can tell afterwards. TensorRT's own names."""

    NONE = "none"
    LAYER_NAMES_ONLY = "layer-names-only"
    DETAILED = "detailed"


def parse_size(text: object) -> object:
    """Return a size in bytes as people write it; units are binary, ``4GiB`` and ``4G`` alike.

    What is no text is returned as it is.

    Raises:
        ValueError: it is not a size; the end of a sentence.

    >>> parse_size("4GiB"), parse_size("512 MB"), parse_size("1024"), parse_size(3)
    (4294967296, 536870912, 1024, 3)
    """
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError("should be a number and a unit, such as 4GiB")
    return int(float(match[1]) * unit)


def parse_target(text: object) -> object:
    """Return the compute capabilities that one plan serves, as this program spells them.

    What is no text is returned as it is.

    Raises:
        ValueError: one is none; the end of a sentence.

    >>> parse_target("SM89"), parse_target("8.9"), parse_target("sm_120+sm_86")
    (('sm_89',), ('sm_89',), ('sm_86', 'sm_120'))
    """
    if not isinstance(text, str):
        return tuple(text) if isinstance(text, list) else text
    numbers = set()
    for part in text.split("+"):
        match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", part.strip().lower(), re.ASCII)
        if match is None:
            raise ValueError(
                "should be compute capabilities such as sm_89; sm_86+sm_89 is one plan for both"
            )
        numbers.add(int(match[1] + match[2]))
    return tuple(f"sm_{number}" for number in sorted(numbers))


Size = Annotated[
    int,
    pydantic.BeforeValidator(parse_size, json_schema_input_type=int | str),
    pydantic.Field(gt=0),
]
"""Bytes; ``4GiB`` and its like, too."""

Target = Annotated[
    tuple[str, ...], pydantic.BeforeValidator(parse_target, json_schema_input_type=str)
]
"""Compute capabilities that one plan serves: ``sm_89``, or ``sm_86+sm_89``."""
