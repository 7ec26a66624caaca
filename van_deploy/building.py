"""Builds engines in bundles; graphs that are missing are made first.

``--tune`` finds the fastest settings on this device: every candidate is built, verified and
timed in a copy of the bundle, and only the fastest is built in the bundle itself. A candidate
that fails its gate is never selected.
"""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from van_deploy import config
from van_deploy.bench.gpu import Timer, gpu_monitor, repeat_for, time_resident, timer_for
from van_deploy.bundle import Bundle
from van_deploy.checks.gates import Outcome as CheckOutcome
from van_deploy.checks.golden import Samples, samples_for
from van_deploy.checks.verify import verify_bundle
from van_deploy.documents import Verdict
from van_deploy.engine import fleet
from van_deploy.engine.backend import Host, detect_host
from van_deploy.engine.fleet import BuildOutcome
from van_deploy.engine.inductor import INDUCTOR, PRECISIONS, build_package, package_settings
from van_deploy.errors import BundleError, ConversionError, MissingDependency, VanDeployError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.precision.plan import SCOPES
from van_deploy.runners.base import Runner, gpu_index
from van_deploy.runners.network import Network
from van_deploy.stopwatch import Progress, no_progress

MIN_S, MIN_CALLS = 1.0, 10


@dataclass(frozen=True)
class CandidateResult:
    """Result of one candidate build.

    Attributes:
        candidate: description of the settings.
        engine: its name; "" if it was not built.
        batch: images per call.
        latency_ms: of a batch: the median of queued launches on a GPU, with images and outputs on
            the device; the fastest call on a CPU; None if it was not timed.
        images_per_s: at that batch.
        sqnr_db: of its logits on the golden samples.
        passed: whether it passes its gate.
        error: why it was not built or not timed, or fails its gate; "" otherwise.
        selected: whether it is the fastest, which is built in the bundle.
    """

    candidate: str
    engine: str = ""
    batch: int = 0
    latency_ms: float | None = None
    images_per_s: float | None = None
    sqnr_db: float | None = None
    passed: bool = False
    error: str = ""
    selected: bool = False


@dataclass(frozen=True)
class BuildReport(Verdict):
    """Results of the requested builds.

    Attributes:
        outcomes: one per engine, in order.
        tuned: the candidates of ``--tune``.
        remarks: a sentence for each missing precision that was made first.
    """

    outcomes: tuple[BuildOutcome, ...]
    tuned: tuple[CandidateResult, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def errors(self) -> list[VanDeployError]:
        """The errors of the builds that failed, in order."""
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]

    @property
    def passed(self) -> bool:
        """Whether there are engines and none failed."""
        return bool(self.outcomes) and not self.errors


def build_bundle(
    bundle: Bundle, settings: config.BuildSettings, *, force: bool, progress: Progress
) -> BuildReport:
    """Build the requested engines in the bundle; current ones are reused.

    Raises:
        VanDeployError: as :meth:`van_deploy.api.Bundle.build`. Invalid requests are reported
            before the first engine is built.
    """
    host = detect_host(device=gpu_index(settings.device or "cpu") or 0)
    if settings.tune:
        return _tune(bundle, settings, host, force, progress)
    if settings.backend == INDUCTOR:
        packages = []
        for one in package_settings(bundle, settings, host):
            progress(f"{bundle.name} {one.precisions[0]}: compiling for {one.device}")
            packages.append(build_package(bundle.path, one, host, force=force))
        return BuildReport(tuple(packages))
    manifest = bundle.manifest
    cells = fleet.engine_cells(bundle.path, settings, manifest.batch, manifest.sizes, host)
    missing = [name for name in settings.precisions if name not in bundle.artifacts]
    remarks = [_make_graph(Bundle.open(bundle.path), name, settings, progress) for name in missing]
    outcomes = fleet.build_cells(
        cells, host=host, timing_cache=settings.timing_cache, force=force, progress=progress
    )
    return BuildReport(tuple(outcomes), remarks=tuple(remarks))


