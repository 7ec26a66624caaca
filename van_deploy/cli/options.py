"""Creates Typer commands from plain functions and tables of options.

Annotations of a function's parameters add options to its command:

- ``bundle: OpenBundle``: the argument ``BUNDLE`` and ``--require-signature``;
- ``Annotated[OptionValues, Table]``: validated options of a table in :mod:`van_deploy.config`;
- ``Annotated[Changes, EXPORT]``: options that change a recipe, and ``--set``.

The parameter ``progress`` receives the progress display. Every command has ``--json`` and prints
the :class:`~van_deploy.cli.console.Output` that its function returns; a function with the
parameter ``as_json`` prints its own output. Other parameters are passed to Typer.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pydantic
import typer

from van_deploy.cli.console import Output, print_output, progress_bar
from van_deploy.config import named_options as named
from van_deploy.config.fields import cli_option, format_range
from van_deploy.config.sizes import BatchRange, SizeRange
from van_deploy.errors import UsageError
from van_deploy.schema import validate

if TYPE_CHECKING:
    from van_deploy.api import Bundle

    OpenBundle = Bundle
else:
    OpenBundle = Annotated[Any, "open bundle"]

MAX_CHOICES_WIDTH = 24  # columns; longer lists are in the help text
TYPE_NAMES = {bool: "", int: "INTEGER", float: "NUMBER", Path: "PATH", BatchRange: "MIN:OPT:MAX"}
TYPE_NAMES[SizeRange] = TYPE_NAMES[BatchRange]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
BundlePath = Annotated[Path, typer.Argument(help="A bundle that `van-deploy export` created.")]
OutputFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the bundle; dist/NAME by default.")
]
Force = Annotated[bool, typer.Option("--force", help="Rebuild everything even if nothing changed.")]
Assignments = Annotated[
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
        help="Refuse the bundle unless it is complete and signed with this key (a PEM file).",
    ),
]


class OptionValues(dict[str, Any]):
    """The options on the command line, as keyword arguments of the API.

    Attributes:
        table: the validated table of these options.
        flags: the options as the user wrote them.
    """

    table: Any
    flags: list[str]


def with_options(function: Callable[..., Output | None]) -> Callable[..., None]:
    """Return a function with the signature that Typer needs for all options of ``function``."""
    hints = get_type_hints(function, include_extras=True)
    arguments = inspect.signature(function).parameters
    tables: dict[str, tuple[Any, Mapping[str, named.NamedOption]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in arguments.items():
        hint = hints[name]
        kind, source = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
        if kind in (OptionValues, named.Changes):
            options = named.named_options(source) if kind is OptionValues else source
            tables[name] = (source if kind is OptionValues else None), options
            parameters += [_parameter(option) for option in options.values()]
            if kind is named.Changes:
                parameters.append(_keyword("assignments", Assignments, None))
        elif hint == OpenBundle:
            parameters.append(_keyword(name, BundlePath, inspect.Parameter.empty))
        elif name != "progress":
            parameters.append(_keyword(name, hint, parameter.default))
    opens_bundle = hints.get("bundle") == OpenBundle
    if opens_bundle:
        parameters.append(_keyword("require_signature", RequireSignature, None))
    if "as_json" not in arguments:
        parameters.append(_keyword("as_json", AsJson, False))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, (schema, options) in tables.items():
            values[name] = _parse_options(schema, options, {o: values.pop(o) for o in options})
            if schema is None:
                values[name] |= named.parse_assignments(values.pop("assignments") or ())
        if "as_json" in arguments:
            function(**values)
            return
        as_json = values.pop("as_json")
        has_progress = opens_bundle or "progress" in arguments
        with progress_bar() if has_progress else contextlib.nullcontext() as progress:
            if opens_bundle:
                key = values.pop("require_signature")
                values["bundle"] = load_bundle(values["bundle"], key, progress)
            if "progress" in arguments:
                values["progress"] = progress
            result = function(**values)
        if result is not None:
            print_output(result, as_json)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def path(text: str) -> Path:
    """Return the path in a text.

    Raises:
        UsageError: it is empty, such as an unset variable of a shell; not the working folder.
    """
    if not text:
        raise UsageError("A path is empty.", "Give a path; . is the working folder.")
    return Path(text)


def load_bundle(bundle: Path, require_signature: Path | None, progress: Any) -> Bundle:
    """Return a bundle. Errors: :class:`van_deploy.api.Bundle`."""
    from van_deploy.api import open_bundle

    return open_bundle(bundle, require_signature=require_signature, progress=progress)


def _parse_options(
    schema: Any, options: Mapping[str, named.NamedOption], arguments: Mapping[str, Any]
) -> Any:
    """Return the options on the command line; those of a schema are validated."""
    values = {o: _parse_value(options[o], v) for o, v in arguments.items() if v is not None}
    flags = {o: option.flags[0] for o, option in options.items()}
    flags |= {o: f"--no-{flags[o][2:]}" for o, value in values.items() if value is False}
    changes = {options[o].place: named.Change(v, flags[o]) for o, v in values.items()}
    if schema is None:
        return changes
    result = OptionValues(values)
    result.flags = [flags[o] for o in values]
    key_names = {option.place: flags[o] for o, option in options.items()}
    result.table = validate(schema, named.apply_changes({}, changes), key_names=key_names)
    return result


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Return a parameter for Typer: its path may not be empty, and its help names its type."""
    kind, info = get_args(annotation)
    if kind in (Path, Path | None):
        info.parser = path
    if isinstance(info, typer.models.OptionInfo) and info.metavar is None:
        info.metavar = _metavar(_kind(kind))
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword_only, default=default, annotation=annotation)


