"""Pins meet the requirements, the bill of materials lists them, and audits report failures."""

import ast
import json
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from supply_chain import audit, pins
from tests.each import each

PINS, LOWEST = pins.read_pins(pins.PINNED), pins.read_pins(pins.LOWEST)
# Of modules that may be absent: those that are installed say it.
STANDARD = {*sys.stdlib_module_names, "van_deploy", "tomllib"}
DISTRIBUTIONS = {"cuda": "cuda-bindings", "tensorrt_rtx": "tensorrt-rtx-cu13"}
INSTALLED = {str(canonicalize_name(d.name)): d.version for d in metadata.distributions()}
DECLARED = pins.declared_requirements(pins.EXTRAS)
HERE = [one for one in DECLARED if one.marker is None or one.marker.evaluate({"extra": ""})]


def unmet(wanted: Iterable[Requirement], versions: Mapping[str, str]) -> list[str]:
    """Return the requirements that are not met by the given versions."""
    return [
        f"{one} refuses {version}"
        for one in wanted
        if (version := versions.get(canonicalize_name(one.name))) is not None
        and not one.specifier.contains(version, prereleases=True)
    ]


def test_pinned_and_installed_versions_meet_the_requirements() -> None:
    assert "gpu" not in pins.EXTRAS
    assert unmet(HERE, INSTALLED) == []
    direct = {canonicalize_name(one.name) for one in HERE}
    assert direct <= PINS.keys() | ({"tomli"} if sys.version_info < (3, 11) else set())
    assert unmet(DECLARED, PINS) == []
    found = [one for one in DECLARED if canonicalize_name(one.name) in INSTALLED]
    everything = pins.resolve_dependencies(found)
    same = {name: PINS[name] for name in everything if INSTALLED.get(name) == PINS.get(name)}
    assert unmet((one for several in everything.values() for one in several), same) == []


def test_pins_are_sorted_names_and_public_versions() -> None:
    for found in (PINS, LOWEST):
        assert list(found) == sorted(found)
        for name, version in found.items():
            assert canonicalize_name(name) == name != "van-deploy"
            assert Version(version).local is None
    assert pins.lower_bounds(pins.declared_requirements(pins.MIN_TESTED)) == LOWEST
    unbounded = [w for w in pins.declared_requirements() if ">=" not in str(w.specifier)]
    assert unbounded == []


def test_imported_packages_are_declared() -> None:
    known = {str(canonicalize_name(one.name)) for one in pins.declared_requirements()}
    # Each comes with one of those.
    known |= {"click", "ml-dtypes", "protobuf", "pydantic-core", "triton", "typing-extensions"}
    installed, missing = metadata.packages_distributions(), set()
    for path in (pins.ROOT / "van_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in {name.partition(".")[0] for name in names} - STANDARD:
                owners = installed.get(module, [DISTRIBUTIONS.get(module, module)])
                if not known & set(map(canonicalize_name, owners)):
                    missing.add(f"{module} in {path}")
    assert missing == set()


def test_bill_of_materials_lists_the_pins_as_cyclonedx() -> None:
    text = pins.BILL.read_text(encoding="utf-8")
    assert json.loads(text) == pins.bill_of_materials(PINS)
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib comes with pip-audit")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    broken = {**pins.bill_of_materials(PINS), "components": [{"name": "x"}]}
    assert validator.validate_str(json.dumps(broken)) is not None


CLEAN = {"name": "a", "version": "1", "vulns": []}
FLAWS = [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "CVE-2", "fix_versions": []}]
KNOWN = {"name": "b", "version": "2", "vulns": FLAWS}
UNKNOWN = {"name": "c", "version": "3", "skip_reason": "Dependency not found"}
FOUND = (
    *("b 2: CVE-1, fixed in 3", "b 2: CVE-2, fixed in no version yet"),
    *("not audited: c: Dependency not found", "2 packages audited, 1 with known vulnerabilities"),
)


@each(
    ("report", "complaint", "code", "lines"),
    [
        ([CLEAN], "", 0, ["1 packages audited, 0 with known vulnerabilities"]),
        ([CLEAN, KNOWN, UNKNOWN], "", 1, [*FOUND]),
        # The service is unreachable, which fails unless it is allowed.
        ([UNKNOWN, UNKNOWN], "", None, ["none of 2 packages is known to the service"]),
        ([], "Traceback\nConnectionError: no route\n", None, ["ConnectionError: no route"]),
        ([], "", None, ["pip-audit wrote no report"]),
    ],
)
def test_audit_reports_vulnerabilities_or_an_unreachable_service(
    report: list[object], complaint: str, code: int | None, lines: list[str]
) -> None:
    text = json.dumps({"dependencies": report}) if report else ""
    for allowed, end in ((False, "FAILED"), (True, "SKIPPED")):
        actual, messages = audit.summarize_audit(text, complaint, allowed)
        if code is None:
            assert (actual, messages[0]) == (not allowed, f"{end}: nothing was audited: {lines[0]}")
        else:
            assert (actual, messages) == (code, lines)
