"""Typer commands made of plain functions and tables of options.

What a function asks for by its annotations, its command takes as options:

- :data:`Opened`, the bundle, opened: the argument ``BUNDLE`` and ``--require-signature``;
- ``Annotated[Given, Table]``, a table of :mod:`van_deploy.config`: the options of that table,
  checked;
- ``Annotated[Changes, EXPORT]``: those options of a recipe, as they were given.

``progress`` is what to tell how far the work is. Every command has ``--json`` and prints the
:class:`~van_deploy.cli.console.CommandOutput` that its function returns; a function with
``as_json`` prints by itself. Everything else about the function is Typer's.
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
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic
import typer

from van_deploy.cli.console import CommandOutput, print_output, progress_bar
from van_deploy.config.fields import cli_option, format_range
from van_deploy.config.named_options import (
    Change,
    Changes,
    NamedOption,
    apply_changes,
    named_options,
)
from van_deploy.config.sizes import BatchRange, SizeRange
from van_deploy.schema import validate

if TYPE_CHECKING:
    from van_deploy.api import Bundle

    Opened: TypeAlias = Bundle
else:
    Opened = Annotated[Any, "opened"]

LONGEST_CHOICES = 24  # columns; longer ones stand in the help
KINDS = {int: "INTEGER", float: "NUMBER", Path: "PATH", BatchRange: "MIN:OPT:MAX"}
KINDS[SizeRange] = KINDS[BatchRange]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
BundlePath = Annotated[Path, typer.Argument(help="A bundle that `van-deploy export` made.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the bundle; dist/NAME by default."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Make everything anew even if nothing changed.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any key of the recipe, such as engines.tf32=false; repeatable.",
    ),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="PUBLICKEY",
        help="Refuse the bundle unless it is whole and signed with this key (a PEM file).",
    ),
]


class OptionValues(dict[str, Any]):
    """The options that were given, as keyword arguments of the API.

    Attributes:
        table: filled with them and checked.
    """

    table: Any


def with_options(function: Callable[..., CommandOutput | None]) -> Callable[..., None]:
    """Return a function that Typer makes a command with every option ``function`` asks for."""
    hints = get_type_hints(function, include_extras=True)
    asked = inspect.signature(function).parameters
    tables: dict[str, tuple[Any, Mapping[str, NamedOption]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in asked.items():
        hint = hints[name]
        kind, about = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
        if kind in (OptionValues, Changes):
            options = named_options(about) if kind is OptionValues else about
            tables[name] = (about if kind is OptionValues else None), options
            parameters += [_parameter(option) for option in options.values()]
        elif about == "opened":
            parameters.append(_keyword("bundle", BundlePath, inspect.Parameter.empty))
        elif name != "progress":
            parameters.append(_keyword(name, hint, parameter.default))
    opens = [name for name in asked if hints[name] == Opened]
    if opens:
        parameters.append(_keyword("require_signature", RequireSignature, None))
    if "as_json" not in asked:
        parameters.append(_keyword("as_json", AsJson, False))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, (schema, options) in tables.items():
            given[name] = _filled(schema, options, {o: given.pop(o) for o in options})
        if "as_json" in asked:
            function(**given)
            return
        as_json = given.pop("as_json")
        with (
            progress_bar() if opens or "progress" in asked else contextlib.nullcontext() as progress
        ):
            for name in opens:
                given[name] = opened(given.pop("bundle"), given.pop("require_signature"), progress)
            if "progress" in asked:
                given["progress"] = progress
            result = function(**given)
        if result is not None:
            print_output(result, as_json)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def opened(bundle: Path, require_signature: Path | None, progress: Any) -> Bundle:
    """Return a bundle. Errors are those of :class:`van_deploy.api.Bundle`."""
    from van_deploy.api import open_bundle

    return open_bundle(bundle, require_signature=require_signature, progress=progress)


def _filled(schema: Any, options: Mapping[str, NamedOption], written: Mapping[str, Any]) -> object:
    """Return the options that were written, checked where they are those of a schema."""
    values = {o: _read(options[o], v) for o, v in written.items() if v is not None}
    changes = {
        options[o].place: Change(value, _flag(options[o], value)) for o, value in values.items()
    }
    if schema is None:
        return changes
    given, key_names = (
        OptionValues(values),
        {option.place: option.flags[0] for option in options.values()},
    )
    key_names |= {place: change.source for place, change in changes.items()}
    given.table = validate(schema, apply_changes({}, changes), key_names=key_names)
    return given


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _parameter(option: NamedOption) -> inspect.Parameter:
    """Return an option as Typer takes it: text, checked later by its table."""
    kind = _kind(option.field.annotation)
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
        metavar="" if kind is bool else "NAME" if listed else _metavar(kind),
        rich_help_panel=option.panel or None,
        show_default=False,
    )
    annotation: Any = operator.getitem(Annotated, (text if required else text | None, told))
    return _keyword(option.name, annotation, inspect.Parameter.empty if required else None)


def _facts(option: NamedOption, choices: list[str]) -> str:
    """Return what the help says of an option's choices, default and limits."""
    text, value = "", None
    if not option.field.is_required():
        value = option.field.get_default(call_default_factory=True, validated_data={})
    if value not in (None, "", (), False, True):
        values = value if isinstance(value, tuple) else (value,)
        text = ",".join(str(getattr(one, "value", one)) for one in values)
    limits = {
        word: getattr(one, word)
        for one in option.field.metadata
        for word in ("ge", "gt", "le", "lt")
        if hasattr(one, word)
    }
    told = [", ".join(choices), f"default: {text}" if text else "", format_range(limits)]
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


def _read(option: NamedOption, given: Any) -> Any:
    """Return a value of the command line as a file would have it, where it can be read so."""
    kind = _kind(option.field.annotation)
    if get_origin(kind) is not tuple:
        return _number(kind, given)
    inner = _kind(get_args(kind)[0])
    texts = ",".join(given).split(",") if cli_option(option.field).commas else given
    return [_number(inner, text.strip()) for text in texts if text.strip()]


def _number(kind: Any, text: Any) -> Any:
    """Return the number in a text where ``kind`` is one, else the text as it is."""
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _flag(option: NamedOption, value: Any) -> str:
    """Return the option as it was written on the command line."""
    return option.flags[0] if value is not False else f"--no-{option.flags[0][2:]}"
