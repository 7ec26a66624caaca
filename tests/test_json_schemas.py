"""The JSON Schemas of documents: current, strict, and what real documents are held against."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest

from supply_chain.json_schemas import DOCUMENTS, INPUTS, files, schema_of
from tests.each import each
from tests.json_documents import require_valid
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.documents import plain, toml_from
from van_deploy.model.variants import listed_variants


def test_the_files_are_what_the_types_say(repository: Path) -> None:
    written = files(repository)
    stale = [path.name for path, text in written.items() if path.read_text() != text]
    assert stale == [], "run `python -m supply_chain.reference`"
    there = {path.name for path in (repository / "docs/schemas").iterdir()}
    assert there == {path.name for path in written}


@each("name", DOCUMENTS)
def test_each_is_a_schema_and_describes_what_it_is(name: str) -> None:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    for table in schema.get("$defs", {}).values():
        assert table["description"]


def test_a_real_manifest_is_valid_and_a_spoiled_one_is_not(digits_bundle: Bundle) -> None:
    manifest = json.loads((digits_bundle.path / MANIFEST).read_text())
    require_valid(manifest, "manifest")
    changes: tuple[dict[str, object], ...] = ({"parameters": "many"}, {"more": 1}, {"weights": {}})
    for change in changes:
        with pytest.raises(AssertionError, match=r"^manifest --json: \$"):
            require_valid({**copy.deepcopy(manifest), **change}, "manifest")


def test_what_json_cannot_spell_is_in_the_schema() -> None:
    listed = plain(listed_variants())
    require_valid(listed, "list")
    listed[0]["top1_percent"] = plain(float("inf"))
    require_valid(listed, "list")
    listed[0]["top1_percent"] = "much"
    with pytest.raises(AssertionError, match="top1_percent"):
        require_valid(listed, "list")


def test_a_file_that_ships_is_of_its_schema(repository: Path) -> None:
    folders = {"calibration-set": "calibration", "recipe": "export"}
    for name, folder in folders.items():
        validator = jsonschema.Draft202012Validator(INPUTS[name].model_json_schema())
        paths = sorted((repository / folder).glob("*.toml"))
        assert paths
        for path in paths:
            assert list(validator.iter_errors(toml_from(path))) == [], path.name
