"""Run a benchmark and return a report with everything needed to repeat it."""

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

from van_deploy.bench.contenders import REFERENCE, list_contenders, resize, select_contenders
from van_deploy.bench.document import BenchReport, Ceilings, Contender, Machine, Row
from van_deploy.bench.gpu import add_ratios, int8_warnings
from van_deploy.bench.interleaved import InterleavedBenchmark, TimedProcess
from van_deploy.bench.roofline import measure_limits
from van_deploy.bench.worker import MALLOC_SETTINGS, WorkerError, WorkerProcess
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import format_size
from van_deploy.data.samples import verification_images
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.provenance import tool_versions
from van_deploy.runners.base import gpu_index
from van_deploy.runners.network import network_input
from van_deploy.stopwatch import Progress, no_progress

# Batch sizes for a latency limit if none are given, up to the maximum of the bundle.
P99_BATCHES = (1, 2, 4, 8, 16, 32, 64)

RUNTIMES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13")
VARIABLES = (
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "OPENBLAS_"),
    *("CUDA_", "TORCH", "ORT_", "OPENVINO_", "OV_"),
)
# Share of this process's cores that other processes may use without a warning.
OTHER_LOAD_LIMIT = 0.1

# Coefficient of variation above which trtexec reports unstable timings.
CV_LIMIT_PERCENT = 2.5


def benchmark_bundle(
    bundle: Bundle, settings: BenchSettings, *, progress: Progress = no_progress
) -> BenchReport:
    """Time each artifact of ``bundle`` in each runtime of a device.

    Raises:
        BundleError: the bundle has no artifact, or a file differs from the manifest.
        UsageError: a runner, the reference or the GPU does not exist.
        MissingDependency: there is no GPU, or a runner requested by name cannot start.
        ConversionError: no contender could be timed.
    """
    start, load = time.perf_counter(), LoadMonitor()
    settings, contenders, skipped = _resolve_settings(bundle, settings)
    ceilings: Ceilings | None = None  # the report is valid without them
    if settings.roofline:
        progress("Measuring the limits of the device")
        with contextlib.suppress(WorkerError), WorkerProcess(settings.threads or 1) as process:
            ceilings = process.request("ceilings", device=settings.device, threads=settings.threads)
    fields = _measure(bundle, contenders, settings, progress)
    rows, network, machine = fields["rows"], bundle.manifest.architecture, load.machine()
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    timed_ms = sum(row.latency.calls * row.latency.mean_ms for row in rows if row.latency)
    warnings = (*warnings_for(rows, settings, machine), *fields.pop("warnings"))
    return BenchReport(
        schema="van-deploy/bench/5",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=bundle.name,
        weights=bundle.manifest.weights,
        settings=settings,
        machine=machine,
        versions=tool_versions(*RUNTIMES),
        environment={**MALLOC_SETTINGS, **variables},
        contenders=contenders,
        skipped=skipped,
        ceilings=ceilings,
        roofline=measure_limits(network, contenders, rows, ceilings) if ceilings else (),
        best_under_p99=_best_under(rows, settings.p99_ms) if settings.p99_ms else None,
        seconds={"wall": time.perf_counter() - start, "timed": timed_ms / 1e3},
        warnings=warnings,
        **fields,
    )


