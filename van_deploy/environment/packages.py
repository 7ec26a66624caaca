"""Which packages are installed, whether they load, and which do not go together.

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from van_deploy.documents import toml_from
from van_deploy.environment.hardware import Driver

CUDA_PAGE = "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"

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


_ROWS = toml_from(Path(__file__).with_name("components.toml"))["component"]
COMPONENTS = tuple(
    Component(
        **{"install": row["distributions"][0], **row, "distributions": tuple(row["distributions"])}
    )
    for row in _ROWS
)
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
    """Return every component as it is here; those that name a module are imported.

    Args:
        distributions: what :func:`installed_distributions` returned.
    """
    found = []
    for component in COMPONENTS:
        name = next((name for name in component.distributions if name in distributions), None)
        fault = _import_fault(component.module) if name and component.module else None
        found.append(Installed(component, name, distributions[name] if name else None, fault))
    return tuple(found)


def installed_distributions() -> dict[str, str]:
    """Return every installed package's canonical name and version."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package may leave a folder without a name
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def version_of(distribution: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def execution_providers() -> tuple[str, ...]:
    """Return the providers ONNX Runtime was built with; empty if it does not load.

    A provider listed here still needs its hardware and libraries.
    """
    if _import_fault("onnxruntime") is not None:
        return ()
    # Two ONNX Runtimes over each other can leave a module without its functions.
    return tuple(getattr(sys.modules["onnxruntime"], "get_available_providers", tuple)())


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


def _import_fault(module: str) -> str | None:
    """Return why the module cannot be imported, on one line, or None if it can."""
    try:
        imported_quietly(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


@dataclass(frozen=True)
class Clash:
    """Installed things that do not go together.

    Attributes:
        message: what they are and what comes of it.
        remedy: the command or step that ends it.
    """

    message: str
    remedy: str


def clashes_among(
    distributions: Mapping[str, str],
    torch_cuda: str | None,
    driver: Driver | None,
    onnxruntime_cuda: str | None = None,
) -> tuple[Clash, ...]:
    """Return what does not go together.

    Args:
        distributions: installed packages' canonical names and versions.
        torch_cuda: the CUDA PyTorch was built for, such as ``13.0``.
        driver: the NVIDIA driver, if there is one.
        onnxruntime_cuda: the CUDA ONNX Runtime was built for.
    """
    pip, major = pip_command(), (torch_cuda or "").partition(".")[0]
    found = []
    families: dict[tuple[str, ...], str] = {
        ONNXRUNTIMES: "onnxruntime" if driver is None else "onnxruntime-gpu[cuda,cudnn]",
        ("tensorrt-cu12", "tensorrt-cu13"): f"tensorrt-cu{major or 13}",
        ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13"): f"tensorrt-rtx-cu{major or 13}",
    }
    for family, wanted in families.items():
        present = [name for name in family if name in distributions]
        change = f"`{pip} uninstall --yes {' '.join(present)} && {pip} install '{wanted}'`."
        cuda = onnxruntime_cuda if family is ONNXRUNTIMES else "".join(present)[-2:]
        if len(present) > 1:
            message = "both installed; they hold the same module and overwrite each other's files."
            found.append(Clash(f"{' and '.join(present)} are {message}", f"Keep one: {change}"))
        elif present == ["onnxruntime"] and driver is not None and driver.gpus:
            message = "There is an NVIDIA GPU, but the installed onnxruntime is the one for CPUs."
            found.append(Clash(message, f"For the GPU: {change}"))
        elif present and cuda and major and cuda.partition(".")[0] != major:
            page = f" (ONNX Runtime's for each CUDA: {CUDA_PAGE})" * (family is ONNXRUNTIMES)
            message = f"{present[0]} was built for CUDA {cuda}, but PyTorch for CUDA {torch_cuda}"
            found.append(
                Clash(
                    f"{message}: one process cannot load both.",
                    f"Take the one that is built for PyTorch's CUDA{page}: {change}",
                )
            )
    if driver is not None and major and driver.cuda_version[0] < int(major):
        newest = "{}.{}".format(*driver.cuda_version)
        found.append(
            Clash(
                f"PyTorch was built for CUDA {torch_cuda}, but NVIDIA driver {driver.version} runs "
                f"CUDA up to {newest}.",
                f"Update the driver, or install a PyTorch built for CUDA {driver.cuda_version[0]}.",
            )
        )
    return tuple(found)


def unmet_requirements(distributions: Mapping[str, str]) -> tuple[Clash, ...]:
    """Return the requirements that installed packages of ours state and do not get.

    Follows the components' own requirements (protobuf, numpy and the like) as
    ``pip check`` does; extras are left out. Any ONNX Runtime stands for ``onnxruntime``.
    """
    todo = [name for component in COMPONENTS for name in component.distributions]
    found: list[Clash] = []
    for name in todo:  # which grows
        stated = importlib.metadata.requires(name) if name in distributions else None
        for needed in map(Requirement, stated or ()):
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            package = canonicalize_name(needed.name)
            names = ONNXRUNTIMES if package == "onnxruntime" else (package,)
            version = next((distributions[n] for n in names if n in distributions), None)
            if package not in todo:
                todo.append(package)
            if version is None or not needed.specifier.contains(version, prereleases=True):
                here = f"{version} is installed" if version else "is not installed"
                wanted = f"{package}{needed.specifier}"
                found.append(
                    Clash(
                        f"{name} needs {wanted}, but {package} {here}.",
                        f"Try `{pip_command()} install '{wanted}'`.",
                    )
                )
    return tuple(found)
