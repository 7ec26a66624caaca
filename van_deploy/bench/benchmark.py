"""A benchmark from settings to a report that holds what is needed to repeat it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import REFERENCE, chosen, contenders_of, gpu_answers
from van_deploy.bench.document import SCHEMA, BenchReport, Best, BestUnder, Seconds, Subject
from van_deploy.bench.machine import During, Watch, busy_cores, machine_here
from van_deploy.bench.on_gpu import gpu_rows, int8_not_worth_it, with_ratios
from van_deploy.bench.process import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bench.profile import ProfileLine
from van_deploy.bench.race import Lane, Loading, Progress, Race, Row
from van_deploy.bench.roofline import measured_limits
from van_deploy.bench.timing import CV_LIMIT_PERCENT
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings
from van_deploy.config.bench import LEAST_ROUNDS
from van_deploy.config.sizes import ImageSize, sides_of, size_text
from van_deploy.environment.hardware import cpu
from van_deploy.errors import ConversionError, UsageError
from van_deploy.provenance import tool_versions
from van_deploy.runners.base import CudaOptions

__all__ = ["Measured", "benchmark_bundle", "race_report", "warnings_of"]

SWEEP = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes tried under a latency limit, as far as the bundle's range goes."""

RUNTIMES = (
    *("torch", "timm", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-rtx-cu13"),
)
VARIABLES = (
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "OPENBLAS_"),
    *("CUDA_", "TORCH", "ORT_", "OPENVINO_", "OV_"),
)


def benchmark_bundle(
    bundle: Bundle, settings: BenchSettings, *, progress: Progress | None = None
) -> BenchReport:
    """Return how fast each artifact of ``bundle`` is in each runtime of a device.

    Raises:
        BundleError: there is no artifact, or a file is not the manifest's.
        UsageError: a runner or the reference is unknown.
        MissingDependency: a runner was asked for by name and cannot start.
        ConversionError: not one contender could be timed.
    """
    from van_deploy.data import check_images

    settings = settings.changed(device=settings.device or ("cuda:0" if gpu_answers() else "cpu"))
    cuda = CudaOptions(
        use_tf32=settings.tf32,
        cudnn_conv_algo_search=settings.conv_search,
        fuse_conv_bias=settings.fuse_conv_bias,
    )
    entries = chosen(contenders_of(bundle, settings.device or "cpu", cuda), settings.runners)
    if settings.p99_ms is not None:
        largest = max(1, bundle.manifest.batch.max)
        settings = settings.changed(batches=tuple(b for b in SWEEP if b <= largest))
    preprocessing = bundle.manifest.preprocessing
    inputs: dict[ImageSize, Any] = {}
    described = ""
    for size in settings.image_sizes or (preprocessing.image_size,):
        at_size = preprocessing.override(image_size=size)
        checked = check_images(bundle.name, at_size, max(settings.batches))
        inputs[size], described = checked.inputs, checked.description
    return race_report(
        [entry for entry in entries if isinstance(entry, Contender)],
        [entry for entry in entries if isinstance(entry, Skipped)],
        inputs,
        settings,
        native_size=preprocessing.image_size,
        images=described,
        preprocessing=preprocessing.as_dict(),
        model=bundle.name,
        subject=Subject(
            bundle=str(bundle.path),
            parameters=bundle.manifest.parameters,
            weights=bundle.manifest.weights,
            batch_range=bundle.manifest.batch,
        ),
        progress=progress,
    )


@dataclass
class Measured:
    """What the races of all image sizes came to.

    Attributes:
        rows: of all contenders, batches and sizes.
        loaded: what loading took, by name.
        profiles: by name.
        timed_s: seconds of timed calls.
        reference: what ratios are against.
    """

    rows: list[Row] = field(default_factory=list)
    loaded: dict[str, Loading] = field(default_factory=dict)
    profiles: dict[str, tuple[ProfileLine, ...]] = field(default_factory=dict)
    timed_s: float = 0.0
    reference: str | None = None

    def add(self, lane: Lane, profile: bool) -> None:
        """Take over what a contender's process says besides its rows."""
        if lane.loaded:
            self.loaded[lane.contender.name] = lane.loaded
        lane.failure = None if lane.loaded else lane.failure
        if profile and (answer := lane.ask("profile")):
            lines = tuple(ProfileLine(**line) for line in answer["lines"])
            self.profiles[lane.contender.name] = lines


