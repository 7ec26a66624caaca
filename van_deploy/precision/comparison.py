"""The precisions side by side, on images none of them was calibrated on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.checks.gates import (
    LOSSY,
    Finding,
    Limit,
    Outcome,
    allowed_loss,
    check_loss,
    check_minimum,
    check_near_lossless,
    flip_margin,
    paired_loss,
    sqnr_floor,
)
from van_deploy.checks.golden import LOGITS_LAYOUT, OutputLayout
from van_deploy.config import QuantizeSettings
from van_deploy.errors import ConversionError
from van_deploy.graph.names import fixed_batch, make_batch_dynamic_
from van_deploy.intervals import wilson_interval
from van_deploy.metrics import Comparison, Task, find_flips, sqnr_db
from van_deploy.precision.images import JobImages
from van_deploy.precision.scales import Images
from van_deploy.runners.onnxruntime import create_session, require_onnxruntime

if TYPE_CHECKING:
    from van_deploy.precision.int8 import Int8

ROUNDS = 11  # of timing

Labels = npt.NDArray[np.int64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One graph to compare.

    Attributes:
        name: what the table calls it: its precision, with its scope or how it runs.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``, which decides its gate.
        model: the graph.
        int8: how it was quantised, where it was.
    """

    name: str
    precision: str
    model: ModelProto
    int8: Int8 | None = None


def compare_precisions(
    candidates: Sequence[Candidate],
    images: JobImages,
    settings: QuantizeSettings,
    outputs: OutputLayout = LOGITS_LAYOUT,
    providers: Sequence[str] = (),
) -> list[Row]:
    """Return one line for each candidate; the first one, FP32, is the reference.

    The logits are always judged; a loss of accuracy only where the user named an evaluation set.
    A line is what the manifest holds; figures that are infinite or not known are None:

    - ``name`` and ``precision`` of the candidate, ``size_bytes`` of the file, ``images`` compared;
    - ``sqnr_db`` of the logits over all images, or of the worst feature map; the smallest
      ``cosine`` of any image; the mean ``kl`` in nats; the ``agreement``, the share (0..1) of
      images with the same label, with the 95 % ``agreement_interval``;
    - ``correct``, how many were classified right, with the ``top1_interval``;
    - ``ms_per_image``, the median in the target's runtime;
    - ``passed``, whether it holds its gate (None for FP32 itself), ``failures``, what it does not
      hold, and ``doubts``, what the images are too few to decide.

    Args:
        candidates: the graphs, FP32 first.
        images: whose evaluation set is run.
        settings: the target, the budget, and ONNX Runtime's threads.
        outputs: of the network.
        providers: of ONNX Runtime to time an image in; none to measure no time.

    Raises:
        ConversionError: ONNX Runtime refuses a graph.
    """
    fuse, threads = settings.target == "cpu", settings.threads
    runs = [
        logits_session(c.model, fuse=fuse, threads=threads, outputs=outputs) for c in candidates
    ]
    pieces: list[list[Images]] = [[] for _ in runs]
    numbers: list[int] = []
    for batch, found in images.read(images.judges, 32):
        numbers += found
        for run, logits in zip(runs, pieces, strict=True):
            logits.append(run(batch))
    known, judged = images.judges.labels, images.named and not outputs.widths
    labels = None if known is None or outputs.widths else known[numbers]
    times: Sequence[float | None] = [None] * len(runs)
    if providers:
        how: dict[str, Any] = {"threads": threads, "providers": providers, "outputs": outputs}
        timed = [logits_session(c.model, fuse=True, in_turns=True, **how) for c in candidates]
        times = _interleaved_ms(timed, images.few(images.judges, 1))
    expected, rows = np.concatenate(pieces[0]), []
    for candidate, logits, ms in zip(candidates, pieces, times, strict=True):
        actual, precision = np.concatenate(logits), candidate.precision
        figures, findings = outputs.compare(expected, actual), list[Finding]()
        if judged and precision != "fp32":
            findings = _findings(precision, expected, actual, labels, settings.max_drop)
        elif precision != "fp32":
            findings = [check_minimum("SQNR", figures.sqnr_db, sqnr_floor(precision, np.inf))]
        correct = None if labels is None else int((actual.argmax(axis=1) == labels).sum())
        rows.append(_row(candidate, figures, findings, correct, ms))
    return rows


