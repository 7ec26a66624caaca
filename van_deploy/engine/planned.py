"""The engines that are asked of one bundle: planned, refused where impossible, then built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from van_deploy.bundle import Bundle
from van_deploy.config import BatchRange, BuildOptions, EngineSettings
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.backend import Backend, choose_backend
from van_deploy.engine.build import Progress
from van_deploy.engine.bundled import build_in_bundle, request_for
from van_deploy.engine.fleet import BUILT, REUSED, Cell, FleetHost, Outcome
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.refusals import refuse_impossible
from van_deploy.errors import UsageError

__all__ = ["Planned", "build_planned", "planned_engines"]


@dataclass(frozen=True)
class Planned:
    """One engine to build.

    Attributes:
        precision: the ONNX artefact it is built from.
        served: what the plan will serve.
        backend: what builds it.
        options: what is asked of it.
    """

    precision: str
    served: tuple[str, ...]
    backend: Backend
    options: BuildOptions


def planned_engines(
    settings: EngineSettings,
    batch: BatchRange | None,
    host: Host | None = None,
    sizes: SizeRange | None = None,
) -> list[Planned]:
    """Return the engines asked for: each precision, for each of the targets.

    Args:
        settings: what is asked.
        batch: the profile where none is asked for.
        host: this machine; None looks.
        sizes: of graphs with dynamic height and width, where none are asked for.

    Raises:
        UsageError: nothing builds what is asked.
        MissingDependency: what builds it is not installed, or wants a GPU.
    """
    if settings.backend == "inductor":
        raise UsageError(
            "A recipe's engines are TensorRT's.",
            "Build the package with `van-deploy build BUNDLE --backend inductor`.",
        )
    host = host or host_here()
    plans = []
    for targets in settings.targets or ((),):
        backend = choose_backend(settings.backend, targets, host.target)
        served = targets or ((host.target,) if host.target else ())
        options = settings.of(served if backend.builds_for_absent_gpus else targets, batch, sizes)
        refuse_impossible(backend, options, host, settings.timing_cache)
        plans += [Planned(name, served, backend, options) for name in settings.precisions]
    return sorted(plans, key=lambda plan: settings.precisions.index(plan.precision))


def build_planned(
    path: Path,
    plans: Sequence[Planned],
    *,
    timing_cache: Path | None = None,
    check_reproducible: bool = False,
    force: bool = False,
    progress: Callable[[str], Progress | None] | None = None,
) -> Iterator[Outcome]:
    """Build engines in the bundle at ``path``, and yield each as it ends.

    Args:
        path: the bundle; every file to build from is there, and is checked before any work.
        plans: from :func:`planned_engines`.
        timing_cache: a file to learn from and add to.
        check_reproducible: build twice and compare.
        force: build engines even if they are there.
        progress: asked, for each engine by its name, what to tell about its build.

    Raises:
        VanDeployError: as :func:`~van_deploy.engine.bundled.build_in_bundle`.
    """
    host, bundle = host_here(), Bundle.open(path)
    requests = [request_for(bundle, p.precision, p.backend, p.options, host) for p in plans]
    for plan, request in zip(plans, requests, strict=True):
        built = build_in_bundle(
            request,
            plan.backend,
            plan.options,
            host=host,
            timing_cache=timing_cache,
            check_reproducible=check_reproducible,
            force=force,
            progress=progress(request.name) if progress else None,
        )
        cell = Cell(
            bundle.path,
            plan.precision,
            plan.served,
            plan.options,
            FleetHost(),
            own_profiles=False,
        )
        yield Outcome(cell, REUSED if built.reused else BUILT, built.name, built.sidecar)
