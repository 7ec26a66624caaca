"""The precisions side by side, on images none of them was calibrated on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.checks.gates import (
    LOSSY,
    Finding,
    Limit,
    Outcome,
    allowed_loss,
    flip_margin,
    sqnr_floor,
)
from van_deploy.checks.rules import at_least, judge_loss, judge_numbers, paired_loss
from van_deploy.checks.samples import LOGITS, Outputs
from van_deploy.errors import ConversionError, ImageError
from van_deploy.graph.shapes import fixed_batch, with_dynamic_batch_
from van_deploy.intervals import wilson_interval
from van_deploy.metrics import Task, find_flips, sqnr_db
from van_deploy.precision.sensitivity import labels_lost
from van_deploy.runners.onnxruntime import inference_session, require_onnxruntime

__all__ = ["Candidate", "PrecisionRow", "compare_precisions", "logits_session", "recommended"]

ROUNDS = 11  # of timing

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]
Run = Callable[[Images], Logits]


@dataclass(frozen=True)
class Candidate:
    """One graph to compare.

    Attributes:
        name: what the table calls it: its precision, with its scope or how it runs.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``, which decides its gate.
        model: the graph.
    """

    name: str
    precision: str
    model: ModelProto


@dataclass(frozen=True)
class PrecisionRow:
    """One line of the comparison; the reference is FP32.

    Attributes:
        name: of the candidate.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        size_bytes: of the file.
        sqnr_db: of the logits over all images, or of the worst feature map.
        cosine: smallest of any image.
        kl: mean over the images, in nats; None where there are no classes, as the next one.
        agreement: share (0..1) of images with the same label.
        images: how many.
        correct: how many were classified right, or None without labels.
        ms_per_image: median in the target's runtime, or None where it was not measured.
        passed: whether it holds its gate; None for FP32 itself.
        failures: what it does not hold.
        doubts: what the images are too few to decide.
        agreement_interval: of 95 %, of ``agreement``; None likewise.
    """

    name: str
    precision: str
    size_bytes: int
    sqnr_db: float
    cosine: float
    kl: float | None
    agreement: float | None
    images: int
    correct: int | None
    ms_per_image: float | None
    passed: bool | None
    failures: tuple[str, ...]
    doubts: tuple[str, ...]
    agreement_interval: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the line as JSON can hold it, with top-1's interval; infinite figures as None."""
        known = self.correct is not None
        values = {
            **asdict(self),
            "top1_interval": wilson_interval(self.correct or 0, self.images) if known else None,
        }
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in values.items()
        }


def compare_precisions(
    candidates: Sequence[Candidate],
    batches: Iterable[tuple[Images, Sequence[int]]],
    labels: npt.NDArray[np.int64] | None,
    *,
    fuse: bool,
    judged: bool,
    outputs: Outputs = LOGITS,
    max_drop: float | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
) -> tuple[PrecisionRow, ...]:
    """Return one line for each candidate; the first one, FP32, is the reference.

    Args:
        candidates: the graphs, FP32 first.
        batches: images ``(n, C, S, S)`` with their numbers.
        labels: of all images by number, or None.
        fuse: see :func:`logits_session`.
        judged: whether the images were given to judge accuracy on, so that a loss of
            accuracy is a gate; the logits always are.
        outputs: of the network.
        max_drop: points that may be lost instead of what the class allows.
        providers: of ONNX Runtime to time an image in; none to measure no time.
        threads: of ONNX Runtime.

    Raises:
        ImageError: no image could be read.
        ConversionError: ONNX Runtime refuses a graph.
    """
    runs = [
        logits_session(c.model, fuse=fuse, threads=threads, outputs=outputs) for c in candidates
    ]
    pieces: list[list[Logits]] = [[] for _ in runs]
    numbers: list[int] = []
    first: Images | None = None
    for images, found in batches:
        first = images[:1] if first is None else first
        numbers += found
        for run, logits in zip(runs, pieces, strict=True):
            logits.append(run(images))
    if first is None:
        raise ImageError("There is no image to compare on.", "Pass a folder with --eval DIR.")
    known = None if labels is None or outputs.widths else labels[numbers]
    times: list[float | None] = [None] * len(runs)
    if providers:
        times = list(_interleaved_ms(candidates, first, providers, threads, outputs))
    reference = np.concatenate(pieces[0])
    return tuple(
        _row(candidate, reference, np.concatenate(logits), known, ms, judged, max_drop, outputs)
        for candidate, logits, ms in zip(candidates, pieces, times, strict=True)
    )