class LoadMonitor:
    """Measures the CPU load of other processes since its creation."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # starts the interval of the next call
        self._wall, self._own = time.perf_counter(), sum(os.times()[:4])

    def machine(self) -> Machine:
        """Return the machine with the load of other processes.

        This process and the children that have exited are not counted.
        """
        own = (sum(os.times()[:4]) - self._own) / (time.perf_counter() - self._wall)
        other = max(0.0, psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1) - own)
        processor, driver = cpu(), nvidia_driver()
        gpus, version = (driver.gpus, driver.version) if driver else ((), None)
        under_load = other > OTHER_LOAD_LIMIT * processor.cores_allowed
        return Machine(processor, gpus, version, other, under_load)


def _resolve_settings(
    bundle: Bundle, settings: BenchSettings
) -> tuple[BenchSettings, dict[str, Contender], dict[str, str]]:
    """Return the settings with defaults filled in, the contenders, and reasons for skipped ones."""
    driver = nvidia_driver()
    gpus = driver.gpus if driver else ()
    device = settings.device or ("cuda:0" if gpus else "cpu")
    index = gpu_index(device)
    if index is not None and settings.streams > 1:
        raise UsageError(
            f"--streams is {settings.streams}; on a GPU one stream is timed, with queued batches.",
            "Omit --streams, or use --device cpu.",
        )
    if index is not None and index >= len(gpus):
        raise MissingDependency(
            f"There is no NVIDIA GPU '{device}' on this machine.",
            "Use --device cpu, or run `van-deploy doctor` to list the GPUs.",
        )
    threads = settings.threads or (cpu().cores_allowed if index is None else 1)
    batch, batches = bundle.manifest.batch, settings.batches
    if "batches" not in settings.model_fields_set:
        if batch.fixed:
            batches = (batch.fixed,)
        elif settings.p99_ms:
            batches = tuple(n for n in P99_BATCHES if n <= batch.max)
    settings = settings.with_changes(device=device, threads=threads, batches=batches)
    contenders, skipped = select_contenders(list_contenders(bundle, settings), settings.runners)
    if contenders and settings.reference not in contenders:
        if settings.reference != REFERENCE:
            raise UsageError(
                f"The reference '{settings.reference}' is not among the runners.",
                f"Choose one of: {', '.join(contenders)}.",
            )
        settings = settings.with_changes(reference=next(iter(contenders)))
    return settings, contenders, skipped


def _measure(
    bundle: Bundle, contenders: Mapping[str, Contender], settings: BenchSettings, progress: Progress
) -> dict[str, Any]:
    """Time the contenders; return the report's images, rows, reference, profiles and warnings.

    On a CPU their rounds are interleaved; on a GPU they run one after the other.

    Raises:
        ConversionError: no contender could be timed.
    """
    rows, profiles, warnings, own = list[Row](), {}, list[str](), bundle.manifest.preprocessing
    sizes = settings.image_sizes or (own.image_size,)
    for size in sizes:
        preprocessing = own.override(image_size=size)
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
            folder, processes = Path(name), list[TimedProcess]()
            images = verification_images(bundle.name, preprocessing, max(settings.batches))
            for contender in contenders.values():
                inputs = folder / f"{contender.embedded}.npy"
                np.save(inputs, network_input(images.values, contender.embedded, preprocessing))
                sized = contender if size == own.image_size else resize(contender, size, folder)
                processes.append(TimedProcess(sized, inputs, size, settings))
            for group in [processes] if settings.device == "cpu" else [[p] for p in processes]:
                with InterleavedBenchmark(group, settings, progress) as benchmark:
                    rows += benchmark.run()
                    timed = {r.contender for r in rows if r.latency and r.image_size == size}
                    profiled = settings.profile and size == sizes[-1]
                    for process in [p for p in group if profiled and p.name in timed]:
                        if lines := process.profile():
                            profiles[process.name] = lines
                        else:
                            reason = " ".join(str(process.failure).split())
                            warnings.append(f"{process.name} was not profiled: {reason}")
    if not any(row.latency for row in rows):
        reasons = sorted({f"{row.contender}: {row.error}" for row in rows})
        raise ConversionError(
            f"No runner could be timed: {'; '.join(reasons) or 'none is available'}.",
            "Run `van-deploy doctor` to see what is missing.",
        )
    reference = settings.reference if any(row.ratio for row in rows) else None
    if settings.device != "cpu":
        reference, rows = add_ratios(rows, contenders.values(), settings.reference)
        warnings += int8_warnings(rows, contenders.values())
    fields = {"images": images.description, "rows": tuple(rows), "profiles": profiles}
    return {**fields, "reference": reference, "warnings": warnings}


def _best_under(rows: Sequence[Row], p99_ms: float) -> dict[str, Row | None]:
    """Return the row with the highest throughput under a p99 limit, or None.

    By contender; by contender and image size if there are several sizes.
    """
    several = len({row.image_size for row in rows}) > 1
    names = [row.contender + f" at {format_size(row.image_size)}" * several for row in rows]
    ranked = sorted(zip(names, rows, strict=True), key=lambda pair: pair[1].images_per_s or 0.0)
    fast = {name: row for name, row in ranked if row.latency and row.latency.p99_ms <= p99_ms}
    return {**dict.fromkeys(names), **fast}


def warnings_for(rows: Sequence[Row], settings: BenchSettings, machine: Machine) -> Iterator[str]:
    """Yield warnings about failures, throttling, load, variation and ratios that did not settle."""
    if failed := sum(bool(row.error) for row in rows):
        yield f"{failed} of {len(rows)} rows failed: each FAIL has the reason"
    if slowed := [row.throttled for row in rows if row.throttled]:
        reasons = ", ".join(sorted({reason for row_reasons in slowed for reason in row_reasons}))
        yield f"the GPU was throttled in {len(slowed)} of {len(rows)} rows: {reasons}"
    if settings.device != "cpu":
        return
    if machine.under_load:
        yield (
            f"other processes used {machine.other_load_cores:.1f} of {machine.cpu.cores_allowed} "
            "cores during the benchmark; latencies are too high, ratios are affected less"
        )
    cvs = {f"{r.contender} at batch {r.batch}": r.latency.cv_percent for r in rows if r.latency}
    if variations := {name: cv for name, cv in cvs.items() if cv > CV_LIMIT_PERCENT}:
        worst = max(variations, key=variations.__getitem__)
        yield (
            f"{len(variations)} of {len(rows)} rows vary by more than {CV_LIMIT_PERCENT} % between "
            f"calls (most: {worst}, {variations[worst]:.0f} %)"
        )
    settled = [row.settled for row in rows if row.settled is not None]
    if unsettled := settled.count(False):
        yield (
            f"{unsettled} of {len(settled)} ratios did not settle within "
            f"{settings.budget.tolerance_percent:g} % over quiet rounds before the time limit; "
            "increase --limit"
        )