def _parameter(option: named.NamedOption) -> inspect.Parameter:
    """Return an option for Typer: a text, which its table validates later."""
    kind = _kind(option.field.annotation)
    choices = _choices(kind)
    is_long = len("|".join(choices)) > MAX_CHOICES_WIDTH
    required = option.field.is_required()
    flags = option.flags
    if kind is bool and option.field.default:
        flags = (f"{flags[0]}/--no-{flags[0][2:]}", *flags[1:])
    text = {bool: bool, tuple: list[str]}.get(get_origin(kind) or kind, str)
    info = typer.Option(
        *flags,
        help=(option.field.description or "").replace("[", "\\[")
        + _help_suffix(option, choices if is_long else []),
        metavar="NAME" if is_long else _metavar(kind),
        rich_help_panel=option.panel or None,
        show_default=False,
    )
    annotation: Any = operator.getitem(Annotated, (text if required else text | None, info))
    return _keyword(option.name, annotation, inspect.Parameter.empty if required else None)


def _help_suffix(option: named.NamedOption, choices: list[str]) -> str:
    """Return the choices, the default and the limits of an option for the help."""
    text, value = "", None
    if not option.field.is_required():
        value = option.field.get_default(call_default_factory=True, validated_data={})
    if value not in (None, "", ()) and not isinstance(value, bool):
        values = value if isinstance(value, tuple) else (value,)
        text = ",".join(str(getattr(one, "value", one)) for one in values)
    limits = {
        word: getattr(one, word)
        for one in option.field.metadata
        for word in ("ge", "gt", "le", "lt")
        if hasattr(one, word)
    }
    parts = [", ".join(choices), f"default: {text}" if text else "", format_range(limits)]
    return f" [dim]\\[{'; '.join(filter(None, parts))}][/dim]" if any(parts) else ""


def _kind(annotation: Any) -> Any:
    """Return the type in an annotation, without None and without limits."""
    if type(None) in get_args(annotation):
        return _kind(next(kind for kind in get_args(annotation) if kind is not type(None)))
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        parsers = (pydantic.BeforeValidator, pydantic.WrapValidator)
        is_text = any(isinstance(one, parsers) for one in metadata)
        return str if is_text else _kind(inner)
    return annotation


def _choices(kind: Any) -> list[str]:
    """Return the values of an enum or a literal type, else nothing."""
    if get_origin(kind) is tuple:
        return _choices(_kind(get_args(kind)[0]))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _metavar(kind: Any) -> str:
    """Return the placeholder of a value in the help."""
    if get_origin(kind) is tuple:
        return f"{_metavar(_kind(get_args(kind)[0]))},..."
    return "|".join(_choices(kind)) or TYPE_NAMES.get(kind, "TEXT")


def _parse_value(option: named.NamedOption, value: Any) -> Any:
    """Return a value on the command line as a file would have it, if it can be parsed."""
    kind = _kind(option.field.annotation)
    if get_origin(kind) is not tuple:
        return _parse_number(kind, value)
    inner = _kind(get_args(kind)[0])
    texts = ",".join(value).split(",") if cli_option(option.field).commas else value
    return [_parse_number(inner, text.strip()) for text in texts if text.strip()]


def _parse_number(kind: Any, text: Any) -> Any:
    """Return the number in a text if ``kind`` is a number, else the text."""
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
