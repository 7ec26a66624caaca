"""What is written from the code: types of keyword arguments, a page, the JSON Schemas.

``python -m supply_chain.reference`` writes ``van_deploy/option_types.pyi``, the table of
keys in ``docs/recipe.md`` and ``docs/schemas``; a test compares them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from supply_chain import json_schemas
from van_deploy import config
from van_deploy.config.fields import range_text
from van_deploy.config.named import EXPORT, Named, named_options
from van_deploy.schema import Settings

BEGIN, END = "<!-- keys: python -m supply_chain.reference -->", "<!-- /keys -->"
LIMITS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}


def files(root: Path) -> Mapping[Path, str]:
    """Return every file that is written from the tables, with its contents."""
    page = root / "docs" / "recipe.md"
    text = page.read_text(encoding="utf-8")
    table = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    written = f"{BEGIN}\n\n{key_table()}\n{END}"
    return {
        root / "van_deploy" / "option_types.pyi": option_types(),
        page: table.sub(lambda _: written, text),
        **json_schemas.files(root),
    }


def option_types() -> str:
    """Return the keyword arguments of the Python API as ``TypedDict`` classes."""
    tables: dict[str, type[Settings]] = {
        "BenchOptions": config.BenchSettings,
        "BuildOptions": config.BuildSettings,
        "CheckOptions": config.CheckSettings,
        "DriftOptions": config.DriftSettings,
        "EvaluateOptions": config.EvaluationSettings,
        "PackageOptions": config.PackageSettings,
        "PredictOptions": config.PredictSettings,
        "QuantizeOptions": config.QuantizeSettings,
        "RunOptions": config.RunSettings,
        "VerifyOptions": config.VerifySettings,
    }
    options = {name: list(named_options(table).values()) for name, table in tables.items()}
    lines = [
        "# Written by `python -m supply_chain.reference` from van_deploy/config.",
        "from collections.abc import Sequence",
        "from pathlib import Path",
        "from typing import Literal, TypedDict",
    ]
    for name, found in sorted({**options, "ExportOptions": list(EXPORT.values())}.items()):
        root = tables.get(name, config.Recipe)
        lines += ["", f"class {name}(TypedDict, total=False):"]
        lines += [f"    {option.name}: {_type_of(option, root)}" for option in found]
    return "\n".join(lines) + "\n"


def key_table() -> str:
    """Return every key of a recipe with its type, default and help, as Markdown."""
    schema = config.Recipe.model_json_schema()
    lines: list[str] = []
    for table, entry in schema["properties"].items():
        lines += [f"### `[{table}]`", "", entry["description"], ""]
        lines += ["| key | values | default | what it does |", "|---|---|---|---|"]
        for key, value in _keys(schema, entry):
            default = json.dumps(value.get("default"))
            words = f"`{default}`" if default not in ("null", '""', "[]") else ""
            lines.append(
                f"| `{key}` | {_values(schema, value)} | {words} | {value.get('description', '')} |"
            )
        lines.append("")
    return "\n".join(lines)


def _keys(schema: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a table; those of tables inside it with dots."""
    for key, value in _resolved(schema, entry)["properties"].items():
        inner = _resolved(schema, value)
        if "properties" in inner:
            yield from ((f"{key}.{name}", found) for name, found in _keys(schema, value))
        else:
            yield key, value


def _resolved(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema["$defs"][value["$ref"].split("/")[-1]] if "$ref" in value else value


def _type_of(option: Named, root: type[Settings]) -> str:
    """Return the Python type of an option's values."""
    schema = root.model_json_schema()
    value: Mapping[str, Any] = schema
    for part in option.place:
        value = _resolved(schema, value)["properties"][part]
    return " | ".join(dict.fromkeys(_types(schema, value)))


def _types(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Iterator[str]:
    value = _resolved(schema, value)
    if "anyOf" in value:
        for one in value["anyOf"]:
            yield from _types(schema, one)
    elif "enum" in value:
        yield f"Literal[{', '.join(json.dumps(name) for name in value['enum'])}]"
    elif value.get("type") == "array":
        yield f"Sequence[{' | '.join(_types(schema, value['items']))}]"
    elif value.get("type") == "object":  # a batch range, written min:opt:max
        yield "str"
    else:
        yield TYPES[value["type"]]
        if value.get("format") == "path":
            yield "Path"


def _values(schema: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """Return what a key takes, in words."""
    value = _resolved(schema, value)
    if "anyOf" in value:
        kinds = [_values(schema, one) for one in value["anyOf"] if one.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in value:
        return " \\| ".join(f"`{name}`" for name in value["enum"])
    if value.get("type") == "array":
        return f"list of {_values(schema, value['items'])}"
    if value.get("type") == "object":
        return "`min:opt:max`"
    limits = {word: value[key] for word, key in LIMITS.items() if key in value}
    words = {"integer": "whole number", "number": "number", "boolean": "true, false"}
    kind = "path" if value.get("format") == "path" else words.get(value["type"], "text")
    return f"{kind} {range_text(limits)}".strip()


if __name__ == "__main__":
    for path, text in files(Path(__file__).parents[1]).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}\n")
