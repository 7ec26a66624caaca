"""Base classes of documents and options, and the messages of validation errors.

Recipes, options, manifests, sidecars, baselines and calibration sets are pydantic
models derived from :class:`Schema`. For every source of the values (TOML, JSON, the
command line, keyword arguments), :func:`validate` reports the first mistake in one
message: the key as the user wrote it, the value, the accepted values, and for an
unknown key the nearest known one. Types are not converted: ``"3"``, ``3.0`` and ``true``
are not whole numbers.

Documents that this package writes (:class:`VersionedSchema`) are JSON files whose first key
is their schema and version. A file of another version is refused; the message says how to
create it again.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import pydantic
import pydantic_core
from pydantic import AfterValidator, Field
from pydantic._internal._model_construction import ModelMetaclass
from typing_extensions import dataclass_transform

from van_deploy import documents
from van_deploy.errors import InputError, UsageError

MAX_NUMBER = 2**62
VALUE_REMEDY = "Give a value as `--help` or docs/recipe.md describes it."

Model = TypeVar("Model", bound="Schema")
Document = TypeVar("Document", bound="VersionedSchema")
KeyNames = Mapping[tuple[str, ...], str]
"""Keys as the user wrote them, if not in a file: ``("export", "opset")`` is ``--opset`` or
``opset=``. Other keys are written with dots."""

_TYPE_ERRORS = {
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
    """Two values in a table conflict; raised by the validator of a schema.

    Args:
        message: the conflict; ``{opset}`` is replaced by that key of the same table as the
            user wrote it.
        remedy: what to do next, with the same placeholders.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


class Schema(pydantic.BaseModel):
    """Base of all tables: frozen, without unknown keys, with finite numbers, strictly typed."""

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
        """Return the values in JSON types."""
        return self.model_dump(mode="json")

    def with_changes(self: Model, **values: Any) -> Model:
        """Return a validated copy with other values.

        Raises:
            UsageError: a value has the wrong type, or conflicts with another.
        """
        current = {name: getattr(self, name) for name in self.model_fields_set}
        return validate(type(self), {**current, **values})


class OpenSchema(Schema):
    """A table that accepts additional keys; the declared keys are still checked."""

    model_config = pydantic.ConfigDict(extra="allow")


@dataclass_transform(field_specifiers=(pydantic.Field,))
class _StrictInit(ModelMetaclass):
    """Validates ``Settings(...)`` as strictly as a file, with the same messages."""

    if not TYPE_CHECKING:

        def __call__(cls, *values_in_order: Any, **values: Any) -> Any:  # noqa: N805
            values = {**dict(zip(cls.model_fields, values_in_order, strict=False)), **values}
            names = {(field_key(n, field),): f"{n}=" for n, field in cls.model_fields.items()}
            names |= {(name,): f"{name}=" for name in values}
            return validate(cls, values, key_names=names)


class Settings(Schema, metaclass=_StrictInit):
    """A table of options; a call is validated like a file.

    Raises:
        UsageError: a value has the wrong type, or conflicts with another.
    """

    model_config = pydantic.ConfigDict(use_attribute_docstrings=False)


class VersionedSchema(Schema):
    """A document whose class declares ``schema_: Literal["van-deploy/NAME/VERSION"]``."""

    schema_: str = Field(alias="schema")

    @classmethod
    def schema_name(cls) -> str:
        """Return the required value of ``schema``."""
        return str(get_args(cls.model_fields["schema_"].annotation)[0])

    def text(self) -> str:
        """Return the document as the text of its file."""
        plain = documents.plain(self)
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def validate(
    model: type[Model],
    values: Any,
    *,
    where: str = "",
    error: type[InputError] | type[UsageError] = UsageError,
    remedy: str = VALUE_REMEDY,
    key_names: KeyNames | None = None,
) -> Model:
    """Return an instance of ``model`` with ``values``.

    Args:
        model: the schema.
        values: a mapping from TOML, JSON or keyword arguments; or JSON in bytes that was
            checked by :func:`~van_deploy.documents.parse_json`.
        where: start of the message, such as ``The recipe 'x.toml'``; "" for the key alone.
        error: class of the error to raise.
        remedy: what to do next, unless the mistake has a remedy of its own.
        key_names: keys as the user wrote them, if not in ``where``; a mistake in one of
            these is a :class:`UsageError` without ``where``.

    Raises:
        error: a key is unknown or missing, or a value has the wrong type, exceeds its limits
            or is not JSON; one sentence about the first mistake.
    """
    try:
        text = values if isinstance(values, bytes) else _to_json(values)
        _refuse_values(model, values, bool(text))
        return model.model_validate_json(text, strict=True)
    except pydantic.ValidationError as failure:
        mistake = failure.errors(include_url=False)[0]
    except UsageError as failure:  # a nested table was created by a validator
        message = f"{where}: {failure.message}" if where else failure.message
        raise error(message, failure.remedy) from None
    message, advice, is_outside = _describe_mistake(model, mistake, key_names or {})
    if is_outside:
        error, where, remedy = UsageError, "", VALUE_REMEDY
    sentence = re.sub("^(the|it) ", lambda word: word[0].capitalize(), message)
    raise error(f"{where}: {message}" if where else sentence, advice or remedy)


