"""What TensorRT says while it works: kept whole, and summarised."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MEMORY = {
    "weights_bytes": r"Total Weights Memory: (\d+) bytes",
    "activation_bytes": r"Total Activation Memory: (\d+) bytes",
    "scratch_bytes": r"Max Scratch Memory: (\d+) bytes",
}


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
