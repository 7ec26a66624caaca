"""JSON Schemas of every document this program prints with ``--json`` or keeps in a file.

``python -m supply_chain.reference`` writes ``docs/schemas/NAME.schema.json``; a test
compares them, and real documents with them. Pydantic makes them from the types of the results:
their annotations, and the ``Attributes:`` of their docstrings. A new document is one line
in :data:`DOCUMENTS`. Files that a user writes are in :data:`INPUTS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from van_deploy.config import Recipe
from van_deploy.config.fields import described
from van_deploy.documents import field_is_json, json_properties
from van_deploy.engine.bundled import FleetFile
from van_deploy.errors import VanDeployError
from van_deploy.recipe import CalibrationSet
from van_deploy.schema import Schema

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
    "info": "van_deploy.describe:model_described",
    "inspect": "van_deploy.describe:artifacts_described",
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
    "sign": "van_deploy.signing:Signed",
    "signature": "van_deploy.signing:Signature",
    "verify": "van_deploy.checks.verify:VerifyReport",
    "verify-signature": "van_deploy.signing:Signed",
}
"""Each document by name: the class of it, or the function that returns it."""

INPUTS: Mapping[str, type[Schema]] = {
    "calibration-set": CalibrationSet,
    "fleet": FleetFile,
    "recipe": Recipe,
}
"""Each file that a user writes, by name."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def files(root: Path) -> Mapping[Path, str]:
    """Return the path and the contents of every schema; ``root`` is the repository's."""
    written = {name: schema_of(name) for name in DOCUMENTS}
    written |= {
        name: {"$schema": DIALECT, **table.model_json_schema()} for name, table in INPUTS.items()
    }
    return {
        root / "docs" / "schemas" / f"{name}.schema.json": json.dumps(schema, indent=2) + "\n"
        for name, schema in written.items()
    }


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema of the document called ``name``."""
    module, _, attribute = DOCUMENTS[name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    if not isinstance(kind, type):
        kind = typing.get_type_hints(kind)["return"]
    config = ConfigDict(arbitrary_types_allowed=True)  # which a class cannot be given, a list can
    lists: Any = list
    adapter = TypeAdapter[Any](lists[kind], config=config)
    schema = adapter.json_schema(schema_generator=_Writer, mode="serialization")
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    return {"$schema": DIALECT, "title": name, **schema["items"], **definitions}


class _Writer(GenerateJsonSchema):
    """Writes types in the form that :func:`~van_deploy.documents.plain` gives their values."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Return the fields that belong to the document, and the properties that do."""
        kind = schema["cls"]
        if issubclass(kind, os.PathLike):  # a bundle
            return {"type": "string", "description": "The path of its folder."}
        kept = {field.name for field in dataclasses.fields(kind) if field_is_json(field)}
        inner: Any = schema["schema"]
        fields = [field for field in inner["fields"] if field["name"] in kept]
        for name in json_properties(kind):
            returned = typing.get_type_hints(getattr(kind, name).fget)["return"]
            fields.append(core_schema.dataclass_field(name, TypeAdapter(returned).core_schema))
        written: Any = {**schema, "schema": {**inner, "fields": fields}}
        return _told(kind, super().dataclass_schema(written))

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Return the table with what its class says of it."""
        return _told(schema["cls"], super().model_schema(schema))

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        """Return the form of our errors."""
        if issubclass(schema["cls"], VanDeployError):
            texts = {name: {"type": "string"} for name in ("kind", "message", "remedy")}
            return {"type": "object", "properties": texts, "required": [*texts]}
        return super().is_instance_schema(schema)

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """Return numbers, and how those are written that JSON cannot spell."""
        return {"anyOf": [super().float_schema(schema), {"enum": ["inf", "-inf", "nan"]}]}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Return the value's own: defaults are written like all others."""
        return self.generate_inner(schema["schema"])

    def field_is_required(self, *_: Any, **__: Any) -> bool:
        """Return True: every key is there."""
        return True

    def field_title_should_be_set(self, *_: Any) -> bool:
        """Return False: a title would be the key again."""
        return False


def _told(kind: type, schema: JsonSchemaValue) -> JsonSchemaValue:
    """Return the schema of a table, closed unless it is open, and described by its docstring."""
    schema.pop("title", None)
    schema.setdefault("additionalProperties", False)
    schema["description"] = " ".join(described(kind.__doc__ or "")[0].partition("\n\n")[0].split())
    for base in reversed(kind.__mro__):
        for name, words in described(base.__doc__ or "")[1].items():
            if name in schema["properties"]:
                schema["properties"][name]["description"] = words
    return schema
