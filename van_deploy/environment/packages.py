"""Installed packages, and whether they can be loaded.

Versions are from package metadata. Every package is imported to test that it can be loaded.
"""

import contextlib
import importlib.metadata
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from van_deploy.documents import read_toml_file


@dataclass(frozen=True)
class Component:
    """A package that van-deploy uses.

    Attributes:
        name: common name.
        enables: its use in van-deploy.
        install: argument of ``pip install``.
        distribution: the installed distribution that provides it, or None.
        version: of that distribution, or None.
        fault: why it cannot be loaded although it is installed, or None.
        installed: all installed distributions that provide it, which overwrite each other.
    """

    name: str
    enables: str
    install: str
    distribution: str | None
    version: str | None
    fault: str | None
    installed: tuple[str, ...] = ()


def find_components() -> tuple[Component, ...]:
    """Return all components of ``components.toml``; the installed ones are imported."""
    components = []
    for row in read_toml_file(Path(__file__).with_name("components.toml"))["component"]:
        installed = tuple(filter(installed_version, row["distributions"]))
        first = next(iter(installed), None)
        fault = import_error(row["module"]) if first else None
        install = row.get("install", row["distributions"][0])
        fields = (row["name"], row["enables"], install, first, first and installed_version(first))
        components.append(Component(*fields, fault, installed))
    return tuple(components)


def installed_version(distribution: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, KeyError, ValueError):
        return importlib.metadata.version(distribution)
    return None  # also if its metadata is damaged


def module_attribute(module: str, name: str) -> Any:
    """Return an attribute of a module, or None if it cannot be loaded or lacks the attribute.

    Two ONNX Runtime packages that overwrite each other can leave a module without functions.
    """
    return None if import_error(module) else getattr(sys.modules[module], name, None)


def execution_providers() -> tuple[str, ...]:
    """Return the execution providers of ONNX Runtime; empty if it cannot be loaded.

    A listed provider may still lack its hardware or libraries.
    """
    return tuple((module_attribute("onnxruntime", "get_available_providers") or tuple)())


def onnxruntime_cuda() -> str | None:
    """Return the CUDA version of ONNX Runtime (``13.0``), or None for a CPU build or without it."""
    return module_attribute("onnxruntime", "cuda_version") or None


def torch_cuda() -> str | None:
    """Return the CUDA version of PyTorch (``13.0``), or None for a CPU build or without it."""
    return getattr(module_attribute("torch", "version"), "cuda", None)


def pip_command() -> str:
    """Return the command of the pip that belongs to this Python."""
    first = Path(shutil.which("pip") or "")
    return "pip" if first.parent == Path(sys.executable).parent else f"{sys.executable} -m pip"


def import_without_telemetry(module: str) -> ModuleType:
    """Import and return a module with OpenVINO's telemetry disabled.

    OpenVINO reports its import to a web service through ``openvino_telemetry``, and uses a stub if
    that package is not installed. The package is therefore hidden during the import, unless it
    was imported before.

    Raises:
        ImportError: the module is not installed or cannot be loaded.
    """
    telemetry = "openvino_telemetry"
    if telemetry in sys.modules:
        return importlib.import_module(module)
    sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules[telemetry]


def import_error(module: str) -> str | None:
    """Return why a module cannot be imported, on one line, or None if it can."""
    try:
        import_without_telemetry(module)
    except (Exception, SystemExit) as error:  # a damaged package can raise anything
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None
