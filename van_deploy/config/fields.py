"""Building blocks of options: fields, tables, and types of values."""

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
    """How an option appears on the command line.

    Attributes:
        flags: such as ``--output`` and ``-o``; empty for the key with dashes.
        panel: heading in the help; None for the ``PANEL`` of its table.
        commas: accept a list separated by commas, besides repeating the option.
    """

    flags: tuple[str, ...] = ()
    panel: str | None = None
    commas: bool = True

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add nothing to the JSON Schema of the field: pydantic calls this."""


def option(
    default: Any,
    *,
    key: str = "",
    flags: Sequence[str] = (),
    panel: str | None = None,
    commas: bool = True,
    **limits: Any,
) -> Any:
    """Return the field of one option; its help is in the ``Attributes:`` of the table.

    Args:
        default: a value, or a function that returns one; ``...`` for a required option.
        key: its name in files and keyword arguments; "" for the attribute's name.
        flags: see :class:`CliOption`.
        panel: see :class:`CliOption`.
        commas: see :class:`CliOption`.
        limits: pydantic's, such as ``ge=1``.
    """
    kind = "default_factory" if callable(default) else "default"
    return pydantic.Field(
        **{kind: default},
        validation_alias=key or None,
        json_schema_extra=CliOption(tuple(flags), panel, commas),
        **limits,
    )


def cli_option(field: FieldInfo) -> CliOption:
    """Return how a field appears on the command line."""
    extra: object = field.json_schema_extra
    return extra if isinstance(extra, CliOption) else CliOption()


def format_range(limits: Mapping[str, float]) -> str:
    """Return the text of limits.

    >>> format_range({"ge": 17, "le": 23}), format_range({"gt": 0}), format_range({})
    ('from 17 up to 23', 'above 0', '')
    """
    words = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
    return " ".join(f"{word} {limits[limit]:g}" for limit, word in words.items() if limit in limits)


@functools.cache
def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the text of a class's docstring, and the description of each attribute."""
    text, _, section = inspect.cleandoc(docstring).partition("\n\nAttributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return text, {name: " ".join(words.split()) for name, words in found}


def _own_text(schema: dict[str, Any]) -> None:
    schema["description"], _ = parse_docstring(schema.get("description", ""))  # "" under -OO


class Table(Settings):
    """Options under one heading of the command line's help.

    The help of each option is in the docstring, as ``Attributes:`` in Google's style.
    """

    model_config = pydantic.ConfigDict(json_schema_extra=_own_text)
    PANEL: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Set the description of every option from the docstrings of the table and its bases."""
        for base in cls.__mro__:
            for name, words in parse_docstring(base.__doc__ or "")[1].items():
                field = cls.model_fields.get(name)
                if field is not None and not field.description:
                    field.description = words

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield the message and the remedy of every :class:`ConflictError`."""
        yield from ()

    @pydantic.model_validator(mode="after")
    def _check_conflicts(self) -> Self:
        for message, remedy in self.conflicts():
            raise ConflictError(message, remedy)
        return self

    def first_set(self, *names: str) -> str:
        """Return the first option that differs from its default, as a placeholder in a message."""
        fields = type(self).model_fields
        changed = (name for name in names if getattr(self, name) != fields[name].get_default())
        return next((f"{{{field_key(name, fields[name])}}}" for name in changed), "")


class PathOrNameMarker:
    """Marks a text that is the path of a file, if that file exists, else a name."""


FileOrName = Annotated[str, PathOrNameMarker()]
"""A path, or the name of a repository or a calibration set."""


def parse_bytes(text: object) -> object:
    """Return the bytes in a text such as ``4GiB``; units are binary with and without ``i``.

    Other types are returned unchanged.

    Raises:
        ValueError: the text is not a size.

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
    """Return the compute capabilities of one plan in their normal form, ``sm_89``.

    Other types are returned unchanged.

    Raises:
        ValueError: a part is not a compute capability.

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
"""Bytes, as a number or a text such as ``4GiB``."""

Target = Annotated[
    tuple[str, ...], pydantic.BeforeValidator(parse_target, json_schema_input_type=str)
]
"""Compute capabilities that one plan runs on: ``sm_89``, or ``sm_86+sm_89``."""
