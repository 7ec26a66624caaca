"""How long a contender is timed, and when that is enough."""

from __future__ import annotations

from dataclasses import dataclass

from van_deploy.errors import UsageError

__all__ = ["LEAST_ROUNDS", "Budget"]

LEAST_ROUNDS = 6
"""Fewer rounds have no 95 % interval of their median (2 x 0.5^5 is more than 5 %)."""


@dataclass(frozen=True)
class Budget:
    """How long to time one contender at one batch size.

    A contender is done when it has been timed for ``seconds`` and ``calls`` and its
    ratio's interval is within ``tolerance_percent``; or when it has been timed for
    ``limit_s``, and its row then says that it did not settle.

    Attributes:
        seconds: of timed calls, at least.
        calls: at least as many.
        limit_s: of timed calls, at most, whatever was not reached; one slice in each of
            six rounds may take longer.
        rounds: ``seconds`` is cut into as many slices, one a round.
        warmup_s: unmeasured calls before the first round.
        tolerance_percent: how far the 95 % interval of a ratio may reach from it.
    """

    seconds: float = 3.0
    calls: int = 100
    limit_s: float = 10.0
    rounds: int = 30
    warmup_s: float = 1.0
    tolerance_percent: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.rounds < 1 or self.calls < 1:
            raise UsageError(
                f"{self.rounds} rounds and {self.calls} calls make no sense.",
                "Give 1 or more of each: --rounds 30 --calls 100.",
            )
        if not (self.seconds > 0 and self.limit_s > 0 and self.warmup_s >= 0):
            raise UsageError(
                f"{self.seconds:g} s timed, {self.limit_s:g} s at most and {self.warmup_s:g} s of "
                "warm-up make no sense.",
                "Give more than 0: --seconds 3 --limit 10 --warmup 1.",
            )
        if not self.tolerance_percent > 0:
            raise UsageError(
                f"{self.tolerance_percent:g} % is no tolerance.", "Give more than 0: --tolerance 2."
            )

    def slice_s(self, reference_call_s: float = 0.0) -> float:
        """Return the seconds of one slice: all of a round are as long as the reference's one call.

        Slices of unequal length would meet unequal shares of what disturbs the machine.

        >>> Budget(seconds=3, rounds=30).slice_s(), Budget(seconds=3, rounds=30).slice_s(0.5)
        (0.1, 0.5)
        """
        return max(self.seconds / self.rounds, reference_call_s)

    def is_over(self, timed_s: float, rounds: int) -> bool:
        """Return whether a contender may not be timed any longer."""
        return timed_s >= self.limit_s and rounds >= min(LEAST_ROUNDS, self.rounds)

    def is_met(self, timed_s: float, calls: int, rounds: int) -> bool:
        """Return whether a contender was timed for as long as it has to be."""
        return (
            timed_s >= self.seconds
            and calls >= self.calls
            and rounds >= min(LEAST_ROUNDS, self.rounds)
        )
