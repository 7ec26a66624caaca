"""Pins are versions that are asked for, the bill of materials lists them, audits do not pretend."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from supply_chain import audit
from supply_chain.pins import (
    BILL,
    LOWEST,
    NOT_TOGETHER,
    PINNED,
    ROOT,
    TRIED_LOWEST,
    bill_of_materials,
    declared,
    lowest,
    needed,
    pinned_names,
    pins_in,
)
from tests.each import each

EXTRAS = ("cpu", "rtx", "openvino", "ray", "sign", "serve", "triton")
NAMES = (*EXTRAS, "test", "lint", "audit", "full")
PINS = pins_in(PINNED)
MODULES = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml"}
MODULES |= {"google": "protobuf", "cuda": "cuda-bindings", "tensorrt_rtx": "tensorrt-rtx-cu13"}
MODULES |= {"pynvml": "nvidia-ml-py"}


def here(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def refused(wanted: Iterable[Requirement], versions: Mapping[str, str]) -> list[str]:
    """Return the requirements that the version there is does not meet."""
    names = [(one, str(canonicalize_name(one.name))) for one in wanted]
    return [
        f"{one} refuses {versions[name]}"
        for one, name in names
        if name in versions and not one.specifier.contains(versions[name], prereleases=True)
    ]


def test_what_is_installed_is_what_is_asked_for() -> None:
    here_now = [wanted for wanted in declared(NAMES) if here(wanted)]
    versions = {w.name: v for w in here_now if (v := installed(w.name)) is not None}
    assert refused(here_now, {str(canonicalize_name(n)): v for n, v in versions.items()}) == []
    assert {wanted.name for wanted in declared(()) if here(wanted)} <= versions.keys()


def test_every_pin_is_a_version_that_is_admitted() -> None:
    direct = {canonicalize_name(w.name) for w in declared(NAMES) if here(w)}
    assert direct <= PINS.keys() | ({"tomli"} if sys.version_info < (3, 11) else set())
    assert pinned_names() == list(NAMES)
    assert NOT_TOGETHER.isdisjoint(NAMES)
    assert refused(declared(NAMES), PINS) == []
    everything = needed(w for w in declared(NAMES) if installed(w.name) is not None)
    same = {name: PINS[name] for name in everything if installed(name) == PINS.get(name)}
    assert refused((one for several in everything.values() for one in several), same) == []


def test_pins_are_plain_names_and_versions_in_order() -> None:
    for pins in (PINS, pins_in(LOWEST)):
        assert list(pins) == sorted(pins)
        for name, version in pins.items():
            assert canonicalize_name(name) == name != "van-deploy"
            assert Version(version).local is None
    assert pins_in(LOWEST) == lowest(declared(TRIED_LOWEST))
    assert [w for w in declared() if not any(s.operator == ">=" for s in w.specifier)] == []


# --- what is imported is declared ------------------------------------------------------------


def imported() -> Iterator[tuple[str, str]]:
    """Yield every package that ``van_deploy`` imports anywhere, and the file."""
    for path in (ROOT / "van_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            else:
                continue
            for name in names:
                yield name.partition(".")[0], path.relative_to(ROOT).as_posix()


def test_every_package_that_is_imported_is_declared() -> None:
    known = {str(canonicalize_name(w.name)) for w in declared()}
    known |= {"click", "ml-dtypes", "onnx-ir", "protobuf", "pydantic-core", "triton"}
    known |= {"typing-extensions"}  # each comes with one of those
    standard = set(sys.stdlib_module_names) | {"van_deploy", "tomllib"}
    missing = {
        f"{module} in {path}"
        for module, path in imported()
        if module not in standard
        if canonicalize_name(MODULES.get(module, module)) not in known
    }
    assert missing == set()


# --- the bill of materials -------------------------------------------------------------------


def test_the_bill_of_materials_lists_the_pins() -> None:
    assert json.loads(BILL.read_text(encoding="utf-8")) == bill_of_materials(PINS)


def test_the_bill_of_materials_is_cyclonedx() -> None:
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib comes with pip-audit")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(BILL.read_text(encoding="utf-8")) is None
    broken = {**bill_of_materials(PINS), "components": [{"name": "x"}]}
    assert validator.validate_str(json.dumps(broken)) is not None


# --- the audit -------------------------------------------------------------------------------

CLEAN = {"name": "a", "version": "1", "vulns": []}
KNOWN = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "CVE-2", "fix_versions": []}],
}
UNKNOWN = {"name": "c", "version": "3", "skip_reason": "Dependency not found"}


@each("allowed", [False, True])
def test_an_audit_says_what_it_did(allowed: bool) -> None:
    text = json.dumps({"dependencies": [CLEAN]})
    last = "1 packages audited, 0 with known vulnerabilities"
    assert audit.judged(text, "", allowed) == (0, [last])
    text = json.dumps({"dependencies": [CLEAN, KNOWN, UNKNOWN]})
    assert audit.judged(text, "", allowed) == (
        1,
        [
            "b 2: CVE-1, mended in 3",
            "b 2: CVE-2, mended in no version yet",
            "not audited: c: Dependency not found",
            "2 packages audited, 1 with known vulnerabilities",
        ],
    )


@each(
    ("report", "complaint", "what"),
    [
        ([UNKNOWN, UNKNOWN], "", "none of 2 packages is known to the service"),
        ([], "", "none of 0 packages is known to the service"),
        (None, "Traceback\nConnectionError: no route\n", "ConnectionError: no route"),
        (None, "", "pip-audit wrote no report"),
    ],
)
def test_an_audit_that_could_not_ask_fails_unless_told_otherwise(
    report: list[object] | None, complaint: str, what: str
) -> None:
    text = "" if report is None else json.dumps({"dependencies": report})
    code, lines = audit.judged(text, complaint)
    assert (code, lines[0]) == (1, f"FAILED: nothing was audited: {what}")
    code, lines = audit.judged(text, complaint, allow_offline=True)
    assert (code, lines[0]) == (0, f"SKIPPED: nothing was audited: {what}")


def test_check_runs_the_linters_and_the_audit() -> None:
    text = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^(lint|audit|check):(.*\n(?:\t.*\n)*)", text, re.MULTILINE))
    assert recipes["check"].split() == ["lint", "audit"]
    assert "supply_chain.audit $(AUDIT)" in recipes["audit"]
    for tool in ("ruff check .", "ruff format --check .", "lint-imports", "codespell", "mypy"):
        assert tool in recipes["lint"]
