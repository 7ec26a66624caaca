"""Checks of one network on samples: its outputs at every batch size, and its graph."""

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
from van_deploy.checks.gates import Finding, Limit, Outcome, pass_or_fail
from van_deploy.checks.golden import Samples
from van_deploy.checks.graphs import Fault, check_scales, one_line, overflows_of_graph
from van_deploy.config import EvaluationSettings
from van_deploy.data.images import Batch
from van_deploy.environment.hardware import cpu
from van_deploy.errors import UsageError
from van_deploy.graph.embed import PROBABILITIES, TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import OUTPUT_NAME, fixed_batch
from van_deploy.metrics import Array, Comparison, Flip, Task, find_flips, probabilities, rms
from van_deploy.runners.base import Logits, Outputs
from van_deploy.runners.network import ORT_CPU, PYTORCH, Network
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

# Instruction sets for which ONNX Runtime has kernels with another order of summation.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")

# Maps samples and row indices to the network's outputs for these rows.
Run = Callable[[Samples, npt.NDArray[np.int64]], Outputs]


# --- artifacts -------------------------------------------------------------------------------


def shared_settings(settings: config.CheckSettings | config.RunSettings) -> dict[str, Any]:
    """Return the runner and allow options, which the settings of all checks share."""
    names = ("runner", "device", "trust_engine", "allow_skip", "allow_inconclusive")
    return {name: getattr(settings, name) for name in names}


def plain_onnx_artifacts(bundle: Bundle) -> list[str]:
    """Return the names of the ONNX artifacts from normalised images to logits."""
    return [n for n, a in bundle.artifacts.items() if a.kind == "onnx" and a.embedded == "none"]


def select_artifacts(bundle: Bundle, names: Sequence[str]) -> list[str]:
    """Return ``names``, or the names of all artifacts if it is empty.

    Raises:
        BundleError: the bundle has no artifact of that name.
    """
    return [bundle.artifact(name).name for name in names] or list(bundle.artifacts)


def open_artifact(
    bundle: Bundle, name: str, settings: config.RunnerSettings, threads: int = 0, spin: bool = True
) -> Network | Finding:
    """Return an artifact, to be opened with ``with``, or SKIPPED if it cannot run here.

    Args:
        bundle: the bundle.
        name: name of the artifact.
        settings: selects the runner.
        threads: intra-op threads; 0 for the runtime's default.
        spin: whether waiting threads spin.

    Raises:
        BundleError: the artifact does not exist, or its files do not match the manifest.
        MissingDependency: ONNX Runtime is not installed.
    """
    network = Network(bundle, name, settings, threads=threads or None, spin=spin)
    bundle.verified_path(name, only_file=network.is_engine and settings.trust_engine)
    if (obstacle := network.skip_reason()) is not None:
        return gates.skipped_finding("runs", obstacle.reason, obstacle.kind)
    return network


def inputs_for(network: Network, samples: Samples, rows: npt.NDArray[np.int64]) -> Array:
    """Return some of the samples in an artifact's input format.

    Raises:
        UsageError: the artifact takes pixels, and the samples have only normalised inputs.
    """
    if network.embedding == "none":
        return samples.inputs[rows]
    if samples.pixels is None:
        raise UsageError(
            f"'{network.name}' takes pixels, and the samples are normalised network input.",
            "Give image files or uint8 arrays.",
        )
    return network.prepare(samples.pixels[rows])


