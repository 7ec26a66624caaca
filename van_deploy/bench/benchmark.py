"""A benchmark from settings to a report that holds what is needed to repeat it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import REFERENCE, chosen, contenders_of, gpu_answers, resized
from van_deploy.bench.document import SCHEMA, BenchReport, Best, BestUnder, Seconds, Subject
from van_deploy.bench.lane import Lane
from van_deploy.bench.machine import Watch, busy_cores, machine_here, warnings_of
from van_deploy.bench.on_gpu import gpu_row, int8_not_worth_it, with_ratios
from van_deploy.bench.process import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bench.profile import ProfileLine
from van_deploy.bench.race import Progress, Race
from van_deploy.bench.roofline import measured_limits
from van_deploy.bench.timing import Loading, Row
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import ImageSize
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.provenance import tool_versions
from van_deploy.runners.base import CudaOptions, gpu_index
from van_deploy.runners.cuda import no_device

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
        UsageError: a runner, the reference or the GPU is unknown.
        MissingDependency: there is no GPU, or a runner was asked for by name and cannot start.
        ConversionError: not one contender could be timed.
    """
    say, device = progress or (lambda _: None), settings.device
    device = device or ("cuda:0" if gpu_answers() else "cpu")
    _require_gpu(device, settings.streams)
    cuda = CudaOptions(False, settings.tf32, settings.conv_search, settings.fuse_conv_bias)
    entries = chosen(contenders_of(bundle, device, cuda), settings.runners)
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    settings = _completed(settings, device, bundle, contenders)
    cores, manifest = cpu().cores_allowed, bundle.manifest
    threads = settings.threads or cores
    start, busy = time.perf_counter(), busy_cores()
    ceilings = _ceilings(threads, device, say) if settings.roofline else None
    watch, run = Watch(cores), _Run(bundle, settings, threads, say)
    for size in settings.image_sizes or (manifest.preprocessing.image_size,):
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            run.at(size, contenders, Path(folder))
    reference = settings.reference if any(row.ratio for row in run.rows) else None
    if device != "cpu":
        reference, run.rows = with_ratios(run.rows, contenders, settings.reference)
    rows, during = run.rows, watch.report()
    if not any(row.latency for row in rows):
        reasons = sorted({f"{row.contender}: {row.error}" for row in rows})
        raise ConversionError(
            f"Not one runner could be timed: {'; '.join(reasons) or 'there is none here'}.",
            "See `van-deploy doctor` for what is missing.",
        )
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    limits = measured_limits(manifest.architecture, contenders, rows, ceilings)
    int8 = int8_not_worth_it(rows, contenders) if device != "cpu" else []
    return BenchReport(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=bundle.name,
        subject=Subject(str(bundle.path), manifest.parameters, manifest.weights, manifest.batch),
        settings=settings,
        device=device,
        threads=threads,
        images=run.images,
        machine=machine_here(),
        python=platform.python_version(),
        versions=tool_versions(*RUNTIMES),
        environment={**KEEP_MEMORY, **variables},
        contenders={contender.name: contender for contender in contenders},
        reference=reference,
        rows=tuple(rows),
        skipped=tuple(entry for entry in entries if isinstance(entry, Skipped)),
        loading=run.loaded,
        ceilings=ceilings,
        roofline=limits,
        profiles=run.profiles,
        best_under_p99=_best_under(rows, settings.p99_ms),
        during=during,
        seconds=Seconds(time.perf_counter() - start, run.timed_s),
        warnings=(*warnings_of(rows, settings, busy, cores, during), *int8, *run.unprofiled),
    )


