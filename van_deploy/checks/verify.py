"""Every artefact of a bundle against the original PyTorch network, and a verdict on each.

Asked of each: are the logits the network's at every batch size, does a row come
out as the image does alone, did a clear decision change, does any module add
more error than its precision explains, do INT8 steps suit what they round, does FP16
hold every tensor, and is its preprocessing the weights'?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.checks.canary import check_canary
from van_deploy.checks.contract import contract_failures
from van_deploy.checks.expected import ReferenceLogits, reference_logits
from van_deploy.checks.gates import (
    Limits,
    find_flips,
    judge,
    limits_from_noise,
)
from van_deploy.checks.isolate import cuts_of
from van_deploy.checks.opened import ON_CPU, Execution, NotRun, open_artefact, plain_onnx
from van_deploy.checks.overflow import overflows_of_graph
from van_deploy.checks.parts import drift_of_graph, is_equalized
from van_deploy.checks.reference import Reference, reference_of
from van_deploy.checks.steps import StepRow, steps_of_graph
from van_deploy.checks.verdicts import ArtefactVerdict, BatchVerdict, VerifyReport
from van_deploy.config import BatchRange, GateSettings
from van_deploy.data import CheckImages
from van_deploy.errors import ConversionError, VanDeployError
from van_deploy.metrics import Array, compare
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.runners.base import Logits
from van_deploy.runners.network import Network

__all__ = [
    "batch_sizes",
    "verify_bundle",
    "verify_logits",
]

MODULE_IMAGES = 4
STEP_IMAGES = 16

Progress = Callable[[str], None]


def batch_sizes(batch: BatchRange) -> tuple[int, ...]:
    """Return the batch sizes to try: 1, 2, 3, the optimum, the maximum and another odd one.

    >>> batch_sizes(BatchRange(1, 8, 32)), batch_sizes(BatchRange(1, 1, 2))
    ((1, 2, 3, 5, 8, 32), (1, 2))
    """
    wanted = {1, 2, 3, batch.opt, batch.max}
    wanted.add(next(odd for odd in range(5, 99, 2) if odd not in wanted))
    return tuple(sorted(size for size in wanted if size <= batch.max))


def verify_bundle(
    bundle: Bundle,
    loaded: LoadedVan,
    pictures: CheckImages,
    *,
    gates: GateSettings | None = None,
    artefacts: Sequence[str] = (),
    execution: Execution = ON_CPU,
    modules: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Return the verdict on each artefact of ``bundle``.

    Args:
        bundle: the bundle.
        loaded: its original network.
        pictures: at least as many as the largest batch.
        gates: limits that are not to be derived.
        artefacts: which ones; by default all.
        execution: what runs them.
        modules: look into plain ONNX graphs as well, module by module.
        threads: threads of ONNX Runtime; None lets it choose.
        progress: told what is checked.

    Raises:
        BundleError: an artefact is not there, or is not the manifest's.
        UsageError: there is no such runner, or too few pictures.
    """
    say = progress or (lambda _: None)
    settings = gates or GateSettings()
    say("PyTorch in float64 and float32")
    expected = reference_logits(loaded, pictures)
    sizes = batch_sizes(bundle.manifest.batch)
    plain = plain_onnx(bundle)
    reference = None
    verdicts = []
    for name in artefacts or bundle.artefacts:
        artefact = bundle.artefact(name)
        say(f"'{name}' at batch {', '.join(map(str, sizes))}")
        limits = limits_from_noise(
            expected.noise, artefact.precision, settings.of(artefact.precision)
        )
        opened = open_artefact(bundle, name, execution, threads=threads)
        if isinstance(opened, NotRun):
            verdict = _skipped(opened, artefact.precision)
            if opened.answers:
                verdict = _with_canary(verdict, bundle, execution, threads)
            verdicts.append(verdict)
            continue
        served = [size for size in sizes if opened.serves(size)]
        verdict = _verify_opened(opened, artefact.precision, expected, pictures, served, limits)
        verdict = _add(verdict, contract_failures(bundle, name))
        verdict = _with_canary(verdict, bundle, execution, threads)
        if modules and name in plain:
            say(f"'{name}', module by module")
            images = pictures.inputs[:MODULE_IMAGES]
            reference = reference or reference_of(bundle, loaded, images)
            verdict = _with_modules(verdict, bundle, reference, images)
            more = pictures.inputs[:STEP_IMAGES]
            verdict = _with_numbers(verdict, bundle, more)
        verdicts.append(verdict)
    return VerifyReport(pictures.description, pictures.names, expected.noise, tuple(verdicts))


def _skipped(not_run: NotRun, precision: str) -> ArtefactVerdict:
    reason = not_run.reason + ("; only the canary was asked" if not_run.answers else "")
    return ArtefactVerdict(not_run.artefact, precision, not_run.runner, "skipped", reason)


def verify_logits(
    name: str, precision: str, expected: Array, found: Logits, limits: Limits
) -> ArtefactVerdict:
    """Return the verdict on logits alone, both ``(N, K)``: a pure function of them."""
    comparison = compare(expected, found)
    flips = find_flips(expected, found, limits.flip_margin)
    faults = sum(flip.fault for flip in flips)
    failures = tuple(judge(comparison, faults, limits))
    return ArtefactVerdict(
        artefact=name,
        precision=precision,
        runner="",
        outcome="failed" if failures else "passed",
        limits=limits,
        comparison=comparison,
        flips=tuple(flips),
        failures=failures,
    )


