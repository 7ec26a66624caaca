"""A benchmark from settings to a report that holds what is needed to repeat it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import REFERENCE, chosen, contenders_of, gpu_answers
from van_deploy.bench.document import SCHEMA, BenchReport, Best, BestUnder, Seconds, Subject
from van_deploy.bench.lane import Lane, Loading, Row
from van_deploy.bench.machine import Watch, busy_cores, machine_here
from van_deploy.bench.on_gpu import gpu_rows, int8_not_worth_it, with_ratios
from van_deploy.bench.process import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bench.profile import ProfileLine
from van_deploy.bench.race import Progress, Race
from van_deploy.bench.resize import resized
from van_deploy.bench.roofline import measured_limits
from van_deploy.bench.steadiness import warnings_of
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import ImageSize, size_text
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.provenance import tool_versions
from van_deploy.runners.base import CudaOptions, gpu_index

__all__ = ["Measured", "benchmark_bundle"]

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


Sized = tuple[ImageSize, Path, list[Contender]]
"""An image size, the file of its images, and the contenders that take it."""


def benchmark_bundle(
    bundle: Bundle, settings: BenchSettings, *, progress: Progress | None = None
) -> BenchReport:
    """Return how fast each artifact of ``bundle`` is in each runtime of a device.

    Raises:
        BundleError: there is no artifact, or a file is not the manifest's.
        UsageError: a runner, the reference or the GPU is unknown.
        MissingDependency: there is no GPU, or a runner was asked for by name and cannot start.
        ConversionError: not one contender could be timed.
    """
    say, device = progress or (lambda _: None), settings.device or _default_device()
    _require_gpu(device, settings.streams)
    cuda = CudaOptions(False, settings.tf32, settings.conv_search, settings.fuse_conv_bias)
    entries = chosen(contenders_of(bundle, device, cuda), settings.runners)
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    if settings.p99_ms is not None:
        largest = max(1, bundle.manifest.batch.max)
        settings = settings.changed(batches=tuple(b for b in SWEEP if b <= largest))
    settings = _with_reference(settings.changed(device=device), contenders)
    cores, manifest = cpu().cores_allowed, bundle.manifest
    threads = settings.threads or cores
    start, busy = time.perf_counter(), busy_cores()
    ceilings = _ceilings(threads, device, say) if settings.roofline else None
    watch = Watch(cores)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        sized, images = _sized(bundle, contenders, settings, Path(folder))
        given = (settings, manifest.preprocessing.as_dict(), say)
        measured = _on_cpu(sized, threads, *given) if device == "cpu" else _on_gpu(sized, *given)
    rows, during = measured.rows, watch.report()
    if not any(row.latency for row in rows):
        raise _nothing(rows)
    warnings = [*warnings_of(rows, settings, busy, cores, during)]
    return BenchReport(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=bundle.name,
        subject=Subject(str(bundle.path), manifest.parameters, manifest.weights, manifest.batch),
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
        skipped=tuple(entry for entry in entries if isinstance(entry, Skipped)),
        loading=measured.loaded,
        ceilings=ceilings,
        roofline=measured_limits(manifest.architecture, contenders, rows, ceilings)
        if ceilings
        else (),
        profiles=measured.profiles,
        best_under_p99=_best_under(rows, settings.p99_ms),
        during=during,
        seconds=Seconds(time.perf_counter() - start, measured.timed_s),
        warnings=(*warnings, *int8_not_worth_it(rows, contenders)),
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


def _sized(
    bundle: Bundle, contenders: Sequence[Contender], settings: BenchSettings, folder: Path
) -> tuple[list[Sized], str]:
    """Return each image size with its images and contenders, and what the images are."""
    import numpy as np

    from van_deploy.data import check_images

    preprocessing, result, described = bundle.manifest.preprocessing, [], ""
    for size in settings.image_sizes or (preprocessing.image_size,):
        at_size = preprocessing.override(image_size=size)
        checked = check_images(bundle.name, at_size, max(settings.batches))
        described, path = checked.description, folder / f"images-{size_text(size)}.npy"
        np.save(path, checked.inputs)
        taken = list(contenders)
        if size != preprocessing.image_size:
            taken = [resized(contender, size, folder) for contender in contenders]
        result.append((size, path, taken))
    return result, described


def _on_cpu(
    sized: Sequence[Sized],
    threads: int,
    settings: BenchSettings,
    preprocessing: Mapping[str, Any],
    say: Progress,
) -> Measured:
    """Race all contenders at each image size."""
    measured = Measured()
    more: dict[str, Any] = {"preprocessing": preprocessing, "progress": say}
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
    sized: Sequence[Sized],
    settings: BenchSettings,
    preprocessing: Mapping[str, Any],
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


def _default_device() -> str:
    return "cuda:0" if gpu_answers() else "cpu"


def _require_gpu(device: str, streams: int) -> None:
    """Refuse a GPU that is not there, or several streams on one, before anything is started."""
    index, driver = gpu_index(device), nvidia_driver()
    if index is None:
        return
    if streams > 1:
        raise UsageError(
            f"--streams is {streams}, and on a GPU one stream is timed, with batches queued on it.",
            "Leave --streams out, or time with --device cpu.",
        )
    if driver is None or not driver.gpus:
        raise MissingDependency(
            f"No NVIDIA GPU answers here, so nothing can be timed on '{device}'.",
            "Time with --device cpu, or see `van-deploy doctor`.",
        )
    if index >= len(driver.gpus):
        raise UsageError(
            f"There is no device {device}; CUDA sees {len(driver.gpus)}, from cuda:0.",
            "Give one of these, or look at CUDA_VISIBLE_DEVICES.",
        )


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


def _variables() -> dict[str, str]:
    """Return the environment variables that change how fast things run."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    return {**KEEP_MEMORY, **found}
