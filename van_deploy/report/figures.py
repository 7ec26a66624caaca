"""Numbers as people read them: one function a kind, used by every table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from van_deploy.config.sizes import size_text

TEXTS = ("", "name", "state")
"""Forms that are set to the left: text that may be broken over lines, a name that may not, and a
state."""

LONGEST = 12  # of a list that is shown whole
SPELLED = ("inf", "-inf", "nan")  # numbers that JSON holds as text
STATES = {True: "PASS", False: "FAIL", None: "SKIPPED", "passed": "PASS", "failed": "FAIL"}


def shown(value: Any, form: str) -> str:
    """Return a cell's text.

    Args:
        value: what the cell holds, as JSON spells it; None is ``-``, or nothing in text.
        form: one of :data:`TEXTS` or :data:`NAMED`, ``number`` (as it is), or a format such as
            ``.1f``. A text that is no number stays as it is.

    >>> shown("inf", ".1f"), shown(0.9835, "percent"), shown(None, ".1f"), shown([1, 2.5], "")
    ('inf', '98.35', '-', '1 2.5')
    """
    if value is None:
        return "-" if form else ""
    if form == "state":
        return state_of(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        if value not in SPELLED or form in TEXTS:
            return value
        value = float(value)
    if form in NAMED:
        return NAMED[form](value)
    if isinstance(value, Mapping):
        return ", ".join(_entry(key, item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return listed(value) if len(value) <= LONGEST else f"{listed(value[:8])} ... ({len(value)})"
    return format(value, form if form[:1] in tuple("+,.dg") else "g" * isinstance(value, float))


def _entry(key: str, value: Any) -> str:
    form = "bytes" if key.endswith("_bytes") else ""
    return f"{key.removesuffix('_bytes').replace('_', ' ')} {shown(value, form)}"


def state_of(outcome: str | bool | None) -> str:
    """Return the word for an outcome.

    >>> state_of(True), state_of("pass"), state_of("missing")
    ('PASS', 'PASS', 'MISSING')
    """
    return STATES.get(outcome, str(outcome).upper())


def bytes_text(size: float) -> str:
    """Return a size in bytes as people read it, in binary units.

    >>> bytes_text(512), bytes_text(16_500_000), bytes_text(25_276_502_016)
    ('512 B', '15.7 MiB', '23.5 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count_text(count: float) -> str:
    """Return a large count with its decimal unit.

    >>> count_text(431), count_text(4_103_176), count_text(2_506_000_000)
    ('431', '4.1 M', '2.5 G')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:g}"


def ms_text(value: float) -> str:
    """Return milliseconds with three figures.

    >>> ms_text(0.4213), ms_text(12.345), ms_text(4321.0)
    ('0.421', '12.3', '4,321')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def listed(values: Iterable[object], separator: str = " ") -> str:
    """Return values in one line, floats without trailing zeros."""
    return separator.join(f"{v:g}" if isinstance(v, float) else shown(v, "") for v in values)


NAMED: Mapping[str, Callable[[Any], str]] = {
    "bytes": bytes_text,
    "count": count_text,
    "ms": ms_text,
    "percent": lambda share: f"{100 * share:.2f}",
    "percents": lambda ends: f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}",
    "points": lambda ends: f"{ends[0]:+.2f} to {ends[1]:+.2f}",
    "ratio": lambda ratio: "{median:.2f} ({low:.2f}-{high:.2f})".format(**ratio),
    "size": size_text,
}
"""Kinds of numbers: a share and the two ends of an interval in percent, an interval in points,
a ratio with its 95 % interval, such as ``4.13 (4.00-4.31)``, and height x width."""
