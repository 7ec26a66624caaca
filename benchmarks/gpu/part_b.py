"""Part b of the GPU report: every runtime, the GPU tests, and the agreement gates."""

from __future__ import annotations

from step import Context, Step


def steps_of_b(context: Context) -> list[Step]:
    """Return the steps, the most valuable first."""
    raise NotImplementedError
