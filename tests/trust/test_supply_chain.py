"""Pins are versions that are asked for, the bill of materials lists them, audits do not pretend."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
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

NAMES = (
    "cpu",
    "rtx",
    "openvino",
    "ray",
    "sign",
    "serve",
    "triton",
    "test",
    "lint",
    "audit",
    "full",
)
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


def test_what_is_installed_is_what_is_asked_for() -> None:
    wrong = [
        f"{wanted}, here {version}"
        for wanted in declared(NAMES)
        if here(wanted) and (version := installed(wanted.name)) is not None
        if not wanted.specifier.contains(version, prereleases=True)
    ]
    assert wrong == []


def test_the_base_is_installed() -> None:
    assert [w.name for w in declared(()) if here(w) and installed(w.name) is None] == []


def test_every_direct_requirement_is_pinned() -> None:
    assert {canonicalize_name(w.name) for w in declared(NAMES) if here(w)} <= PINS.keys() | (
        {"tomli"} if sys.version_info < (3, 11) else set()
    )
    assert pinned_names() == list(NAMES)
    assert NOT_TOGETHER.isdisjoint(NAMES)


def test_every_pin_is_a_version_the_project_admits() -> None:
    wanted = [w for w in declared(NAMES) if canonicalize_name(w.name) in PINS]
    refused = [
        f"{w} refuses {PINS[canonicalize_name(w.name)]}"
        for w in wanted
        if not w.specifier.contains(PINS[canonicalize_name(w.name)], prereleases=True)
    ]
    assert len(wanted) > 30
    assert refused == []


def test_every_pin_is_a_version_that_packages_here_admit() -> None:
    """Where the pinned set is what is installed, every requirement in it holds."""
    refused = [
        f"{w} refuses {PINS[name]}"
        for name, requirements in needed(
            w for w in declared(NAMES) if installed(w.name) is not None
        ).items()
        for w in requirements
        if name in PINS and installed(name) == PINS[name]
        if not w.specifier.contains(PINS[name], prereleases=True)
    ]
    assert refused == []


@each("path", [PINNED, LOWEST])
def test_pins_are_plain_names_and_versions_in_order(path: object) -> None:
    pins = pins_in(PINNED if path is PINNED else LOWEST)
    assert list(pins) == sorted(pins)
    for name, version in pins.items():
        assert canonicalize_name(name) == name
        assert Version(version).local is None
        assert "van-deploy" not in name


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    assert pins_in(LOWEST) == lowest(declared(TRIED_LOWEST))


def test_every_requirement_has_a_lower_bound() -> None:
    unbounded = [str(w) for w in declared() if not any(s.operator == ">=" for s in w.specifier)]
    assert unbounded == []


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
    known |= {
        "click",
        "ml-dtypes",
        "onnx-ir",
        "protobuf",
        "pydantic-core",
        "triton",
        "typing-extensions",
    }  # each comes with one of those
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


@each(
    ("report", "complaint", "code", "last"),
    [
        ([CLEAN], "", 0, "1 packages audited, 0 with known vulnerabilities"),
        ([CLEAN, KNOWN, UNKNOWN], "", 1, "2 packages audited, 1 with known vulnerabilities"),
    ],
)
@each("allowed", [False, True])
def test_an_audit_says_what_it_did(
    report: list[object], complaint: str, code: int, last: str, allowed: bool
) -> None:
    got, lines = audit.judged(json.dumps({"dependencies": report}), complaint, allowed)
    assert (got, lines[-1]) == (code, last)


@each(
    ("report", "complaint", "what"),
    [
        (
            [UNKNOWN, UNKNOWN],
            "",
            "none of 2 packages was audited: Dependency not found",
        ),
        ([], "", "none of 0 packages was audited: no pins"),
        (
            None,
            "Traceback\nConnectionError: no route\n",
            "nothing was audited: ConnectionError: no route",
        ),
        (None, "", "nothing was audited: pip-audit wrote no report"),
    ],
)
def test_an_audit_that_could_not_ask_fails_unless_told_otherwise(
    report: list[object] | None, complaint: str, what: str
) -> None:
    text = "" if report is None else json.dumps({"dependencies": report})
    assert audit.judged(text, complaint) == (
        1,
        [f"FAILED: {what}", "give --allow-offline to let this pass"],
    )
    assert audit.judged(text, complaint, allow_offline=True) == (
        0,
        [f"SKIPPED: {what} (--allow-offline lets this pass)"],
    )


def test_a_vulnerability_is_named_with_its_remedy() -> None:
    _, lines = audit.judged(json.dumps({"dependencies": [KNOWN, UNKNOWN]}), "")
    assert lines[:3] == [
        "b 2: CVE-1, mended in 3",
        "b 2: CVE-2, mended in no version yet",
        "not audited: c: Dependency not found",
    ]


def test_check_runs_the_linters_and_the_audit() -> None:
    text = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^(lint|audit|check):(.*\n(?:\t.*\n)*)", text, re.MULTILINE))
    assert recipes["check"].split() == ["lint", "audit"]
    assert "supply_chain.audit $(AUDIT)" in recipes["audit"]
    for tool in ("ruff check .", "ruff format --check .", "lint-imports", "codespell", "mypy"):
        assert tool in recipes["lint"]
