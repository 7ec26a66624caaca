"""A bundle's benchmark: its artefacts in every run time that is here, against each other."""

from __future__ import annotations

from typing import Any

from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import chosen, contenders_of
from van_deploy.bench.document import BenchReport, Subject
from van_deploy.bench.report import Progress, race_report
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import ImageSize

__all__ = ["benchmark_bundle"]

SWEEP = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes tried under a latency limit, as far as the bundle's range goes."""


def benchmark_bundle(
    bundle: Bundle, settings: BenchSettings, *, progress: Progress | None = None
) -> BenchReport:
    """Return how fast each artefact of ``bundle`` is in each run time that is here.

    Raises:
        BundleError: there is no artefact, or a file is not the manifest's.
        UsageError: a runner or the reference is unknown.
        MissingDependency: a runner was asked for by name and cannot start.
        ConversionError: not one contender could be timed.
    """
    from van_deploy.data import check_images

    entries = chosen(contenders_of(bundle), settings.runners)
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    skipped = [entry for entry in entries if isinstance(entry, Skipped)]
    if settings.p99_ms is not None:
        largest = bundle.manifest.batch.max
        settings = settings.changed(batches=tuple(b for b in SWEEP if b <= max(1, largest)))
    preprocessing = bundle.manifest.preprocessing
    sizes = settings.image_sizes or (preprocessing.image_size,)
    inputs: dict[ImageSize, Any] = {}
    described = ""
    for size in sizes:
        at_size = preprocessing.override(image_size=size)
        checked = check_images(bundle.name, at_size, max(settings.batches))
        inputs[size], described = checked.inputs, checked.description
    return race_report(
        contenders,
        skipped,
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
