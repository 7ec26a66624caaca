"""The fastest settings for one bundle on one device: candidates built, judged and timed.

Candidates are built in a copy of the bundle, so that only the one that is kept is ever in the
bundle itself. An engine that does not hold its gate is never the fastest.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.checks.gates import Outcome
from van_deploy.checks.golden import samples_for
from van_deploy.checks.verify import verify_bundle
from van_deploy.config import BatchRange, BuildSettings, QuantizeSettings, VerifySettings
from van_deploy.engine.host import Host
from van_deploy.errors import ConversionError, MissingDependency, VanDeployError
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.results import Tuned
from van_deploy.runners.network import Network

LEAST_S, LEAST_CALLS, ROUNDS = 0.3, 10, 5
SCOPES = ("pointwise", "deep", "all")


@dataclass(frozen=True)
class Candidate:
    """One way to build.

    Attributes:
        settings: of one precision.
        scope: what of the network is INT8; "" as it is in the bundle.
    """

    settings: BuildSettings
    scope: str = ""

    @property
    def described(self) -> str:
        """The settings in words, such as ``int8 pointwise, level 5, tiling full``."""
        asked = self.settings
        words = [f"{asked.precisions[0]} {self.scope}".strip()]
        if asked.backend == "inductor":
            words += ["max-autotune"] * asked.max_autotune
            words += ["fused kernels"] * asked.fused_kernels
        else:
            words += [f"level {asked.optimization_level}", f"tiling {asked.tiling}"]
        return ", ".join(words)


Build = Callable[[Bundle, BuildSettings], str]
"""Builds one engine in a bundle and returns its name."""


def require_timing(settings: BuildSettings, host: Host) -> None:
    """Return if candidates can be timed here.

    Raises:
        MissingDependency: what would run them is not here.
    """
    if host.gpu is None and settings.device != "cpu":
        raise MissingDependency(
            "--tune cannot time anything here: no NVIDIA GPU answers.",
            "Run it on the GPU that will serve, or leave --tune out. Packages for this processor "
            "are timed with --backend inductor --device cpu.",
        )


def candidates_of(bundle: Bundle, settings: BuildSettings) -> list[Candidate]:
    """Return what is tried: precision, INT8 scope, and how hard the backend searches.

    The precisions are those asked for, or all that there are. INT8 scopes other than the
    bundle's own are made where there are images to calibrate with.
    """
    inductor = settings.backend == "inductor"
    precisions: tuple[str, ...] = settings.precisions
    if "precisions" not in settings.model_fields_set:
        precisions = ("fp32", "fp16", "bf16")
        if not inductor:
            precisions = tuple(n for n, a in bundle.artefacts.items() if a.kind == "onnx")
    found = []
    for precision in precisions:
        one = settings.model_copy(update={"precisions": (precision,), "tune": False})
        scopes = SCOPES if precision == "int8" and settings.images is not None else ("",)
        for scope in scopes:
            batch = (settings.profiles or (bundle.manifest.batch,))[0]
            static = batch.min == batch.max and precision != "fp32"
            found += [Candidate(each, scope) for each in _searches(one, inductor, static)]
    return found


def _searches(one: BuildSettings, inductor: bool, static: bool) -> Iterator[BuildSettings]:
    if inductor:
        tries: tuple[dict[str, Any], ...] = ({}, {"max_autotune": True}, {"fused_kernels": True})
        tries = tries[: 1 if one.device == "cpu" else 3 if static else 2]
    else:
        levels = (3, 5) if one.optimization_level is None else (one.optimization_level,)
        tries = tuple(
            {"optimization_level": level, "tiling": tiling}
            for level in levels
            for tiling in ("none", "full")
        )
    return (one.model_copy(update=each) for each in tries)


def tuned(
    bundle: Bundle,
    settings: BuildSettings,
    build: Build,
    progress: Callable[[str], None],
) -> tuple[list[Tuned], Candidate]:
    """Return every candidate as it was found, and the fastest that holds its gate.

    Args:
        bundle: what is deployed.
        settings: what the user asks.
        build: builds one of them.
        progress: told what is being done.

    Raises:
        ConversionError: no candidate was built and holds its gate.
    """
    candidates = candidates_of(bundle, settings)
    batch = (settings.profiles or (bundle.manifest.batch,))[0]
    found: list[Tuned] = []
    with tempfile.TemporaryDirectory(prefix="van-deploy-tuning-") as folder:
        for number, candidate in enumerate(candidates, 1):
            progress(f"{number} of {len(candidates)}: {candidate.described}")
            copy = Path(folder) / bundle.path.name
            shutil.copytree(bundle.path, copy)
            try:
                found.append(_tried(copy, candidate, batch, build))
            except VanDeployError as error:
                found.append(Tuned(candidate.described, error=error.message))
            finally:
                shutil.rmtree(copy)
    timed = [i for i, one in enumerate(found) if one.passed and one.latency_ms is not None]
    if not timed:
        reasons = "; ".join(f"{one.candidate}: {one.error}" for one in found)
        raise ConversionError(
            f"No candidate holds its gate: {reasons}.", "See `van-deploy verify`."
        )
    best = min(timed, key=lambda i: found[i].latency_ms or 0.0)
    found[best] = replace(found[best], kept=True)
    return found, candidates[best]


def _tried(copy: Path, candidate: Candidate, batch: BatchRange, build: Build) -> Tuned:
    """Build, judge and time one candidate in a copy of the bundle."""
    settings = candidate.settings
    with_scope(copy, candidate)
    name = build(Bundle.open(copy), settings)
    bundle = Bundle.open(copy)
    device = "cuda:0" if settings.device in (None, "cpu") else str(settings.device)
    verdict = verify_bundle(
        bundle,
        samples_for(bundle, None, None),
        VerifySettings(artefacts=(name,), device=device, modules=False),
    ).artefacts[name]
    passed = verdict.outcome is Outcome.PASS
    seconds = None
    with Network(bundle, name, device=device) as network:
        shape = (batch.opt, *network.input.shape)
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        seconds = _seconds(network.opened, images)
    return Tuned(
        candidate.described,
        name,
        batch.opt,
        1e3 * seconds,
        batch.opt / seconds,
        verdict.comparison.sqnr_db if verdict.comparison else None,
        passed,
        verdict.reason,
    )


def with_scope(path: Path, candidate: Candidate) -> None:
    """Make the bundle's INT8 graph anew with the candidate's scope, where it names one."""
    if candidate.scope:
        images = candidate.settings.images
        asked = QuantizeSettings(precision="int8", scope=(candidate.scope,), images=images)
        quantize_bundle(path, asked, force=True)


def _seconds(runner: Any, images: npt.NDArray[Any]) -> float:
    """Return the least mean time of a call: launches queued on the GPU, or runs on the CPU."""
    held = runner.resident(images) if getattr(runner, "on_gpu", True) else None

    def calls(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            if held is None:
                runner.run(images)
            else:
                held.launch()
        if held is not None:
            held.download()
            held.outputs()
        return (time.perf_counter() - start) / count

    try:
        if held is not None:
            held.upload()
        calls(LEAST_CALLS)  # compiles, tunes, records
        count = max(LEAST_CALLS, round(LEAST_S / calls(LEAST_CALLS)))
        return min(calls(count) for _ in range(ROUNDS))
    finally:
        if held is not None:
            held.close()
