"""Writes ``constraints.txt``, ``constraints-min.txt`` and the bill of materials.

``python -m supply_chain.pins`` takes the versions that are installed, so run it where
the tests have passed. The lowest versions are the lower bounds of ``pyproject.toml``.
"""

from __future__ import annotations

import json
import platform
import sys
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL = {**TABLES["project"]["optional-dependencies"], **TABLES["dependency-groups"]}
PINNED, LOWEST = ROOT / "constraints.txt", ROOT / "constraints-min.txt"
BILL = ROOT / "van_deploy/environment/sbom.cdx.json"
NOT_TOGETHER = {"gpu"}  # holds the other ONNX Runtime, and TensorRT for a GPU that is there
TRIED_LOWEST = ("cpu", "serve", "sign")  # the extras whose lower bounds `make test-min` tries


def declared(names: Iterable[str] | None = None) -> list[Requirement]:
    """Return what ``pyproject.toml`` asks for.

    Args:
        names: extras and dependency groups to add to the base; by default all of them.
    """
    lines = [*TABLES["project"]["dependencies"]]
    for name in OPTIONAL if names is None else names:  # a table includes another group
        wanted = (line for line in OPTIONAL[name] if isinstance(line, str))
        lines += [line for line in wanted if line not in lines]
    return [Requirement(line) for line in lines]


def needed(requirements: Iterable[Requirement]) -> dict[str, list[Requirement]]:
    """Return every installed package that is needed, and all that is required of it here."""
    found: dict[str, list[Requirement]] = {}
    waiting, seen = list(requirements), set()
    while waiting:
        wanted = waiting.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(wanted.name)
        found.setdefault(name, []).append(wanted)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        for line in metadata.requires(name) or ():
            further = Requirement(line)
            extras, marker = {"", *wanted.extras}, further.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                further.marker = None
                waiting.append(further)
    return found


def lowest(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Return the lower bound of each requirement by name; the highest where there are several."""
    found: dict[str, str] = {}
    for wanted in requirements:
        name = canonicalize_name(wanted.name)
        for bound in wanted.specifier:
            if bound.operator == ">=" and Version(bound.version) >= Version(found.get(name, "0")):
                found[name] = bound.version
    return dict(sorted(found.items()))


def pins_in(path: Path) -> dict[str, str]:
    """Return the versions a constraints file names, by package."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==", 1) for line in lines if line and not line.startswith("#"))
    return dict(pairs)


def bill_of_materials(pins: Mapping[str, str]) -> dict[str, Any]:
    """Return the pinned packages as CycloneDX 1.6; the same pins give the same document."""
    from van_deploy import __version__

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
        "metadata": {
            "component": {**program, "licenses": [{"license": {"id": "Apache-2.0"}}]},
        },
        "components": [component("library", *pin) for pin in sorted(pins.items())],
    }


def _text(title: str, pins: Mapping[str, str]) -> str:
    lines = [f"# {line}" for line in title.splitlines()]
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in pins.items())]) + "\n"


def pinned_names() -> list[str]:
    """Return the extras and groups that the tests run with."""
    return [name for name in OPTIONAL if name not in NOT_TOGETHER]


def main() -> None:
    """Write the three files."""
    names = sorted(needed(declared(pinned_names())))
    pinned = {name: metadata.version(name).partition("+")[0] for name in names}
    python = platform.python_version().rpartition(".")[0]
    title = (
        "Versions the tests have passed with, of everything that is needed, directly or not.\n"
        f"Python {python}, {platform.system()} {platform.machine()}. Written by `make pins`.\n"
        "pip install --constraint constraints.txt ..."
    )
    PINNED.write_text(_text(title, pinned), encoding="utf-8")
    title = (
        "The lower bounds of pyproject.toml, of the base and the extras "
        f"{', '.join(TRIED_LOWEST)}.\nWritten by `make pins`, tried by `make test-min`."
    )
    LOWEST.write_text(_text(title, lowest(declared(TRIED_LOWEST))), encoding="utf-8")
    BILL.write_text(json.dumps(bill_of_materials(pinned), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(pinned)} packages in {PINNED.name}, {LOWEST.name} and {BILL.name}\n")


if __name__ == "__main__":
    main()