class _Run:
    """The contenders timed at one image size after the other, and what that came to.

    Attributes:
        rows: of all contenders, batches and sizes.
        loaded: what loading took, by name.
        profiles: by name, where they were asked for.
        unprofiled: whose time is not known, and why.
        timed_s: seconds of timed calls.
        images: what they are, in words.
    """

    def __init__(
        self, bundle: Bundle, settings: BenchSettings, threads: int, say: Progress
    ) -> None:
        self.rows: list[Row] = []
        self.loaded: dict[str, Loading] = {}
        self.profiles: dict[str, tuple[ProfileLine, ...]] = {}
        self.unprofiled: list[str] = []
        self.timed_s, self.images = 0.0, ""
        self._bundle, self._settings, self._threads, self._say = bundle, settings, threads, say

    def at(self, size: ImageSize, contenders: Sequence[Contender], folder: Path) -> None:
        """Time the contenders at one image size; ``folder`` is for images and graphs of it."""
        import numpy as np

        from van_deploy.data import check_images
        from van_deploy.runners.network import network_input

        preprocessing = self._bundle.manifest.preprocessing
        at_size = preprocessing.override(image_size=size)
        checked = check_images(self._bundle.name, at_size, max(self._settings.batches))
        self.images = checked.description
        for embedded in {contender.embedded for contender in contenders}:
            given = network_input(checked.values, embedded, at_size)
            np.save(folder / f"{embedded}.npy", given)
        if size != preprocessing.image_size:
            contenders = [resized(contender, size, folder) for contender in contenders]
        if self._settings.device == "cpu":
            self._race(size, contenders, folder)
        else:
            self._on_gpu(size, contenders, folder)

    def _race(self, size: ImageSize, contenders: Sequence[Contender], images: Path) -> None:
        """Race all contenders; under a latency limit the slow ones drop out."""
        settings, running = self._settings, None
        with Race(contenders, self._threads, streams=settings.streams, progress=self._say) as race:
            for batch in sorted(set(settings.batches)):
                given = (images, batch, size, settings.budget, settings.reference, running)
                rows = race.run(*given)
                self.rows += rows
                self.timed_s += sum(lane.timed_s for lane in race.lanes)
                running = {row.contender for row in rows if _keeps(row, settings.p99_ms)}
                if not running:
                    break
            for lane in race.lanes:
                self._add(lane)

    def _on_gpu(self, size: ImageSize, contenders: Sequence[Contender], images: Path) -> None:
        """Time one contender after the other, each at every batch size.

        Under a latency limit larger batches are not tried once one is too slow.
        """
        settings = self._settings
        for contender in contenders:
            self._say(f"Loading {contender.name}")
            with WorkerProcess(1) as process:
                lane = Lane(contender)
                lane.load(process, 1)
                for batch in sorted(set(settings.batches)):
                    self._say(f"Batch {batch}: {contender.name}")
                    row = gpu_row(lane, images, batch, size, settings.budget)
                    self.rows.append(row)
                    if row.latency and not _keeps(row, settings.p99_ms):
                        break
                self._add(lane)

    def _add(self, lane: Lane) -> None:
        """Take over what a contender's process says besides its rows."""
        if lane.loaded is None:
            return
        self.loaded[lane.contender.name], lane.failure = lane.loaded, None
        if not self._settings.profile:
            return
        if lines := lane.ask("profile"):
            self.profiles[lane.contender.name] = tuple(lines)
        elif lane.failure is not None:
            self.unprofiled.append(f"{lane.contender.name} was not profiled: {lane.failure}")


def _completed(
    settings: BenchSettings, device: str, bundle: Bundle, contenders: Sequence[Contender]
) -> BenchSettings:
    """Return settings with the device, the batches to sweep, and a reference that runs."""
    settings = settings.changed(device=device)
    if settings.p99_ms is not None:
        largest = max(1, bundle.manifest.batch.max)
        settings = settings.changed(batches=tuple(b for b in SWEEP if b <= largest))
    names = [contender.name for contender in contenders]
    if settings.reference in names or not names:
        return settings
    if settings.reference != REFERENCE:
        raise UsageError(
            f"The reference '{settings.reference}' is not among the runners.",
            f"Choose one of: {', '.join(names)}.",
        )
    return settings.changed(reference=names[0])


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
        raise no_device(index, len(driver.gpus))


def _keeps(row: Row, p99_ms: float | None) -> bool:
    """Return whether a row's latency keeps the limit; without a limit any row does."""
    return p99_ms is None or (row.latency is not None and row.latency.p99_ms <= p99_ms)


def _best_under(rows: Sequence[Row], p99_ms: float | None) -> BestUnder | None:
    """Return each contender's batch of most images a second under the limit, None for none."""
    if p99_ms is None:
        return None
    best: dict[str, Best | None] = dict.fromkeys(row.contender for row in rows)
    for row in sorted(rows, key=lambda row: row.images_per_s or 0.0):
        if row.latency and row.images_per_s and _keeps(row, p99_ms):
            best[row.contender] = Best(row.batch, row.latency.p99_ms, row.images_per_s)
    return BestUnder(p99_ms, best)


def _ceilings(threads: int, device: str, say: Progress) -> Ceilings | None:
    """Return the device's measured limits, from a process of their own."""
    say("Measuring what the device can do")
    try:
        with WorkerProcess(threads) as process:
            given = {"threads": threads, "seconds": 0.5, "device": device}
            ceilings: Ceilings = process.ask("ceilings", **given)
            return ceilings
    except WorkerError:
        return None  # the figures stand without it; the report says there is no roofline
