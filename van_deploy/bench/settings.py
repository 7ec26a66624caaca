"""What a benchmark is to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from van_deploy.bench.budget import Budget
from van_deploy.bench.contender import Contender
from van_deploy.bench.contenders import REFERENCE
from van_deploy.errors import UsageError

__all__ = ["Settings", "with_known_reference"]

BATCH_LIMIT = 4096


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        batches: batch sizes.
        threads: of each run time; None for the cores this process may use.
        streams: calls in flight at the same time; the threads are shared among them.
        image_sizes: sides of the input; empty for the bundle's own.
        runners: which contenders (see :func:`~van_deploy.bench.contenders.chosen`).
        reference: what ratios are against; where it does not run, the first that does.
        p99_ms: look for the best batch whose 99th percentile stays below this, too.
        budget: time for one contender at one batch size.
        roofline: measure the machine's limits and compare with them.
    """

    batches: tuple[int, ...] = (1, 8)
    threads: int | None = None
    streams: int = 1
    image_sizes: tuple[int, ...] = ()
    runners: tuple[str, ...] = ()
    reference: str = REFERENCE
    p99_ms: float | None = None
    budget: Budget = field(default_factory=Budget)
    roofline: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if not self.batches or not all(1 <= batch <= BATCH_LIMIT for batch in self.batches):
            raise UsageError(
                f"The batch sizes {list(self.batches)} are not between 1 and {BATCH_LIMIT}.",
                "Write them with commas: --batches 1,8,32.",
            )
        for option, value in (("--threads", self.threads), ("--streams", self.streams)):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value} makes no sense.", "Give 1 or more.")
        if self.p99_ms is not None and not self.p99_ms > 0:
            raise UsageError(f"{self.p99_ms:g} ms is no latency limit.", "Give more than 0.")


def with_known_reference(settings: Settings, contenders: Sequence[Contender]) -> Settings:
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
    return replace(settings, reference=names[0])
