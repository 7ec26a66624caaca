"""Options by name, for command lines and keyword arguments."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from pydantic.fields import FieldInfo

from van_deploy.config.fields import cli_option
from van_deploy.config.recipe_tables import Recipe
from van_deploy.config.sizes import BatchRange
from van_deploy.documents import tomllib
from van_deploy.errors import RecipeError, UsageError
from van_deploy.schema import Settings, field_key, validate

AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True)
class NamedOption:
    """One option of a schema.

    Attributes:
        name: of the keyword argument.
        place: its keys in the schema, the outermost table first.
        field: its type, default, limits and description.
        flags: its names on the command line.
        panel: heading in the help.
    """

    name: str
    place: tuple[str, ...]
    field: FieldInfo
    flags: tuple[str, ...]
    panel: str


class Change(NamedTuple):
    """A new value of one option.

    Attributes:
        value: as it would be in a file.
        source: the option as the user wrote it, such as ``--opset`` or ``opset=``.
    """

    value: Any
    source: str


Changes = dict[tuple[str, ...], Change]
"""New values of options by their keys, the outermost table first."""


def named_options(schema: type[Settings]) -> dict[str, NamedOption]:
    """Return every option of a schema and its inner tables by name."""
    return {option.name: option for option in _options(schema)}


def _options(schema: type[Settings], place: tuple[str, ...] = ()) -> Iterator[NamedOption]:
    for name, info in schema.model_fields.items():
        key, inner, cli = field_key(name, info), info.annotation, cli_option(info)
        if isinstance(inner, type) and issubclass(inner, Settings) and inner is not BatchRange:
            yield from _options(inner, (*place, key))
        else:
            table = next(c for c in schema.__mro__ if name in c.__annotations__)
            panel = getattr(table, "PANEL", "") if cli.panel is None else cli.panel
            yield NamedOption(key, (*place, key), info, cli.flags or _flags(key), panel)


def _flags(name: str) -> tuple[str, ...]:
    return (f"--{name.replace('_', '-')}",)


RECIPE = {".".join(option.place): option for option in _options(Recipe)}
"""Every key of a recipe."""


def _renamed(**keys: str) -> dict[str, NamedOption]:
    """Return keys of a recipe as options under other names."""
    return {n: replace(RECIPE[key], name=n, flags=_flags(n)) for n, key in keys.items()}


EXPORT = {
    **{o.name: o for o in RECIPE.values() if o.place[0] in ("model", "preprocessing", "export")},
    **_renamed(batch="batch", precision="precision.make", calibration="precision.calibration"),
}
"""Options of ``van-deploy export``, by name; each is a key of a recipe."""

RUN = _renamed(
    precision="precision.make",
    calibration="precision.calibration",
    engine="engines.precisions",
    target="engines.targets",
    evaluate="evaluate.images",
    labels="evaluate.labels",
    class_order="evaluate.class_order",
)
"""Options of ``van-deploy run`` that replace keys of a recipe."""


def parse_changes(options: Mapping[str, NamedOption], values: Mapping[str, Any]) -> Changes:
    """Return the changes that keyword arguments make.

    Raises:
        UsageError: there is no option of that name.
    """
    for name in values:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            raise UsageError(
                f"The key '{name}=' is unknown.",
                f"Did you mean '{near[0]}='?" if near else f"Known keys: {', '.join(options)}.",
            )
    return {options[name].place: Change(value, f"{name}=") for name, value in values.items()}


def parse_assignments(assignments: Iterable[str]) -> Changes:
    """Return the changes of ``KEY=VALUE`` assignments.

    The value is TOML, else text: ``model.weights=mine.pth`` needs no quotation marks.

    Raises:
        UsageError: an assignment has no ``=`` or no key.
    """
    changes: Changes = {}
    for text in assignments:
        key, equals, text_value = text.partition("=")
        place = tuple(part.strip() for part in key.split("."))
        if not equals or not all(place):
            raise UsageError(
                f"--set '{text}' is not an assignment.",
                "Write KEY=VALUE, such as --set engines.tf32=false.",
            )
        try:
            value = tomllib.loads(f"value = {text_value}")["value"]
        except tomllib.TOMLDecodeError:
            value = text_value
        changes[place] = Change(value, f"--set {'.'.join(place)}")
    return changes


def parse_recipe(tables: dict[str, Any], changes: Changes, where: str = "") -> Recipe:
    """Return the recipe in ``tables`` with ``changes`` applied.

    Raises:
        RecipeError: a key or value in the tables is invalid; begins with ``where``.
        UsageError: a change is invalid; names the option as the user wrote it.
    """
    key_names = {place: change.source for place, change in changes.items()}
    tables = apply_changes(tables, changes)
    return validate(Recipe, tables, where=where, error=RecipeError, key_names=key_names)


def parse_settings(schema: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Return the settings in the keyword arguments of a call.

    Raises:
        UsageError: an option is unknown, of the wrong type, or conflicts with another.
    """
    options = named_options(schema)
    tree = apply_changes({}, parse_changes(options, values))
    return validate(schema, tree, key_names={o.place: f"{o.name}=" for o in options.values()})


def explicit_values(settings: Settings) -> dict[str, Any]:
    """Return the values that were set explicitly, as a file would have them."""
    fields, tree = type(settings).model_fields, {}
    for name, value in settings.model_dump(mode="json", exclude_unset=True).items():
        inner = getattr(settings, name)
        is_table = isinstance(inner, Settings)
        tree[field_key(name, fields[name])] = explicit_values(inner) if is_table else value
    return tree


def apply_changes(tables: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Apply changes to nested tables in place, and return the tables.

    If the name of a recipe's network changes, its weights stay the same.

    Raises:
        UsageError: a value is where a table should be.
    """
    model = tables.get("model")
    if ("model", "name") in changes and isinstance(model, dict) and model.get("name"):
        model.setdefault("weights", model["name"])
    for place, change in changes.items():
        tree = tables
        for depth, part in enumerate(place[:-1], 1):
            tree = tree.setdefault(part, {})
            if not isinstance(tree, dict):
                key, outer = ".".join(place), ".".join(place[:depth])
                message = f"'{key}' cannot be set: '{outer}' is not a table."
                raise UsageError(message, f"Set '{outer}' as a whole.")
        tree[place[-1]] = change.value
    return tables
