"""Generated reference: JSON Schemas, the table of recipe keys, and types of keyword arguments.

``python -m supply_chain.reference`` writes ``docs/schemas/NAME.schema.json`` for every document
that is printed with ``--json`` or kept in a file, the table in ``docs/recipe.md``, and
``van_deploy/option_types.pyi``; a test compares them. Pydantic makes the schemas from the types
of the results: their annotations, and the ``Attributes:`` of their docstrings.
"""

import dataclasses
import importlib
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from van_deploy import config
from van_deploy.config.fields import format_range, parse_docstring
from van_deploy.config.named_options import EXPORT, named_options
from van_deploy.documents import is_json_field, json_properties
from van_deploy.engine.fleet import FleetFile
from van_deploy.errors import VanDeployError
from van_deploy.recipe import CalibrationSet

DOCUMENTS: Mapping[str, str] = {
    "baseline": "van_deploy.checks.regression:Baseline",
    "bench": "van_deploy.bench.document:BenchReport",
    "bench-limits": "van_deploy.bench.document:PaperLimits",
    "build": "van_deploy.building:BuildReport",
    "check": "van_deploy.checks.regression:CheckReport",
    "doctor": "van_deploy.environment.doctor:Environment",
    "drift": "van_deploy.checks.drift:DriftReport",
    "evaluate": "van_deploy.checks.evaluate:EvaluateReport",
    "export": "van_deploy.pipeline:ExportReport",
    "inductor-sidecar": "van_deploy.engine.sidecar:PackageSidecar",
    "info": "van_deploy.describe:describe_model",
    "inspect": "van_deploy.describe:describe_artifacts",
    "list": "van_deploy.model.variants:list_variants",
    "manifest": "van_deploy.manifest:Manifest",
    "package": "van_deploy.serve.package:PackageReport",
    "package-record": "van_deploy.serve.package:PackageRecord",
    "predict": "van_deploy.api:Predictions",
    "predict-line": "van_deploy.serve.predict:Prediction",
    "quantize": "van_deploy.precision.pipeline:QuantizeResult",
    "report": "van_deploy.api:WrittenReport",
    "run": "van_deploy.pipeline:RunResult",
    "serve": "van_deploy.cli.use:Listening",
    "sidecar": "van_deploy.engine.sidecar:Sidecar",
    "sign": "van_deploy.signing:SignedBundle",
    "signature": "van_deploy.signing:Signature",
    "verify": "van_deploy.checks.verify:VerifyReport",
    "verify-signature": "van_deploy.signing:SignedBundle",
}
"""Each document by name: its class, or the function that returns it."""

INPUTS: dict[str, type[BaseModel]] = {
    "calibration-set": CalibrationSet,
    "fleet": FleetFile,
    "recipe": config.Recipe,
}
"""The tables of each file that a user writes, by name."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BEGIN, END = "<!-- keys: python -m supply_chain.reference -->", "<!-- /keys -->"
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
OPTION_TYPES_HEAD = """\
# Written by `python -m supply_chain.reference` from van_deploy/config.
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict"""
CALLS = (
    *("Bench", "Build", "Check", "Drift", "Evaluation", "Export"),
    *("Package", "Predict", "Quantize", "Run", "Verify"),
)
# In Python, and in words on the page. An object is a range, written min:opt:max.
TYPES = {
    "string": ("str", "text"),
    "path": ("str | Path", "path"),
    "object": ("str", "`min:opt:max`"),
    "integer": ("int", "whole number"),
    "number": ("float", "number"),
    "boolean": ("bool", "true, false"),
    "null": ("None", ""),
}
JsonSchema = Mapping[str, Any]


def generated_files(root: Path) -> Mapping[Path, str]:
    """Return the contents of every generated file by path; ``root`` is the repository's."""
    page = root / "docs" / "recipe.md"
    table, text = f"{BEGIN}\n\n{key_table()}\n{END}", page.read_text(encoding="utf-8")
    schemas = {name: document_schema(name) for name in DOCUMENTS}
    inputs = {name: table.model_json_schema() for name, table in INPUTS.items()}
    schemas |= {name: {"$schema": DIALECT, **schema} for name, schema in inputs.items()}
    folder = root / "docs" / "schemas"
    return {
        root / "van_deploy" / "option_types.pyi": option_types(),
        page: re.sub(f"{BEGIN}.*?{END}", lambda _: table, text, flags=re.DOTALL),
        **{folder / f"{n}.schema.json": json.dumps(s, indent=2) + "\n" for n, s in schemas.items()},
    }


