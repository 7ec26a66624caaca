"""A race from settings to a report that holds what is needed to repeat it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.document import SCHEMA, BenchReport, Best, BestUnder, Seconds, Subject
from van_deploy.bench.lane import Loading, Row
from van_deploy.bench.limits import measured_limits
from van_deploy.bench.machine import Watch, busy_cores, machine_here
from van_deploy.bench.process import KEEP_MEMORY, WorkerError
from van_deploy.bench.quiet import Quiet
from van_deploy.bench.race import Race, ceilings_here
from van_deploy.bench.resize import resized_file
from van_deploy.bench.settings import with_known_reference
from van_deploy.bench.steadiness import load_before, warnings_of
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import ImageSize
from van_deploy.environment.hardware import cpu
from van_deploy.errors import ConversionError
from van_deploy.provenance import tool_versions

__all__ = ["Progress", "race_report"]

RUN_TIMES = (
    "torch",
    "timm",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
)
VARIABLES = (
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "OPENBLAS_"),
    *("CUDA_", "TORCH", "ORT_", "OPENVINO_", "OV_"),
)

Progress = Callable[[str], None]


@dataclass
class _Measured:
    """What the races of all image sizes came to."""

    rows: list[Row] = field(default_factory=list)
    loaded: dict[str, Loading] = field(default_factory=dict)
    timed_s: float = 0.0
    runner_s: float = 0.0
    waited_s: float = 0.0
    quiet: Quiet | None = None

    def add(self, race: Race) -> None:
        """Take over what a race's processes report once all of its batches are done."""
        self.loaded.update(race.loaded())
        self.timed_s += race.timed_s
        self.runner_s += race.runner_s
        self.waited_s += race.gauge.waited_s
        self.quiet = race.gauge.seen()


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
    settings = with_known_reference(settings, contenders)
    cores = cpu().cores_allowed
    threads = settings.threads or cores
    start, warnings = time.perf_counter(), load_before(busy_cores(), cores)
    ceilings = _ceilings(threads, progress) if settings.roofline else None
    watch = Watch(cores)
    race_of = partial(
        Race,
        threads=threads,
        streams=settings.streams,
        preprocessing=preprocessing,
        environment=environment,
        progress=progress,
    )
    measured = _measured(contenders, inputs, settings, native_size, race_of)
    state = watch.report()
    warnings += warnings_of(measured.rows, state, settings.budget.tolerance_percent)
    return BenchReport(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model,
        subject=subject,
        settings=settings,
        threads=threads,
        images=images,
        machine=machine_here(),
        python=platform.python_version(),
        versions=tool_versions(*RUN_TIMES),
        environment=_variables(),
        contenders={contender.name: contender for contender in contenders},
        reference=settings.reference if any(row.ratio for row in measured.rows) else None,
        rows=tuple(measured.rows),
        skipped=tuple(skipped),
        loading=measured.loaded,
        ceilings=ceilings,
        roofline=measured_limits(contenders, measured.rows, ceilings) if ceilings else (),
        best_under_p99=_best_under(measured.rows, settings.p99_ms),
        during=state,
        quiet=measured.quiet,
        seconds=_seconds(time.perf_counter() - start, measured),
        warnings=tuple(warnings),
    )


def _measured(
    contenders: Sequence[Contender],
    inputs: Mapping[ImageSize, Any],
    settings: BenchSettings,
    native_size: ImageSize,
    race_of: Callable[[Sequence[Contender]], Race],
) -> _Measured:
    """Return the rows of every image size, each in a race of its own; some have figures."""
    measured = _Measured()
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        folder = Path(name)
        for size, array in inputs.items():
            here = list(contenders)
            if size != native_size:
                here = [resized_file(contender, size, folder) for contender in contenders]
            with race_of(here) as race:
                measured.rows += _batches(race, _saved(array, folder, size), size, settings)
                measured.add(race)
    if not any(row.latency for row in measured.rows):
        raise _nothing(measured.rows)
    return measured


def _seconds(wall: float, measured: _Measured) -> Seconds:
    return Seconds(
        wall=wall,
        timed=measured.timed_s,
        in_runners=measured.runner_s,
        waited=measured.waited_s,
        overhead_percent=100 * (wall - measured.runner_s - measured.waited_s) / wall,
    )


def _nothing(rows: Sequence[Row]) -> ConversionError:
    reasons = sorted({f"{row.contender}: {row.error}" for row in rows})
    return ConversionError(
        f"Not one runner could be timed: {'; '.join(reasons) or 'there is none here'}.",
        "See `van-deploy doctor` for what is missing.",
    )


def _batches(race: Race, images: Path, size: ImageSize, settings: BenchSettings) -> list[Row]:
    """Return the rows of every batch; under a latency limit, the slow ones drop out."""
    rows: list[Row] = []
    running: set[str] | None = None
    for batch in sorted(set(settings.batches)):
        new = race.run(images, batch, size, settings.budget, settings.reference, running)
        rows += new
        if settings.p99_ms is not None:
            limit = settings.p99_ms
            running = {r.contender for r in new if r.latency and r.latency.p99_ms <= limit}
            if not running:
                break
    return rows


def _best_under(rows: Sequence[Row], p99_ms: float | None) -> BestUnder | None:
    """Return each contender's batch of most images a second under the limit, None for none."""
    if p99_ms is None:
        return None
    best: dict[str, Best | None] = {row.contender: None for row in rows}
    for row in rows:
        if row.latency is None or row.latency.p99_ms > p99_ms:
            continue
        current, rate = best[row.contender], row.images_per_s or 0.0
        if current is None or rate > current.images_per_s:
            best[row.contender] = Best(row.batch, row.latency.p99_ms, rate)
    return BestUnder(p99_ms, best)


def _ceilings(threads: int, progress: Progress | None) -> Ceilings | None:
    if progress is not None:
        progress("Measuring what the machine can do")
    try:
        return ceilings_here(threads)
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
