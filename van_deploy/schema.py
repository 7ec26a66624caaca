"""The base of every document and table of options, and how a mistake in one is told.

Recipes, options, manifests, sidecars, baselines and calibration sets are pydantic
models derived from :class:`Schema`. Whatever they are filled from (TOML, JSON, the
command line, keyword arguments), a mistake becomes one message from
:func:`validate`: the key as its source spells it, what was given, what it takes, and
for an unknown key the nearest one. Nothing is taken for another type: ``"3"``, ``3.0``
and ``true`` are no whole numbers.

Documents of this program's own (:class:`VersionedSchema`) are JSON files that say first which
form they have. A file of another version is refused, with what makes it anew, rather than
guessed at.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import pydantic
from pydantic import AfterValidator, Field
from pydantic._internal._model_construction import ModelMetaclass
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json
from typing_extensions import dataclass_transform

from van_deploy import documents
from van_deploy.errors import InputError, UsageError

LARGEST = 2**62

Model = TypeVar("Model", bound="Schema")
Document = TypeVar("Document", bound="VersionedSchema")
Spelling = Mapping[tuple[str, ...], str]
"""How the user wrote the keys that did not come from a file: ``("export", "opset")``
is ``--opset`` or ``opset=``. What is not in it is written with dots."""

_KINDS = {
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "model_type": "should be a table",
    "dict_type": "should be a table",
    "path_type": "should be a path",
    "string_type": "should be a text",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
}


class ConflictError(ValueError):
    """Two values that do not go together, found by a schema's own validator.

    Args:
        message: what does not go together; ``{opset}`` stands for that key of the same
            table as the user wrote it.
        remedy: what to do next, with the same placeholders.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


class Schema(pydantic.BaseModel):
    """A frozen table whose keys are all known; numbers are finite, and texts are not numbers."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,
        hide_input_in_errors=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    def as_dict(self) -> dict[str, Any]:
        """Return the values, ready for JSON."""
        return self.model_dump(mode="json")

    def with_changes(self: Model, **values: Any) -> Model:
        """Return a copy with other values, checked like the first.

        Raises:
            UsageError: a value is not of its kind, or contradicts another.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return validate(type(self), {**given, **values})


class OpenSchema(Schema):
    """A table that others may add keys to; the ones it names are still checked."""

    model_config = pydantic.ConfigDict(extra="allow")


@dataclass_transform(kw_only_default=True, field_specifiers=(pydantic.Field,))
class _Checked(ModelMetaclass):
    """Makes ``Settings(...)`` as strict as a file, with the same messages."""

    if not TYPE_CHECKING:

        def __call__(cls, *values_in_order: Any, **values: Any) -> Any:  # noqa: N805
            values = {**dict(zip(cls.model_fields, values_in_order, strict=False)), **values}
            spelling = {(field_key(n, field),): f"{n}=" for n, field in cls.model_fields.items()}
            spelling |= {(name,): f"{name}=" for name in values}
            return validate(cls, values, spelling=spelling)


class Settings(Schema, metaclass=_Checked):
    """A table of options. Made in Python it is checked as it is when a file is read.

    Raises:
        UsageError: a value is not of its kind, or contradicts another.
    """

    model_config = pydantic.ConfigDict(use_attribute_docstrings=False)


class VersionedSchema(Schema):
    """A document whose class says ``schema_: Literal["van-deploy/NAME/VERSION"]``."""

    schema_: str = Field(alias="schema")

    @classmethod
    def schema_name(cls) -> str:
        """Return what ``schema`` must be."""
        return str(get_args(cls.model_fields["schema_"].annotation)[0])

    def text(self) -> str:
        """Return the document as its file has it."""
        plain = documents.plain(self)
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def validate(
    model: type[Model],
    values: Any,
    *,
    where: str = "",
    error: type[InputError] | type[UsageError] = UsageError,
    remedy: str = "Correct it.",
    spelling: Spelling | None = None,
) -> Model:
    """Return ``model`` filled from ``values``.

    Args:
        model: the schema.
        values: a mapping, as TOML, JSON or keyword arguments gave it; or JSON in bytes, if it
            has gone through :func:`~van_deploy.documents.parse_json`.
        where: what opens the message, such as ``The recipe 'x.toml'``; "" for the key alone.
        error: what a mistake is raised as.
        remedy: what to do next, where the mistake itself suggests nothing better.
        spelling: how the user wrote the keys that are not from ``where``; a mistake in one
            of those is a :class:`UsageError` without ``where``.

    Raises:
        error: a key is unknown or missing, or a value is not of its kind or out of its
            limits; one sentence about the first mistake.
    """
    try:
        text = values if isinstance(values, bytes) else to_json(values, inf_nan_mode="constants")
        return model.model_validate_json(text, strict=True)
    except PydanticSerializationError as failure:
        raise UsageError(
            f"A value is none that a file could hold: {failure}.", "Give a plain value."
        ) from None
    except pydantic.ValidationError as failure:
        told = _Told(model, failure.errors(include_url=False)[0], spelling or {})
    except UsageError as failure:  # what a schema's own validator found to contradict itself
        message = f"{where}: {failure.message}" if where else failure.message
        raise error(message, failure.remedy) from None
    if told.is_spelled:
        error, where, remedy = UsageError, "", "Correct it."
    sentence = re.sub("^(the|it) ", lambda word: word[0].capitalize(), told.message)
    raise error(f"{where}: {told.message}" if where else sentence, told.remedy or remedy)


