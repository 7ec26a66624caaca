"""What an option is made of: its help, its place on the command line, and kinds of values."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic.fields import FieldInfo
from typing_extensions import Self

from van_deploy.schema import ConflictError, Settings, field_key


@dataclass(frozen=True)
class CliOption:
    """How the command line shows and reads an option.

    Attributes:
        flags: such as ``--output`` and ``-o``; empty for the key with dashes.
        panel: heading it stands under in the help; None for its table's ``PANEL``.
        commas: whether a list may be written with commas, besides repeating the option.
    """

    flags: tuple[str, ...] = ()
    panel: str | None = None
    commas: bool = True

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add nothing to the JSON Schema of the field: pydantic asks."""


def option(
    default: Any,
    *,
    key: str = "",
    flags: Sequence[str] = (),
    panel: str | None = None,
    commas: bool = True,
    **limits: Any,
) -> Any:
    """Return the field of one option; what it does, the table's docstring says of the attribute.

    Args:
        default: its value where nothing is given, or what makes it; ``...`` where something
            must be given.
        key: what files and keyword arguments call it; "" for the attribute's name.
        flags: see :class:`CliOption`.
        panel: see :class:`CliOption`.
        commas: see :class:`CliOption`.
        limits: such as ``ge=1``; pydantic's names.
    """
    made = {"default_factory": default} if callable(default) else {"default": default}
    return pydantic.Field(
        **made,
        validation_alias=key or None,
        json_schema_extra=CliOption(tuple(flags), panel, commas),
        **limits,
    )


def cli_option(field: FieldInfo) -> CliOption:
    """Return how the command line shows a field."""
    extra: object = field.json_schema_extra
    return extra if isinstance(extra, CliOption) else CliOption()


def format_range(limits: Mapping[str, float]) -> str:
    """Return limits in words.

    >>> format_range({"ge": 17, "le": 23}), format_range({"gt": 0}), format_range({})
    ('from 17 up to 23', 'above 0', '')
    """
    words = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
    return " ".join(f"{said} {limits[one]:g}" for one, said in words.items() if one in limits)


@functools.cache
def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Return what a class says of itself, and of each of its attributes."""
    text, _, section = inspect.cleandoc(docstring).partition("\n\nAttributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return text, {name: " ".join(words.split()) for name, words in found}


def _own_text(schema: dict[str, Any]) -> None:
    schema["description"], _ = parse_docstring(schema.get("description", ""))  # none under -OO


class Table(Settings):
    """Options that the command line shows under one heading; some may not go together.

    What an option does stands in the docstring, as ``Attributes:`` of Google's style.
    """

    model_config = pydantic.ConfigDict(json_schema_extra=_own_text)
    PANEL: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Give every option the description that the table's docstring, or its base's, has."""
        for base in cls.__mro__:
            for name, words in parse_docstring(base.__doc__ or "")[1].items():
                field = cls.model_fields.get(name)
                if field is not None and not field.description:
                    field.description = words

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what does not go together, and what to do, as a :class:`ConflictError` has it."""
        yield from ()

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> Self:
        for message, remedy in self.conflicts():
            raise ConflictError(message, remedy)
        return self

    def first_set(self, *names: str) -> str:
        """Return the first of these that is not its default, as a contradiction's placeholder."""
        fields = type(self).model_fields
        given = (name for name in names if getattr(self, name) != fields[name].get_default())
        return next((f"{{{field_key(name, fields[name])}}}" for name in given), "")


class PathOrNameMarker:
    """Marks a text that names a file beside the recipe if there is one of that name."""


FileOrName = Annotated[str, PathOrNameMarker()]
"""A path, or the name of something else (a repository, a calibration set)."""


def parse_bytes(text: object) -> object:
    """Return a size in bytes as people write it; units are binary, ``4GiB`` and ``4G`` alike.

    What is no text is returned as it is.

    Raises:
        ValueError: it is not a size; the end of a sentence.

    >>> parse_bytes("4GiB"), parse_bytes("512 MB"), parse_bytes("1024"), parse_bytes(3)
    (4294967296, 536870912, 1024, 3)
    """
    if not isinstance(text, str):
        return text
    pattern = r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*"
    match = re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError("should be a number and a unit, such as 4GiB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


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


ByteSize = Annotated[
    int,
    pydantic.BeforeValidator(parse_bytes, json_schema_input_type=int | str),
    pydantic.Field(gt=0),
]
"""Bytes; ``4GiB`` and its like, too."""

Target = Annotated[
    tuple[str, ...], pydantic.BeforeValidator(parse_target, json_schema_input_type=str)
]
"""Compute capabilities that one plan serves: ``sm_89``, or ``sm_86+sm_89``."""