def _row(
    candidate: Candidate,
    figures: Comparison,
    findings: Sequence[Finding],
    correct: int | None,
    ms: float | None,
) -> Row:
    """Return a candidate's line of :func:`compare_precisions`."""
    failures, doubts = (
        tuple(finding.message for finding in findings if finding.outcome is outcome)
        for outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE)
    )
    same, count = figures.top1_agreement, figures.images
    agreed = None if same is None else round(same * count)
    row: Row = {
        "name": candidate.name,
        "precision": candidate.precision,
        "size_bytes": candidate.model.ByteSize(),
        "sqnr_db": figures.sqnr_db,
        "cosine": figures.cosine,
        "kl": figures.kl,
        "agreement": same,
        "images": count,
        "correct": correct,
        "ms_per_image": ms,
        "passed": None if candidate.precision == "fp32" else not failures,
        "failures": failures,
        "doubts": doubts,
        "agreement_interval": None if agreed is None else wilson_interval(agreed, count),
        "top1_interval": None if correct is None else wilson_interval(correct, count),
    }
    endless = [k for k, v in row.items() if isinstance(v, float) and not np.isfinite(v)]
    return row | dict.fromkeys(endless)


def count_lost_labels(expected: Images, found: Images, labels: Labels | None) -> int:
    """Return how many images lose their right label; without labels, how many change it.

    Improvements do not offset regressions.

    >>> count_lost_labels(np.eye(4), np.eye(4)[[0, 1, 2, 2]], None)
    1
    """
    before, after = expected.argmax(axis=1), found.argmax(axis=1)
    changed = before != after
    return int((changed if labels is None else changed & (before == labels)).sum())


def _findings(
    precision: str, expected: Images, found: Images, labels: Labels | None, max_drop: float | None
) -> list[Finding]:
    """Return what the rules of an evaluation set say: to the logits, and to the accuracy."""
    floor, allowed = sqnr_floor(precision, np.inf), allowed_loss(precision)
    quality = sqnr_db(expected, found)
    won = 0 if labels is None else count_lost_labels(found, expected, labels)
    loss = paired_loss(count_lost_labels(expected, found, labels), won, len(expected))
    if max_drop is not None and precision == "int8":
        allowed = Limit(max_drop, "--max-drop")
    if precision in LOSSY:
        what = "agreement" if labels is None else "top-1"
        return [check_minimum("SQNR", quality, floor), check_loss(loss, allowed, what)]
    flips = find_flips(expected, found, Task.SINGLE_LABEL, flip_margin(floor.value))
    return check_near_lossless(loss, allowed, quality, floor, flips, Task.SINGLE_LABEL)


def recommended(rows: Sequence[Row], made: Row) -> tuple[str | None, str]:
    """Return the fastest candidate that holds its gate, and why; None where no time was measured.

    Args:
        rows: FP32 first.
        made: the line of the graph that was asked for.
    """
    name = made["name"]
    if not made["passed"]:
        return None, f"{name.upper()} does not hold its gate: {'; '.join(made['failures'])}"
    size = f"{rows[0]['size_bytes'] / made['size_bytes']:.2f} times smaller than FP32"
    fit = [row for row in rows if row["ms_per_image"] and row["passed"] is not False]
    if not fit:
        return None, f"speed not measured: compare engines with `bench`; {size}"
    best = min(fit, key=lambda row: row["ms_per_image"])
    if best is not made:
        slower = made["ms_per_image"] / best["ms_per_image"]
        return best["name"], f"{name.upper()} takes {slower:.2f} times as long here"
    gain = rows[0]["ms_per_image"] / best["ms_per_image"]
    return name, f"{gain:.2f} times the speed of FP32 here, {size}"


def logits_session(
    model: ModelProto,
    *,
    fuse: bool,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    in_turns: bool = False,
    outputs: OutputLayout = LOGITS_LAYOUT,
) -> Callable[[Images], Images]:
    """Return a function from images ``(N, C, H, W)`` to float32 logits ``(N, K)``.

    Of a backbone, to the sketches of its maps. A static batch is made dynamic.

    Args:
        model: the graph; BF16 is emulated.
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
    options = require_onnxruntime().SessionOptions()
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
        make_batch_dynamic_(model)
    try:
        session, _ = create_session(model, options, providers)
    except Exception as error:
        raise ConversionError(
            f"ONNX Runtime refuses the converted graph: {error}",
            "Please report it, with the command and the network's architecture.",
        ) from error
    entry = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]

    def run(images: Images) -> Images:
        found = session.run(None, {entry: images})
        return np.asarray(outputs.rows(dict(zip(names, found, strict=True))), dtype=np.float32)

    return run


def _interleaved_ms(runs: Sequence[Callable[[Images], Images]], image: Images) -> list[float]:
    """Return each graph's median time for one image in milliseconds, measured in turns.

    Turn about, so that what else the machine does falls on all of them alike.
    """
    times: list[list[float]] = [[] for _ in runs]
    for number in range(ROUNDS + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(image)
            if number:  # the first is a warm-up
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