def read_document(
    model: type[Document],
    path: Path,
    what: str,
    error: type[InputError],
    remedy: str,
    text: str | None = None,
) -> Document:
    """Return the document in a file.

    Args:
        model: its class.
        path: the file.
        what: what errors call it, such as ``manifest``.
        error: what a mistake is raised as.
        remedy: what to do about a file that is not what was written, or of another version.
        text: what the file holds; None reads it.

    Raises:
        error: it cannot be read, is damaged, or is of another version.
    """
    where = f"The {what} '{path}' is damaged"
    try:
        text = documents.read_text_file(path) if text is None else text
        raw = documents.parse_json(text)
    except OSError as failure:
        reason = failure.strerror or failure
        raise error(f"The {what} '{path}' cannot be read: {reason}.", remedy) from failure
    except ValueError as failure:
        raise error(f"{where}: {failure}.", remedy) from failure
    found = raw.get("schema") if isinstance(raw, Mapping) else None
    if isinstance(found, str) and found != model.schema_name():
        raise error(
            f"'{path}' has schema '{found[:100]}'; this version reads '{model.schema_name()}'.",
            remedy,
        )
    return validate(model, text.encode(), where=where, error=error, remedy=remedy)


def read_toml_document(model: type[Model], path: Path, what: str, error: type[InputError]) -> Model:
    """Return the schema in a TOML file.

    Args:
        model: the schema.
        path: the file.
        what: what errors call it, such as ``recipe``.
        error: what a mistake is raised as.

    Raises:
        error: the file cannot be read, is not TOML, or is not of this schema.
    """
    values = read_toml_tables(path, what, error)
    return validate(model, values, where=f"The {what} '{path}'", error=error)


def read_toml_tables(path: Path, what: str, error: type[InputError]) -> dict[str, Any]:
    """Return the tables of a TOML file. Arguments and errors: :func:`read_toml_document`."""
    try:
        return documents.read_toml_file(path)
    except (OSError, documents.DocumentError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"The {what} '{path}' cannot be read: {reason}.", "Check the path.") from None
    except ValueError as failure:
        raise error(
            f"The {what} '{path}' is not TOML: {failure}.", "Correct the line it names."
        ) from None


def nested_table(annotation: Any) -> type[Any] | None:
    """Return the table that an annotation holds: itself, or inside a union, list or mapping."""
    if isinstance(annotation, type) and (
        issubclass(annotation, Schema) or dataclasses.is_dataclass(annotation)
    ):
        return annotation
    return next(filter(None, map(nested_table, get_args(annotation))), None)