class Networks(ExitStack):
    """PyTorch and the selected artifacts, loaded; a context manager.

    Args:
        bundle: bundle of the artifacts.
        loaded: the original network.
        settings: selects the artifacts and the runner.
        threads: intra-op threads; 0 for the runtime's default.

    Attributes:
        numeric: numeric class of each artifact.
        runners: runner of each network, PyTorch first.
        skipped: findings of the artifacts that cannot run here.
    """

    def __init__(
        self, bundle: Bundle, loaded: LoadedVan, settings: EvaluationSettings, threads: int = 0
    ) -> None:
        from van_deploy.runners.pytorch import TorchRunner

        super().__init__()
        self.bundle, self.loaded, self.settings = bundle, loaded, settings
        self._torch = TorchRunner(loaded.model)
        self.numeric, self.skipped = dict[str, str](), dict[str, Finding]()
        self._artifacts: dict[str, Network] = {}
        for name in select_artifacts(bundle, settings.artifacts):
            # Idle threads must not spin: the next image is decoded on that core.
            network = open_artifact(bundle, name, settings, threads, spin=False)
            if isinstance(network, Finding):
                self.skipped[name] = network
            elif OUTPUT_NAME not in {output.name for output in network.outputs}:
                self.skipped[name] = gates.skipped_finding("runs", "it has no logits", "accuracy")
            else:
                self._artifacts[name] = self.enter_context(network)
                precision = bundle.artifact(name).precision
                self.numeric[name] = gates.numeric_class(precision, tf32=network.tf32)
        self.runners = {PYTORCH: PYTORCH, **{n: a.runner for n, a in self._artifacts.items()}}

    def logits(self, batch: Batch) -> dict[str, Logits]:
        """Return each network's logits ``(n, K)``, PyTorch's first; n is 1 or more."""
        logits = {PYTORCH: self._torch.run(batch.inputs)}
        for name, network in self._artifacts.items():
            # Images are normalised once for all networks that take normalised input.
            values = batch.inputs if network.embedding == "none" else batch.values
            logits[name] = network.logits(values)
        return logits


# --- results ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchRow:
    """Result at one batch size.

    Attributes:
        batch: the batch size.
        outcome: outcome of the rules at this size.
        sqnr_db: SQNR of the logits against the reference; None without logits.
        invariance_db: SQNR of the worst image against the same image alone; None without logits.
    """

    batch: int
    outcome: Outcome
    sqnr_db: float | None = None
    invariance_db: float | None = None


@dataclass(frozen=True)
class NetworkVerdict(gates.CheckResult):
    """Result of the checks of one network.

    Attributes:
        findings: results of the rules.
        comparison: metrics of the logits, or of the worst feature map, at the first batch size;
            None without logits.
        flips: decisions that changed, the widest margin first.
        batches: one row per batch size.
    """

    findings: tuple[Finding, ...]
    comparison: Comparison | None = None
    flips: tuple[Flip, ...] = ()
    batches: tuple[BatchRow, ...] = ()


def instruction_set(runner: str, numeric: str) -> str:
    """Return the instruction set that an artifact's SQNR depends on; "" for none.

    On a CPU, the noise of float32 and the saturation of INT8 kernels depend on it.
    """
    exact = runner == ORT_CPU and numeric in ("fp32", "int8")
    return "/".join(f for f in cpu().features if exact and f in CPU_FEATURES)


def record_key(runner: str, numeric: str) -> str:
    """Return the key under which an artifact's SQNR on the golden samples is recorded."""
    return "/".join(filter(None, [runner, numeric, instruction_set(runner, numeric)]))


def batch_sizes(batch: config.BatchRange) -> tuple[int, ...]:
    """Return the batch sizes to check: 1, 2, 3, the optimum, the maximum and another odd one.

    A static batch has one size.

    >>> profiles = config.BatchRange(min=1, opt=8, max=32), config.BatchRange(min=1, opt=1, max=2)
    >>> [batch_sizes(profile) for profile in profiles]
    [(1, 2, 3, 5, 8, 32), (1, 2)]
    """
    if batch.fixed:
        return (batch.fixed,)
    sizes = {1, 2, 3, batch.opt, batch.max}
    sizes.add(next(odd for odd in range(5, 99, 2) if odd not in sizes))
    return tuple(sorted(size for size in sizes if size <= batch.max))


def check_new_graph(
    model: Path | onnx.ModelProto,
    precision: str,
    samples: Samples,
    sizes: Sequence[int] = (1,),
    *,
    method: str = "mse",
    profile: config.GateProfile = gates.DEFAULT_PROFILE,
) -> tuple[NetworkVerdict, dict[str, float]]:
    """Return the verdict on a new graph, and the SQNR to record for it.

    Args:
        model: the graph, or its file; its input is normalised images.
        precision: precision of the graph.
        samples: the golden samples.
        sizes: batch sizes to check if the batch is dynamic.
        method: calibration method, for INT8.
        profile: limits of the recipe, which take precedence.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        ConversionError: ONNX Runtime rejects the graph.
    """
    graph, record = onnx.load(model) if isinstance(model, Path) else model, {}
    floor, fixed = samples.sqnr_floor(precision, profile), fixed_batch(graph)
    with OnnxRuntimeRunner(model, arena=False) as runner:
        sizes = (fixed,) if fixed else sizes
        verdict = check_outputs(lambda of, i: runner.run_all(of.inputs[i]), samples, sizes, floor)
    if verdict.comparison is not None:
        record[record_key(ORT_CPU, precision)] = min(verdict.comparison.sqnr_db, gates.ROUNDOFF_DB)
    findings, _ = check_graph(graph, precision, samples, floor, method)
    return replace(verdict, findings=(*verdict.findings, *findings)), record


