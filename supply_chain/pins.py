"""Writes ``constraints.txt``, ``constraints-min.txt`` and the bill of materials.

``python -m supply_chain.pins`` records the versions that are installed, so run it where
the tests have passed. The lowest versions are the lower bounds of ``pyproject.toml``.
"""

import json
import platform
import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from van_deploy import __version__
from van_deploy.documents import tomllib

ROOT = Path(__file__).parent.parent
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL = {**TABLES["project"]["optional-dependencies"], **TABLES["dependency-groups"]}
PINNED, LOWEST = ROOT / "constraints.txt", ROOT / "constraints-min.txt"
BILL = ROOT / "van_deploy/environment/sbom.cdx.json"
CONFLICTING = {"gpu"}  # onnxruntime-gpu holds the same module as onnxruntime
EXTRAS = [name for name in OPTIONAL if name not in CONFLICTING]  # installed where the tests run
MIN_TESTED = ("cpu", "serve", "sign")  # the extras whose lower bounds `make test-min` tests


def declared_requirements(names: Iterable[str] = OPTIONAL) -> list[Requirement]:
    """Return the requirements in ``pyproject.toml``.

    Args:
        names: extras and dependency groups to add to the base; by default all of them.
    """
    tables = [TABLES["project"]["dependencies"], *(OPTIONAL[name] for name in names)]
    # A table, not a text, includes another group.
    lines = dict.fromkeys(line for table in tables for line in table if isinstance(line, str))
    return [Requirement(line) for line in lines]


def resolve_dependencies(requirements: Iterable[Requirement]) -> dict[str, list[Requirement]]:
    """Return every installed package that is needed, with all requirements on it."""
    found: dict[str, list[Requirement]] = {}
    pending = [(requirement, {""}) for requirement in requirements]
    while pending:
        requirement, extras = pending.pop()
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        if requirement not in found.setdefault(name, []):
            found[name].append(requirement)
            extras = {"", *requirement.extras}
            pending += [(Requirement(line), extras) for line in metadata.requires(name) or ()]
    return found


def lower_bounds(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Return the lower bound of each requirement by name; the highest where there are several."""
    found: dict[str, str] = {}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        for bound in requirement.specifier:
            if bound.operator == ">=" and Version(bound.version) >= Version(found.get(name, "0")):
                found[name] = bound.version
    return dict(sorted(found.items()))


def read_pins(path: Path) -> dict[str, str]:
    """Return the versions in a constraints file, by package."""
    return dict(re.findall(r"^([^#\n]+?)==(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def bill_of_materials(pins: Mapping[str, str]) -> dict[str, Any]:
    """Return the pinned packages as CycloneDX 1.6; the same pins give the same document."""

    def component(kind: str, name: str, version: str) -> dict[str, Any]:
        url = f"pkg:pypi/{name}@{version}"
        return {"type": kind, "bom-ref": url, "name": name, "version": version, "purl": url}

    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"van-deploy {__version__} {sorted(pins.items())}")
    program = component("application", "van-deploy", __version__)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": {**program, "licenses": [{"license": {"id": "Apache-2.0"}}]}},
        "components": [component("library", *pin) for pin in sorted(pins.items())],
    }


def write_pins(path: Path, title: str, pins: Mapping[str, str]) -> None:
    """Write a constraints file that opens with a comment."""
    lines = [f"# {line}" for line in title.splitlines()]
    lines += [f"{name}=={version}" for name, version in pins.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write the three files."""
    names = sorted(resolve_dependencies(declared_requirements(EXTRAS)))
    pins = {name: metadata.version(name).partition("+")[0] for name in names}
    python = platform.python_version().rpartition(".")[0]
    title = (
        "Versions the tests have passed with, of everything that is needed, directly or not.\n"
        f"Python {python}, {platform.system()} {platform.machine()}. Written by `make pins`.\n"
        "pip install --constraint constraints.txt ..."
    )
    write_pins(PINNED, title, pins)
    title = (
        "The lower bounds of pyproject.toml, of the base and the extras "
        f"{', '.join(MIN_TESTED)}.\nWritten by `make pins`, tried by `make test-min`."
    )
    write_pins(LOWEST, title, lower_bounds(declared_requirements(MIN_TESTED)))
    BILL.write_text(json.dumps(bill_of_materials(pins), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(pins)} packages in {PINNED.name}, {LOWEST.name} and {BILL.name}\n")


if __name__ == "__main__":
    main()
