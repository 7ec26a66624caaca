"""Importing packages that would tell their makers about it, without that.

OpenVINO reports its import to a web service, and Ray its use; nobody who deploys a
network asked for either, and nothing here needs the network but downloads of weights.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

__all__ = ["imported_quietly", "without_ray_reports"]

_REPORTER = "openvino_telemetry"


def imported_quietly(module: str) -> ModuleType:
    """Return the module, imported without OpenVINO's reporter.

    OpenVINO takes its own stand-in where the reporter is not installed, and for the
    time of the import it seems not to be. A reporter that was loaded before stays.

    Raises:
        ImportError: the module is not there or does not load.
    """
    if _REPORTER in sys.modules:
        return importlib.import_module(module)
    sys.modules[_REPORTER] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules[_REPORTER]


def without_ray_reports() -> None:
    """Switch Ray's usage reports off in this process, unless the user has decided."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
