"""The data files of this package that are filled in: manifests, the example client, model.py.

A line that ends in ``#if WORD...`` is kept where one of the words holds; the mark itself
always goes. ``$name`` stands for a value, as in :class:`string.Template`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib import resources
from string import Template

__all__ = ["filled"]

_MARK = re.compile(r"^(.*?) +#if ([a-z0-9 ]+)$")


def filled(template: str, values: dict[str, object], holds: Collection[str] = ()) -> str:
    """Return a file of ``templates/`` with its values in place.

    Args:
        template: its name, such as ``compose.yaml``.
        values: by the name after ``$``.
        holds: the words whose lines are kept.

    Raises:
        KeyError: the template names a value that is not given.
    """
    text = (resources.files("van_deploy.serve") / "templates" / template).read_text("utf-8")
    lines = []
    for line in text.splitlines():
        marked = _MARK.match(line)
        if marked is None:
            lines.append(line)
        elif set(marked[2].split()) & set(holds):
            lines.append(marked[1])
    return Template("\n".join(lines) + "\n").substitute(values)
