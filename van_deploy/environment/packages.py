"""Which packages are installed, and whether they load.

Versions come from the packages' metadata. Only the small run times (ONNX
Runtime, TensorRT, OpenVINO) are imported, to see whether they load; PyTorch is not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from van_deploy.documents import toml_from
from van_deploy.environment.privacy import imported_quietly

__all__ = [
    "COMPONENTS",
    "ONNXRUNTIMES",
    "Component",
    "Installed",
    "canonical_name",
    "cuda_version_of",
    "execution_providers",
    "installed_components",
    "installed_distributions",
    "pip_command",
]

# These hold one and the same module; only one of them may be installed.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


@dataclass(frozen=True)
class Component:
    """A package this program works with.

    Attributes:
        name: what people call it.
        distributions: the packages on PyPI that bring it, the usual one first.
        enables: what it is there for; what is missing without it.
        install: what to pass to ``pip install``.
        optional: whether this program starts without it.
        module: imported to see whether it loads; empty for the heavy ones.
    """

    name: str
    distributions: tuple[str, ...]
    enables: str
    install: str
    optional: bool = True
    module: str = ""


def canonical_name(distribution: str) -> str:
    """Return a package's name as PyPI compares names.

    >>> canonical_name("TensorRT_RTX_cu13")
    'tensorrt-rtx-cu13'
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _components() -> Iterator[Component]:
    for row in toml_from(Path(__file__).with_name("components.toml"))["component"]:
        names = tuple(row["distributions"])
        yield Component(**{"install": names[0], **row, "distributions": names})


COMPONENTS = tuple(_components())
"""In the order doctor lists them."""


@dataclass(frozen=True)
class Installed:
    """One component as it is here.

    Attributes:
        component: which one.
        distribution: the package that brings it, or None if it is missing.
        version: that package's version, or None.
        fault: why it does not load although it is installed, or None.
    """

    component: Component
    distribution: str | None
    version: str | None
    fault: str | None

    @property
    def usable(self) -> bool:
        """Whether it is installed and loads."""
        return self.version is not None and self.fault is None


def installed_components(distributions: Mapping[str, str]) -> tuple[Installed, ...]:
    """Return every component as it is here.

    Args:
        distributions: what :func:`installed_distributions` returned.
    """
    return tuple(_installed(component, distributions) for component in COMPONENTS)


def installed_distributions() -> dict[str, str]:
    """Return every installed package's canonical name and version."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package may leave a folder without a name
            found.setdefault(canonical_name(name), distribution.version)
    return found


def execution_providers() -> tuple[str, ...]:
    """Return the providers ONNX Runtime was built with; empty if it does not load.

    A provider listed here still needs its hardware and libraries.
    """
    if _import_fault("onnxruntime") is not None:
        return ()
    onnxruntime = importlib.import_module("onnxruntime")
    # Two ONNX Runtimes over each other can leave a module without its functions.
    listed = getattr(onnxruntime, "get_available_providers", tuple)
    return tuple(listed())


def cuda_version_of(module: str) -> str | None:
    """Return the CUDA that PyTorch or ONNX Runtime was built for (``13.0``), without importing it.

    None where it is not installed, or built for CPUs.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a finder may raise where it finds nothing
        return None
    if spec is None or spec.origin is None:
        return None
    place = {"torch": "version.py", "onnxruntime": "capi/build_and_package_info.py"}[module]
    path = Path(spec.origin).parent / place
    text = path.read_text() if path.exists() else ""
    match = re.search(r"^cuda(?:_version)?\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def pip_command() -> str:
    """Return how to call the pip of the Python that runs this program."""
    pip = shutil.which("pip")
    executable = Path(sys.executable)
    if pip and Path(pip).parent == executable.parent:
        return "pip"
    folder = Path.cwd()
    short = executable.relative_to(folder) if executable.is_relative_to(folder) else executable
    return f"{short} -m pip"


def _installed(component: Component, distributions: Mapping[str, str]) -> Installed:
    """Return the component as ``distributions`` has it, imported if it names a module."""
    name = next((name for name in component.distributions if name in distributions), None)
    if name is None:
        return Installed(component, None, None, None)
    fault = _import_fault(component.module) if component.module else None
    return Installed(component, name, distributions[name], fault)


def _import_fault(module: str) -> str | None:
    """Return why the module cannot be imported, on one line, or None if it can."""
    try:
        imported_quietly(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None
