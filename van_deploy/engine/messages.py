"""What TensorRT says while it works, what that means, and what to do about it.

An entry of ``messages.toml`` is a pattern, its cause in plain words and a remedy. The
patterns of the parser and of the builder were collected from TensorRT for RTX 1.7.1 on
files made wrong on purpose (``tests/engine/test_messages.py`` does it again); those with a
number come from issue threads, because they need a GPU or another release.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from van_deploy import errors
from van_deploy.documents import read_toml_file
from van_deploy.errors import ConversionError, VanDeployError

_MEMORY = {
    "weights_bytes": r"Total Weights Memory: (\d+) bytes",
    "activation_bytes": r"Total Activation Memory: (\d+) bytes",
    "scratch_bytes": r"Max Scratch Memory: (\d+) bytes",
}
SHOWN = 3  # parser problems shown in full


@dataclass
class BuildLog:
    """Every message, in order.

    Attributes:
        entries: severity (``INTERNAL_ERROR``, ``ERROR``, ``WARNING``, ``INFO``,
            ``VERBOSE``) and text.
    """

    entries: list[tuple[str, str]] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """The errors, each once."""
        return list(dict.fromkeys(text for kind, text in self.entries if kind.endswith("ERROR")))

    @property
    def warnings(self) -> list[str]:
        """The warnings as they came."""
        return [text for kind, text in self.entries if kind == "WARNING"]

    def text(self) -> str:
        """Return the log as a file holds it: one letter for the severity, then the message."""
        return "".join(f"[{severity[0]}] {text}\n" for severity, text in self.entries)


def trt_logger(trt: Any, log: BuildLog) -> Any:
    """Return a logger of the bindings ``trt`` that writes into ``log``. Keep it alive."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.entries.append((severity.name, text))

    return Logger()


def memory_facts(log: BuildLog) -> dict[str, int]:
    """Return what the builder said about memory on the GPU, in bytes; no GPU is needed.

    ``weights_bytes``, ``activation_bytes`` and ``scratch_bytes`` (part of the
    activations) at the largest batch.
    """
    found = {name: [int(size) for size in re.findall(p, log.text())] for name, p in _MEMORY.items()}
    return {name: max(sizes) for name, sizes in found.items() if sizes}


def warnings_summary(warnings: list[str]) -> Mapping[str, int]:
    """Return each different warning and how often it came, numbers in it left out.

    >>> dict(warnings_summary(["a.cpp:12: odd 1", "a.cpp:14: odd 2", "other"]))
    {'odd N': 2, 'other': 1}
    """
    plain = (re.sub(r"^\S+\.cpp:\d+: ", "", text) for text in warnings)
    return Counter(" ".join(re.sub(r"\b\d+(\.\d+)?\b", "N", text).split()) for text in plain)


@dataclass(frozen=True)
class Entry:
    """One known failure.

    Attributes:
        name: what tests and documentation call it.
        pattern: a regular expression that finds it in TensorRT's message.
        cause: what it means, in words for people.
        remedy: what to do.
        error: the class of error it becomes.
    """

    name: str
    pattern: str
    cause: str
    remedy: str
    error: type[VanDeployError] = ConversionError


CATALOGUE = tuple(
    Entry(**{**row, "error": getattr(errors, row.get("error", "ConversionError"))})
    for row in read_toml_file(Path(__file__).with_name("messages.toml"))["entry"]
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


def parser_failure(what: str, parser: Any, said: Sequence[str]) -> VanDeployError:
    """Return the error for a file that the parser refused.

    Args:
        what: that it did, such as ``TensorRT 11.4.0 cannot take 'model.onnx'``.
        parser: an ``OnnxParser`` of the bindings. A node's name is its PyTorch module's path.
        said: errors that the logger heard, for causes the parser does not pass on.
    """
    lines, known = [], []
    for problem in (parser.get_error(i) for i in range(min(SHOWN, parser.num_errors))):
        text, node = problem.desc(), problem.node_name()
        heard = f"{problem.code().name} {' '.join(said)}"
        known.append(entry_for(text) or entry_for(heard) or UNKNOWN)
        where = f"{node} ({problem.node_operator()})" if node else "the file"
        lines.append(f"{where}: {known[-1].cause}. TensorRT says: {_short(text)}")
    if not known:
        return failure(what, said)
    if parser.num_errors > SHOWN:
        lines.append(f"and {parser.num_errors - SHOWN} more.")
    remedies = dict.fromkeys(entry.remedy for entry in known)
    return known[0].error("\n".join([f"{what}:", *lines]), "\n".join(remedies))


def failure(what: str, said: Sequence[str]) -> VanDeployError:
    """Return the error for something TensorRT did not do.

    Args:
        what: that it did not, such as ``TensorRT 11.4.0 built no plan from 'model.onnx'``.
        said: what the logger heard.
    """
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