def check_outputs(
    run: Run, samples: Samples, sizes: Sequence[int], floor: Limit, recorded_db: float | None = None
) -> NetworkVerdict:
    """Return the verdict on a network's outputs at every batch size and image size.

    Args:
        run: the network.
        samples: samples with the reference's logits.
        sizes: batch sizes. The others are compared with the first, which is 1 or the one of a
            static graph. All samples are run at every size.
        floor: minimum SQNR of the logits.
        recorded_db: SQNR recorded on the same samples, or None.

    Raises:
        Exception: the runtime's own, if the network does not run at the first size.
    """
    smallest, static = sizes[0], sizes[0] > 1
    outputs, _ = _run_batches(run, samples, smallest)
    alone = {name: values[: len(samples)] for name, values in outputs.items()}
    findings, flips = _check_rows(samples, alone, floor, recorded_db)
    logits = alone.get(OUTPUT_NAME)
    if logits is not None and logits.shape != samples.logits.shape:
        return NetworkVerdict(tuple(findings))
    rows = [] if static else [_batch_row(smallest, findings)]
    runs = [(samples, size, f"batch {size}: ") for size in (sizes if static else sizes[1:])]
    runs += [(other, smallest, f"{other.size}: ") for other in samples.others]
    for of, size, where in runs:
        # A static graph gets the same images at the same batch size, shifted within the batch.
        native, start = of is samples, 0 if static else len(findings)
        try:
            outputs, images = _run_batches(run, of, size, int(static and native))
            repeated = replace(of, logits=of.logits[images])
            # The record is of every image once: some images twice have another mean.
            record = recorded_db if native and len(images) % len(of) == 0 else None
            findings += _check_rows(repeated, outputs, floor, record, where)[0]
            actual = outputs.get(OUTPUT_NAME, np.empty(0))
            if native and logits is not None and actual.shape == repeated.logits.shape:
                findings.append(gates.check_batch_invariance(logits[images], actual, floor, size))
        except Exception as error:  # the runtimes raise bare exception types
            findings.append(pass_or_fail("runs", f"{where}it does not run: {one_line(error)}"))
        if native:
            rows.append(_batch_row(size, findings[start:]))
    comparison = None if logits is None else samples.outputs.compare(samples.logits, logits)
    return NetworkVerdict(tuple(findings), comparison, tuple(flips), tuple(rows))


def _batch_row(batch: int, findings: Sequence[Finding]) -> BatchRow:
    """Return the row of a batch size; the first size has no finding on batch invariance."""
    levels, invariance = (
        [f.value for f in findings if f.rule == rule and f.value is not None]
        for rule in ("SQNR", "batch invariance")
    )
    invariance_db = min(invariance, default=math.inf if levels else None)
    return BatchRow(batch, gates.outcome_of(findings), min(levels, default=None), invariance_db)


