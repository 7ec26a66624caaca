"""The deadline for a request's body, in both of its forms."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from van_deploy.serve import body


@pytest.mark.parametrize("make", [body._deadline, body._Deadline])
def test_a_deadline_ends_what_takes_too_long_and_nothing_else(make: Any) -> None:
    async def main() -> str:
        async with make(5.0):
            await asyncio.sleep(0)
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            async with make(0.02):
                await asyncio.sleep(5)
        await asyncio.sleep(0.05)  # nothing is left behind that cancels this
        return "done"

    assert asyncio.run(main()) == "done"


def test_a_cancelled_request_stays_cancelled() -> None:
    async def main() -> None:
        async def work() -> None:
            async with body._Deadline(5.0):
                await asyncio.sleep(5)

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
