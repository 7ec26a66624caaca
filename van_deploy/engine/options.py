"""What can be asked of an engine build: tables of :mod:`van_deploy.config`."""

from __future__ import annotations

from van_deploy.config import BuildOptions, HardwareCompatibility, Profiling

__all__ = ["BuildOptions", "HardwareCompatibility", "Profiling"]
