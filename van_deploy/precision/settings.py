"""What a quantisation for its target comes to."""

from __future__ import annotations

from dataclasses import replace

from van_deploy.config import QuantizeSettings
from van_deploy.precision.cpu import CPU_SCOPE
from van_deploy.precision.equalize import EqualizeSettings
from van_deploy.precision.refine_settings import RefineSettings

__all__ = ["AUTO", "QuantizeSettings", "equalizing", "refining", "rest_precision", "scope_asked"]

AUTO = "auto"


def equalizing(settings: QuantizeSettings) -> EqualizeSettings | None:
    """Return the exact changes to make; on a CPU without those that add operators."""
    if not settings.equalize:
        return None
    usual = EqualizeSettings()
    return usual if settings.target == "tensorrt" else replace(usual, shift=False, stretch=False)


def refining(settings: QuantizeSettings) -> RefineSettings | None:
    """Return the improvements to make; for a CPU without those that know TensorRT's rounding."""
    if not settings.refine:
        return None
    usual = RefineSettings()
    if settings.target == "tensorrt":
        return usual
    return replace(usual, scales=False, biases=False, turns=False)


def rest_precision(settings: QuantizeSettings) -> str:
    """Return what becomes of everything that is not INT8."""
    return settings.rest or ("fp32" if settings.target == "cpu" else "fp16")


def scope_asked(settings: QuantizeSettings) -> str | tuple[str, ...]:
    """Return the scope, the target's default included."""
    if not settings.scope:
        return CPU_SCOPE if settings.target == "cpu" else "pointwise"
    return settings.scope[0] if len(settings.scope) == 1 else settings.scope