class _Told:
    """The first mistake in a document, in words.

    Attributes:
        message: a sentence.
        remedy: what to do next; "" where the message says it.
        is_spelled: whether the user wrote the key outside of the document.
    """

    def __init__(self, model: type[Schema], fault: ErrorDetails, spelling: Spelling) -> None:
        self._spelling = spelling
        self._place = [part for part in fault["loc"] if not _is_branch(part)]
        self.is_spelled = False
        key = self._spelled(self._place)
        self.remedy = ""
        contradiction = fault.get("ctx", {}).get("error")
        if isinstance(contradiction, ConflictError):
            self.message = self._filled(contradiction.message)
            self.remedy = self._filled(contradiction.remedy)
        elif fault["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            self.message = f"the key '{key}' is unknown."
            self.remedy = self._nearest(model)
        elif fault["type"] == "missing":
            self.message = f"'{key}' is missing."
        else:
            text = _KINDS.get(fault["type"]) or re.sub(
                r"^(Input|Value error,|String|List|Tuple|Dictionary) ?", "", fault["msg"]
            )
            given = reprlib.repr(fault["input"])
            self.message = f"'{key}' is {given}: it {text}." if key else f"it {text}."

    def _spelled(self, place: list[str | int]) -> str:
        """Return a location as the user wrote it, and remember whether that was elsewhere."""
        for length in range(len(place), 0, -1):
            written = self._spelling.get(tuple(map(str, place[:length])))
            if written is not None:
                self.is_spelled = True
                rest = [part for part in place[length:] if isinstance(part, str)]
                return ".".join([written.rstrip("="), *rest]) if rest else written
        return ".".join(map(str, place))[:200]

    def _filled(self, text: str) -> str:
        """Return a contradiction with its placeholders as the user wrote those keys."""
        return re.sub(
            r"\{([\w.]+)\}", lambda found: self._spelled([*self._place, *found[1].split(".")]), text
        )

    def _nearest(self, model: type[Schema]) -> str:
        """Return what the unknown key may have been meant for."""
        *table, name = self._place
        known = _keys_at(model, table)
        near = difflib.get_close_matches(str(name), known, n=1)
        if near:
            ours = self._spelled(self._place)
            return f"Did you mean '{ours.replace(str(name), near[0])}'?"
        return f"Known keys: {', '.join(known)}."


def _is_branch(part: str | int) -> bool:
    """Return whether a part of a location names a branch of a union rather than a key."""
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "str", "bool"})


def _keys_at(table: type[Any], place: list[str | int]) -> list[str]:
    """Return the keys that the table at a location may have."""
    for part in place:
        if part not in _keys_of(table):  # a place in a list, or a key of a mapping
            continue
        found = nested_table(_keys_of(table)[str(part)])
        if found is None:
            return []
        table = found
    return list(_keys_of(table))


def _keys_of(table: type[Any]) -> dict[str, Any]:
    """Return the keys of a schema or a data class, and the type of each."""
    hints = get_type_hints(table, include_extras=True)
    if dataclasses.is_dataclass(table):
        return {field.name: hints[field.name] for field in dataclasses.fields(table)}
    return {field_key(name, field): hints[name] for name, field in table.model_fields.items()}


def field_key(name: str, field: pydantic.fields.FieldInfo) -> str:
    """Return what files and keyword arguments call a field."""
    return field.validation_alias if isinstance(field.validation_alias, str) else name


# --- kinds of values that documents from elsewhere hold, checked when they are read -------------


def _text(value: str) -> str:
    if len(value) > documents.MAX_TEXT_LENGTH:
        raise ValueError(f"has {len(value):,} characters, more than a text may have here")
    if not value.isprintable():
        raise ValueError("holds control characters")
    return value


def _file_name(value: str) -> str:
    """Return a name that is safe as a file's, in YAML and in a program's text.

    >>> _file_name("van_b1-fp16")
    'van_b1-fp16'
    """
    if re.fullmatch(r"\w[\w.+-]{0,199}", value) is None:
        raise ValueError("is no name: letters, digits and . + - _ only, 200 at most")
    return value


def _kept(value: Any) -> Any:
    """Return a data class whose texts can be shown and whose numbers are of a sensible size."""
    for leaf in _leaves(dataclasses.asdict(value)):
        if isinstance(leaf, str):
            _text(leaf)
        elif isinstance(leaf, int | float) and abs(leaf) > LARGEST:
            raise ValueError(f"holds the number {leaf:.3g}")
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _leaves(item)
    else:
        yield value


Text = Annotated[str, AfterValidator(_text)]
"""Text of a sensible length without control characters."""

Label = Annotated[str, Field(max_length=documents.MAX_TEXT_LENGTH)]
"""Text that may hold anything, such as a class's name; what shows it makes it harmless."""

FileName = Annotated[str, AfterValidator(_file_name)]
"""A name that is safe as a file's, in YAML and in a program's text."""

Count = Annotated[int, Field(ge=0, lt=LARGEST)]
"""A whole number from 0."""

JsonObject = dict[str, Any]
"""A JSON object whose keys belong to whoever wrote it."""

SafeDataclass = AfterValidator(_kept)
"""Goes with a data class that a document keeps: its texts are :data:`Text`, numbers sensible."""