def _to_json(value: object) -> bytes:
    """Return a value as JSON, or nothing if it, or a part of it, cannot be written."""
    with contextlib.suppress(pydantic_core.PydanticSerializationError):
        return pydantic_core.to_json(value, inf_nan_mode="constants")
    return b""


def _refuse_values(table: type[Schema], values: Any, is_json: bool, *place: str) -> None:
    """Raise for a value that is not JSON, or an empty path, which is pathlib's working folder."""
    fields = {field_key(name, field): field for name, field in table.model_fields.items()}
    for key, value in values.items() if isinstance(values, Mapping) else ():
        field, text = fields.get(key), ""
        inner = nested_table(field.annotation) if field else None
        if inner is not None and issubclass(inner, Schema):
            _refuse_values(inner, value, is_json, *place, key)
        if not is_json and not _to_json(value):
            text = "should be Python's own number or bool, a UTF-8 text or path, or a list of these"
        if field and isinstance(value, str) and not value and is_path(field):
            text = "should be a path; . is the working folder"
        if text:
            kind = pydantic_core.PydanticCustomError("value", text)
            mistake = pydantic_core.InitErrorDetails(type=kind, loc=(*place, str(key)), input=value)
            raise pydantic.ValidationError.from_exception_data(table.__name__, [mistake])


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
        what: its name in messages, such as ``manifest``.
        error: class of the error to raise.
        remedy: what to do about a damaged file, or a file of another version.
        text: contents of the file; None reads it.

    Raises:
        error: the file cannot be read, is damaged, or has another version.
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
    schema = raw.get("schema") if isinstance(raw, Mapping) else None
    if isinstance(schema, str) and schema != model.schema_name():
        base, _, number = model.schema_name().rpartition("/")
        newer = re.fullmatch(rf"{base}/([0-9]{{1,9}})", schema)
        if newer and int(newer[1]) > int(number):
            remedy = "A newer van-deploy wrote it: upgrade, or write it again with this version."
        raise error(
            f"'{path}' has schema '{schema[:100]}'; this version reads '{model.schema_name()}'.",
            remedy,
        )
    return validate(model, text.encode(), where=where, error=error, remedy=remedy)


def path_argument(name: str, value: str | Path) -> Path:
    """Return an argument of a call as a path.

    Raises:
        UsageError: it is empty, or neither a text nor a path, also of another library.
    """
    return Path(text_argument(name, value))


def optional_path(name: str, value: str | Path | None) -> Path | None:
    """Return an argument as :func:`path_argument` does, or None."""
    return None if value is None else path_argument(name, value)


def text_argument(name: str, value: str | Path) -> str:
    """Return an argument as :func:`path_argument` does, with its own spelling (``./mine``)."""
    is_text = isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)
    return str(os.fspath(value)) if is_text and value != "" else _refuse(name, value, "a path")


def bool_argument(name: str, value: bool) -> bool:
    """Return an argument of a call.

    Raises:
        UsageError: it is neither True nor False.
    """
    return value if isinstance(value, bool) else _refuse(name, value, "true or false")


def _refuse(name: str, value: object, kind: str) -> NoReturn:
    text = f"'{name}=' is {reprlib.repr(value)}: it should be {kind}."
    raise UsageError(text, VALUE_REMEDY)


