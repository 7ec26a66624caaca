"""Compare the precisions of one network on images that none of them was calibrated on."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.checks import gates
from van_deploy.checks.golden import LOGITS_LAYOUT, OutputLayout
from van_deploy.config import GateSettings, QuantizeSettings
from van_deploy.data.images import ImageSet
from van_deploy.errors import ConversionError
from van_deploy.graph.names import fixed_batch, make_batch_dynamic_
from van_deploy.intervals import wilson_interval
from van_deploy.metrics import Comparison, Task, decisions, find_flips
from van_deploy.precision.images import ImageSets
from van_deploy.precision.scales import Images
from van_deploy.runners.onnxruntime import create_session, require_onnxruntime

if TYPE_CHECKING:
    from van_deploy.precision.int8 import Int8Model

TIMING_ROUNDS = 11

Labels = npt.NDArray[np.int64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One graph to compare.

    Attributes:
        name: in the table: the precision, with the INT8 scope or how it is executed.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``; selects the gate.
        model: the graph.
        int8: the quantisation settings and results, for INT8 only.
    """

    name: str
    precision: str
    model: ModelProto
    int8: Int8Model | None = None


def compare_precisions(
    candidates: Sequence[Candidate],
    images: ImageSets,
    settings: QuantizeSettings,
    outputs: OutputLayout = LOGITS_LAYOUT,
    providers: Sequence[str] = (),
    rules: GateSettings | None = None,
) -> list[Row]:
    """Return one table row for each candidate; the first candidate, FP32, is the reference.

    The SQNR of the logits is always checked; the accuracy only if the user gave an evaluation
    set. Rows are written into the manifest; figures that are infinite or unknown are None:

    - ``name`` and ``precision`` of the candidate, ``size_bytes`` of the file, ``images`` compared;
    - ``sqnr_db`` of the logits over all images, or of the worst feature map; the smallest
      ``cosine`` of any image; the mean ``kl`` in nats, of classes; the ``agreement``, the share
      (0..1) of images with the same labels, with the 95 % ``agreement_interval``;
    - ``correct``, the number of correct labels, with the ``top1_interval``;
    - ``ms_per_image``, the median latency in the target's runtime;
    - ``passed``, whether the candidate passes its gate (None for FP32), ``failures``, the limits
      that it exceeds, and ``inconclusive``, the limits that need more images to decide.

    Args:
        candidates: the graphs, FP32 first.
        images: provide the evaluation set.
        settings: the target, the accuracy budget, and ONNX Runtime's threads.
        outputs: of the network.
        providers: ONNX Runtime providers to measure latency with; empty skips the measurement.
        rules: limits of the recipe, which take precedence.

    Raises:
        ConversionError: ONNX Runtime cannot load a graph.
    """
    session = functools.partial(logits_session, threads=settings.threads)
    fuse, task, rules = settings.target == "cpu", outputs.task, rules or GateSettings()
    sessions = [session(c.model, fuse=fuse, outputs=outputs) for c in candidates]
    logits, labels = predict(sessions, images, images.evaluation)
    latencies: Sequence[float | None] = [None] * len(sessions)
    if providers:
        timed = [session(c.model, fuse=True, timed_on=providers) for c in candidates]
        latencies = _interleaved_ms(timed, next(images.read(images.evaluation, 1))[0])
    expected, at_chance, rows = logits[0], False, []
    if labels is not None:
        correct = int((decisions(expected, task)[:, 0] == labels).sum())
        at_chance = gates.is_at_chance(correct, *expected.shape)
    for candidate, actual, ms in zip(candidates, logits, latencies, strict=True):
        figures, findings = outputs.compare(expected, actual), list[gates.Finding]()
        profile = rules.of(candidate.precision)
        if candidate.precision != "fp32":
            offset = outputs.offset_db(expected)
            floor = gates.sqnr_floor(candidate.precision, np.inf, profile, offset)
            findings = [gates.check_minimum("SQNR", figures.sqnr_db, floor)]
            if images.has_evaluation_set and figures.top1_agreement is not None:
                lossy = candidate.precision in gates.LOSSY
                if not lossy:
                    flips = find_flips(expected, actual, task, gates.flip_margin(floor.value, task))
                    findings = gates.check_near_lossless(figures.sqnr_db, floor, flips, task)
                allowed = gates.allowed_loss(candidate.precision, profile)
                option = "--max-drop" if candidate.precision == "int8" else ""
                if option and settings.max_drop is not None:
                    allowed = gates.Limit(settings.max_drop, option)
                lost = count_lost_labels(expected, actual, labels, task)
                won = 0 if labels is None else count_lost_labels(actual, expected, labels, task)
                metric = "agreement" if labels is None else "top-1"
                loss = gates.paired_loss(lost, won, len(expected))
                findings.append(gates.check_loss(loss, allowed, metric, lossy, option, at_chance))
        hits = None if labels is None else int((decisions(actual, task)[:, 0] == labels).sum())
        rows.append(_row(candidate, figures, findings, hits, ms))
    return rows


def predict(
    runs: Sequence[Callable[[Images], Images]], images: ImageSets, chosen: ImageSet
) -> tuple[list[Images], Labels | None]:
    """Return each graph's logits ``(N, K)`` of the readable images of a set, and their labels."""
    batches: list[list[Images]] = [[] for _ in runs]
    indices = list[int]()
    for inputs, batch_indices in images.read(chosen, 32):
        indices += batch_indices
        for run, logits in zip(runs, batches, strict=True):
            logits.append(run(inputs))
    labels = None if chosen.labels is None else chosen.labels[indices]
    return [np.concatenate(logits) for logits in batches], labels