def _verify_opened(
    opened: Network,
    precision: str,
    expected: ReferenceLogits,
    pictures: CheckImages,
    sizes: Sequence[int],
    limits: Limits,
) -> ArtefactVerdict:
    pixels, name = pictures.values, opened.name
    try:
        with opened:
            alone = np.concatenate([opened.logits(pixels[i : i + 1]) for i in range(len(pixels))])
            if alone.shape != expected.float64.shape:
                return _broken(
                    opened,
                    precision,
                    limits,
                    f"the output has shape {alone.shape} where PyTorch's has "
                    f"{expected.float64.shape}",
                )
            verdict = verify_logits(name, precision, expected.float64, alone, limits)
            batches = tuple(
                _batch(opened, pixels[:size], expected.float64[:size], alone[:size], limits)
                for size in sizes
            )
    except ConversionError as error:
        return _broken(opened, precision, limits, f"it does not load: {_line(error)}")
    except VanDeployError:
        raise
    except Exception as error:  # the run times raise their own bare types
        return _broken(opened, precision, limits, f"it does not run at batch 1: {_line(error)}")
    verdict = replace(verdict, runner=opened.runner, batches=batches)
    failures = [f"batch {b.batch}: {text}" for b in batches for text in b.failures]
    return _add(verdict, failures)


def _batch(
    opened: Network, pixels: Any, expected: Array, alone: Logits, limits: Limits
) -> BatchVerdict:
    size = len(pixels)
    try:
        together = opened.logits(pixels)
    except Exception as error:
        return BatchVerdict(size, None, None, (f"it does not run: {_line(error)}",))
    if together.shape != expected.shape:
        message = f"the output has shape {together.shape} where PyTorch's has {expected.shape}"
        return BatchVerdict(size, None, None, (message,))
    comparison = compare(expected, together)
    row = compare(alone, together).relative
    faults = sum(flip.fault for flip in find_flips(expected, together, limits.flip_margin))
    failures = judge(comparison, faults, limits)
    if not row <= limits.row_relative:
        failures.append(f"an image alone and in the batch differ by {row:.1e}")
    return BatchVerdict(size, comparison, row, tuple(failures))


def _broken(opened: Network, precision: str, limits: Limits, failure: str) -> ArtefactVerdict:
    return ArtefactVerdict(
        opened.name, precision, opened.runner, "failed", limits=limits, failures=(failure,)
    )


def _add(verdict: ArtefactVerdict, failures: Sequence[str]) -> ArtefactVerdict:
    together = (*verdict.failures, *failures)
    return replace(verdict, failures=together, outcome="failed" if together else verdict.outcome)


def _with_canary(
    verdict: ArtefactVerdict, bundle: Bundle, execution: Execution, threads: int | None
) -> ArtefactVerdict:
    """Return the verdict with whether the artefact answers the bundle's picture as PyTorch did."""
    does_not_run = verdict.comparison is None and verdict.outcome == "failed"
    canary = bundle.manifest.canary
    if canary is None or does_not_run:
        return verdict
    report = check_canary(bundle, verdict.artefact, execution, threads=threads)
    failures = [f"the canary '{canary.file}': {f}" for f in report.failures]
    return _add(replace(verdict, canary=report.max_change), failures)


def _with_modules(
    verdict: ArtefactVerdict, bundle: Bundle, reference: Reference, images: Any
) -> ArtefactVerdict:
    """Return the verdict with what each module adds, and the modules that add too much."""
    import onnx

    cuts = cuts_of(onnx.load(bundle.verified("fp32")), "module", reference.modules)
    model = onnx.load(bundle.verified(verdict.artefact))
    equalized = is_equalized(bundle.artefact(verdict.artefact))
    rows = drift_of_graph(model, reference, images, cuts, equalized=equalized)
    placed = sorted(
        (row for row in rows if row.added_db is not None), key=lambda row: float(row.added_db or 0)
    )
    least = verdict.limits.module_db if verdict.limits else -math.inf
    failures = [
        f"{row.name} alone has {row.added_db:.1f} dB, at least {least:g} dB are asked"
        + (f" ({row.note})" if row.note else "")
        for row in placed
        if not float(row.added_db or 0) >= least
    ]
    return _add(replace(verdict, modules=tuple(placed)), failures)


def _with_numbers(verdict: ArtefactVerdict, bundle: Bundle, images: Any) -> ArtefactVerdict:
    """Return the verdict with INT8 steps, those that do not suit, and FP16 overflows."""
    import onnx

    model = onnx.load(bundle.verified(verdict.artefact))
    rows = steps_of_graph(model, images, bundle.artefact(verdict.artefact))
    order = sorted(rows, key=lambda row: (not row.fault, _suspicion(row)))
    faults = [row.fault for row in order]
    faults += overflows_of_graph(model, images[:MODULE_IMAGES]).values()
    return _add(replace(verdict, steps=tuple(order)), [fault for fault in faults if fault])


def _suspicion(row: StepRow) -> float:
    return math.inf if row.halving_gain_db is None else -row.halving_gain_db


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
