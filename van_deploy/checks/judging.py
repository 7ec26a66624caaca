"""One network judged on samples: its answers at every batch size, and its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from van_deploy.checks import gates
from van_deploy.checks.gates import Finding, Limit, Outcome, held
from van_deploy.checks.graphs import one_line
from van_deploy.checks.layers import overflows_of_graph
from van_deploy.checks.opened import in_batches
from van_deploy.checks.rules import judge_invariance, judge_logits
from van_deploy.checks.samples import Samples
from van_deploy.checks.scales import ScaleRow, judge_scales
from van_deploy.config import BatchRange, GateProfile
from van_deploy.environment.hardware import cpu
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import OUTPUT_NAME, fixed_batch
from van_deploy.metrics import Array, Comparison, Flip, probabilities, rms
from van_deploy.runners.network import ORT_CPU, Outputs
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

if TYPE_CHECKING:
    from onnx import ModelProto


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
class Judgement:
    """What was found of one network.

    Attributes:
        findings: one a rule.
        comparison: of the logits, or of the worst feature map, one image at a time; None where
            there are none.
        flips: decisions that changed, the widest margin first.
        batches: one row a batch size.
        scales: every scale of an INT8 graph.
    """

    findings: tuple[Finding, ...]
    comparison: Comparison | None = None
    flips: tuple[Flip, ...] = ()
    batches: tuple[BatchRow, ...] = ()
    scales: tuple[ScaleRow, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """What all findings say together."""
        return gates.outcome_of(self.findings)


class Judged(Judgement):
    """What the answers of a graph that was just made say, and its tensors."""

    JSON_PROPERTIES: ClassVar = ("outcome",)

    @property
    def passed(self) -> bool:
        """Whether nothing failed and nothing is left open."""
        return self.outcome is Outcome.PASS


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
    profile: GateProfile = gates.DEFAULT,
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

    numeric = gates.numeric_class(precision)
    floor = gates.sqnr_floor(numeric, samples.noise_db, profile)
    graph = onnx.load(model) if isinstance(model, Path) else model
    fixed, record = fixed_batch(graph), {}
    with OnnxRuntimeRunner(model, arena=False) as runner:
        judged = judge_answers(
            runner.run_all, lambda of: of.inputs, samples, (fixed,) if fixed else sizes, floor
        )
    if judged.comparison is not None:
        record[record_key(ORT_CPU, numeric)] = min(judged.comparison.sqnr_db, gates.ROUNDOFF_DB)
    findings, scales = judge_graph(graph, numeric, samples, method, profile)
    return replace(judged, findings=(*judged.findings, *findings), scales=scales), record


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
    least, level = sizes[0], samples.outputs.sqnr_db
    static = least > 1
    outputs = _answers(run, samples, prepare(samples), least)
    if OUTPUT_NAME not in outputs:
        return _judge_shares(run, prepare(samples), samples, sizes, floor)
    alone = outputs[OUTPUT_NAME]
    findings, flips = _judge_rows(samples, alone, floor, recorded_db)
    if alone.shape != samples.logits.shape:
        return Judged(tuple(findings))
    rows = [BatchRow(least, gates.outcome_of(findings), level(samples.logits, alone), math.inf)]

    def tried(of: Samples, size: int, where: str, shift: int) -> Array | None:
        """Judge the answers to samples that are moved within their batches, and return them."""
        try:
            found = _answers(run, of, np.roll(prepare(of), shift, axis=0), size)[OUTPUT_NAME]
        except Exception as error:  # the runtimes raise their own bare types
            findings.append(held("runs", f"{where}it does not run: {one_line(error)}"))
            return None
        back, record = np.roll(found, -shift, axis=0), recorded_db if of is samples else None
        if not shift:  # else these are the same images at the same batch size again
            findings.extend(_judge_rows(of, back, floor, record, where)[0])
        return back if back.shape == of.logits.shape else None

    for size in sizes if static else sizes[1:]:
        known = 0 if static else len(findings)
        found = tried(samples, size, f"batch {size}: ", int(static))
        row = BatchRow(size, Outcome.FAIL)
        if found is not None:
            findings.append(judge_invariance(alone, found, floor, size))
            said = gates.outcome_of(findings[known:])
            row = BatchRow(size, said, level(samples.logits, found), findings[-1].value)
        rows = [row] if static else [*rows, row]
    for other in samples.others:
        tried(other, least, f"{other.size}: ", 0)
    comparison = samples.outputs.compare(samples.logits, alone)
    return Judged(tuple(findings), comparison, tuple(flips), tuple(rows))


def _answers(run: Run, samples: Samples, given: npt.NDArray[Any], batch: int) -> Outputs:
    """Return the answers to all images, ``batch`` at a time, as one output.

    Where the network gives other outputs than the reference, these.
    """

    def reduced(part: npt.NDArray[Any]) -> Outputs:
        outputs, wanted = run(part), samples.outputs
        known = outputs.keys() >= set(wanted.names)
        return {OUTPUT_NAME: wanted.rows(outputs)} if known else outputs

    return in_batches(reduced, given, batch)


def _judge_rows(
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


def _judge_shares(
    run: Run, given: npt.NDArray[Any], samples: Samples, sizes: Sequence[int], floor: Limit
) -> Judged:
    """Return what a network says that gives probabilities or top-k classes, and no logits.

    A probability moves by a quarter of what a difference of logits does, at most.
    """
    noise = rms(samples.logits) * 10 ** (-floor.value / 20)
    limit = Limit(max(math.sqrt(2) * noise, 1e-6), f"what noise at {floor.value:.1f} dB explains")
    findings = []
    for size in sizes:
        change = _largest_change(samples, in_batches(run, given, size))
        fault = (
            f"batch {size}: a probability is off by {change:.1e}, more than {limit.value:.1e} "
            f"({limit.origin})"
        )
        fault *= change > limit.value
        findings.append(held("probabilities", fault, change, limit))
    rows = (BatchRow(size, f.outcome) for size, f in zip(sizes, findings, strict=True))
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
    profile: GateProfile = gates.DEFAULT,
) -> tuple[list[Finding], tuple[ScaleRow, ...]]:
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
            findings.append(held("FP16 range", "; ".join(list(over.values())[:4])))
        if numeric == "int8":
            floor = gates.sqnr_floor(numeric, samples.noise_db, profile)
            found, rows = judge_scales(model, samples, floor, method)
            findings += found
    except Exception as error:  # ONNX Runtime raises its own bare types
        findings.append(held("graph", f"its tensors cannot be looked at: {one_line(error)}"))
    return findings, rows