def _row(
    candidate: Candidate,
    expected: Logits,
    found: Logits,
    labels: npt.NDArray[np.int64] | None,
    ms: float | None,
    judged: bool,
    max_drop: float | None,
    outputs: Outputs,
) -> PrecisionRow:
    figures = outputs.compare(expected, found)
    same = figures.top1_agreement
    agreeing = None if same is None else round(same * figures.images)
    findings: list[Finding] = []
    if candidate.precision != "fp32":
        floor = sqnr_floor(candidate.precision, np.inf)
        findings = [at_least("SQNR", figures.sqnr_db, floor)]
        if judged and not outputs.widths:
            findings = _findings(candidate.precision, expected, found, labels, max_drop)
    failures, doubts = (
        tuple(finding.message for finding in findings if finding.outcome is outcome)
        for outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)
    )
    return PrecisionRow(
        candidate.name,
        candidate.precision,
        candidate.model.ByteSize(),
        figures.sqnr_db,
        figures.cosine,
        figures.kl,
        same,
        figures.images,
        None if labels is None else int((found.argmax(axis=1) == labels).sum()),
        ms,
        None if candidate.precision == "fp32" else not failures,
        failures,
        doubts,
        None if agreeing is None else wilson_interval(agreeing, figures.images),
    )


def _findings(
    precision: str,
    expected: Logits,
    found: Logits,
    labels: npt.NDArray[np.int64] | None,
    max_drop: float | None,
) -> list[Finding]:
    """Return what the rules say: to the logits, and to accuracy where that is judged."""
    floor = sqnr_floor(precision, np.inf)
    quality = sqnr_db(expected, found)
    what = "agreement" if labels is None else "top-1"
    won = 0 if labels is None else labels_lost(found, expected, labels)
    loss = paired_loss(labels_lost(expected, found, labels), won, len(expected))
    allowed = allowed_loss(precision)
    if max_drop is not None and precision == "int8":
        allowed = Limit(max_drop, "--max-drop")
    if precision in LOSSY:
        return [at_least("SQNR", quality, floor), judge_loss(loss, allowed, what)]
    margin = flip_margin(floor.value)
    flips = find_flips(expected, found, Task.SINGLE_LABEL, margin)
    return judge_numbers(loss, allowed, quality, floor, flips)


def recommended(rows: Sequence[PrecisionRow], made: PrecisionRow) -> tuple[str | None, str]:
    """Return the fastest candidate that holds its gate, and why; None where no time was measured.

    Args:
        rows: FP32 first.
        made: the line of the graph that was asked for.
    """
    if not made.passed:
        return None, f"{made.name.upper()} does not hold its gate: {'; '.join(made.failures)}"
    size = f"{rows[0].size_bytes / made.size_bytes:.2f} times smaller than FP32"
    times = {r.name: r.ms_per_image for r in rows if r.ms_per_image and r.passed is not False}
    if not times:
        return None, f"speed not measured: compare engines with `bench`; {size}"
    best = min(times, key=lambda name: times[name])
    if best != made.name:
        slower = times[made.name] / times[best]
        return best, f"{made.name.upper()} takes {slower:.2f} times as long here"
    gain = times[rows[0].name] / times[best]
    return best, f"{gain:.2f} times the speed of FP32 here, {size}"


def logits_session(
    model: ModelProto,
    *,
    fuse: bool,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    in_turns: bool = False,
    outputs: Outputs = LOGITS,
) -> Run:
    """Return a function from images ``(N, C, H, W)`` to float32 logits ``(N, K)``.

    Of a backbone, to the sketches of its maps. A static batch is made dynamic.

    Args:
        model: the graph; FP16 inputs are converted to, and BF16 is emulated.
        fuse: let ONNX Runtime fuse Q/DQ pairs into integer kernels, as on a CPU
            target; otherwise every pair is computed as written, as TensorRT does.
        threads: of ONNX Runtime; None lets it choose.
        providers: of ONNX Runtime.
        in_turns: it is timed in turns with others in this process: threads that wait
            sleep. ONNX Runtime's would keep the cores busy for a while, and slow the
            next session down.
        outputs: of the network.

    Raises:
        ConversionError: ONNX Runtime refuses the graph.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if in_turns:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if fixed_batch(model) is not None:
        static, model = model, ModelProto()
        model.CopyFrom(static)
        with_dynamic_batch_(model)
    try:
        session, _ = inference_session(model, options, providers)
    except Exception as error:
        raise ConversionError(
            f"ONNX Runtime refuses the converted graph: {error}",
            "Please report it, with the command and the network's architecture.",
        ) from error
    entry = session.get_inputs()[0]
    names = [output.name for output in session.get_outputs()]
    kind = np.float16 if entry.type == "tensor(float16)" else np.float32

    def run(images: Images) -> Logits:
        found = session.run(None, {entry.name: images.astype(kind, copy=False)})
        return np.asarray(outputs.rows(dict(zip(names, found, strict=True))), dtype=np.float32)

    return run


def _interleaved_ms(
    candidates: Sequence[Candidate],
    image: Images,
    providers: Sequence[str],
    threads: int | None,
    outputs: Outputs,
) -> list[float]:
    """Return each graph's median time for one image in milliseconds, measured in turns.

    Turn about, so that what else the machine does falls on all of them alike.
    """
    runs = [
        logits_session(
            c.model,
            fuse=True,
            threads=threads,
            providers=providers,
            in_turns=True,
            outputs=outputs,
        )
        for c in candidates
    ]
    times: list[list[float]] = [[] for _ in runs]
    for number in range(ROUNDS + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(image)
            if number:  # the first is a warm-up
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
