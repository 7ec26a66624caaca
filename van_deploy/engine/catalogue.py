"""What TensorRT's messages mean, and what to do about each.

An entry of ``catalogue.toml`` is a pattern, its cause in plain words and a remedy. The
patterns of the parser and of the builder were collected from TensorRT for RTX 1.7.1 on
files made wrong on purpose (``tests/engine/test_catalogue.py`` does it again); those marked
"reported" come from issue threads, because they need a GPU or another release.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy import errors
from van_deploy.documents import toml_from
from van_deploy.errors import ConversionError, VanDeployError

SHOWN = 3  # parser problems shown in full


@dataclass(frozen=True)
class Entry:
    """One known failure.

    Attributes:
        name: what tests and documentation call it.
        pattern: a regular expression that finds it in TensorRT's message.
        cause: what it means, in words for people.
        remedy: what to do.
        error: the class of error it becomes.
        reported: where it was seen, if it was not measured here.
    """

    name: str
    pattern: str
    cause: str
    remedy: str
    error: type[VanDeployError] = ConversionError
    reported: str = ""


CATALOGUE = tuple(
    Entry(**{**row, "error": getattr(errors, row.get("error", "ConversionError"))})
    for row in toml_from(Path(__file__).with_name("catalogue.toml"))["entry"]
)
"""Known failures, the most particular first."""

UNKNOWN = Entry(
    "unknown", "", "not a failure this program knows", "Look into the log beside the plan."
)


def entry_for(text: str) -> Entry | None:
    """Return what a message of TensorRT's means, or None if it is not known.

    >>> entry_for("Scale coefficients must all be positive").name
    'scale not positive'
    """
    return next((entry for entry in CATALOGUE if re.search(entry.pattern, text)), None)


def parser_failure(label: str, source: str, parser: Any, log: Sequence[str] = ()) -> VanDeployError:
    """Return the error for a file that the parser refused.

    Args:
        label: the backend, such as ``TensorRT for RTX 1.7.1``.
        source: the ONNX file.
        parser: an ``OnnxParser`` of the bindings. A node's name is its PyTorch module's path.
        log: errors that the logger heard, for causes the parser does not pass on.
    """
    heard = " ".join(log)
    lines, remedies, classes = [], [], []
    for problem in (parser.get_error(i) for i in range(min(SHOWN, parser.num_errors))):
        text, node = problem.desc(), problem.node_name()
        entry = entry_for(text) or entry_for(f"{problem.code().name} {heard}") or UNKNOWN
        where = f"{node} ({problem.node_operator()})" if node else "the file"
        lines.append(f"{where}: {entry.cause}. TensorRT says: {_short(text)}")
        classes.append(entry.error)
        remedies.append(entry.remedy)
    if not lines:
        said = heard or "without saying why"
        return ConversionError(f"{label} cannot take '{source}': {said}", "Look into the log.")
    if parser.num_errors > SHOWN:
        lines.append(f"and {parser.num_errors - SHOWN} more.")
    return classes[0](
        f"{label} cannot take '{source}':\n" + "\n".join(lines), "\n".join(dict.fromkeys(remedies))
    )


def build_failure(label: str, source: str, said: Sequence[str]) -> VanDeployError:
    """Return the error for a build that gave no plan, from what the logger heard."""
    return _failure(f"{label} built no plan from '{source}'", said)


def load_failure(label: str, plan: str, said: Sequence[str]) -> VanDeployError:
    """Return the error for a plan that did not load, from what the logger heard."""
    return _failure(f"{label} does not load '{plan}'", said)


def run_failure(label: str, what: str, said: Sequence[str]) -> VanDeployError:
    """Return the error for an engine that refused what it was given, such as a batch."""
    return _failure(f"{label} refused {what}", said)


def _failure(what: str, said: Sequence[str]) -> VanDeployError:
    known = [(entry, text) for text in said if (entry := entry_for(text))]
    if known:  # the most particular entry, wherever it was said
        entry, text = min(known, key=lambda pair: CATALOGUE.index(pair[0]))
        return entry.error(f"{what}: {entry.cause}. It says: {_short(text)}", entry.remedy)
    text = _short(said[-1]) if said else "nothing at all"
    return ConversionError(
        f"{what}, for a reason this program does not know. It says: {text}",
        "Look into the log; if the graph is one of `van-deploy export`, please report it.",
    )


def _short(text: str) -> str:
    """Return a message without source positions and internal prefixes, at most 240 characters."""
    plain = " ".join(text.split())
    plain = re.sub(r"\[?\w+\.(?:cpp|h)::?\w+(?:::\d+|: \w+)?\]\s*", "", plain)
    plain = re.sub(r" ?In \w+ at /_src/\S+?:\d+\)?", "", plain)
    return plain if len(plain) <= 240 else plain[:237] + "..."
