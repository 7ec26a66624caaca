"""Requests that are not answered, and what is limited for all of them together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from van_deploy.errors import InputError

__all__ = ["Allowance", "Refusal"]


class Refusal(InputError):
    """A request that is not answered; ``status`` is HTTP's."""

    def __init__(self, message: str, remedy: str = "", status: int = 400) -> None:
        super().__init__(message, remedy)
        self.status = status

    def __reduce__(self) -> tuple[type[Refusal], tuple[str, str, int]]:
        """Return how it is made anew in another process."""
        return Refusal, (self.message, self.remedy, self.status)


class Allowance:
    """So many of something for all requests together; one that would exceed it is refused.

    Args:
        limit: how many.
        message: what a client is told that is refused.
        status: HTTP's, with which it is refused.

    Attributes:
        used: how many are taken now.
    """

    def __init__(self, limit: int, message: str, status: int) -> None:
        self.limit, self.message, self.status, self.used = limit, message, status, 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Give a function that takes some more; all are given back at the end of the block.

        The function raises Refusal where not as many are left.
        """
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if self.used + count > self.limit:
                raise Refusal(self.message, status=self.status)
            self.used += count
            held += count

        try:
            yield take
        finally:
            self.used -= held
