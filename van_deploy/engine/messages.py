"""TensorRT's log messages, and the errors with cause and remedy that they become.

An entry of ``messages.toml`` has a pattern, a cause in plain words and a remedy. The patterns of
the parser and the builder were collected from TensorRT for RTX 1.7.1 on invalid files, which
``tests/engine/test_messages.py`` builds again; those with an issue number need a GPU or another
release.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from van_deploy import errors
from van_deploy.documents import read_toml_file
from van_deploy.errors import ConversionError, VanDeployError

_MEMORY_PATTERNS = {
    "weights_bytes": r"Total Weights Memory: (\d+) bytes",
    "activation_bytes": r"Total Activation Memory: (\d+) bytes",
    "scratch_bytes": r"Max Scratch Memory: (\d+) bytes",
}
MAX_PARSER_ERRORS = 3  # shown in full


@dataclass
class BuildLog:
    """All messages of a TensorRT logger, in order.

    Attributes:
        entries: pairs of severity (``INTERNAL_ERROR``, ``ERROR``, ``WARNING``, ``INFO``,
            ``VERBOSE``) and text.
    """

    entries: list[tuple[str, str]] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """The error messages without duplicates."""
        return list(dict.fromkeys(text for kind, text in self.entries if kind.endswith("ERROR")))

    @property
    def warnings(self) -> list[str]:
        """The warnings, duplicates included."""
        return [text for kind, text in self.entries if kind == "WARNING"]

    def text(self) -> str:
        """Return the content of the log file: the severity's first letter and the message."""
        return "".join(f"[{severity[0]}] {text}\n" for severity, text in self.entries)


def trt_logger(trt: Any, log: BuildLog) -> Any:
    """Return a logger for the bindings ``trt`` that appends to ``log``; keep a reference to it."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.entries.append((severity.name, text))

    return Logger()


def device_memory(log: BuildLog) -> dict[str, int]:
    """Return the GPU memory in bytes that the builder logged; no GPU is needed.

    ``weights_bytes``, ``activation_bytes`` and ``scratch_bytes`` (part of the activations) at the
    largest batch.
    """
    text = log.text()
    sizes = {name: re.findall(p, text) for name, p in _MEMORY_PATTERNS.items()}
    return {name: max(map(int, values)) for name, values in sizes.items() if values}


def count_warnings(warnings: list[str]) -> Mapping[str, int]:
    """Return how often each warning occurred; warnings that differ only in numbers count as one.

    >>> dict(count_warnings(["a.cpp:12: odd 1", "a.cpp:14: odd 2", "other"]))
    {'odd N': 2, 'other': 1}
    """
    plain = (re.sub(r"^\S+\.cpp:\d+: ", "", text) for text in warnings)
    return Counter(" ".join(re.sub(r"\b\d+(\.\d+)?\b", "N", text).split()) for text in plain)


@dataclass(frozen=True)
class KnownError:
    """One known TensorRT error.

    Attributes:
        name: used in tests and documentation.
        pattern: regular expression that matches TensorRT's message.
        cause: explanation in plain words.
        remedy: what the user can do.
        error: exception class raised for it.
    """

    name: str
    pattern: str
    cause: str
    remedy: str
    error: type[VanDeployError] = ConversionError


# The most specific error comes first.
KNOWN_ERRORS = tuple(
    KnownError(**{**row, "error": getattr(errors, row.get("error", "ConversionError"))})
    for row in read_toml_file(Path(__file__).with_name("messages.toml"))["entry"]
)
REPORT = "If `van-deploy export` wrote the graph, please report the problem."
UNKNOWN = KnownError("unknown", "", "not a known error", REPORT)


def find_known_error(text: str) -> KnownError | None:
    """Return the known error that matches a message of TensorRT, or None.

    >>> find_known_error("Scale coefficients must all be positive").name
    'scale not positive'
    """
    return next((known for known in KNOWN_ERRORS if re.search(known.pattern, text)), None)


def error_from_parser(what: str, parser: Any, logged: Sequence[str]) -> VanDeployError:
    """Return the error for a file that the ONNX parser rejected.

    Args:
        what: start of the message, such as ``TensorRT 11.4.0 cannot parse 'model.onnx'``.
        parser: an ``OnnxParser`` of the bindings. A node's name is its PyTorch module's path.
        logged: errors from the logger, for causes that the parser does not report.
    """
    lines, known = [], []
    count = parser.num_errors
    for problem in (parser.get_error(i) for i in range(min(MAX_PARSER_ERRORS, count))):
        text, node = problem.desc(), problem.node_name()
        context = f"{problem.code().name} {' '.join(logged)}"
        known.append(find_known_error(text) or find_known_error(context) or UNKNOWN)
        where = f"{node} ({problem.node_operator()})" if node else "the file"
        lines.append(f"{where}: {known[-1].cause}. TensorRT reports: {_shorten(text)}")
    if not known:
        return error_from_log(what, logged)
    if count > MAX_PARSER_ERRORS:
        lines.append(f"and {count - MAX_PARSER_ERRORS} more.")
    remedies = dict.fromkeys(one.remedy for one in known)
    return known[0].error("\n".join([f"{what}:", *lines]), "\n".join(remedies))


def error_from_log(what: str, logged: Sequence[str]) -> VanDeployError:
    """Return the error for a TensorRT call that failed.

    Args:
        what: start of the message, such as ``TensorRT 11.4.0 built no plan from 'model.onnx'``.
        logged: errors from the logger.
    """
    matches = [(known, text) for text in logged if (known := find_known_error(text))]
    if matches:  # the most specific error, whatever the order of the messages
        known, text = min(matches, key=lambda match: KNOWN_ERRORS.index(match[0]))
        return known.error(f"{what}: {known.cause}. It reports: {_shorten(text)}", known.remedy)
    text = _shorten(logged[-1]) if logged else "no error message"
    return ConversionError(f"{what}, for an unknown reason. It reports: {text}", REPORT)


def _shorten(text: str) -> str:
    """Return a message without source positions and internal prefixes, at most 240 characters."""
    plain = " ".join(text.split())
    plain = re.sub(r"\[?\w+\.(?:cpp|h)::?\w+(?:::\d+|: \w+)?\]\s*", "", plain)
    plain = re.sub(r" ?In \w+ at /_src/\S+?:\d+\)?", "", plain)
    return plain if len(plain) <= 240 else plain[:237] + "..."