def race_report(
    contenders: Sequence[Contender],
    skipped: Sequence[Skipped],
    inputs: Mapping[ImageSize, Any],
    settings: BenchSettings,
    *,
    native_size: ImageSize,
    images: str,
    preprocessing: Mapping[str, Any] | None = None,
    model: str = "",
    subject: Subject | None = None,
    environment: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Return the report of a race between any contenders.

    Args:
        contenders: who runs.
        skipped: who does not, for the report.
        inputs: ``(N, C, S, S)`` float32 for each image size ``S``.
        settings: what to measure.
        native_size: the image size the contenders' files were made for.
        images: what the inputs are, in words.
        preprocessing: mean and std, for graphs with embedded preprocessing.
        model: what the report calls the network.
        subject: the bundle the files are of, for the report.
        environment: variables of every process.
        progress: told what is going on.

    Raises:
        UsageError: the reference is not among the contenders.
        ConversionError: not one contender could be timed.
    """
    say, device = progress or (lambda _: None), settings.device or "cpu"
    settings = _with_reference(settings, contenders)
    cores = cpu().cores_allowed
    threads = settings.threads or cores
    start, busy = time.perf_counter(), busy_cores()
    ceilings = _ceilings(threads, device, say) if settings.roofline else None
    watch = Watch(cores)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        sized = [
            (
                size,
                _saved(array, Path(folder), size),
                _resized(contenders, size, native_size, folder),
            )
            for size, array in inputs.items()
        ]
        if device == "cpu":
            more = {"preprocessing": preprocessing, "environment": environment, "progress": say}
            measured = _on_cpu(sized, settings, threads, **more)
        else:
            measured = _on_gpu(sized, settings, preprocessing, say)
    rows, during = measured.rows, watch.report()
    if not any(row.latency for row in rows):
        raise _nothing(rows)
    return BenchReport(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model,
        subject=subject,
        settings=settings,
        device=device,
        threads=threads,
        images=images,
        machine=machine_here(),
        python=platform.python_version(),
        versions=tool_versions(*RUNTIMES),
        environment=_variables(),
        contenders={contender.name: contender for contender in contenders},
        reference=measured.reference,
        rows=tuple(rows),
        skipped=tuple(skipped),
        loading=measured.loaded,
        ceilings=ceilings,
        roofline=measured_limits(contenders, rows, ceilings) if ceilings else (),
        profiles=measured.profiles,
        best_under_p99=_best_under(rows, settings.p99_ms),
        during=during,
        seconds=Seconds(time.perf_counter() - start, measured.timed_s),
        warnings=(
            *warnings_of(rows, settings, busy, cores, during),
            *(int8_not_worth_it(rows, contenders) if device != "cpu" else ()),
        ),
    )


def _on_cpu(
    sized: Sequence[tuple[ImageSize, Path, list[Contender]]],
    settings: BenchSettings,
    threads: int,
    **more: Any,
) -> Measured:
    """Race all contenders at each image size."""
    measured = Measured()
    for size, images, contenders in sized:
        with Race(contenders, threads, streams=settings.streams, **more) as race:
            running: set[str] | None = None
            for batch in sorted(set(settings.batches)):
                given = (images, batch, size, settings.budget, settings.reference, running)
                rows = race.run(*given)
                measured.rows += rows
                measured.timed_s += sum(lane.timed_s for lane in race.lanes)
                if settings.p99_ms is not None:  # the slow ones drop out
                    running = {r.contender for r in rows if _keeps(r, settings.p99_ms)}
                    if not running:
                        break
            for lane in race.lanes:
                measured.add(lane, settings.profile)
    if any(row.ratio for row in measured.rows):
        measured.reference = settings.reference
    return measured


def _on_gpu(
    sized: Sequence[tuple[ImageSize, Path, list[Contender]]],
    settings: BenchSettings,
    preprocessing: Mapping[str, Any] | None,
    say: Progress,
) -> Measured:
    """Time one contender after the other, each at every batch size."""
    measured = Measured()
    batches = sorted(set(settings.batches))
    for size, images, contenders in sized:
        for contender in contenders:
            given = (contender, images, batches, size, settings, preprocessing, say)
            with gpu_rows(*given) as (lane, rows):
                measured.rows += rows
                measured.add(lane, settings.profile)
    contenders = sized[0][2]
    measured.reference, measured.rows = with_ratios(measured.rows, contenders, settings.reference)
    return measured


def _with_reference(settings: BenchSettings, contenders: Sequence[Contender]) -> BenchSettings:
    """Return settings whose reference runs: the one asked for, else the first contender."""
    names = [contender.name for contender in contenders]
    if settings.reference in names or not names:
        return settings
    if settings.reference != REFERENCE:
        raise UsageError(
            f"The reference '{settings.reference}' is not among the runners.",
            f"Choose one of: {', '.join(names)}.",
        )
    return settings.changed(reference=names[0])


def _resized(
    contenders: Sequence[Contender], size: ImageSize, native_size: ImageSize, folder: str
) -> list[Contender]:
    """Return contenders whose ONNX files are declared for another image size.

    After the rewrites nothing in a VAN's graph depends on the size of its input but the input's
    own declaration. PyTorch takes any size, and an engine refuses what is outside its profile.
    """
    if size == native_size:
        return list(contenders)
    import onnx

    from van_deploy.graph.files import save_onnx

    result = []
    for contender in contenders:
        source = Path(contender.file)
        target = Path(folder) / f"{source.stem}-{size_text(size)}.onnx"
        if source.suffix == ".onnx" and not target.exists():
            model = onnx.load_model(source)
            dims = model.graph.input[0].type.tensor_type.shape.dim
            axes = (1, 2) if contender.embedded == "uint8" else (2, 3)
            for axis, side in zip(axes, sides_of(size), strict=True):
                dims[axis].dim_value = side
            for value in model.graph.output:  # a backbone's maps have other sides then
                value.type.tensor_type.ClearField("shape")
            del model.graph.value_info[:]  # shapes inferred for the old size
            save_onnx(model, target)
        file = str(target) if source.suffix == ".onnx" else contender.file
        result.append(replace(contender, file=file))
    return result


def _nothing(rows: Sequence[Row]) -> ConversionError:
    reasons = sorted({f"{row.contender}: {row.error}" for row in rows})
    return ConversionError(
        f"Not one runner could be timed: {'; '.join(reasons) or 'there is none here'}.",
        "See `van-deploy doctor` for what is missing.",
    )


def _keeps(row: Row, p99_ms: float) -> bool:
    return row.latency is not None and row.latency.p99_ms <= p99_ms


def _best_under(rows: Sequence[Row], p99_ms: float | None) -> BestUnder | None:
    """Return each contender's batch of most images a second under the limit, None for none."""
    if p99_ms is None:
        return None
    best: dict[str, Best | None] = {row.contender: None for row in rows}
    for row in rows:
        current = best[row.contender]
        if _keeps(row, p99_ms) and (current is None or row.rate > current.images_per_s):
            best[row.contender] = Best(row.batch, row.times.p99_ms, row.rate)
    return BestUnder(p99_ms, best)


def _ceilings(threads: int, device: str, say: Progress) -> Ceilings | None:
    """Return the device's measured limits, from a process of their own."""
    say("Measuring what the device can do")
    try:
        with WorkerProcess(threads) as process:
            given = {"threads": threads, "seconds": 0.5, "device": device}
            return Ceilings(**process.ask("ceilings", **given))
    except WorkerError:
        return None  # the figures stand without it; the report says there is no roofline


def _saved(array: Any, folder: Path, size: ImageSize) -> Path:
    import numpy as np

    path = folder / f"images-{size}.npy"
    np.save(path, array)
    return path


def _variables() -> dict[str, str]:
    """Return the environment variables that change how fast things run."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    return {**KEEP_MEMORY, **found}


# --- whether the figures can be believed -----------------------------------------------------


def warnings_of(
    rows: Sequence[Row], settings: BenchSettings, busy: float, cores: int, during: During
) -> Iterator[str]:
    """Yield what to keep in mind: load, heat, variation, unsettled ratios."""
    if busy > 0.1 * cores:
        yield (
            f"the machine was under load before anything ran: {busy:.1f} of "
            f"{cores} cores busy; do not compare these figures with others"
        )
    if settings.device != "cpu":
        yield from _of_the_gpu(rows)
        return
    if during.under_load:
        yield (
            f"other work kept {during.other_load_cores:.1f} cores busy while this ran; "
            "latencies are too long, ratios less so"
        )
    spread = {_named(row): row.times.cv_percent for row in rows if row.latency}
    wild = {name: cv for name, cv in spread.items() if cv > CV_LIMIT_PERCENT}
    if wild:
        worst = max(wild, key=lambda name: wild[name])
        yield (
            f"{len(wild)} of {len(rows)} rows vary by more than {CV_LIMIT_PERCENT} % from call "
            f"to call (most: {worst}, {wild[worst]:.0f} %)"
        )
    few = [row for row in rows if row.ratio and row.round_quiet and not _has_quiet(row)]
    if few:
        yield (
            f"the machine was disturbed in nearly every round of {len(few)} of {len(rows)} rows, "
            "by others on its processor or by heat: their ratios are over all rounds, and may "
            "be others tomorrow"
        )
    loose = {_named(r): r.ratio.uncertainty_percent for r in rows if r.ratio and r.settled is False}
    if loose:
        worst = max(loose, key=lambda name: loose[name])
        yield (
            f"{len(loose)} of {sum(row.settled is not None for row in rows)} ratios did not settle "
            f"within {settings.budget.tolerance_percent:g} % before their time was up (least: "
            f"{worst}, {loose[worst]:.1f} %); a longer --limit gives them more"
        )


def _of_the_gpu(rows: Sequence[Row]) -> Iterator[str]:
    slowed = [row for row in rows if row.throttled]
    if slowed:
        reasons = sorted({reason for row in slowed for reason in row.throttled})
        yield f"the GPU was slowed down in {len(slowed)} of {len(rows)} rows: {', '.join(reasons)}"
    unsteady = [row for row in rows if row.steady is False]
    if unsteady:
        yield f"the GPU's clock was not steady in {len(unsteady)} of {len(rows)} rows"


def _named(row: Row) -> str:
    return f"{row.contender} at batch {row.batch}"


def _has_quiet(row: Row) -> bool:
    return sum(row.round_quiet) >= min(LEAST_ROUNDS, len(row.round_quiet))
