"""Options under one name each, for command lines and keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from van_deploy.config.deployment import Recipe
from van_deploy.config.fields import BatchRange, key_of, shown
from van_deploy.errors import UsageError
from van_deploy.schema import Settings, Spelling, table_in, validated

__all__ = [
    "EXPORT",
    "RUN",
    "Changes",
    "Named",
    "changes_from",
    "named_options",
    "put",
    "put_all",
    "settings_from",
    "with_changes",
]

Table = TypeVar("Table", bound=Settings)


@dataclass(frozen=True)
class Named:
    """One option of a schema.

    Attributes:
        name: of the keyword argument.
        place: its keys in the schema, the outermost table first.
        field: what is known about it.
        flags: the option as the command line writes it.
    """

    name: str
    place: tuple[str, ...]
    field: FieldInfo
    flags: tuple[str, ...]

    @property
    def keyword(self) -> str:
        """The option as a keyword argument is written."""
        return f"{self.name}="


Options = Mapping[str, Named]


@dataclass(frozen=True)
class Changes:
    """Values for some options of a recipe, and how the user wrote these options.

    Attributes:
        values: by the option's keys.
        spelling: by the same keys.
    """

    values: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    spelling: Spelling = field(default_factory=dict)

    def __or__(self, other: Changes) -> Changes:
        """Return both; ``other`` wins where both have a value."""
        return Changes({**self.values, **other.values}, {**self.spelling, **other.spelling})


def named_options(schema: type[Settings], place: tuple[str, ...] = ()) -> dict[str, Named]:
    """Return every option of a schema by its name; those of tables inside it, too."""
    return {option.name: option for option in _options(schema, place)}


def _options(schema: type[Settings], place: tuple[str, ...]) -> Iterator[Named]:
    for name, info in schema.model_fields.items():
        key = key_of(name, info)
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Settings) and inner is not BatchRange:
            yield from _options(inner, (*place, key))
        else:
            yield Named(key, (*place, key), info, shown(info).flags or _flags(key))


def _flags(name: str) -> tuple[str, ...]:
    return (f"--{name.replace('_', '-')}",)


def _chosen(tables: tuple[str, ...], **others: str) -> dict[str, Named]:
    """Return the options of whole tables of a recipe, and single ones under other names."""
    found: dict[str, Named] = {}
    for table in tables:
        schema = table_in(Recipe.model_fields[table].annotation)
        if schema is not None:
            found |= named_options(schema, (table,))
    for name, key in others.items():
        place = tuple(key.split("."))
        schema = Recipe
        for part in place[:-1]:
            schema = table_in(schema.model_fields[part].annotation) or schema
        info = next(f for n, f in schema.model_fields.items() if key_of(n, f) == place[-1])
        found[name] = Named(name, place, info, _flags(name))
    return found


EXPORT = _chosen(
    ("model", "preprocessing", "export"),
    batch="batch",
    precision="precision.make",
    calibration="precision.calibration",
)
"""Options of ``van-deploy export``, which are keys of a recipe."""

RUN = _chosen(
    (),
    precision="precision.make",
    calibration="precision.calibration",
    engine="engines.precisions",
    target="engines.targets",
    evaluate="evaluate.images",
    labels="evaluate.labels",
    class_order="evaluate.class_order",
)
"""Options of ``van-deploy run`` that replace keys of a recipe."""


def changes_from(options: Options, values: Mapping[str, Any]) -> Changes:
    """Return keyword arguments as changes of a recipe.

    Raises:
        UsageError: there is no option of that name.
    """
    _refuse_unknown(options, values)
    return Changes(
        {options[name].place: value for name, value in values.items()},
        {options[name].place: options[name].keyword for name in values},
    )


def with_changes(recipe: Recipe, changes: Changes) -> Recipe:
    """Return a recipe with other values for some keys.

    Raises:
        UsageError: a change is wrong; names the option as it was written.
    """
    tree = _written(recipe)
    put_all(tree, changes)
    return validated(Recipe, tree, spelling=changes.spelling)


def settings_from(schema: type[Table], given: Table | None, values: Mapping[str, Any]) -> Table:
    """Return the settings of a call: those given whole, with keyword arguments instead of some.

    Raises:
        UsageError: an option is unknown, is not of its kind, or contradicts another.
    """
    options = named_options(schema)
    _refuse_unknown(options, values)
    tree = _written(given) if given else {}
    for name, value in values.items():
        put(tree, options[name].place, value)
    return validated(
        schema, tree, spelling={option.place: option.keyword for option in options.values()}
    )


def _written(settings: Settings) -> dict[str, Any]:
    """Return the values that were given, as a file would have them."""
    plain = settings.as_dict()
    return {
        key_of(name, info): _written(value)
        if isinstance(value := getattr(settings, name), Settings)
        else plain[name]
        for name, info in type(settings).model_fields.items()
        if name in settings.model_fields_set
    }


def put_all(tables: dict[str, Any], changes: Changes) -> None:
    """Set values in a recipe's tables; a network of another name keeps the weights it had.

    Raises:
        UsageError: something else is where a table should be.
    """
    model = tables.get("model")
    if ("model", "name") in changes.values and isinstance(model, dict) and model.get("name"):
        model.setdefault("weights", model["name"])
    for place, value in changes.values.items():
        put(tables, place, value)


def put(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set a value in nested tables, making them where they are missing.

    Raises:
        UsageError: something else is where a table should be.
    """
    for depth, part in enumerate(place[:-1], 1):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UsageError(
                f"'{'.'.join(place)}' cannot be set: '{'.'.join(place[:depth])}' is no table.",
                "Set the whole of it.",
            )
    tree[place[-1]] = value


def _refuse_unknown(options: Options, values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            raise UsageError(
                f"The key '{name}=' is unknown.",
                f"Did you mean '{near[0]}='?" if near else f"Known keys: {', '.join(options)}.",
            )
