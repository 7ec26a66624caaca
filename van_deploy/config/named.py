"""Options under one name each, for command lines and keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from van_deploy.config.fields import key_of, shown
from van_deploy.config.making import Recipe
from van_deploy.config.sizes import BatchRange
from van_deploy.errors import UsageError
from van_deploy.schema import Settings, Spelling, validated

AnySettings = TypeVar("AnySettings", bound=Settings)


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


def named_options(schema: type[Settings]) -> dict[str, Named]:
    """Return every option of a schema by its name; those of tables inside it, too."""
    return {option.name: option for option in _options(schema)}


def _options(schema: type[Settings], place: tuple[str, ...] = ()) -> Iterator[Named]:
    for name, info in schema.model_fields.items():
        key, inner, told = key_of(name, info), info.annotation, shown(info)
        if isinstance(inner, type) and issubclass(inner, Settings) and inner is not BatchRange:
            yield from _options(inner, (*place, key))
        else:
            table = next(c for c in schema.__mro__ if name in c.__annotations__)
            panel = getattr(table, "PANEL", "") if told.panel is None else told.panel
            yield Named(key, (*place, key), info, told.flags or _flags(key), panel)


def _flags(name: str) -> tuple[str, ...]:
    return (f"--{name.replace('_', '-')}",)


RECIPE = {".".join(option.place): option for option in _options(Recipe)}
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


def changes_from(options: Mapping[str, Named], values: Mapping[str, Any]) -> Changes:
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
    places = {name: options[name].place for name in values}
    return Changes(
        {places[name]: value for name, value in values.items()},
        {place: f"{name}=" for name, place in places.items()},
    )


def with_changes(recipe: Recipe, changes: Changes) -> Recipe:
    """Return a recipe with other values for some keys.

    Raises:
        UsageError: a change is wrong; names the option as it was written.
    """
    tree = put_all(_written(recipe), changes)
    return validated(Recipe, tree, spelling=changes.spelling)


def settings_from(schema: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Return the settings that a call's keyword arguments are.

    Raises:
        UsageError: an option is unknown, is not of its kind, or contradicts another.
    """
    options = named_options(schema)
    tree = put_all({}, changes_from(options, values))
    return validated(schema, tree, spelling={o.place: f"{o.name}=" for o in options.values()})


def _written(settings: Settings) -> dict[str, Any]:
    """Return the values that were given, as a file would have them."""
    fields, tree = type(settings).model_fields, {}
    for name, value in settings.model_dump(mode="json", exclude_unset=True).items():
        inner = getattr(settings, name)
        is_table = isinstance(inner, Settings)
        tree[key_of(name, fields[name])] = _written(inner) if is_table else value
    return tree


def put_all(tables: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Return nested tables with values set in them, in place.

    A recipe's network of another name keeps the weights it had.

    Raises:
        UsageError: something else is where a table should be.
    """
    model = tables.get("model")
    if ("model", "name") in changes.values and isinstance(model, dict) and model.get("name"):
        model.setdefault("weights", model["name"])
    for place, value in changes.values.items():
        tree = tables
        for depth, part in enumerate(place[:-1], 1):
            tree = tree.setdefault(part, {})
            if not isinstance(tree, dict):
                raise UsageError(
                    f"'{'.'.join(place)}' cannot be set: '{'.'.join(place[:depth])}' is no table.",
                    "Set the whole of it.",
                )
        tree[place[-1]] = value
    return tables
