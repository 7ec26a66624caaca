"""Text from files, made harmless for a terminal.

A class name, a tensor's name or a file's may hold escape sequences: a terminal that is
sent them moves its cursor, changes its title, or worse. Rich passes them on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.segment import Segment

from van_deploy.documents import CONTROL

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Harmless(RenderHook):
    """Shows a control character as ``\N{REPLACEMENT CHARACTER}`` in all that a console prints."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Return the same, each without control characters once it is rendered."""
        return [_Cleaned(renderable) for renderable in renderables]


class _Cleaned:
    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            clean = segment.control or not CONTROL.search(segment.text)
            yield segment if clean else Segment(_cleaned(segment.text), segment.style)


def _cleaned(text: str) -> str:
    """Return text without colours, which libraries put into messages, and other sequences shown."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", COLOUR.sub("", text))