def document_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of the document called ``name``."""
    module, _, attribute = DOCUMENTS[name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    if not isinstance(kind, type):
        kind = typing.get_type_hints(kind)["return"]
    config = ConfigDict(arbitrary_types_allowed=True)  # a list takes it, a class does not
    lists: Any = list
    adapter = TypeAdapter[Any](lists[kind], config=config)
    schema = adapter.json_schema(schema_generator=_SchemaWriter, mode="serialization")
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    return {"$schema": DIALECT, "title": name, **schema["items"], **definitions}


class _SchemaWriter(GenerateJsonSchema):
    """Writes types in the form that :func:`~van_deploy.documents.plain` gives their values."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Return the fields and the properties that belong to the document."""
        kind = schema["cls"]
        if issubclass(kind, os.PathLike):  # a bundle
            return {"type": "string", "description": "The path of its folder."}
        kept = {field.name for field in dataclasses.fields(kind) if is_json_field(field)}
        inner: Any = schema["schema"]
        fields = [field for field in inner["fields"] if field["name"] in kept]
        for name in json_properties(kind):
            hint = typing.get_type_hints(getattr(kind, name).fget)["return"]
            fields.append(core_schema.dataclass_field(name, TypeAdapter(hint).core_schema))
        written: Any = {**schema, "schema": {**inner, "fields": fields}}
        return _describe_(kind, super().dataclass_schema(written))

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Return the table with the description of its class."""
        return _describe_(schema["cls"], super().model_schema(schema))

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        """Return the form of this package's errors."""
        if issubclass(schema["cls"], VanDeployError):
            texts = {name: {"type": "string"} for name in ("kind", "message", "remedy")}
            return {"type": "object", "properties": texts, "required": [*texts]}
        return super().is_instance_schema(schema)

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """Return a number, or the texts for infinity and NaN, which JSON does not have."""
        return {"anyOf": [super().float_schema(schema), {"enum": ["inf", "-inf", "nan"]}]}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Return the schema of the value: defaults are written like other values."""
        return self.generate_inner(schema["schema"])

    def field_is_required(self, *_: Any, **__: Any) -> bool:
        """Return True: every key is there."""
        return True

    def field_title_should_be_set(self, *_: Any) -> bool:
        """Return False: a title would be the key again."""
        return False


def _describe_(kind: type, schema: JsonSchemaValue) -> JsonSchemaValue:
    """Return the schema of a table, closed unless it is open, and described by its docstring."""
    schema.pop("title", None)
    schema.setdefault("additionalProperties", False)
    summary = parse_docstring(kind.__doc__ or "")[0].partition("\n\n")[0]
    schema["description"] = " ".join(summary.split())
    for base in reversed(kind.__mro__):
        for name, words in parse_docstring(base.__doc__ or "")[1].items():
            if name in schema["properties"]:
                schema["properties"][name]["description"] = words
    return schema


def resolved_schema(table: type[config.Recipe]) -> Any:
    """Return the JSON Schema of a table with every reference replaced by what it refers to."""
    schema = {"$defs": {}, **table.model_json_schema()}

    def resolve(value: dict[str, Any]) -> dict[str, Any]:
        definition = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2])
        return {**_map_objects(definition, resolve), **value} if definition else value

    return _map_objects(schema, resolve)


def _map_objects(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    return json.loads(json.dumps(value), object_hook=change)


def option_types() -> str:
    """Return the keyword arguments of the Python API as ``TypedDict`` classes."""
    lines = [OPTION_TYPES_HEAD]
    for name in CALLS:
        table = config.Recipe if name == "Export" else getattr(config, f"{name}Settings")
        schema = resolved_schema(table)
        lines += ["", f"class {name}Options(TypedDict, total=False):"]
        for option in (EXPORT if name == "Export" else named_options(table)).values():
            value = schema
            for part in option.place:
                value = value["properties"][part]
            lines.append(f"    {option.name}: {_python_type(value)}")
    return "\n".join([*lines, ""])


def key_table() -> str:
    """Return every key of a recipe with its type, default and help, as Markdown."""
    lines: list[str] = []
    for table, entry in resolved_schema(config.Recipe)["properties"].items():
        lines += [f"### `[{table}]`", "", entry["description"], ""]
        lines += ["| key | values | default | what it does |", "|---|---|---|---|"]
        for key, value in _keys(entry):
            default = json.dumps(value.get("default"))
            words = f"`{default}`" if default not in ("null", '""', "[]") else ""
            lines.append(f"| `{key}` | {_words(value)} | {words} | {value['description']} |")
        lines.append("")
    return "\n".join(lines)


def _keys(table: JsonSchema) -> Iterator[tuple[str, JsonSchema]]:
    """Yield the keys of a table; those of tables inside it with dots."""
    for key, value in table["properties"].items():
        if "properties" in value:
            yield from ((f"{key}.{name}", inner) for name, inner in _keys(value))
        else:
            yield key, value


def _types(value: JsonSchema) -> list[tuple[str, str]]:
    """Return each type that a value can have: in Python, and for the page with its limits."""
    if "anyOf" in value:
        return [pair for kind in value["anyOf"] for pair in _types(kind)]
    if "enum" in value:
        literals = ", ".join(map(json.dumps, value["enum"]))
        return [(f"Literal[{literals}]", " \\| ".join(f"`{name}`" for name in value["enum"]))]
    if value["type"] == "array":
        return [(f"Sequence[{_python_type(value['items'])}]", f"list of {_words(value['items'])}")]
    kind = "object" if "properties" in value else value.get("format", value["type"])
    python, words = TYPES[kind]
    limits = {word: value[key] for word, key in LIMITS.items() if key in value}
    return [(python, f"{words} {format_range(limits)}".strip())]


def _python_type(value: JsonSchema) -> str:
    return " | ".join(dict.fromkeys(python for python, _ in _types(value)))


def _words(value: JsonSchema) -> str:
    return " or ".join(words for _, words in _types(value) if words)


if __name__ == "__main__":
    for path, text in generated_files(Path(__file__).parents[1]).items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}\n")
