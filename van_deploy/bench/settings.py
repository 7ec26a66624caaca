"""The reference of a benchmark's ratios."""

from __future__ import annotations

from collections.abc import Sequence

from van_deploy.bench.contender import Contender
from van_deploy.bench.contenders import REFERENCE
from van_deploy.config import BenchSettings
from van_deploy.errors import UsageError

__all__ = ["with_known_reference"]


def with_known_reference(settings: BenchSettings, contenders: Sequence[Contender]) -> BenchSettings:
    """Return settings whose reference runs: the one asked for, else the first contender.

    Raises:
        UsageError: a reference was asked for that is not among the contenders.
    """
    names = [contender.name for contender in contenders]
    if settings.reference in names or not names:
        return settings
    if settings.reference != REFERENCE:
        raise UsageError(
            f"The reference '{settings.reference}' is not among the runners.",
            f"Choose one of: {', '.join(names)}.",
        )
    return settings.changed(reference=names[0])
