"""One network judged on samples: its answers at every batch size, and its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from van_deploy.checks.gates import (
    DEFAULT,
    ROUNDOFF_DB,
    Finding,
    Limit,
    Outcome,
    Profile,
    failed,
    numeric_class,
    outcome_of,
    sqnr_floor,
)
from van_deploy.checks.layers import overflows_of_graph
from van_deploy.checks.opened import in_batches
from van_deploy.checks.rules import judge_invariance, judge_logits
from van_deploy.checks.samples import Samples
from van_deploy.checks.scales import ScaleRow, judge_scales
from van_deploy.config import BatchRange
from van_deploy.environment.hardware import cpu
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.graph.shapes import fixed_batch
from van_deploy.metrics import Array, Comparison, Flip, probabilities, rms
from van_deploy.runners.network import ORT_CPU, Outputs
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "BatchRow",
    "Judged",
    "batch_sizes",
    "judge_answers",
    "judge_graph",
    "judge_new",
    "record_key",
]

OVERFLOW_IMAGES = 4
ORDERS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
"""Instruction sets for which ONNX Runtime has kernels that add in another order."""

Run = Callable[[npt.NDArray[Any]], Outputs]


@dataclass(frozen=True)
class BatchRow:
    """One batch size.

    Attributes:
        batch: images in the batch.
        outcome: what the rules say at this size.
        sqnr_db: of the logits against the reference; None where there are none.
        invariance_db: SQNR of the worst image against itself alone; None likewise.
    """

    batch: int
    outcome: Outcome
    sqnr_db: float | None = None
    invariance_db: float | None = None


@dataclass(frozen=True)
class Judged:
    """What the answers of one network, or its graph, say.

    Attributes:
        findings: one a rule.
        comparison: of the logits, or of the worst feature map, one image at a time; None where
            there are none.
        flips: decisions that changed, the widest margin first.
        batches: one row a batch size.
        scales: of an INT8 graph.
    """

    JSON_PROPERTIES: ClassVar = ("outcome",)

    findings: tuple[Finding, ...]
    comparison: Comparison | None = None
    flips: tuple[Flip, ...] = ()
    batches: tuple[BatchRow, ...] = ()
    scales: tuple[ScaleRow, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """What all findings say together."""
        return outcome_of(self.findings)

    @property
    def passed(self) -> bool:
        """Whether nothing failed and nothing is left open."""
        return self.outcome is Outcome.PASS

    @property
    def record(self) -> float | None:
        """The SQNR to record, in dB; None where there is none."""
        return None if self.comparison is None else min(self.comparison.sqnr_db, ROUNDOFF_DB)


def record_key(runner: str, numeric: str) -> str:
    """Return under which name an artifact's SQNR on the golden samples is recorded.

    On a CPU, float32's noise and what INT8 kernels saturate depend on the instruction set.
    """
    if runner != ORT_CPU or numeric not in ("fp32", "int8"):
        return f"{runner}/{numeric}"
    return "/".join([runner, numeric, *(f for f in cpu().features if f in ORDERS)])


def batch_sizes(batch: BatchRange) -> tuple[int, ...]:
    """Return the batch sizes to try: 1, 2, 3, the optimum, the maximum and another odd one.

    A static graph has one.

    >>> batch_sizes(BatchRange(min=1, opt=8, max=32)), batch_sizes(BatchRange(min=1, opt=1, max=2))
    ((1, 2, 3, 5, 8, 32), (1, 2))
    """
    if batch.fixed:
        return (batch.fixed,)
    wanted = {1, 2, 3, batch.opt, batch.max}
    wanted.add(next(odd for odd in range(5, 99, 2) if odd not in wanted))
    return tuple(sorted(size for size in wanted if size <= batch.max))


def judge_new(
    model: Path | ModelProto,
    precision: str,
    samples: Samples,
    sizes: Sequence[int] = (1,),
    *,
    method: str = "mse",
    profile: Profile = DEFAULT,
) -> tuple[Judged, dict[str, float]]:
    """Return what a graph that was just made says, and the SQNR to record of it.

    Args:
        model: the graph, which takes normalised images, or its file.
        precision: of the graph.
        samples: the golden samples.
        sizes: batch sizes to try where the batch is dynamic.
        method: of calibration, for INT8.
        profile: what a recipe sets otherwise.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        ConversionError: it refuses the graph.
    """
    import onnx

    numeric = numeric_class(precision)
    floor = sqnr_floor(numeric, samples.noise_db, profile)
    graph = onnx.load(model) if isinstance(model, Path) else model
    fixed = fixed_batch(graph)
    with OnnxRuntimeRunner(model, arena=False) as runner:
        answers = judge_answers(
            runner.run_all, _inputs, samples, (fixed,) if fixed else sizes, floor
        )
    inside = judge_graph(graph, numeric, samples, method, profile)
    together = Judged(
        (*answers.findings, *inside.findings),
        answers.comparison,
        answers.flips,
        answers.batches,
        inside.scales,
    )
    record = {} if answers.record is None else {record_key(ORT_CPU, numeric): answers.record}
    return together, record


def judge_answers(
    run: Run,
    prepare: Callable[[Samples], npt.NDArray[Any]],
    samples: Samples,
    sizes: Sequence[int],
    floor: Limit,
    recorded_db: float | None = None,
) -> Judged:
    """Return what the answers of a network say, at every batch size and image size.

    Args:
        run: the network.
        prepare: gives samples as it takes them.
        samples: with the reference's logits.
        sizes: batch sizes to try, the one that the others are compared with first: 1, or the
            one of a static graph; every size gets all samples.
        floor: least SQNR of the logits.
        recorded_db: SQNR recorded on the same samples, or None.

    Raises:
        Exception: the runtime's own, where the network does not run one image at a time.
    """
    given, answer = prepare(samples), _Answering(run, samples)
    one_by_one = answer.outputs(given, sizes[0])
    if OUTPUT_NAME not in one_by_one:
        return _judge_shares(run, given, samples, sizes, floor)
    alone = one_by_one[OUTPUT_NAME]
    findings, flips = _judge_outputs(samples, alone, floor, recorded_db)
    if alone.shape != samples.logits.shape:
        return Judged(tuple(findings))
    first = BatchRow(
        sizes[0], outcome_of(findings), samples.outputs.sqnr_db(samples.logits, alone), math.inf
    )
    rows = [first]
    if sizes[0] > 1:  # of a static graph: the images at other places of their batch
        turned = np.roll(np.arange(len(given)), 1)
        moved = answer.of(given[turned], sizes[0])
        findings.append(judge_invariance(alone[turned], moved, floor, sizes[0]))
        rows = [replace(first, outcome=outcome_of(findings), invariance_db=findings[-1].value)]
    for size in sizes[1:]:
        found, row = _judge_batch(answer, given, alone, size, floor, recorded_db)
        findings += found
        rows.append(row)
    for other in samples.others:
        findings += _judge_size(run, prepare(other), other, sizes[0], floor)
    return Judged(
        tuple(findings), samples.outputs.compare(samples.logits, alone), tuple(flips), tuple(rows)
    )


class _Answering:
    """A network whose outputs are taken as the samples have them."""

    def __init__(self, run: Run, samples: Samples) -> None:
        self.run, self.samples = run, samples

    def outputs(self, given: npt.NDArray[Any], batch: int) -> Outputs:
        """Return the answers to all images, ``batch`` at a time, as one output.

        Where the network gives other outputs than the reference, these.
        """

        def reduced(part: npt.NDArray[Any]) -> Outputs:
            outputs, wanted = self.run(part), self.samples.outputs
            return {OUTPUT_NAME: wanted.rows(outputs)} if wanted.are_in(outputs) else outputs

        return in_batches(reduced, given, batch)

    def of(self, given: npt.NDArray[Any], batch: int) -> Array:
        """Return the answers of a network that is known to give them."""
        return self.outputs(given, batch)[OUTPUT_NAME]


def _inputs(samples: Samples) -> npt.NDArray[Any]:
    return samples.inputs


def _judge_outputs(
    samples: Samples, found: Array, floor: Limit, recorded_db: float | None, where: str = ""
) -> tuple[list[Finding], list[Flip]]:
    """Return the findings on the logits, or on each feature map, and the label flips."""
    options: dict[str, Any] = {"recorded_db": recorded_db, "task": samples.task}
    if not samples.outputs.widths or found.shape != samples.logits.shape:
        return judge_logits(samples.logits, found, floor, where=where, **options)
    findings, actual = [], samples.outputs.parts(found)
    for name, expected in samples.outputs.parts(samples.logits).items():
        of_map = judge_logits(expected, actual[name], floor, where=f"{where}{name}: ", **options)
        findings += of_map[0]
    return findings, []


def _judge_size(
    run: Run, given: npt.NDArray[Any], samples: Samples, batch: int, floor: Limit
) -> list[Finding]:
    """Return what the answers at another image size say."""
    where = f"{samples.size}: "
    try:
        found = _Answering(run, samples).of(given, batch)
    except Exception as error:  # the runtimes raise their own bare types
        return [failed("runs", f"{where}it does not run: {_line(error)}")]
    return _judge_outputs(samples, found, floor, None, where)[0]


def _judge_batch(
    answer: _Answering,
    given: npt.NDArray[Any],
    alone: Array,
    size: int,
    floor: Limit,
    recorded_db: float | None,
) -> tuple[list[Finding], BatchRow]:
    """Return what one batch size says beyond what one image at a time did."""
    where, samples = f"batch {size}: ", answer.samples
    try:
        together = answer.of(given, size)
    except Exception as error:  # the runtimes raise their own bare types
        return [failed("runs", f"{where}it does not run: {_line(error)}")], BatchRow(
            size, Outcome.FAIL
        )
    findings, _ = _judge_outputs(samples, together, floor, recorded_db, where)
    if together.shape != alone.shape:
        return findings, BatchRow(size, Outcome.FAIL)
    same = judge_invariance(alone, together, floor, size)
    findings.append(same)
    row = BatchRow(
        size, outcome_of(findings), samples.outputs.sqnr_db(samples.logits, together), same.value
    )
    return findings, row


def _judge_shares(
    run: Run, given: npt.NDArray[Any], samples: Samples, sizes: Sequence[int], floor: Limit
) -> Judged:
    """Return what a network says that gives probabilities or first classes, and no logits.

    A probability moves by a quarter of what a difference of logits does, at most.
    """
    noise = rms(samples.logits) * 10 ** (-floor.value / 20)
    limit = Limit(max(math.sqrt(2) * noise, 1e-6), f"what noise at {floor.value:.1f} dB explains")
    findings, rows = [], []
    for size in sizes:
        change = _largest_change(samples, in_batches(run, given, size))
        holds = change <= limit.value
        message = (
            f"batch {size}: a probability is off by {change:.1e}, more than {limit.value:.1e} "
            f"({limit.origin})"
        )
        outcome = Outcome.PASS if holds else Outcome.FAIL
        findings.append(Finding("probabilities", outcome, "" if holds else message, change, limit))
        rows.append(BatchRow(size, outcome))
    return Judged(tuple(findings), batches=tuple(rows))


def _largest_change(samples: Samples, found: Outputs) -> float:
    """Return by how much any probability is off; infinite for what is no number."""
    expected = probabilities(samples.logits, samples.task)
    pairs = []
    if "probabilities" in found:
        pairs.append((expected, found["probabilities"]))
    if TOP_CLASSES in found:
        chosen = np.take_along_axis(expected, found[TOP_CLASSES], axis=1)
        best = -np.sort(-expected, axis=1)[:, : chosen.shape[1]]
        pairs += [(best, chosen), (best, found[TOP_PROBABILITIES])]  # the right ones, in order
    largest = max(float(np.abs(one - other).max()) for one, other in pairs)
    return largest if math.isfinite(largest) else math.inf


def judge_graph(
    model: ModelProto,
    numeric: str,
    samples: Samples,
    method: str = "mse",
    profile: Profile = DEFAULT,
) -> Judged:
    """Return what a plain graph's tensors say: FP16 that overflows, and INT8 scales.

    Args:
        model: the graph, which takes normalised images.
        numeric: its numeric class.
        samples: the golden samples.
        method: of calibration, for INT8.
        profile: what a recipe sets otherwise.
    """
    findings: list[Finding] = []
    rows: tuple[ScaleRow, ...] = ()
    try:
        over = overflows_of_graph(model, samples.inputs[:OVERFLOW_IMAGES])
        if numeric in ("fp16", "int8") or over:
            outcome = Outcome.FAIL if over else Outcome.PASS
            findings.append(Finding("FP16 range", outcome, "; ".join(list(over.values())[:4])))
        if numeric == "int8":
            floor = sqnr_floor(numeric, samples.noise_db, profile)
            found, rows = judge_scales(model, samples, floor, method)
            findings += found
    except Exception as error:  # ONNX Runtime raises its own bare types
        findings.append(failed("graph", f"its tensors cannot be looked at: {_line(error)}"))
    return Judged(tuple(findings), scales=rows)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
