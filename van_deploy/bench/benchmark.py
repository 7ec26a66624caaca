"""A benchmark from settings to a report that holds what is needed to repeat it."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from van_deploy.bench.contenders import REFERENCE, chosen, contenders_of, gpu_answers, resized
from van_deploy.bench.document import SCHEMA, BenchReport, Ceilings, Contender, Machine, Row
from van_deploy.bench.gpu import int8_not_worth_it, with_ratios
from van_deploy.bench.race import Race
from van_deploy.bench.roofline import measured_limits
from van_deploy.bench.worker import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings
from van_deploy.data.samples import check_images
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.provenance import tool_versions
from van_deploy.runners.base import CudaOptions, gpu_index
from van_deploy.runners.cuda import no_device
from van_deploy.runners.network import network_input
from van_deploy.stopwatch import Progress, silent

SWEEP = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes tried under a latency limit, as far as the bundle's range goes."""

RUNTIMES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13")
VARIABLES = (
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "OPENBLAS_"),
    *("CUDA_", "TORCH", "ORT_", "OPENVINO_", "OV_"),
)
OTHER_LOAD_LIMIT = 0.1
"""Share of the cores this process may use that others may keep busy before it is said."""

CV_LIMIT_PERCENT = 2.5
"""Coefficient of variation above which trtexec, too, calls its timings unstable."""


def benchmark_bundle(
    bundle: Bundle, settings: BenchSettings, *, progress: Progress = silent
) -> BenchReport:
    """Return how fast each artifact of ``bundle`` is in each runtime of a device.

    Raises:
        BundleError: there is no artifact, or a file is not the manifest's.
        UsageError: a runner, the reference or the GPU is unknown.
        MissingDependency: there is no GPU, or a runner was asked for by name and cannot start.
        ConversionError: not one contender could be timed.
    """
    start, watch = time.perf_counter(), Watch()
    device = settings.device or ("cuda:0" if gpu_answers() else "cpu")
    _require_gpu(device, settings.streams)
    cuda = CudaOptions(False, settings.tf32, settings.conv_search, settings.fuse_conv_bias)
    contenders, skipped = chosen(contenders_of(bundle, device, cuda), settings.runners)
    settings = _completed(settings.changed(device=device), bundle, list(contenders))
    ceilings: Ceilings | None = None  # the figures stand without it
    if settings.roofline:
        progress("Measuring what the device can do")
        given = {"device": device, "threads": settings.threads}
        with contextlib.suppress(WorkerError), WorkerProcess(settings.threads or 1) as process:
            ceilings = process.ask("ceilings", **given)
    measured = _measured(bundle, list(contenders.values()), settings, progress)
    rows, manifest = measured["rows"], bundle.manifest
    of = (manifest.architecture, list(contenders.values()), rows)
    machine = watch.machine()
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    timed_ms = sum(row.latency.calls * row.latency.mean_ms for row in rows if row.latency)
    said = (*warnings_of(rows, settings, machine), *measured.pop("warnings"))
    return BenchReport(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=bundle.name,
        weights=manifest.weights,
        settings=settings,
        machine=machine,
        versions=tool_versions(*RUNTIMES),
        environment={**KEEP_MEMORY, **variables},
        contenders=contenders,
        skipped=skipped,
        ceilings=ceilings,
        roofline=measured_limits(*of, ceilings) if ceilings else (),
        best_under_p99=_best_under(rows, settings),
        seconds={"wall": time.perf_counter() - start, "timed": timed_ms / 1e3},
        warnings=said,
        **measured,
    )


