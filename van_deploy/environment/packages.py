"""Which packages are installed, and whether they load.

Versions come from the packages' metadata. Only the small runtimes (ONNX Runtime, TensorRT,
OpenVINO) are imported, to see whether they load; PyTorch is not.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from van_deploy.documents import toml_from


@dataclass(frozen=True)
class Component:
    """A package this program works with, as it is here.

    Attributes:
        name: what people call it.
        enables: what it is there for; what is missing without it.
        install: what to pass to ``pip install``.
        distribution: the package that brings it, or None if it is missing.
        version: that package's version, or None.
        fault: why it does not load although it is installed, or None.
    """

    name: str
    enables: str
    install: str
    distribution: str | None
    version: str | None
    fault: str | None


def components_here() -> tuple[Component, ...]:
    """Return every component of ``components.toml`` as it is here; small ones are imported."""
    found = []
    for row in toml_from(Path(__file__).with_name("components.toml"))["component"]:
        here = next((name for name in row["distributions"] if version_of(name)), None)
        module, install = row.get("module"), row.get("install", row["distributions"][0])
        version = version_of(here) if here else None
        fault = import_fault(module) if here and module else None
        found.append(Component(row["name"], row["enables"], install, here, version, fault))
    return tuple(found)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def execution_providers() -> tuple[str, ...]:
    """Return the providers ONNX Runtime was built with; empty if it does not load.

    A provider listed here still needs its hardware and libraries.
    """
    if import_fault("onnxruntime") is not None:
        return ()
    # Two ONNX Runtimes over each other can leave a module without its functions.
    return tuple(getattr(sys.modules["onnxruntime"], "get_available_providers", tuple)())


def cuda_version_of(module: str) -> str | None:
    """Return the CUDA that PyTorch or ONNX Runtime was built for (``13.0``), without importing it.

    None where it is not installed, or built for CPUs.
    """
    place = {"torch": "version.py", "onnxruntime": "capi/build_and_package_info.py"}[module]
    spec = None
    with contextlib.suppress(ImportError):  # a finder may raise where it finds nothing
        spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent / place if spec and spec.origin else Path()
    text = path.read_text() if path.is_file() else ""
    match = re.search(r"^cuda(?:_version)?\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def pip_command() -> str:
    """Return how to call the pip of the Python that runs this program."""
    pip, executable = shutil.which("pip"), Path(sys.executable)
    if pip and Path(pip).parent == executable.parent:
        return "pip"
    folder = Path.cwd()
    short = executable.relative_to(folder) if executable.is_relative_to(folder) else executable
    return f"{short} -m pip"


def imported_quietly(module: str) -> ModuleType:
    """Return the module, imported without telling OpenVINO's makers.

    OpenVINO reports its import to a web service. It takes its own stand-in where the reporter is
    not installed, and for the time of the import it seems not to be. A reporter that was loaded
    before stays.

    Raises:
        ImportError: the module is not there or does not load.
    """
    reporter = "openvino_telemetry"
    if reporter in sys.modules:
        return importlib.import_module(module)
    sys.modules[reporter] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules[reporter]


def import_fault(module: str) -> str | None:
    """Return why the module cannot be imported, on one line, or None if it can."""
    try:
        imported_quietly(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None
