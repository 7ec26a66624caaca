"""Which packages are installed, and whether they load.

Versions come from the packages' metadata. Only the small runtimes (ONNX Runtime, TensorRT,
OpenVINO) are imported, to see whether they load; PyTorch is not.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from van_deploy.documents import read_toml_file


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
        installed: every package here that brings it: more than one overwrite each other.
    """

    name: str
    enables: str
    install: str
    distribution: str | None
    version: str | None
    fault: str | None
    installed: tuple[str, ...] = ()


def components_here() -> tuple[Component, ...]:
    """Return every component of ``components.toml`` as it is here; small ones are imported."""
    found = []
    for row in read_toml_file(Path(__file__).with_name("components.toml"))["component"]:
        installed = tuple(filter(version_of, row["distributions"]))
        here = next(iter(installed), None)
        fault = import_fault(row["module"]) if here and "module" in row else None
        version, install = here and version_of(here), row.get("install", row["distributions"][0])
        given = (row["name"], row["enables"], install, here, version, fault)
        found.append(Component(*given, installed))
    return tuple(found)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def of_onnxruntime(name: str) -> Any:
    """Return an attribute of ONNX Runtime; None where it does not load, or has none such.

    Two ONNX Runtimes over each other can leave a module without its functions.
    """
    return None if import_fault("onnxruntime") else getattr(sys.modules["onnxruntime"], name, None)


def execution_providers() -> tuple[str, ...]:
    """Return the providers ONNX Runtime was built with; empty if it does not load.

    A provider listed here still needs its hardware and libraries.
    """
    return tuple((of_onnxruntime("get_available_providers") or tuple)())


def onnxruntime_cuda() -> str | None:
    """Return the CUDA that ONNX Runtime was built for (``13.0``); None for CPUs, or without it."""
    return of_onnxruntime("cuda_version") or None


def torch_cuda() -> str | None:
    """Return the CUDA that PyTorch was built for (``13.0``), without importing it.

    None where it is not installed, or built for CPUs.
    """
    text = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        place = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        text = Path(str(place)).read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def pip_command() -> str:
    """Return how to call the pip of the Python that runs this program."""
    first = Path(shutil.which("pip") or "")
    return "pip" if first.parent == Path(sys.executable).parent else f"{sys.executable} -m pip"


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