class Watch:
    """Tells, of the time since it was made, what others used of the processor."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # from here on it says what was used since it was last asked
        self._wall, self._own = time.perf_counter(), sum(os.times()[:4])

    def machine(self) -> Machine:
        """Return the machine, and the load since the start.

        What this process and the children it has waited for used is not "others".
        """
        own = (sum(os.times()[:4]) - self._own) / (time.perf_counter() - self._wall)
        other = max(0.0, psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1) - own)
        here, driver = cpu(), nvidia_driver()
        gpus, version = (driver.gpus, driver.version) if driver else ((), None)
        under_load = other > OTHER_LOAD_LIMIT * here.cores_allowed
        return Machine(here, gpus, version, other, under_load)


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


def _completed(settings: BenchSettings, bundle: Bundle, names: Sequence[str]) -> BenchSettings:
    """Return settings with the threads, the batches to sweep, and a reference that runs."""
    settings = settings.changed(
        threads=settings.threads or (cpu().cores_allowed if settings.device == "cpu" else 1)
    )
    if settings.p99_ms is not None:
        largest = max(1, bundle.manifest.batch.max)
        settings = settings.changed(batches=tuple(b for b in SWEEP if b <= largest))
    if settings.reference in names or not names:
        return settings
    if settings.reference != REFERENCE:
        raise UsageError(
            f"The reference '{settings.reference}' is not among the runners.",
            f"Choose one of: {', '.join(names)}.",
        )
    return settings.changed(reference=names[0])


def _measured(
    bundle: Bundle, contenders: Sequence[Contender], settings: BenchSettings, say: Progress
) -> dict[str, Any]:
    """Time the contenders; return the report's images, rows, reference, profiles and warnings.

    On a CPU all of them race, on a GPU one comes after the other.

    Raises:
        ConversionError: not one could be timed.
    """
    rows, profiles, warnings, own = list[Row](), {}, list[str](), bundle.manifest.preprocessing
    for size in settings.image_sizes or (own.image_size,):
        preprocessing = own.override(image_size=size)
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
            folder, sized = Path(name), contenders
            images = check_images(bundle.name, preprocessing, max(settings.batches))
            for kind in {contender.embedded for contender in contenders}:
                np.save(folder / f"{kind}.npy", network_input(images.values, kind, preprocessing))
            if size != own.image_size:
                sized = [resized(contender, size, folder) for contender in contenders]
            for group in [sized] if settings.device == "cpu" else [[one] for one in sized]:
                with Race(group, settings, folder, size, say) as race:
                    rows += _swept(race, settings)
                    for lane in race.lanes if settings.profile else ():
                        if lines := lane.profile():
                            profiles[lane.contender.name] = lines
                        elif lane.load_s:
                            warnings.append(
                                f"{lane.contender.name} was not profiled: {lane.failure}"
                            )
    if not any(row.latency for row in rows):
        reasons = sorted({f"{row.contender}: {row.error}" for row in rows})
        raise ConversionError(
            f"Not one runner could be timed: {'; '.join(reasons) or 'there is none here'}.",
            "See `van-deploy doctor` for what is missing.",
        )
    reference = settings.reference if any(row.ratio for row in rows) else None
    if settings.device != "cpu":
        reference, rows = with_ratios(rows, contenders, settings.reference)
        warnings += int8_not_worth_it(rows, contenders)
    given = {"images": images.description, "rows": tuple(rows), "profiles": profiles}
    return {**given, "reference": reference, "warnings": warnings}


def _swept(race: Race, settings: BenchSettings) -> list[Row]:
    """Return the rows of every batch size; who is too slow for the limit drops out."""
    rows, running = list[Row](), {lane.contender.name for lane in race.lanes}
    for batch in sorted(set(settings.batches)):
        rows += race.run(batch, running) if running else []
        running -= {row.contender for row in rows if row.latency and not _keeps(row, settings)}
    return rows


def _keeps(row: Row, settings: BenchSettings) -> bool:
    """Return whether a row has a latency, and that keeps the limit where there is one."""
    return row.latency is not None and row.latency.p99_ms <= (settings.p99_ms or math.inf)


def _best_under(rows: Sequence[Row], settings: BenchSettings) -> dict[str, Row | None] | None:
    """Return each contender's row of most images a second under the limit, None for none."""
    best: dict[str, Row | None] = dict.fromkeys(row.contender for row in rows)
    for row in sorted(rows, key=lambda row: row.images_per_s or 0.0):
        if _keeps(row, settings):
            best[row.contender] = row
    return None if settings.p99_ms is None else best


def warnings_of(rows: Sequence[Row], settings: BenchSettings, machine: Machine) -> Iterator[str]:
    """Yield what to keep in mind: load, heat, variation, unsettled ratios."""
    if slowed := [row.throttled for row in rows if row.throttled]:
        reasons = ", ".join(sorted({reason for why in slowed for reason in why}))
        yield f"the GPU was slowed down in {len(slowed)} of {len(rows)} rows: {reasons}"
    if settings.device != "cpu":
        return
    if machine.under_load:
        yield (
            f"other work kept {machine.other_load_cores:.1f} of {machine.cpu.cores_allowed} cores "
            "busy while this ran; latencies are too long, ratios less so"
        )
    spread = {
        f"{row.contender} at batch {row.batch}": row.latency.cv_percent
        for row in rows
        if row.latency and row.latency.cv_percent > CV_LIMIT_PERCENT
    }
    if spread:
        worst = max(spread, key=spread.__getitem__)
        yield (
            f"{len(spread)} of {len(rows)} rows vary by more than {CV_LIMIT_PERCENT} % from call "
            f"to call (most: {worst}, {spread[worst]:.0f} %)"
        )
    settled = [row.settled for row in rows if row.settled is not None]
    if loose := settled.count(False):
        yield (
            f"{loose} of {len(settled)} ratios did not settle within "
            f"{settings.budget.tolerance_percent:g} % over quiet rounds before their time was up; "
            "a longer --limit gives them more"
        )
