"""A benchmark from settings to a report that holds what is needed to repeat it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from van_deploy.bench.contenders import REFERENCE, chosen, contenders_of, resized
from van_deploy.bench.document import BenchReport, Ceilings, Contender, Machine, Row
from van_deploy.bench.gpu import int8_not_worth_it, with_ratios
from van_deploy.bench.race import Lane, Race
from van_deploy.bench.roofline import measured_limits
from van_deploy.bench.worker import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings
from van_deploy.data.samples import verification_images
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.provenance import tool_versions
from van_deploy.runners.base import gpu_index
from van_deploy.runners.network import network_input
from van_deploy.stopwatch import Progress, no_progress

# Batch sizes tried under a latency limit, as far as the bundle's range goes.
SWEEP = (1, 2, 4, 8, 16, 32, 64)

RUNTIMES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13")
VARIABLES = (
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "OPENBLAS_"),
    *("CUDA_", "TORCH", "ORT_", "OPENVINO_", "OV_"),
)
# Share of the cores this process may use that others may keep busy before it is said.
OTHER_LOAD_LIMIT = 0.1

# Coefficient of variation above which trtexec, too, calls its timings unstable.
CV_LIMIT_PERCENT = 2.5


def benchmark_bundle(
    bundle: Bundle, settings: BenchSettings, *, progress: Progress = no_progress
) -> BenchReport:
    """Return how fast each artifact of ``bundle`` is in each runtime of a device.

    Raises:
        BundleError: there is no artifact, or a file is not the manifest's.
        UsageError: a runner, the reference or the GPU is unknown.
        MissingDependency: there is no GPU, or a runner was asked for by name and cannot start.
        ConversionError: not one contender could be timed.
    """
    start, watch = time.perf_counter(), Watch()
    settings, contenders, skipped = _prepared(bundle, settings)
    ceilings: Ceilings | None = None  # the figures stand without it
    if settings.roofline:
        progress("Measuring what the device can do")
        given = {"device": settings.device, "threads": settings.threads}
        with contextlib.suppress(WorkerError), WorkerProcess(settings.threads or 1) as process:
            ceilings = process.ask("ceilings", **given)
    measured = _measured(bundle, contenders, settings, progress)
    rows, manifest, machine = measured["rows"], bundle.manifest, watch.machine()
    of = (manifest.architecture, contenders, rows)
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    timed_ms = sum(row.latency.calls * row.latency.mean_ms for row in rows if row.latency)
    said = (*warnings_of(rows, settings, machine), *measured.pop("warnings"))
    return BenchReport(
        schema="van-deploy/bench/5",
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
        best_under_p99=_best_under(rows, settings.p99_ms) if settings.p99_ms else None,
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


def _prepared(
    bundle: Bundle, settings: BenchSettings
) -> tuple[BenchSettings, dict[str, Contender], dict[str, str]]:
    """Return the settings with all that was left open, who is timed, and who is skipped and why."""
    driver = nvidia_driver()
    gpus = driver.gpus if driver else ()
    device = settings.device or ("cuda:0" if gpus else "cpu")
    index = gpu_index(device)
    if index is not None and settings.streams > 1:
        raise UsageError(
            f"--streams is {settings.streams}; on a GPU one is timed, with batches queued on it.",
            "Leave --streams out, or time with --device cpu.",
        )
    if index is not None and index >= len(gpus):
        raise MissingDependency(
            f"No NVIDIA GPU '{device}' answers here, so nothing can be timed on it.",
            "Time with --device cpu, or see `van-deploy doctor`.",
        )
    threads = settings.threads or (cpu().cores_allowed if index is None else 1)
    largest = max(1, bundle.manifest.batch.max)
    batches = tuple(n for n in SWEEP if n <= largest) if settings.p99_ms else settings.batches
    settings = settings.with_changes(device=device, threads=threads, batches=batches)
    contenders, skipped = chosen(contenders_of(bundle, settings), settings.runners)
    if contenders and settings.reference not in contenders:
        if settings.reference != REFERENCE:
            raise UsageError(
                f"The reference '{settings.reference}' is not among the runners.",
                f"Choose one of: {', '.join(contenders)}.",
            )
        settings = settings.with_changes(reference=next(iter(contenders)))
    return settings, contenders, skipped


def _measured(
    bundle: Bundle, contenders: Mapping[str, Contender], settings: BenchSettings, say: Progress
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
            folder, lanes = Path(name), list[Lane]()
            images = verification_images(bundle.name, preprocessing, max(settings.batches))
            for one in contenders.values():
                inputs = folder / f"{one.embedded}.npy"
                np.save(inputs, network_input(images.values, one.embedded, preprocessing))
                sized = one if size == own.image_size else resized(one, size, folder)
                lanes.append(Lane(sized, inputs, size, settings))
            for group in [lanes] if settings.device == "cpu" else [[lane] for lane in lanes]:
                with Race(group, settings, say) as race:
                    rows += race.sweep()
                    for lane in race.lanes if settings.profile else ():
                        if lines := lane.profile():
                            profiles[lane.name] = lines
                        elif lane.load_s:
                            warnings.append(f"{lane.name} was not profiled: {lane.failure}")
    if not any(row.latency for row in rows):
        reasons = sorted({f"{row.contender}: {row.error}" for row in rows})
        raise ConversionError(
            f"Not one runner could be timed: {'; '.join(reasons) or 'there is none here'}.",
            "See `van-deploy doctor` for what is missing.",
        )
    reference = settings.reference if any(row.ratio for row in rows) else None
    if settings.device != "cpu":
        reference, rows = with_ratios(rows, contenders.values(), settings.reference)
        warnings += int8_not_worth_it(rows, contenders.values())
    given = {"images": images.description, "rows": tuple(rows), "profiles": profiles}
    return {**given, "reference": reference, "warnings": warnings}


def _best_under(rows: Sequence[Row], p99_ms: float) -> dict[str, Row | None]:
    """Return each contender's row of most images a second under a limit, None for none."""
    best: dict[str, Row | None] = dict.fromkeys(row.contender for row in rows)
    for row in sorted(rows, key=lambda row: row.images_per_s or 0.0):
        if row.latency and row.latency.p99_ms <= p99_ms:
            best[row.contender] = row
    return best


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
    cvs = {f"{r.contender} at batch {r.batch}": r.latency.cv_percent for r in rows if r.latency}
    if spread := {name: cv for name, cv in cvs.items() if cv > CV_LIMIT_PERCENT}:
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
