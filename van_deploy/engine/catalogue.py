"""What TensorRT's messages mean, and what to do about each.

An entry is a pattern, its cause in plain words and a remedy. The patterns of the
parser and of the builder were collected from TensorRT for RTX 1.7.1 on files made
wrong on purpose (``tests/engine/test_catalogue.py`` does it again); those marked
"reported" come from issue threads, because they need a GPU or another release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from van_deploy.errors import ConversionError, InputError, MissingDependency, VanDeployError

__all__ = [
    "CATALOGUE",
    "Entry",
    "ParserProblem",
    "build_failure",
    "entry_for",
    "load_failure",
    "parser_failure",
    "parser_problems",
    "run_failure",
]

SHOWN = 3  # parser problems shown in full


@dataclass(frozen=True)
class ParserProblem:
    """One thing the parser could not take.

    Attributes:
        code: TensorRT's name for the kind, such as ``INVALID_NODE``.
        node: the node's name, which is the PyTorch module's path; "" if it names none.
        operator: the ONNX operator; "" likewise.
        text: what TensorRT said.
    """

    code: str
    node: str
    operator: str
    text: str


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


CATALOGUE: tuple[Entry, ...] = (
    Entry(
        "unknown operator",
        r"Plugin not found|No importer registered|creator && ",
        "TensorRT has no operator of this name and no plugin for it",
        "Export with standard operators: `van-deploy export` writes nothing else. "
        "ONNX Runtime's own operators (com.microsoft) come from graphs it has optimised.",
    ),
    Entry(
        "unsupported type",
        r"unsupported input type|Failed to convert ONNX dat[ea] type|UNSUPPORTED_NODE_DATATYPE",
        "an input has a type TensorRT does not take there",
        "Feed float32, float16 or bfloat16 images; uint8 images need a Cast first.",
    ),
    Entry(
        "mixed types",
        r"must be of same type|must have the same type|expects? .* same type",
        "two inputs of one operator have different types; in a strongly typed network nothing "
        "is converted silently",
        "Make the half-precision file with `van-deploy quantize BUNDLE --precision fp16`: "
        "converters that leave out Casts write such graphs.",
    ),
    Entry(
        "scale not positive",
        r"Scale coefficients must all be positive",
        "a quantisation scale is zero or negative; casting a tiny scale to FP16 makes it zero",
        "Floor the scales at 6.1e-5, as `van-deploy quantize` does.",
    ),
    Entry(
        "asymmetric quantisation",
        r"Non-zero zero point is not supported",
        "a zero-point is not 0; TensorRT's INT8 is symmetric",
        "Quantise symmetrically: `van-deploy quantize BUNDLE --precision int8`.",
    ),
    Entry(
        "weights do not fit",
        r"failed to broadcast to input|Kernel weight",
        "a convolution's weights do not match the channels that come in",
        "The graph is inconsistent: check it with ONNX Runtime, then export it again.",
    ),
    Entry(
        "shapes do not fit",
        r"broadcast dimensions must be conformable|Shape Error|dimensions? mismatch for operand",
        "the shapes of an operator's inputs do not go together",
        "The graph is inconsistent: check it with ONNX Runtime, then export it again.",
    ),
    Entry(
        "frozen batch",
        r"reshap\w+ (failed|would change volume)|violate shape constraints",
        "a Reshape in the graph holds the batch size it was exported with, so other batch sizes "
        "do not go through",
        "Export with a free batch (`van-deploy export` proves it at several sizes), or build for "
        "the one size the graph has.",
    ),
    Entry(
        "broken graph",
        r"Node input was not registered|INVALID_GRAPH",
        "a node reads a value that nothing makes",
        "The file is damaged or was edited: export it again.",
    ),
    Entry(
        "external weights",
        r"Failed to open file|Failed to import initializer",
        "the weights that belong beside the file cannot be read",
        "Keep model.onnx and its data file together in one folder.",
        InputError,
    ),
    Entry(
        "not ONNX",
        r"Failed to parse the ONNX model|ParseFromCodedStream",
        "the file is damaged or cut short",
        "Export it again, or download it again.",
        InputError,
    ),
    Entry(
        "profile does not fit",
        r"Dimension mismatch for tensor .* profile|no optimization profile|MIN<=OPT<=MAX",
        "the batch profile and the network's input do not go together",
        "Give --batch min:opt:max with rising numbers that the graph's batch allows.",
    ),
    Entry(
        "workspace too small",
        r"within workspace limit|insufficient workspace|try increasing the workspace",
        "no kernel fits into the workspace",
        "Raise --workspace, or leave it out.",
    ),
    Entry(
        "no lean library",
        r"libnvinfer_lean",
        "a version-compatible plan needs TensorRT's lean library, which is not here",
        "Leave --version-compatible out, or install the tensorrt_lean package of this release.",
        MissingDependency,
    ),
    Entry(
        "library not found",
        r"[Uu]nable to load library|cannot open shared object file|Could not load library",
        "a library of TensorRT or CUDA is missing",
        "Run `van-deploy doctor`, and reinstall the TensorRT package it names.",
        MissingDependency,
    ),
    Entry(
        "device out of memory",
        r"[Oo]ut ?[Oo]f ?[Mm]emory|cudaError(?:MemoryAllocation|\s*2\b)|bad_alloc|"
        r"Requested amount of (?:GPU )?memory",
        "there is not enough memory",
        "Use a smaller maximum batch (--batch 1:1:8) or --workspace, or close what else uses "
        "the GPU.",
        MissingDependency,
    ),
    Entry(
        "no driver",
        r"cudaError 35|CUDA driver version is insufficient|no CUDA-capable device|"
        r"CUDA initialization failure|CHECK\(status == CUDA_SUCCESS\)|"
        r"factory function returned nullptr",
        "this needs an NVIDIA GPU with a driver that is new enough, and none answers here",
        "Run `van-deploy doctor` to see what is here; without a GPU, build with "
        "--backend tensorrt-rtx.",
        MissingDependency,
    ),
    Entry(
        "no kernel",
        r"[Cc]ould not find any implementation|no tactics to implement",
        "TensorRT has no kernel for a layer within these limits",
        "Raise --workspace or --optimization-level; an INT8 depth-wise convolution is the usual "
        "cause: quantise the 1x1 convolutions only.",
        reported="NVIDIA/TensorRT #4060, #3385",
    ),
    Entry(
        "another version",
        r"not compatible with this version of TensorRT|[Vv]ersion tag does not match|"
        r"expecting library version",
        "the plan was built with another version of TensorRT",
        "Build it again with the version that is installed here.",
        reported="NVIDIA/TensorRT #574",
    ),
    Entry(
        "another GPU",
        r"incompatible device, expecting compute|not compatible with the (?:current )?device",
        "the plan was built for another GPU",
        "Build it again with --target for this GPU.",
        reported="NVIDIA/TensorRT #2176",
    ),
    Entry(
        "damaged plan",
        r"[Mm]agic tag does not match|[Ss]erialization assertion|deserializ\w+ failed|"
        r"[Cc]orrupt|Trying to load an engine created with incompatible",
        "the plan is damaged, or is no TensorRT plan",
        "Build it again.",
        InputError,
        reported="NVIDIA/TensorRT #3130",
    ),
)
"""Known failures, the most particular first."""


def entry_for(text: str) -> Entry | None:
    """Return what a message of TensorRT's means, or None if it is not known.

    >>> entry_for("Scale coefficients must all be positive").name
    'scale not positive'
    """
    return next((entry for entry in CATALOGUE if re.search(entry.pattern, text)), None)


def parser_problems(parser: Any) -> list[ParserProblem]:
    """Return what an ``OnnxParser`` of the bindings reports."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [
        ParserProblem(e.code().name, e.node_name(), e.node_operator(), e.desc()) for e in errors
    ]


def parser_failure(
    label: str, source: str, problems: Sequence[ParserProblem], log: Iterable[str] = ()
) -> VanDeployError:
    """Return the error for a file that the parser refused.

    Args:
        label: the back end, such as ``TensorRT for RTX 1.7.1``.
        source: the ONNX file.
        problems: what the parser reported.
        log: errors that the logger heard, for causes the parser does not pass on.
    """
    if not problems:
        said = " ".join(log) or "without saying why"
        return ConversionError(f"{label} cannot take '{source}': {said}", "Look into the log.")
    heard = " ".join(log)
    lines, remedies, classes = [], [], []
    for problem in problems[:SHOWN]:
        entry = entry_for(problem.text) or entry_for(f"{problem.code} {heard}")
        cause = entry.cause if entry else "not a failure this program knows"
        where = f"{problem.node} ({problem.operator})" if problem.node else "the file"
        lines.append(f"{where}: {cause}. TensorRT says: {_short(problem.text)}")
        classes.append(entry.error if entry else ConversionError)
        remedies.append(entry.remedy if entry else "Look into the log beside the plan.")
    more = len(problems) - SHOWN
    if more > 0:
        lines.append(f"and {more} more.")
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