def build_fleet(
    path: Path,
    settings: config.FleetSettings,
    *,
    force: bool,
    progress: Progress,
    on_outcome: Callable[[int, int, BuildOutcome], None],
) -> BuildReport:
    """Build every engine of a fleet file; a failure does not stop the others.

    Args:
        path: the file.
        settings: whether to build on this machine or on a Ray cluster.
        force: build engines even if they exist.
        progress: receives the current build.
        on_outcome: called with the number, the total and the outcome of each build.

    Raises:
        RecipeError: the file is invalid.
        MissingDependency: a Ray cluster is requested and not available.
    """
    cells = fleet.read_fleet(path)
    if settings.on == "ray":
        stream = fleet.build_on_ray(cells, address=settings.ray_address or None, force=force)
    else:
        stream = fleet.build_cells(cells, keep_going=True, force=force, progress=progress)
    outcomes = []
    for count, outcome in enumerate(stream, 1):
        on_outcome(count, len(cells), outcome)
        outcomes.append(outcome)
    return BuildReport(tuple(sorted(outcomes, key=lambda outcome: cells.index(outcome.cell))))


def _make_graph(
    bundle: Bundle, precision: str, settings: config.BuildSettings, progress: Progress
) -> str:
    """Make a missing graph as ``van-deploy quantize`` does, and return a remark about it.

    INT8 needs images to calibrate on.

    Raises:
        BundleError: it cannot be made; the remedy is the command.
    """
    has_images = settings.images is not None or bundle.name == EMBEDDED_NAME
    is_quantized = precision in {"fp16", "bf16", "int8"}
    if not is_quantized or (precision == "int8" and not has_images):
        try:
            bundle.artifact(precision)
        except BundleError as error:
            hint = "\nOr give --images DIR to make it in this command." * is_quantized
            raise BundleError(error.message, error.remedy + hint) from None
    progress(f"Making {precision}, which is not in the bundle")
    quantize = config.QuantizeSettings(precision=cast("Any", precision), images=settings.images)
    result = quantize_bundle(bundle.path, quantize, progress=progress)
    failure = "" if result else f"; its gate did not pass: `van-deploy verify {bundle.path}`"
    return f"{precision}: not in the bundle; made as with `van-deploy quantize`{failure}"


class Candidate(NamedTuple):
    """Settings of one candidate build.

    Attributes:
        description: such as ``int8 pointwise, level 5, tiling full``.
        settings: of one precision.
        scope: the INT8 scope; "" for the bundle's own graph.
    """

    description: str
    settings: config.BuildSettings
    scope: str


def tuning_candidates(bundle: Bundle, settings: config.BuildSettings) -> list[Candidate]:
    """Return the candidates: every precision, INT8 scope and search option of the backend.

    A search option that the user gives is that of every candidate. Precisions are the requested
    ones, or all in the bundle. INT8 scopes besides the bundle's own need images to calibrate on.
    """
    inductor, precisions = settings.backend == INDUCTOR, settings.precisions
    if "precisions" not in settings.model_fields_set:
        graphs = tuple(name for name, item in bundle.artifacts.items() if item.kind == "onnx")
        precisions = PRECISIONS if inductor else graphs
    batch = (settings.profiles or (bundle.manifest.batch,))[0]
    level = settings.optimization_level
    tilings = (settings.tiling,) if "tiling" in settings.model_fields_set else ("none", "full")
    searches: dict[str, dict[str, Any]] = {
        f", level {level}, tiling {tiling}": {"optimization_level": level, "tiling": tiling}
        for level in ((3, 5) if level is None else (level,))
        for tiling in tilings
    }
    if inductor:
        names = {"max_autotune": ", max-autotune", "fused_kernels": ", fused kernels"}
        given = "".join(suffix for name, suffix in names.items() if getattr(settings, name))
        searches = {given: {}}
        if not given and settings.device != "cpu":
            tried = list(names)[: 1 + (batch.min == batch.max)]
            searches |= {names[name]: {name: True} for name in tried}
    candidates = []
    for precision in precisions:
        scopes = SCOPES if precision == "int8" and settings.images is not None else ("",)
        for scope in scopes:
            for suffix, search in searches.items():
                if not (precision == "fp32" and "fused_kernels" in search):
                    update = {"precisions": (precision,), "tune": False, **search}
                    description = f"{precision} {scope}".strip() + suffix
                    one = settings.model_copy(update=update)
                    candidates.append(Candidate(description, one, scope))
    return candidates


