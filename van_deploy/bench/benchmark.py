"""A bundle's benchmark: settings in, a report out that holds what is needed to repeat it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import REFERENCE, chosen, contenders_of
from van_deploy.bench.machine import Watch, busy_cores, machine_facts
from van_deploy.bench.process import WorkerError
from van_deploy.bench.race import Budget, Race, Row, ceilings_here
from van_deploy.bench.resize import resized_file
from van_deploy.bench.roofline import Work, limit_of, work_of_file
from van_deploy.bench.timing import CV_LIMIT_PERCENT
from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import cpu
from van_deploy.errors import ConversionError, UsageError
from van_deploy.provenance import tool_versions

__all__ = ["SCHEMA", "BenchReport", "Settings", "benchmark_bundle", "race_report"]

SCHEMA = "van-deploy/bench/1"
SWEEP = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes tried under a latency limit, as far as the bundle's range goes."""

RUN_TIMES = (
    "torch",
    "timm",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
)
BATCH_LIMIT = 4096
LOAD_LIMIT = 0.1  # of the cores, before anything runs

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        batches: batch sizes.
        threads: of each run time; None for the cores this process may use.
        streams: calls in flight at the same time; the threads are shared among them.
        image_sizes: sides of the input; empty for the bundle's own.
        runners: which contenders (see :func:`~van_deploy.bench.contenders.chosen`).
        reference: what ratios are against; where it does not run, the first that does.
        p99_ms: look for the best batch whose 99th percentile stays below this, too.
        budget: time for one contender at one batch size.
        roofline: measure the machine's limits and compare with them.
    """

    batches: tuple[int, ...] = (1, 8)
    threads: int | None = None
    streams: int = 1
    image_sizes: tuple[int, ...] = ()
    runners: tuple[str, ...] = ()
    reference: str = REFERENCE
    p99_ms: float | None = None
    budget: Budget = field(default_factory=Budget)
    roofline: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if not self.batches or not all(1 <= batch <= BATCH_LIMIT for batch in self.batches):
            raise UsageError(
                f"The batch sizes {list(self.batches)} are not between 1 and {BATCH_LIMIT}.",
                "Write them with commas: --batches 1,8,32.",
            )
        if self.streams < 1 or (self.threads is not None and self.threads < 1):
            raise UsageError(
                f"{self.threads} threads and {self.streams} streams make no sense.",
                "Give 1 or more of each.",
            )
        if self.p99_ms is not None and not self.p99_ms > 0:
            raise UsageError(f"{self.p99_ms:g} ms is no latency limit.", "Give more than 0.")


@dataclass(frozen=True)
class BenchReport:
    """What was measured, and everything needed to measure it again.

    Attributes:
        rows: one a contender, batch and image size.
        skipped: who did not start, and why.
        facts: the rest, ready for JSON: see :meth:`as_dict`.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    facts: Mapping[str, Any]

    @property
    def measured(self) -> list[Row]:
        """The rows with figures."""
        return [row for row in self.rows if row.latency is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report, ready for JSON."""
        return {
            "schema": SCHEMA,
            **self.facts,
            "rows": [asdict(row) for row in self.rows],
            "skipped": [asdict(entry) for entry in self.skipped],
        }


def benchmark_bundle(
    bundle: Bundle, settings: Settings, *, progress: Progress | None = None
) -> BenchReport:
    """Return how fast each artefact of ``bundle`` is in each run time that is here.

    Raises:
        BundleError: there is no artefact, or a file is not the manifest's.
        UsageError: a runner or the reference is unknown.
        MissingDependency: a runner was asked for by name and cannot start.
        ConversionError: not one contender could be timed.
    """
    from van_deploy.checks.sample_images import images_to_check
    from van_deploy.model.preprocess import Preprocessing

    entries = chosen(contenders_of(bundle), settings.runners)
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    skipped = [entry for entry in entries if isinstance(entry, Skipped)]
    if settings.p99_ms is not None:
        largest = int(bundle.manifest["batch"]["max"])
        settings = replace(settings, batches=tuple(b for b in SWEEP if b <= max(1, largest)))
    preprocessing = Preprocessing.from_dict(bundle.manifest["preprocessing"])
    sizes = settings.image_sizes or (preprocessing.image_size,)
    inputs: dict[int, Any] = {}
    described = ""
    for size in sizes:
        at_size = preprocessing.override(image_size=size)
        inputs[size], described = images_to_check(bundle.name, at_size, max(settings.batches))
    return race_report(
        contenders,
        skipped,
        inputs,
        settings,
        native_size=preprocessing.image_size,
        images=described,
        preprocessing=preprocessing.as_dict(),
        about={
            "bundle": str(bundle.path),
            "model": bundle.name,
            "parameters": bundle.manifest.get("parameters"),
            "weights": bundle.manifest.get("weights"),
            "batch_range": bundle.manifest.get("batch"),
        },
        progress=progress,
    )


def race_report(
    contenders: Sequence[Contender],
    skipped: Sequence[Skipped],
    inputs: Mapping[int, Any],
    settings: Settings,
    *,
    native_size: int,
    images: str,
    preprocessing: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
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
        about: what to say of the model in the report.
        environment: variables of every process.
        progress: told what is going on.

    Raises:
        UsageError: the reference is not among the contenders.
        ConversionError: not one contender could be timed.
    """
    settings = _with_reference(settings, contenders)
    threads = settings.threads or cpu().cores_allowed
    start, warnings = time.perf_counter(), []
    before = busy_cores()
    if before is not None and before > LOAD_LIMIT * cpu().cores_allowed:
        warnings.append(
            f"the machine was under load before anything ran: {before:.1f} of "
            f"{cpu().cores_allowed} cores busy; do not compare these figures with others"
        )
    ceilings = _ceilings(threads, progress) if settings.roofline else None
    watch = Watch(cpu().cores_allowed)
    rows: list[Row] = []
    loaded: dict[str, Any] = {}
    spent = {"timed_s": 0.0, "runner_s": 0.0, "cpu_s": 0.0}
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        for size, array in inputs.items():
            here = list(contenders)
            if size != native_size:
                here = [resized_file(c, size, Path(folder)) for c in contenders]
            with Race(
                here,
                threads,
                streams=settings.streams,
                preprocessing=preprocessing,
                environment=environment,
                progress=progress,
            ) as race:
                rows += _batches(race, _saved(array, Path(folder), size), size, settings)
                loaded.update(race.loaded())
                spent["timed_s"] += race.timed_s
                spent["runner_s"] += race.runner_s
                spent["cpu_s"] += race.timed_cpu_s
    wall = time.perf_counter() - start
    state = watch.report()
    warnings += _warnings(rows, state)
    report = BenchReport(
        rows=tuple(rows),
        skipped=tuple(skipped),
        facts={
            **(about or {}),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": {**asdict(settings), "threads": threads, "images": images},
            "reference": settings.reference if any(row.ratio for row in rows) else None,
            "contenders": {c.name: c.as_dict() for c in contenders},
            "loading": loaded,
            "machine": machine_facts(),
            "during": state,
            "python": platform.python_version(),
            "versions": tool_versions(*RUN_TIMES),
            "environment": _variables(),
            "ceilings": ceilings.as_dict() if ceilings else None,
            "roofline": _roofline(contenders, rows, ceilings) if ceilings else [],
            "best_under_p99": _best_under(rows, settings.p99_ms),
            "seconds": {
                "wall": wall,
                "timed": spent["timed_s"],
                "in_runners": spent["runner_s"],
                "overhead_percent": 100 * (wall - spent["runner_s"]) / wall,
            },
            "warnings": warnings,
        },
    )
    if not report.measured:
        reasons = sorted({f"{row.contender}: {row.error}" for row in rows})
        raise ConversionError(
            f"Not one runner could be timed: {'; '.join(reasons) or 'there is none here'}.",
            "See `van-deploy doctor` for what is missing.",
        )
    return report


def _batches(race: Race, images: Path, size: int, settings: Settings) -> list[Row]:
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


def _best_under(rows: Sequence[Row], p99_ms: float | None) -> dict[str, Any] | None:
    """Return each contender's batch of most images a second under the limit, None for none."""
    if p99_ms is None:
        return None
    best: dict[str, Any] = {row.contender: None for row in rows}
    for row in rows:
        if row.latency is None or row.latency.p99_ms > p99_ms:
            continue
        current = best[row.contender]
        if current is None or (row.images_per_s or 0) > current["images_per_s"]:
            best[row.contender] = {
                "batch": row.batch,
                "p99_ms": row.latency.p99_ms,
                "images_per_s": row.images_per_s,
            }
    return {"limit_ms": p99_ms, "best": best}


def _roofline(
    contenders: Sequence[Contender], rows: Sequence[Row], ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Return each row's time over the least possible time for the same graph."""
    graphs = {c.name: c for c in contenders if c.file.endswith(".onnx")}
    plain = next((c for c in graphs.values() if c.precision == "fp32"), None)
    counted: dict[tuple[str, int, int], Work] = {}
    result = []
    for row in rows:
        contender = next(c for c in contenders if c.name == row.contender)
        graph = graphs.get(row.contender, plain)  # PyTorch does the same arithmetic
        if row.latency is None or graph is None:
            continue
        key = (graph.file, row.batch, row.image_size)
        if key not in counted:
            counted[key] = work_of_file(Path(graph.file), row.batch, row.image_size)
        limit = limit_of(counted[key], ceilings, contender.precision)
        if limit is None:
            continue
        per_batch = 1e3 * row.batch / row.images_per_s if row.images_per_s else row.latency.p50_ms
        result.append(
            {
                "contender": row.contender,
                "batch": row.batch,
                "image_size": row.image_size,
                "work": counted[key].as_dict(),
                "limit": limit.as_dict(),
                "percent_of_limit": 100 * limit.ms / per_batch,
            }
        )
    return result


def _ceilings(threads: int, progress: Progress | None) -> Ceilings | None:
    if progress is not None:
        progress("Measuring what the machine can do")
    try:
        return ceilings_here(threads)
    except WorkerError:
        return None  # the figures stand without it; the report says there is no roofline


def _saved(array: Any, folder: Path, size: int) -> Path:
    import numpy as np

    path = folder / f"images-{size}.npy"
    np.save(path, array)
    return path


def _with_reference(settings: Settings, contenders: Sequence[Contender]) -> Settings:
    """Return settings whose reference runs: the one asked for, else the first contender."""
    names = [contender.name for contender in contenders]
    if settings.reference in names or not names:
        return settings
    if settings.reference != REFERENCE:
        raise UsageError(
            f"The reference '{settings.reference}' is not among the runners.",
            f"Choose one of: {', '.join(names)}.",
        )
    return replace(settings, reference=names[0])


def _warnings(rows: Sequence[Row], state: Mapping[str, Any]) -> list[str]:
    found = []
    if state["under_load"]:
        found.append(
            f"other work kept {state['other_load_cores']:.1f} cores busy while this ran; "
            "latencies are too long, ratios less so"
        )
    if state["throttled"]:
        found.append(f"the processor was slowed for heat {state['throttled']:.0f} times")
    wild = [r for r in rows if r.latency and r.latency.cv_percent > CV_LIMIT_PERCENT]
    if wild:
        worst = max(wild, key=lambda r: r.latency.cv_percent if r.latency else 0.0)
        found.append(
            f"{len(wild)} of {len(rows)} rows vary by more than {CV_LIMIT_PERCENT} % from call to "
            f"call (most: {worst.contender} at batch {worst.batch}, "
            f"{worst.latency.cv_percent if worst.latency else 0.0:.0f} %)"
        )
    return found


def _variables() -> dict[str, str]:
    """Return the environment variables that change how fast things run."""
    prefixes = ("OMP_", "MKL_", "KMP_", "OPENBLAS_", "CUDA_", "TORCH", "ORT_", "OPENVINO_", "OV_")
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}
