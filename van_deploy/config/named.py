"""Options under one name each, for command lines and keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from van_deploy.config.deployment import Recipe
from van_deploy.config.fields import BatchRange, key_of, shown
from van_deploy.errors import UsageError
from van_deploy.schema import Settings, Spelling, validated

Table = TypeVar("Table", bound=Settings)


@dataclass(frozen=True)
class Named:
    """One option of a schema.

    Attributes:
        name: of the keyword argument.
        place: its keys in the schema, the outermost table first.
        field: what is known about it.
        flags: the option as the command line writes it.
        panel: heading it stands under in the help.
    """

    name: str
    place: tuple[str, ...]
    field: FieldInfo
    flags: tuple[str, ...]
    panel: str


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
        key, inner, told = key_of(name, info), info.annotation, shown(info)
        if isinstance(inner, type) and issubclass(inner, Settings) and inner is not BatchRange:
            yield from _options(inner, (*place, key))
        else:
            table = next(c for c in schema.__mro__ if name in c.__annotations__)
            panel = vars(table).get("PANEL", "") if told.panel is None else told.panel
            yield Named(key, (*place, key), info, told.flags or _flags(key), panel)


def _flags(name: str) -> tuple[str, ...]:
    return (f"--{name.replace('_', '-')}",)


RECIPE = {".".join(option.place): option for option in _options(Recipe, ())}
"""Every key of a recipe."""


def _renamed(**keys: str) -> dict[str, Named]:
    """Return keys of a recipe as options under other names."""
    return {n: replace(RECIPE[key], name=n, flags=_flags(n)) for n, key in keys.items()}


EXPORT = {
    **{o.name: o for o in RECIPE.values() if o.place[0] in ("model", "preprocessing", "export")},
    **_renamed(batch="batch", precision="precision.make", calibration="precision.calibration"),
}
"""Options of ``van-deploy export``, which are keys of a recipe."""

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


def changes_from(options: Options, values: Mapping[str, Any]) -> Changes:
    """Return keyword arguments as changes of a recipe.

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
    return Changes(
        {options[name].place: value for name, value in values.items()},
        {options[name].place: f"{name}=" for name in values},
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
    tree = _written(given) if given else {}
    put_all(tree, changes_from(options, values))
    return validated(schema, tree, spelling={o.place: f"{o.name}=" for o in options.values()})


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
    """Set values in nested tables; a recipe's network of another name keeps the weights it had.

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
