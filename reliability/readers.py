"""What reads a spoiled file: the program, or the function that its commands read it through."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Reader", "command"]

Reader = Callable[[], object]
"""Reads a spoiled file; returns or raises what the program would."""


def command(*words: str) -> Reader:
    """Return a reader that runs ``van-deploy`` with these words, in this process."""

    def run() -> object:
        from typer.testing import CliRunner

        from van_deploy.cli.app import app

        result = CliRunner().invoke(app, [*words, "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code

    return run
