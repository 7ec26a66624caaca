"""One network judged on samples: its answers at every batch size, and its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from van_deploy import config
from van_deploy.bundle import Bundle
from van_deploy.checks import gates
from van_deploy.checks.gates import (
    Finding,
    Limit,
    Outcome,
    check_batch_invariance,
    check_logits,
    pass_or_fail,
)
from van_deploy.checks.golden import Samples
from van_deploy.checks.graphs import Fault, check_scales, one_line, overflows_of_graph
from van_deploy.data.images import Batch
from van_deploy.environment.hardware import cpu
from van_deploy.errors import UsageError
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import OUTPUT_NAME, fixed_batch
from van_deploy.metrics import Array, Comparison, Flip, probabilities, rms
from van_deploy.runners.base import Logits, Outputs
from van_deploy.runners.network import ORT_CPU, PYTORCH, Network
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

OVERFLOW_IMAGES = 4
ORDERS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
"""Instruction sets for which ONNX Runtime has kernels that add in another order."""

Run = Callable[[Samples, npt.NDArray[np.int64]], Outputs]
"""From samples and which of them to every output of a network for these."""


# --- artifacts to be judged ------------------------------------------------------------------


def shared_settings(asked: config.CheckSettings | config.RunSettings) -> dict[str, Any]:
    """Return what runs the artifacts and what may pass, for other settings."""
    names = ("runner", "device", "trust_engine", "allow_skip", "allow_inconclusive")
    return {name: getattr(asked, name) for name in names}


def plain_onnx_artifacts(bundle: Bundle) -> list[str]:
    """Return the ONNX artifacts that take normalised images and give logits."""
    entries = bundle.artifacts.items()
    return [name for name, one in entries if one.kind == "onnx" and one.embedded == "none"]


def select_artifacts(bundle: Bundle, names: Sequence[str]) -> list[str]:
    """Return the artifacts called ``names``, or all of them.

    Raises:
        BundleError: one of the names is not in the bundle.
    """
    return [bundle.artifact(name).name for name in names] or list(bundle.artifacts)


def open_artifact(
    bundle: Bundle, name: str, asked: config.RunnerSettings, threads: int = 0, spin: bool = True
) -> Network | Finding:
    """Return the artifact called ``name`` to be opened with ``with``, or why it does not run here.

    Args:
        bundle: the bundle.
        name: of the artifact.
        asked: what runs it.
        threads: inside one operator; 0 lets the runtime choose.
        spin: whether threads that wait keep their cores busy.

    Raises:
        BundleError: there is no such artifact, or its files are not the manifest's.
        MissingDependency: ONNX Runtime is not installed.
    """
    network = Network(bundle, name, asked, threads=threads or None, spin=spin)
    bundle.verified_path(name, only_file=network.is_engine and asked.trust_engine)
    obstacle = network.skip_reason()
    if obstacle is not None:
        return gates.skipped_finding("runs", obstacle.reason, obstacle.kind)
    return network


def inputs_for(network: Network, samples: Samples, rows: slice | npt.NDArray[np.int64]) -> Array:
    """Return some of the samples as an artifact takes them.

    Raises:
        UsageError: the artifact takes pixels and there are none.
    """
    if network.embedding == "none":
        return samples.inputs[rows]
    if samples.pixels is None:
        raise UsageError(
            f"'{network.name}' takes pixels, and the images at hand are network input.",
            "Give images as files, or as uint8 arrays.",
        )
    return network.prepare(samples.pixels[rows])


class Networks(ExitStack):
    """PyTorch and some artifacts, loaded; closed by ``with``.

    Args:
        bundle: of the artifacts.
        loaded: the original network.
        asked: which artifacts, and what runs them.
        threads: inside one operator; 0 lets the runtime choose.

    Attributes:
        numeric: the numeric class of each artifact.
        runners: what runs each network, PyTorch first.
        skipped: artifacts that do not run here.
    """

    def __init__(
        self, bundle: Bundle, loaded: LoadedVan, asked: config.EvaluationSettings, threads: int = 0
    ) -> None:
        from van_deploy.runners.pytorch import TorchRunner

        super().__init__()
        self.bundle, self.loaded, self._torch = bundle, loaded, TorchRunner(loaded.model)
        self.numeric, self.skipped = dict[str, str](), dict[str, Finding]()
        self._artifacts: dict[str, Network] = {}
        for name in select_artifacts(bundle, asked.artifacts):
            # Idle threads must not spin: the next image is being decoded on that core.
            opened = open_artifact(bundle, name, asked, threads, spin=False)
            if isinstance(opened, Finding):
                self.skipped[name] = opened
            elif OUTPUT_NAME not in {output.name for output in opened.outputs}:
                self.skipped[name] = gates.skipped_finding("runs", "it gives no logits")
            else:
                self._artifacts[name] = self.enter_context(opened)
                kind = bundle.artifact(name).precision
                self.numeric[name] = gates.numeric_class(kind, tf32=opened.tf32)
        self.runners = {PYTORCH: PYTORCH, **{n: a.runner for n, a in self._artifacts.items()}}

    def logits(self, batch: Batch) -> dict[str, Logits]:
        """Return each network's logits ``(n, K)``, PyTorch's first; n is 1 or more."""
        found = {PYTORCH: self._torch.run(batch.inputs)}
        for name, opened in self._artifacts.items():
            # Normalised once for all that take it so.
            given = batch.inputs if opened.embedding == "none" else batch.values
            found[name] = opened.logits(given)
        return found


# --- what is found ---------------------------------------------------------------------------


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
class NetworkVerdict(gates.CheckResult):
    """What was found of one network.

    Attributes:
        findings: one a rule.
        comparison: of the logits, or of the worst feature map, one image at a time; None where
            there are none.
        flips: decisions that changed, the widest margin first.
        batches: one row a batch size.
    """

    findings: tuple[Finding, ...]
    comparison: Comparison | None = None
    flips: tuple[Flip, ...] = ()
    batches: tuple[BatchRow, ...] = ()


def record_key(runner: str, numeric: str) -> str:
    """Return under which name an artifact's SQNR on the golden samples is recorded.

    On a CPU, float32's noise and what INT8 kernels saturate depend on the instruction set.
    """
    exact = runner == ORT_CPU and numeric in ("fp32", "int8")
    return "/".join([runner, numeric, *(f for f in cpu().features if exact and f in ORDERS)])


def batch_sizes(batch: config.BatchRange) -> tuple[int, ...]:
    """Return the batch sizes to try: 1, 2, 3, the optimum, the maximum and another odd one.

    A static graph has one.

    >>> profiles = config.BatchRange(min=1, opt=8, max=32), config.BatchRange(min=1, opt=1, max=2)
    >>> [batch_sizes(profile) for profile in profiles]
    [(1, 2, 3, 5, 8, 32), (1, 2)]
    """
    if batch.fixed:
        return (batch.fixed,)
    wanted = {1, 2, 3, batch.opt, batch.max}
    wanted.add(next(odd for odd in range(5, 99, 2) if odd not in wanted))
    return tuple(sorted(size for size in wanted if size <= batch.max))


def check_new_graph(
    model: Path | onnx.ModelProto,
    precision: str,
    samples: Samples,
    sizes: Sequence[int] = (1,),
    *,
    method: str = "mse",
    profile: config.GateProfile = gates.DEFAULT_PROFILE,
) -> tuple[NetworkVerdict, dict[str, float]]:
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
    graph, record = onnx.load(model) if isinstance(model, Path) else model, {}
    floor, fixed = gates.sqnr_floor(precision, samples.noise_db, profile), fixed_batch(graph)
    with OnnxRuntimeRunner(model, arena=False) as runner:
        sizes = (fixed,) if fixed else sizes
        judged = check_outputs(lambda of, i: runner.run_all(of.inputs[i]), samples, sizes, floor)
    if judged.comparison is not None:
        record[record_key(ORT_CPU, precision)] = min(judged.comparison.sqnr_db, gates.ROUNDOFF_DB)
    findings, _ = check_graph(graph, precision, samples, floor, method)
    return replace(judged, findings=(*judged.findings, *findings)), record


def check_outputs(
    run: Run, samples: Samples, sizes: Sequence[int], floor: Limit, recorded_db: float | None = None
) -> NetworkVerdict:
    """Return what the answers of a network say, at every batch size and image size.

    Args:
        run: the network.
        samples: with the reference's logits.
        sizes: batch sizes to try, the one that the others are compared with first: 1, or the
            one of a static graph; every size gets all samples.
        floor: least SQNR of the logits.
        recorded_db: SQNR recorded on the same samples, or None.

    Raises:
        Exception: the runtime's own, where the network does not run one image at a time.
    """
    least, static, level = sizes[0], sizes[0] > 1, samples.outputs.sqnr_db
    outputs = _answers(run, samples, least)
    if OUTPUT_NAME not in outputs:
        return _check_probabilities(run, samples, sizes, floor)
    alone = outputs[OUTPUT_NAME]
    findings, flips = _check_rows(samples, alone, floor, recorded_db)
    if alone.shape != samples.logits.shape:
        return NetworkVerdict(tuple(findings))
    rows = [BatchRow(least, gates.outcome_of(findings), level(samples.logits, alone), math.inf)]
    tried = [(samples, size, f"batch {size}: ") for size in (sizes if static else sizes[1:])]
    tried += [(other, least, f"{other.size}: ") for other in samples.others]
    for of, size, where in tried:
        # A static graph gets the same images at the same batch size, in other places.
        own, moved, known = of is samples, int(static and of is samples), len(findings)
        row = BatchRow(size, Outcome.FAIL)
        try:
            found = _answers(run, of, size, moved)[OUTPUT_NAME]
        except Exception as error:  # the runtimes raise their own bare types
            findings.append(pass_or_fail("runs", f"{where}it does not run: {one_line(error)}"))
        else:
            if not moved:
                record = recorded_db if own else None
                findings += _check_rows(of, found, floor, record, where)[0]
            if own and found.shape == alone.shape:
                findings.append(check_batch_invariance(alone, found, floor, size))
                said = gates.outcome_of(findings[0 if moved else known :])
                row = BatchRow(size, said, level(of.logits, found), findings[-1].value)
        if own:
            rows = [row] if moved else [*rows, row]
    comparison = samples.outputs.compare(samples.logits, alone)
    return NetworkVerdict(tuple(findings), comparison, tuple(flips), tuple(rows))


def _answers(run: Run, samples: Samples, batch: int, moved: int = 0) -> Outputs:
    """Return the answers to all images, ``batch`` at a time, as one output.

    Where the network gives other outputs than the reference, these. Every batch is full: the
    last one is filled up with other images, and a batch of more images than there are repeats
    them in another order. Images are ``moved`` by so many places within their batches.
    """
    count, pieces = len(samples), []
    for start in range(0, count, batch):
        places = np.arange(start, start + batch)
        outputs = run(samples, (places + places // count - moved) % count)
        if outputs.keys() >= set(samples.outputs.names):
            outputs = {OUTPUT_NAME: samples.outputs.rows(outputs)}
        pieces.append(outputs)
    whole = {name: np.concatenate([p[name] for p in pieces])[:count] for name in pieces[0]}
    return {name: np.roll(rows, -moved, axis=0) for name, rows in whole.items()}


def _check_rows(
    samples: Samples, found: Array, floor: Limit, recorded_db: float | None, where: str = ""
) -> tuple[list[Finding], list[Flip]]:
    """Return the findings on the logits, or on each feature map, and the label flips."""
    how = (floor, recorded_db, samples.task)
    if not samples.outputs.widths or found.shape != samples.logits.shape:
        return check_logits(samples.logits, found, *how, where)
    findings, actual = [], samples.outputs.parts(found)
    for name, expected in samples.outputs.parts(samples.logits).items():
        findings += check_logits(expected, actual[name], *how, f"{where}{name}: ")[0]
    return findings, []


def _check_probabilities(
    run: Run, samples: Samples, sizes: Sequence[int], floor: Limit
) -> NetworkVerdict:
    """Return what a network says that gives probabilities or top-k classes, and no logits.

    A probability moves by a quarter of what a difference of logits does, at most.
    """
    noise = rms(samples.logits) * 10 ** (-floor.value / 20)
    limit = Limit(max(math.sqrt(2) * noise, 1e-6), f"what noise at {floor.value:.1f} dB explains")
    expected, findings = probabilities(samples.logits, samples.task), []
    for size in sizes:
        found = _answers(run, samples, size)
        pairs = [(expected, found["probabilities"])] if "probabilities" in found else []
        if TOP_CLASSES in found:
            chosen = np.take_along_axis(expected, found[TOP_CLASSES], axis=1)
            best = -np.sort(-expected, axis=1)[:, : chosen.shape[1]]
            pairs += [(best, chosen), (best, found[TOP_PROBABILITIES])]  # the right ones, in order
        changes = [np.abs(one - other).max() for one, other in pairs] or [math.inf]
        change = float(np.max(changes))  # or NaN
        change = change if math.isfinite(change) else math.inf
        fault = (
            f"batch {size}: a probability is off by {change:.1e}, more than {limit.value:.1e} "
            f"({limit.origin})"
        ) * (change > limit.value)
        findings.append(pass_or_fail("probabilities", fault, change, limit))
    rows = (BatchRow(size, f.outcome) for size, f in zip(sizes, findings, strict=True))
    return NetworkVerdict(tuple(findings), batches=tuple(rows))


def check_graph(
    model: onnx.ModelProto, numeric: str, samples: Samples, floor: Limit, method: str = "mse"
) -> tuple[list[Finding], list[Fault]]:
    """Return what a plain graph's tensors say: FP16 that overflows, and INT8 scales.

    And each fault with the module or node that it is in.

    Args:
        model: the graph, which takes normalised images.
        numeric: its numeric class.
        samples: the golden samples.
        floor: least SQNR of the logits.
        method: of calibration, for INT8.
    """
    findings: list[Finding] = []
    try:
        faults = overflows_of_graph(model, samples.inputs[:OVERFLOW_IMAGES])
        if numeric in ("fp16", "int8") or faults:
            findings.append(pass_or_fail("FP16 range", "; ".join(said for _, said in faults[:4])))
        if numeric == "int8":
            found, wrong = check_scales(model, samples, floor, method)
            return findings + found, faults + wrong
    except Exception as error:  # ONNX Runtime raises its own bare types
        said = f"its tensors cannot be looked at: {one_line(error)}"
        return [*findings, pass_or_fail("graph", said)], [("", said)]
    return findings, faults