def _row(
    candidate: Candidate,
    figures: Comparison,
    findings: Sequence[gates.Finding],
    correct: int | None,
    ms: float | None,
) -> Row:
    """Return a candidate's row of :func:`compare_precisions`."""
    failures, inconclusive = (
        tuple(finding.message for finding in findings if finding.outcome is outcome)
        for outcome in (gates.Outcome.FAIL, gates.Outcome.INCONCLUSIVE)
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
        "inconclusive": inconclusive,
        "agreement_interval": None if agreed is None else wilson_interval(agreed, count),
        "top1_interval": None if correct is None else wilson_interval(correct, count),
    }
    infinite = [k for k, v in row.items() if isinstance(v, float) and not np.isfinite(v)]
    return row | dict.fromkeys(infinite)


def count_lost_labels(
    expected: Images, actual: Images, labels: Labels | None, task: Task = Task.SINGLE_LABEL
) -> int:
    """Return how many images lose their correct label; without labels, how many change theirs.

    Improvements do not offset regressions.

    >>> count_lost_labels(np.eye(4), np.eye(4)[[0, 1, 2, 2]], None)
    1
    """
    before, after = decisions(expected, task), decisions(actual, task)
    changed = (before != after).any(axis=1)
    return int((changed if labels is None else changed & (before[:, 0] == labels)).sum())


def gate_rank(row: Row) -> int:
    """Return 0 for FP32 and a candidate that passes its gate, 1 if it is undecided, else 2."""
    return 2 if row["passed"] is False else int(bool(row["inconclusive"]))


def recommend(rows: Sequence[Row], requested: Row) -> tuple[str | None, str]:
    """Return the fastest candidate that passes its gate and the reason.

    The candidate is None if no latency was measured, or if the requested one does not pass.
    One that needs more images to be decided is not recommended.

    Args:
        rows: FP32 first.
        requested: the row of the requested graph.
    """
    name = requested["name"]
    if not requested["passed"]:
        return None, f"{name.upper()} fails its gate: {'; '.join(requested['failures'])}"
    if requested["inconclusive"]:
        return None, f"{name.upper()} is undecided"
    size = f"{rows[0]['size_bytes'] / requested['size_bytes']:.2f} times smaller than FP32"
    passing = [row for row in rows if row["ms_per_image"] and not gate_rank(row)]
    if not passing:
        return None, f"speed not measured: compare engines with `bench`; {size}"
    best = min(passing, key=lambda row: row["ms_per_image"])
    if best is not requested:
        slowdown = requested["ms_per_image"] / best["ms_per_image"]
        return best["name"], f"{name.upper()} takes {slowdown:.2f} times as long on this machine"
    speedup = rows[0]["ms_per_image"] / best["ms_per_image"]
    return name, f"{speedup:.2f} times the speed of FP32 on this machine, {size}"


def logits_session(
    model: ModelProto,
    *,
    fuse: bool,
    threads: int | None = None,
    outputs: OutputLayout = LOGITS_LAYOUT,
    timed_on: Sequence[str] = (),
) -> Callable[[Images], Images]:
    """Return a function that maps images ``(N, C, H, W)`` to float32 logits ``(N, K)``.

    A backbone returns the sketches of its feature maps. A static batch is made dynamic.

    Args:
        model: the graph; BF16 is emulated.
        fuse: let ONNX Runtime fuse Q/DQ pairs into integer kernels, as for a CPU
            target; otherwise every pair is computed as written, as TensorRT does.
        threads: of ONNX Runtime; None lets ONNX Runtime choose.
        outputs: of the network.
        timed_on: ONNX Runtime providers to time the graph on, alternately with others: its idle
            threads do not spin, which would slow the next session, and the function returns the
            first output as it is. By default the CPU runs the graph, and is not timed.

    Raises:
        ConversionError: ONNX Runtime cannot load the graph.
    """
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if timed_on:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if fixed_batch(model) is not None:
        static, model = model, ModelProto()
        model.CopyFrom(static)
        make_batch_dynamic_(model)
    try:
        session, _ = create_session(model, options, timed_on or ("CPUExecutionProvider",))
    except Exception as error:
        raise ConversionError(
            f"ONNX Runtime cannot load the converted graph: {error}",
            "Report this bug with the command and the network's architecture.",
        ) from error
    input_name = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]

    def run(images: Images) -> Images:
        results = session.run(None, {input_name: images})
        if timed_on:
            return np.asarray(results[0])
        return np.asarray(outputs.rows(dict(zip(names, results, strict=True))), dtype=np.float32)

    return run


def _interleaved_ms(runs: Sequence[Callable[[Images], Images]], image: Images) -> list[float]:
    """Return each graph's median latency for one image in milliseconds.

    Rounds are interleaved, so that other load on the machine affects all graphs alike.
    """
    latencies: list[list[float]] = [[] for _ in runs]
    for number in range(TIMING_ROUNDS + 1):
        for run, samples in zip(runs, latencies, strict=True):
            start = time.perf_counter()
            run(image)
            if number:  # the first round is a warm-up
                samples.append(1000 * (time.perf_counter() - start))
    return [statistics.median(samples) for samples in latencies]