def read_toml_document(model: type[Model], path: Path, what: str, error: type[InputError]) -> Model:
    """Return the schema in a TOML file.

    Args:
        model: the schema.
        path: the file.
        what: its name in messages, such as ``recipe``.
        error: class of the error to raise.

    Raises:
        error: the file cannot be read, is not TOML, or does not match the schema.
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
    """Return the schema or data class in an annotation, also inside a union, list or mapping."""
    if isinstance(annotation, type) and (
        issubclass(annotation, Schema) or dataclasses.is_dataclass(annotation)
    ):
        return annotation
    return next(filter(None, map(nested_table, get_args(annotation))), None)


def is_path(field: pydantic.fields.FieldInfo) -> bool:
    """Return whether the value of a field is a path."""
    return Path in (field.annotation, *get_args(field.annotation))


def _describe_mistake(
    model: type[Schema], error: pydantic_core.ErrorDetails, key_names: KeyNames
) -> tuple[str, str, bool]:
    """Return the message of a validation error, and what else to know about it.

    Returns:
        One sentence; what to do next, "" if the sentence is enough; and whether the user wrote
        a key in these texts outside the document.
    """
    is_unknown = error["type"] in {"extra_forbidden", "unexpected_keyword_argument"}
    unknown = len(error["loc"]) - is_unknown  # index of a key that may look like a branch
    location = [
        part
        for index, part in enumerate(error["loc"])
        if index == unknown or not _is_union_branch(part)
    ]
    outside = list[str]()

    def key_name(location: list[str | int]) -> str:
        """Return a key as the user wrote it."""
        for length in range(len(location), 0, -1):
            name = key_names.get(tuple(map(str, location[:length])))
            if name is not None:
                outside.append(name)
                inner = [part for part in location[length:] if isinstance(part, str)]
                return ".".join([name.rstrip("="), *inner]) if inner else name
        return ".".join(map(str, location))[:200]

    def fill(text: str) -> str:
        """Return a text with its placeholders replaced by keys as the user wrote them."""
        return re.sub(r"\{([\w.]+)\}", lambda m: key_name([*location, *m[1].split(".")]), text)

    conflict = error.get("ctx", {}).get("error")
    text = conflict.message if isinstance(conflict, ConflictError) else ""
    key, remedy, place = key_name(location), "", tuple(map(str, location))
    table = place[:-1] if error["type"] == "missing" else place
    if table and not outside and "{" not in text:  # a key outside, as batch.max, made this table
        outside += [name for inner, name in key_names.items() if inner[: len(table)] == table]
        key = outside[0] if outside and table == place else key
    if isinstance(conflict, ConflictError):
        message, remedy = fill(text), fill(conflict.remedy)
    elif is_unknown:
        message, remedy = f"the key '{key}' is unknown.", _suggestion(model, location, key)
    elif error["type"] == "missing":
        message = f"'{key}' is missing."
    else:
        text = _TYPE_ERRORS.get(error["type"]) or re.sub(
            r"^(Input|Value error,|String|List|Tuple|Dictionary) ?", "", error["msg"]
        )
        message = f"'{key}' is {reprlib.repr(error['input'])}: " * bool(key) + f"it {text}."
    return message, remedy, bool(outside)


def _suggestion(model: type[Schema], location: list[str | int], key: str) -> str:
    """Return the nearest known key, or all known keys."""
    *outer, name = location
    table: type[Any] | None = model
    for part in outer:  # else an index in a list, or a key of a mapping
        if table is not None and part in _key_types(table):
            table = nested_table(_key_types(table)[str(part)])
    known = list(_key_types(table)) if table is not None else []
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        right = re.sub(rf"(?<![\w-]){re.escape(str(name))}(?![\w-])", near[0], key, count=1)
        return f"Did you mean '{right}'?"
    return f"Known keys: {', '.join(known)}."


def _is_union_branch(part: str | int) -> bool:
    """Return whether a part of a location is a branch of a union instead of a key."""
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "str", "bool"})


def _key_types(table: type[Any]) -> dict[str, Any]:
    """Return the type of each key of a schema or a data class."""
    hints = get_type_hints(table, include_extras=True)
    if dataclasses.is_dataclass(table):
        return {field.name: hints[field.name] for field in dataclasses.fields(table)}
    return {field_key(name, field): hints[name] for name, field in table.model_fields.items()}


def field_key(name: str, field: pydantic.fields.FieldInfo) -> str:
    """Return the name of a field in files and keyword arguments."""
    return field.validation_alias if isinstance(field.validation_alias, str) else name


# --- types of values in untrusted documents -----------------------------------------------------


def _check_text(value: str) -> str:
    if len(value) > documents.MAX_TEXT_LENGTH:
        raise ValueError(f"has {len(value):,} characters, more than {documents.MAX_TEXT_LENGTH:,}")
    if not value.isprintable():
        raise ValueError("has control characters")
    return value


def _check_file_name(value: str) -> str:
    """Return a name that is safe in file names, YAML and source code.

    >>> _check_file_name("van_b1-fp16")
    'van_b1-fp16'
    """
    if re.fullmatch(r"\w[\w.+-]{0,199}", value) is None:
        raise ValueError("is not a name: use up to 200 letters, digits and . + - _")
    return value


def _check_dataclass(value: Any) -> Any:
    """Return a data class if its texts are printable and its numbers below :data:`MAX_NUMBER`."""
    for leaf in _leaves(dataclasses.asdict(value)):
        if isinstance(leaf, str):
            _check_text(leaf)
        elif isinstance(leaf, int | float) and abs(leaf) > MAX_NUMBER:
            raise ValueError(f"has a number beyond {MAX_NUMBER:.1e}")
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _leaves(item)
    else:
        yield value


Text = Annotated[str, AfterValidator(_check_text)]
"""Text of limited length without control characters."""

Label = Annotated[str, Field(max_length=documents.MAX_TEXT_LENGTH)]
"""Text with any characters, such as a class name; escaped when it is printed."""

FileName = Annotated[str, AfterValidator(_check_file_name)]
"""A name that is safe in file names, YAML and source code."""

Count = Annotated[int, Field(ge=0, lt=MAX_NUMBER)]
"""A whole number from 0."""

JsonObject = dict[str, Any]
"""A JSON object with any keys."""

SafeDataclass = AfterValidator(_check_dataclass)
"""Validator of a data class in a document: its texts are :data:`Text`, its numbers limited."""