def _tune(
    bundle: Bundle, settings: config.BuildSettings, host: Host, force: bool, progress: Progress
) -> BuildReport:
    """Build the fastest candidate that passes its gate.

    Raises:
        MissingDependency: no device can time the candidates.
        ConversionError: no candidate was built and passes its gate.
        VanDeployError: all candidates failed for the same reason, such as a missing compiler.
    """
    if host.gpu is None and settings.device != "cpu":
        raise MissingDependency(
            "--tune cannot time candidates: no NVIDIA GPU is available.",
            "Run it on the GPU that will serve, or without --tune. To time packages for this CPU, "
            "use --backend inductor --device cpu.",
        )
    candidates, results = tuning_candidates(bundle, settings), list[CandidateResult]()
    errors = list[VanDeployError]()
    with tempfile.TemporaryDirectory(prefix="van-deploy-tuning-") as folder:
        for number, candidate in enumerate(candidates, 1):
            progress(f"{number} of {len(candidates)}: {candidate.description}")
            copy = Path(folder) / "bundle"
            shutil.copytree(bundle.path, copy)
            try:
                results.append(measure_candidate(copy, candidate))
            except VanDeployError as error:
                errors.append(error)
                results.append(CandidateResult(candidate.description, error=error.message))
            finally:
                shutil.rmtree(copy)
    passing = [result for result in results if result.passed and result.latency_ms]
    if len(errors) == len(results) and len({error.message for error in errors}) == 1:
        raise errors[0]
    if not passing:
        reasons = "; ".join(f"{result.candidate}: {result.error.rstrip('.')}" for result in results)
        raise ConversionError(
            f"No candidate passes its gate: {reasons}.", "See `van-deploy verify`."
        )
    best = results.index(min(passing, key=lambda result: result.latency_ms or 0.0))
    results[best] = replace(results[best], selected=True)
    built = _build_candidate(bundle.path, candidates[best], force=force)
    return replace(built, tuned=tuple(results))


def _build_candidate(path: Path, candidate: Candidate, *, force: bool = False) -> BuildReport:
    """Build a candidate; one with an INT8 scope makes its graph first."""
    if candidate.scope:
        images = candidate.settings.images
        int8 = config.QuantizeSettings(precision="int8", scope=(candidate.scope,), images=images)
        quantize_bundle(path, int8, force=True)
    return build_bundle(Bundle.open(path), candidate.settings, force=force, progress=no_progress)


def measure_candidate(copy: Path, candidate: Candidate) -> CandidateResult:
    """Build, verify and time one candidate in a copy of the bundle."""
    settings, (built,) = candidate.settings, _build_candidate(copy, candidate).outcomes
    bundle, name = Bundle.open(copy), built.engine
    batch = (settings.profiles or (bundle.manifest.batch,))[0]
    device = "cuda:0" if settings.device in (None, "cpu") else str(settings.device)
    samples = samples_for(bundle, None, None)
    verify = config.VerifySettings(artifacts=(name,), device=device, modules=False)
    verdict = verify_bundle(bundle, samples, verify).artifacts[name]
    passed = verdict.outcome is CheckOutcome.PASS
    with Network(bundle, name, config.RunnerSettings(device=device)) as network:
        images = _timed_images(network, samples, batch.opt)
        seconds = _call_seconds(network.loaded_runner, images, device)
    timed = batch.opt, 1e3 * seconds, batch.opt / seconds
    sqnr_db = verdict.comparison.sqnr_db if verdict.comparison else None
    return CandidateResult(candidate.description, name, *timed, sqnr_db, passed, verdict.reason)


def _timed_images(network: Network, samples: Samples, batch: int) -> npt.NDArray[Any]:
    """Return the golden samples in the network's input format, repeated to a batch."""
    images = network.prepare(samples.inputs if samples.pixels is None else samples.pixels)
    return np.resize(images, (batch, *images.shape[1:]))


def _call_seconds(runner: Runner, images: npt.NDArray[Any], device: str) -> float:
    """Return the time of a call: of launches queued on the GPU, as in ``bench``, or on the CPU."""
    if not runner.on_gpu:
        runner.run(images)  # compiles and tunes
        call = functools.partial(Timer().time_ms, lambda: runner.run(images))
        return min(repeat_for(MIN_S, MIN_CALLS, call)) / 1e3
    with contextlib.closing(runner.resident_batch(images)) as resident:
        timer, monitor = timer_for(resident, device), gpu_monitor(device)
        fields = time_resident(resident, len(images), timer, monitor, MIN_S, MIN_CALLS)
    return float(fields["queued_ms"]) / 1e3
