"""Engines built in bundles, with the graphs they are built from made where they are missing.

``--tune`` finds the fastest settings on this device: candidates are built in a copy of the
bundle, judged and timed, so that only the one that is kept is ever in the bundle itself. An
engine that does not hold its gate is never the fastest.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from van_deploy import config
from van_deploy.bundle import Bundle
from van_deploy.checks.gates import Outcome as Found
from van_deploy.checks.golden import samples_for
from van_deploy.checks.verify import verify_bundle
from van_deploy.documents import Verdict
from van_deploy.engine import bundled
from van_deploy.engine.backend import Host, device_number, host_here
from van_deploy.engine.inductor import INDUCTOR, PRECISIONS, build_package, packages_asked
from van_deploy.errors import BundleError, ConversionError, MissingDependency, VanDeployError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.runners.network import Network
from van_deploy.stopwatch import Progress, no_progress

MADE_HERE = ("fp16", "bf16", "int8")
LEAST_S, LEAST_CALLS, ROUNDS = 0.3, 10, 5
SCOPES = ("pointwise", "deep", "all")


@dataclass(frozen=True)
class CandidateResult:
    """What became of one candidate.

    Attributes:
        candidate: in words.
        engine: its name; "" where it was not built.
        batch: images a call, when it was timed.
        latency_ms: of a batch that stays on the device, the least mean of several rounds;
            None where it was not timed.
        images_per_s: at that batch.
        sqnr_db: of its logits on the golden samples.
        passed: whether it holds its gate.
        error: why it was not built or not timed, or does not hold; "" otherwise.
        kept: whether it is the one that is now in the bundle.
    """

    candidate: str
    engine: str = ""
    batch: int = 0
    latency_ms: float | None = None
    images_per_s: float | None = None
    sqnr_db: float | None = None
    passed: bool = False
    error: str = ""
    kept: bool = False


@dataclass(frozen=True)
class BuildReport(Verdict):
    """The engines that were asked for.

    Attributes:
        outcomes: one an engine, in order.
        tuned: the candidates that were timed, where that was asked.
        remarks: a sentence for each precision that was made on the way.
    """

    outcomes: tuple[bundled.Outcome, ...]
    tuned: tuple[CandidateResult, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def errors(self) -> list[VanDeployError]:
        """Why engines failed, in order."""
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]

    @property
    def passed(self) -> bool:
        """Whether there is one and none failed."""
        return bool(self.outcomes) and not self.errors


def build_bundle(
    bundle: Bundle,
    settings: config.BuildSettings,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> BuildReport:
    """Return the engines asked for, built in the bundle unless they are there already.

    Raises:
        VanDeployError: as :meth:`van_deploy.api.Bundle.build`; nothing that cannot be built is
            found out after the first was.
    """
    host = host_here(device=device_number(settings.device))
    if settings.tune:
        return _fastest(bundle, settings, host, progress)
    if settings.backend == INDUCTOR:
        packages = []
        for one in packages_asked(bundle, settings, host):
            progress(f"{bundle.name} {one.precisions[0]}: compiling for {one.device}")
            package, reused = build_package(bundle.path, one, host, force=force)
            targets, how = package.targets, bundled.REUSED if reused else bundled.BUILT
            made_of = package.precision, targets, one.of(), bundled.FleetHost()
            cell = bundled.Cell(bundle.path, *made_of)
            packages.append(bundled.Outcome(cell, how, package.name, package=package))
        return BuildReport(tuple(packages))
    manifest = bundle.manifest
    cells = bundled.planned_engines(bundle.path, settings, manifest.batch, manifest.sizes, host)
    missing = [name for name in settings.precisions if name not in bundle.artifacts]
    made = [_made_missing(Bundle.open(bundle.path), name, settings, progress) for name in missing]
    outcomes = bundled.build_cells(
        cells, host=host, timing_cache=settings.timing_cache, force=force, progress=progress
    )
    return BuildReport(tuple(outcomes), remarks=tuple(made))


def build_fleet(
    path: Path,
    fleet: config.FleetSettings,
    *,
    force: bool = False,
    progress: Progress = no_progress,
    each: Callable[[int, int, bundled.Outcome], None],
) -> BuildReport:
    """Return what became of every engine of a fleet file; one that fails does not stop the others.

    Args:
        path: the file.
        fleet: where they are built.
        force: build engines even if they are there.
        progress: told what is being built.
        each: told of every engine that is done: which of how many, and how it ended.

    Raises:
        RecipeError: the file is wrong.
        MissingDependency: Ray was asked for and is not here.
    """
    cells = bundled.read_fleet(path)
    if fleet.on == "ray":
        stream = bundled.build_on_ray(cells, address=fleet.ray_address or None, force=force)
    else:
        stream = bundled.build_cells(cells, go_on=True, force=force, progress=progress)
    outcomes = []
    for count, outcome in enumerate(stream, 1):
        each(count, len(cells), outcome)
        outcomes.append(outcome)
    return BuildReport(tuple(sorted(outcomes, key=lambda outcome: cells.index(outcome.cell))))


def _made_missing(
    bundle: Bundle, precision: str, settings: config.BuildSettings, say: Progress
) -> str:
    """Make the ONNX file of a precision that a bundle lacks, and return what to tell of it.

    FP16 and BF16 are made as ``van-deploy quantize`` makes them, and so is INT8 where there are
    images to calibrate it on.

    Raises:
        BundleError: it cannot be made; the remedy is the command.
    """
    made_here = precision in MADE_HERE
    without = precision == "int8" and settings.images is None and bundle.name != EMBEDDED_NAME
    if without or not made_here:
        try:
            bundle.artifact(precision)
        except BundleError as error:
            more = "\nOr give --images DIR to make it on the way." * made_here
            raise BundleError(error.message, error.remedy + more) from None
    say(f"{precision} is not in the bundle yet: making it")
    wanted = cast("config.Precision", precision)
    asked = config.QuantizeSettings(precision=wanted, images=settings.images)
    result = quantize_bundle(bundle.path, asked, progress=say)
    held = "" if result else f"; its gate is not shown to hold: `van-deploy verify {bundle.path}`"
    return f"{precision}: was not in the bundle, and was made as `van-deploy quantize` does{held}"


class Candidate(NamedTuple):
    """One way to build.

    Attributes:
        described: in words, such as ``int8 pointwise, level 5, tiling full``.
        settings: of one precision.
        scope: what of the network is INT8; "" as it is in the bundle.
    """

    described: str
    settings: config.BuildSettings
    scope: str


def tuning_candidates(bundle: Bundle, settings: config.BuildSettings) -> list[Candidate]:
    """Return what is tried: precision, INT8 scope, and how hard the backend searches.

    The precisions are those asked for, or all that there are. INT8 scopes other than the
    bundle's own are made where there are images to calibrate with.
    """
    inductor, precisions = settings.backend == INDUCTOR, settings.precisions
    if "precisions" not in settings.model_fields_set:
        graphs = tuple(name for name, item in bundle.artifacts.items() if item.kind == "onnx")
        precisions = PRECISIONS if inductor else graphs
    batch = (settings.profiles or (bundle.manifest.batch,))[0]
    level = settings.optimization_level
    searches: dict[str, dict[str, Any]] = {
        f", level {level}, tiling {tiling}": {"optimization_level": level, "tiling": tiling}
        for level in ((3, 5) if level is None else (level,))
        for tiling in ("none", "full")
    }
    if inductor:
        searches = {"": {}}
        if settings.device != "cpu":
            searches[", max-autotune"] = {"max_autotune": True}
        if settings.device != "cpu" and batch.min == batch.max:
            searches[", fused kernels"] = {"fused_kernels": True}
    found = []
    for precision in precisions:
        scopes = SCOPES if precision == "int8" and settings.images is not None else ("",)
        for scope in scopes:
            for words, search in searches.items():
                if not (precision == "fp32" and "fused_kernels" in search):
                    update = {"precisions": (precision,), "tune": False, **search}
                    one = settings.model_copy(update=update)
                    found.append(Candidate(f"{precision} {scope}".strip() + words, one, scope))
    return found


def _fastest(
    bundle: Bundle, settings: config.BuildSettings, host: Host, say: Progress
) -> BuildReport:
    """Build the fastest candidate that holds its gate, and say what became of the others.

    Raises:
        MissingDependency: what would run candidates is not here.
        ConversionError: no candidate was built and holds its gate.
    """
    if host.gpu is None and settings.device != "cpu":
        raise MissingDependency(
            "--tune cannot time anything here: no NVIDIA GPU answers.",
            "Run it on the GPU that will serve, or leave --tune out. Packages for this processor "
            "are timed with --backend inductor --device cpu.",
        )
    candidates, found = tuning_candidates(bundle, settings), []
    with tempfile.TemporaryDirectory(prefix="van-deploy-tuning-") as folder:
        for number, candidate in enumerate(candidates, 1):
            say(f"{number} of {len(candidates)}: {candidate.described}")
            copy = Path(folder) / bundle.path.name
            shutil.copytree(bundle.path, copy)
            try:
                found.append(measure_candidate(copy, candidate))
            except VanDeployError as error:
                found.append(CandidateResult(candidate.described, error=error.message))
            finally:
                shutil.rmtree(copy)
    holding = [one for one in found if one.passed and one.latency_ms]
    if not holding:
        reasons = "; ".join(f"{one.candidate}: {one.error}" for one in found)
        raise ConversionError(
            f"No candidate holds its gate: {reasons}.", "See `van-deploy verify`."
        )
    best = found.index(min(holding, key=lambda one: one.latency_ms or 0.0))
    found[best] = replace(found[best], kept=True)
    return replace(_built(bundle.path, candidates[best]), tuned=tuple(found))


def _built(path: Path, candidate: Candidate) -> BuildReport:
    """Build a candidate, the INT8 graph it is built from first where it names a scope."""
    if candidate.scope:
        images = candidate.settings.images
        asked = config.QuantizeSettings(precision="int8", scope=(candidate.scope,), images=images)
        quantize_bundle(path, asked, force=True)
    return build_bundle(Bundle.open(path), candidate.settings)


def measure_candidate(copy: Path, candidate: Candidate) -> CandidateResult:
    """Build, judge and time one candidate in a copy of the bundle."""
    settings, (built,) = candidate.settings, _built(copy, candidate).outcomes
    bundle, name = Bundle.open(copy), built.engine
    batch = (settings.profiles or (bundle.manifest.batch,))[0]
    device = "cuda:0" if settings.device in (None, "cpu") else str(settings.device)
    verdict = verify_bundle(
        bundle,
        samples_for(bundle, None, None),
        config.VerifySettings(artifacts=(name,), device=device, modules=False),
    ).artifacts[name]
    passed = verdict.outcome is Found.PASS
    with Network(bundle, name, config.RunnerSettings(device=device)) as network:
        shape = (batch.opt, *network.input.shape)
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        seconds = _seconds(network.loaded_runner, images)
    timed = batch.opt, 1e3 * seconds, batch.opt / seconds
    sqnr_db = verdict.comparison.sqnr_db if verdict.comparison else None
    return CandidateResult(candidate.described, name, *timed, sqnr_db, passed, verdict.reason)


def _seconds(runner: Any, images: npt.NDArray[Any]) -> float:
    """Return the least mean time of a call: launches queued on the GPU, or runs on the CPU."""
    with contextlib.ExitStack() as stack:
        held = None
        if runner.on_gpu:
            held = stack.enter_context(contextlib.closing(runner.resident_batch(images)))
            held.upload()

        def calls(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                if held is None:
                    runner.run(images)
                else:
                    held.launch()
            if held is not None:
                held.download()
                held.logits()
            return (time.perf_counter() - start) / count

        calls(LEAST_CALLS)  # compiles, tunes, records
        count = max(LEAST_CALLS, round(LEAST_S / calls(LEAST_CALLS)))
        return min(calls(count) for _ in range(ROUNDS))
