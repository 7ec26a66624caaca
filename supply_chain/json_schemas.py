"""JSON Schemas of every document this program prints with ``--json`` or keeps in a file.

``python -m supply_chain.reference`` writes ``docs/schemas/NAME.schema.json``; a test
compares them, and real documents with them. They are made from the types of the results:
their annotations, and the ``Attributes:`` of their docstrings. A new document is one line
in :data:`DOCUMENTS`. Files that a user writes are in :data:`INPUTS`.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import PlainSerializer

from van_deploy.calibration_set import CalibrationSet
from van_deploy.config import Recipe
from van_deploy.documents import field_is_json, json_properties
from van_deploy.engine.bundled import FleetFile
from van_deploy.errors import VanDeployError
from van_deploy.schema import Open, Schema

DOCUMENTS: Mapping[str, str] = {
    "baseline": "van_deploy.checks.regression:Baseline",
    "bench": "van_deploy.bench.document:BenchReport",
    "bench-limits": "van_deploy.bench.document:PaperLimits",
    "build": "van_deploy.results:BuildReport",
    "check": "van_deploy.checks.regression:CheckReport",
    "doctor": "van_deploy.environment.doctor:Environment",
    "drift": "van_deploy.checks.drift:DriftReport",
    "evaluate": "van_deploy.checks.evaluate:EvaluateReport",
    "export": "van_deploy.results:ExportReport",
    "inductor-sidecar": "van_deploy.engine.sidecar:PackageSidecar",
    "info": "van_deploy.describe:model_described",
    "inspect": "van_deploy.describe:artefacts_described",
    "list": "van_deploy.model.variants:listed_variants",
    "manifest": "van_deploy.manifest:Manifest",
    "package": "van_deploy.serve.package:PackageReport",
    "package-record": "van_deploy.serve.package:PackageRecord",
    "predict": "van_deploy.results:Predictions",
    "predict-line": "van_deploy.serve.predict:Prediction",
    "quantize": "van_deploy.precision.pipeline:QuantizeResult",
    "report": "van_deploy.results:WrittenReport",
    "run": "van_deploy.results:RunResult",
    "serve": "van_deploy.results:Listening",
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
SIMPLE: Mapping[Any, Mapping[str, Any]] = {
    Any: {},
    object: {},
    None: {"type": "null"},
    type(None): {"type": "null"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]},
    str: {"type": "string"},
    dict: {"type": "object"},
}
LIMITS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


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
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, type):
        found = typing.get_type_hints(found, _namespace(module), include_extras=True)["return"]
    writer = _Writer()
    top = writer.of(found)
    if list(top) == ["$ref"]:  # said once, and not by reference to itself
        top = writer.definitions.pop(found.__name__)
    definitions = {key: writer.definitions[key] for key in sorted(writer.definitions)}
    return {
        "$schema": DIALECT,
        "title": name,
        **top,
        **({"$defs": definitions} if definitions else {}),
    }


class _Writer:
    """Writes types as JSON Schema.

    Attributes:
        definitions: of every table met so far, by the name of its class.
    """

    def __init__(self) -> None:
        self.definitions: dict[str, dict[str, Any]] = {}
        self._classes: dict[str, type] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        """Return the schema of one type.

        Raises:
            TypeError: no document holds such a thing.
        """
        if isinstance(kind, typing.Hashable) and kind in SIMPLE:
            return dict(SIMPLE[kind])
        origin, inner = get_origin(kind), get_args(kind)
        if origin is typing.Annotated:
            if any(isinstance(one, PlainSerializer) and one.func is str for one in inner[1:]):
                return {"type": "string"}
            return {**self.of(inner[0]), **_limits(inner[1:])}
        if origin is typing.Literal:
            return {"enum": list(inner)}
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [self.of(one) for one in inner]}
        if origin is tuple and inner[-1] is not Ellipsis:
            items = [self.of(one) for one in inner]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.of(inner[1])}
        if isinstance(origin, type) and issubclass(origin, typing.Collection):
            return {"type": "array", "items": self.of(inner[0])}
        return self._of_class(kind)

    def _of_class(self, kind: Any) -> dict[str, Any]:
        if not isinstance(kind, type):
            raise TypeError(f"no document can hold {kind!r}")
        if issubclass(kind, enum.Enum):
            return {"enum": [member.value for member in kind]}
        if issubclass(kind, os.PathLike):
            return {"type": "string"}
        if issubclass(kind, VanDeployError):
            keys = ("kind", "message", "remedy")
            return _table({key: {"type": "string"} for key in keys})
        if not dataclasses.is_dataclass(kind) and not issubclass(kind, Schema):
            raise TypeError(f"no document can hold {kind!r}")
        if self._classes.setdefault(kind.__name__, kind) is not kind:
            raise TypeError(f"two classes are called {kind.__name__}")
        if kind.__name__ not in self.definitions:
            self.definitions[kind.__name__] = {}  # met: it may hold itself
            self.definitions[kind.__name__] = self._of_table(kind)
        return {"$ref": f"#/$defs/{kind.__name__}"}

    def _of_table(self, kind: type) -> dict[str, Any]:
        summary, described = _said(kind)
        properties = {name: self.of(annotation) for name, annotation in _keys(kind).items()}
        for name, words in described.items():
            if name in properties:
                properties[name]["description"] = words
        return {"description": summary, **_table(properties, closed=not issubclass(kind, Open))}


def _keys(kind: Any) -> dict[str, Any]:
    """Return the keys of a table in its document, and the type of each."""
    modules = [base.__module__ for base in kind.__mro__]
    names = {name: found for module in modules for name, found in _namespace(module).items()}
    if not dataclasses.is_dataclass(kind):
        fields = {name: f for name, f in kind.model_fields.items() if not f.exclude}
        hints = typing.get_type_hints(kind, names, include_extras=True)
        return {field.serialization_alias or name: hints[name] for name, field in fields.items()}
    hints = typing.get_type_hints(kind, names, include_extras=True)
    found = {f.name: hints[f.name] for f in dataclasses.fields(kind) if field_is_json(f)}
    table: Any = kind  # of what type checkers take for one
    for name in json_properties(table):
        getter = getattr(table, name).fget
        found[name] = typing.get_type_hints(getter, names, include_extras=True)["return"]
    return found


@cache
def _namespace(module: str) -> dict[str, Any]:
    """Return what the annotations of a module may name, imports for types alone included."""
    loaded = importlib.import_module(module)
    names = dict(vars(loaded))
    if not module.startswith("van_deploy"):
        return names
    for node in ast.parse(inspect.getsource(loaded)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            code = compile(ast.Module(node.body, []), module, "exec")
            exec(code, names)
    return names


def _said(kind: type) -> tuple[str, dict[str, str]]:
    """Return what a class is, and what each of its attributes is, in words."""
    text = inspect.getdoc(kind) or ""
    described: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(
            r"Attributes:\n((?:    .*\n?|\n)+)", inspect.cleandoc(base.__doc__ or "")
        )
        for name, words in re.findall(
            r"^    (\w+): ((?:.|\n {6,})*)", section[1] if section else "", re.MULTILINE
        ):
            described[name] = " ".join(words.split())
    for name, field in getattr(kind, "model_fields", {}).items():
        described |= {name: field.description} if field.description else {}
    return " ".join(text.partition("\n\n")[0].split()), described


def _limits(metadata: tuple[Any, ...]) -> dict[str, Any]:
    """Return the limits that an annotation's metadata holds."""
    found: dict[str, Any] = {}
    for item in metadata:
        for one in getattr(item, "metadata", [item]):
            found |= {word: getattr(one, key) for key, word in LIMITS.items() if hasattr(one, key)}
    return found


def _table(properties: Mapping[str, Any], *, closed: bool = True) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        **({"additionalProperties": False} if closed else {}),
    }
