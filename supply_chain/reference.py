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
from van_deploy.config.fields import format_range
from van_deploy.config.named_options import EXPORT, named_options

BEGIN, END = "<!-- keys: python -m supply_chain.reference -->", "<!-- /keys -->"
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
CALLS = (
    *("Bench", "Build", "Check", "Drift", "Evaluation", "Export"),
    *("Package", "Predict", "Quantize", "Run", "Verify"),
)
TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
TYPES["object"] = "str"  # a range, written min:opt:max
WORDS = {"integer": "whole number", "number": "number", "boolean": "true, false"}
WORDS["object"] = "`min:opt:max`"
Schema = Mapping[str, Any]


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
    lines = [
        "# Written by `python -m supply_chain.reference` from van_deploy/config.",
        "from collections.abc import Sequence",
        "from pathlib import Path",
        "from typing import Literal, TypedDict",
    ]
    for name in CALLS:
        table = config.Recipe if name == "Export" else getattr(config, f"{name}Settings")
        schema = table.model_json_schema()
        lines += ["", f"class {name}Options(TypedDict, total=False):"]
        for option in (EXPORT if name == "Export" else named_options(table)).values():
            value = schema
            for part in option.place:
                value = _resolved(schema, value)["properties"][part]
            lines.append(f"    {option.name}: {_union(schema, value)}")
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
                f"| `{key}` | {_words(schema, value)} | {words} | {value.get('description', '')} |"
            )
        lines.append("")
    return "\n".join(lines)


def _keys(schema: Schema, entry: Schema) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a table; those of tables inside it with dots."""
    for key, value in _resolved(schema, entry)["properties"].items():
        inner = _resolved(schema, value)
        if "properties" in inner:
            yield from ((f"{key}.{name}", found) for name, found in _keys(schema, value))
        else:
            yield key, value


def _resolved(schema: Schema, value: Schema) -> Schema:
    return schema["$defs"][value["$ref"].split("/")[-1]] if "$ref" in value else value


def _leaves(schema: Schema, value: Schema) -> list[Schema]:
    """Return what a value may be, one schema each."""
    value = _resolved(schema, value)
    if "anyOf" not in value:
        return [value]
    return [leaf for one in value["anyOf"] for leaf in _leaves(schema, one)]


def _union(schema: Schema, value: Schema) -> str:
    """Return the Python type of a value."""
    return " | ".join(dict.fromkeys(_type(schema, leaf) for leaf in _leaves(schema, value)))


def _type(schema: Schema, leaf: Schema) -> str:
    if "enum" in leaf:
        return f"Literal[{', '.join(map(json.dumps, leaf['enum']))}]"
    if leaf["type"] == "array":
        return f"Sequence[{_union(schema, leaf['items'])}]"
    return "str | Path" if leaf.get("format") == "path" else TYPES[leaf["type"]]


def _words(schema: Schema, value: Schema) -> str:
    """Return what a key takes, in words."""
    leaves = (leaf for leaf in _leaves(schema, value) if leaf.get("type") != "null")
    return " or ".join(_leaf_words(schema, leaf) for leaf in leaves)


def _leaf_words(schema: Schema, leaf: Schema) -> str:
    if "enum" in leaf:
        return " \\| ".join(f"`{name}`" for name in leaf["enum"])
    if leaf["type"] == "array":
        return f"list of {_words(schema, leaf['items'])}"
    limits = {word: leaf[key] for word, key in LIMITS.items() if key in leaf}
    kind = "path" if leaf.get("format") == "path" else WORDS.get(leaf["type"], "text")
    return f"{kind} {format_range(limits)}".strip()


if __name__ == "__main__":
    for path, text in files(Path(__file__).parents[1]).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}\n")
