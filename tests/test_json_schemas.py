"""The JSON Schemas of documents: current, strict, and valid for real documents."""

import json
from pathlib import Path

import jsonschema
import pytest

from supply_chain.reference import DOCUMENTS, INPUTS, document_schema
from tests.each import each
from tests.json_documents import validate_json_output
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.documents import plain, read_toml_file
from van_deploy.model.variants import list_variants


@each("name", DOCUMENTS)
def test_schemas_are_strict_and_described(name: str) -> None:
    schema = document_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    tables = [table for table in schema.get("$defs", {}).values() if "properties" in table]
    assert all(table["description"] for table in tables)
    assert all(table["required"] == list(table["properties"]) for table in tables)
    assert all("additionalProperties" in table for table in tables)  # closed, or explicitly open


def test_real_documents_are_valid_and_changed_ones_are_not(digits_bundle: Bundle) -> None:
    manifest = json.loads((digits_bundle.path / MANIFEST).read_text())
    validate_json_output(manifest, "manifest")
    for key, value in {"parameters": "many", "more": 1, "weights": {}}.items():
        with pytest.raises(AssertionError, match=r"^manifest --json: \$"):
            validate_json_output({**manifest, key: value}, "manifest")
    listed = plain(list_variants())
    listed[0]["top1_percent"] = "inf"  # JSON cannot spell infinity
    validate_json_output(listed, "list")
    listed[0]["top1_percent"] = "much"
    with pytest.raises(AssertionError, match="top1_percent"):
        validate_json_output(listed, "list")


@each(("name", "folder"), [("calibration-set", "calibration"), ("recipe", "export")])
def test_built_in_files_match_their_schema(repository: Path, name: str, folder: str) -> None:
    validator = jsonschema.Draft202012Validator(INPUTS[name].model_json_schema())
    paths = sorted((repository / folder).glob("*.toml"))
    assert paths
    faults = {path.name: list(validator.iter_errors(read_toml_file(path))) for path in paths}
    assert not any(faults.values()), faults