def _run_batches(
    run: Run, samples: Samples, batch: int, shift: int = 0
) -> tuple[Outputs, npt.NDArray[np.int64]]:
    """Run all images in full batches and return the outputs, and the image of each of their rows.

    A backbone's maps become its rows. The last batch is filled with other images, whose rows are
    left out. A batch larger than the number of images repeats them in another order. ``shift``
    moves the images within their batches.
    """
    count, maps, pieces = len(samples), samples.outputs.widths.keys(), []
    places = np.arange(-(-count // batch) * batch)
    images = (places + places // count - shift) % count
    for start in range(0, count, batch):
        outputs = run(samples, images[start : start + batch])
        if maps and outputs.keys() >= maps:
            outputs = {OUTPUT_NAME: samples.outputs.rows(outputs)}
        pieces.append(outputs)
    kept = max(count, batch)
    whole = {name: np.concatenate([p[name] for p in pieces])[:kept] for name in pieces[0]}
    return whole, images[:kept]


def _check_rows(
    samples: Samples, outputs: Outputs, floor: Limit, recorded_db: float | None, where: str = ""
) -> tuple[list[Finding], list[Flip]]:
    """Return the findings on the logits or feature maps and on other outputs, and the flips."""
    options, actual = (floor, recorded_db, samples.outputs.task), outputs.get(OUTPUT_NAME)
    if actual is None:
        return _check_probabilities(samples, outputs, floor, where)
    if not samples.outputs.widths or actual.shape != samples.logits.shape:
        findings, flips = gates.check_logits(samples.logits, actual, *options, where)
        if len(outputs) > 1:
            findings += _check_probabilities(samples, outputs, floor, where)[0]
        return findings, flips
    findings, maps = [], samples.outputs.parts(actual)
    for name, expected in samples.outputs.parts(samples.logits).items():
        findings += gates.check_logits(expected, maps[name], *options, f"{where}{name}: ")[0]
    return findings, []


def _check_probabilities(
    samples: Samples, outputs: Outputs, floor: Limit, where: str
) -> tuple[list[Finding], list[Flip]]:
    """Return the findings on probabilities and top-k classes, and the label flips.

    If the graph outputs its logits, too, they must give these probabilities. Otherwise noise at
    the floor may change them, a probability by at most a quarter of the change of a difference of
    logits, and must explain the label flips.
    """
    own, task, limit = outputs.get(OUTPUT_NAME), samples.outputs.task, gates.SAME_PROBABILITY
    logits = samples.logits if own is None else own.astype(np.float64)
    if own is None:
        noise = math.sqrt(2) * rms(logits) * 10 ** (-floor.value / 20)
        limit = Limit(max(noise, 1e-6), f"explained by noise at {floor.value:.1f} dB")
    expected, differences, scores = probabilities(logits, task), list[Array](), None
    if TOP_CLASSES in outputs:
        classes = outputs[TOP_CLASSES]
        chosen = np.take_along_axis(expected, classes, axis=1)
        best = -np.sort(-expected, axis=1)[:, : classes.shape[1]]
        differences = [best - chosen, best - outputs[TOP_PROBABILITIES]]  # classes and their order
        if task is Task.SINGLE_LABEL:
            scores = (classes[:, :1] == np.arange(expected.shape[1])).astype(np.float64)
    if PROBABILITIES in outputs:
        differences.append(expected - outputs[PROBABILITIES])
        scores = outputs[PROBABILITIES] - 0.5
    change = float(np.max([np.abs(values).max() for values in differences] or [math.inf]))  # or NaN
    change = change if math.isfinite(change) else math.inf
    allowed = f"more than {limit.value:.1e} ({limit.origin})"
    fault = f"{where}a probability differs by {change:.1e}, {allowed}" * (change > limit.value)
    findings = [pass_or_fail("probabilities", fault, change, limit)]
    if own is not None or scores is None:
        return findings, []
    flips = find_flips(logits, scores, task, gates.flip_margin(floor.value, task))
    return [*findings, gates.check_flips(flips, floor, task, where)], flips


def check_graph(
    model: onnx.ModelProto, numeric: str, samples: Samples, floor: Limit, method: str = "mse"
) -> tuple[list[Finding], list[Fault]]:
    """Return the findings on FP16 overflows and INT8 scales, and each fault with its node.

    Args:
        model: the graph; its input is normalised images.
        numeric: numeric class of the graph.
        samples: the golden samples.
        floor: minimum SQNR of the logits.
        method: calibration method, for INT8.
    """
    findings: list[Finding] = []
    try:
        faults = overflows_of_graph(model, samples.inputs)
        if numeric in ("fp16", "int8") or faults:
            messages = "; ".join(message for _, message in faults[:4])
            findings.append(pass_or_fail("FP16 range", messages))
        if numeric == "int8":
            scale_findings, scale_faults = check_scales(model, samples, floor, method)
            return findings + scale_findings, faults + scale_faults
    except Exception as error:  # ONNX Runtime raises bare exception types
        message = f"its tensors cannot be computed: {one_line(error)}"
        return [*findings, pass_or_fail("graph", message)], [("", message)]
    return findings, faults
