"""Typer commands made of plain functions and tables of options.

A parameter that is annotated with a table of :mod:`van_deploy.config` becomes the options of
that table, and the function gets the table, filled and checked. One annotated
``Annotated[Changes, EXPORT]`` becomes those options of a recipe, and the function gets what was
given. Everything else about the function is Typer's.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic
import typer

from van_deploy.config.fields import range_text, shown
from van_deploy.config.named import Changes, Named, named_options, put_all
from van_deploy.config.sizes import BatchRange
from van_deploy.schema import Settings, validated

LONGEST_CHOICES = 24  # columns; longer ones stand in the help
KINDS = {int: "INTEGER", float: "NUMBER", Path: "PATH", BatchRange: "MIN:OPT:MAX"}


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that Typer makes a command with every option of ``function``'s tables."""
    hints = get_type_hints(function, include_extras=True)
    tables: dict[str, tuple[type[Settings] | None, Mapping[str, Named]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and issubclass(hint, Settings):
            tables[parameter.name] = hint, named_options(hint)
        elif get_origin(hint) is Annotated and get_args(hint)[0] is Changes:
            tables[parameter.name] = None, get_args(hint)[1]
        else:
            parameters.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))
            continue
        parameters += [_parameter(option) for option in tables[parameter.name][1].values()]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        filled = {}
        for name, (schema, options) in tables.items():
            written = {option: given.pop(option) for option in options}
            values = {o: _read(options[o], v) for o, v in written.items() if v is not None}
            changes = Changes(
                {options[o].place: value for o, value in values.items()},
                {options[o].place: _flag(options[o], value) for o, value in values.items()},
            )
            filled[name] = changes if schema is None else _filled(schema, options, changes)
        function(**given, **filled)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _filled(schema: type[Settings], options: Mapping[str, Named], changes: Changes) -> Settings:
    spelling = {option.place: option.flags[0] for option in options.values()}
    spelling |= changes.spelling
    return validated(schema, put_all({}, changes), spelling=spelling)


def _parameter(option: Named) -> inspect.Parameter:
    """Return an option as Typer takes it: text, checked later by its table."""
    facts, kind = shown(option.field), _kind(option.field.annotation)
    choices = _choices(kind)
    listed = len("|".join(choices)) > LONGEST_CHOICES
    required = option.field.is_required()
    flags = option.flags
    if kind is bool and option.field.default:
        flags = (f"{flags[0]}/--no-{flags[0][2:]}", *flags[1:])
    text = {bool: bool, tuple: list[str]}.get(get_origin(kind) or kind, str)
    told = typer.Option(
        *flags,
        help=(option.field.description or "").replace("[", "\\[")
        + _facts(option, choices if listed else []),
        metavar="" if kind is bool else facts.metavar or ("NAME" if listed else _metavar(kind)),
        rich_help_panel=option.panel or None,
        show_default=False,
    )
    annotation: Any = operator.getitem(Annotated, (text if required else text | None, told))
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _facts(option: Named, choices: list[str]) -> str:
    """Return what the help says of an option's choices, default and limits."""
    value = None
    if not option.field.is_required():
        value = option.field.get_default(call_default_factory=True, validated_data={})
    text = shown(option.field).default
    if not text and value not in (None, "", (), False, True):
        values = value if isinstance(value, tuple) else (value,)
        text = ",".join(str(getattr(one, "value", one)) for one in values)
    limits = {
        word: getattr(one, word)
        for one in option.field.metadata
        for word in ("ge", "gt", "le", "lt")
        if hasattr(one, word)
    }
    told = [", ".join(choices), f"default: {text}" if text else "", range_text(limits)]
    return f" [dim]\\[{'; '.join(filter(None, told))}][/dim]" if any(told) else ""


def _kind(annotation: Any) -> Any:
    """Return an annotation without None, and without what only adds limits."""
    if get_origin(annotation) in (types.UnionType, Union):
        return _kind(next(kind for kind in get_args(annotation) if kind is not type(None)))
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        readers = (pydantic.BeforeValidator, pydantic.WrapValidator)
        is_read = any(isinstance(one, readers) for one in metadata)
        return str if is_read else _kind(inner)
    return annotation


def _choices(kind: Any) -> list[str]:
    """Return the values a kind has, where they are few and known."""
    if get_origin(kind) is tuple:
        return _choices(_kind(get_args(kind)[0]))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _metavar(kind: Any) -> str:
    """Return what stands for a value in the help."""
    if get_origin(kind) is tuple:
        return f"{_metavar(_kind(get_args(kind)[0]))},..."
    return "|".join(_choices(kind)) or KINDS.get(kind, "TEXT")


def _read(option: Named, given: Any) -> Any:
    """Return a value of the command line as a file would have it, where it can be read so."""
    kind = _kind(option.field.annotation)
    if get_origin(kind) is not tuple:
        return _number(kind, given)
    inner = _kind(get_args(kind)[0])
    texts = ",".join(given).split(",") if shown(option.field).commas else given
    return [_number(inner, text.strip()) for text in texts if text.strip()]


def _number(kind: Any, text: Any) -> Any:
    """Return the number in a text where ``kind`` is one, else the text as it is."""
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _flag(option: Named, value: Any) -> str:
    """Return the option as it was written on the command line."""
    return option.flags[0] if value is not False else f"--no-{option.flags[0][2:]}"
