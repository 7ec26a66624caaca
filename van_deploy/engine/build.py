"""A plan from an ONNX file: the parent's side of a build.

:func:`engine_from_onnx` checks the request, runs :mod:`van_deploy.engine.worker`,
passes its progress on, and turns whatever happens to it into one error. The plan
lies under a temporary name until the sidecar is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

from van_deploy import errors
from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import Backend
from van_deploy.engine.compatibility import refuse_impossible
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.log import warnings_summary
from van_deploy.engine.sidecar import SCHEMA, Sidecar, log_path, sidecar_path, write_sidecar
from van_deploy.engine.source import read_source
from van_deploy.environment.hardware import memory
from van_deploy.errors import ConversionError, MissingDependency, VanDeployError
from van_deploy.files import file_sha256
from van_deploy.model.preprocess import Preprocessing
from van_deploy.schema import validated

ONNX, PLAN, LOG = "engine.onnx", "engine.plan", "engine.log"  # always the same: see isolation.py
CANCEL_WAIT_S = 5.0  # between asking TensorRT to stop and ending its process


Progress = Callable[[str, int, int | None], object]
"""Told which engine is in which of TensorRT's phases, and how many steps of how many are done."""


def targets_of(options: BuildOptions, host: Host) -> tuple[str, ...]:
    """Return the compute capabilities a plan will serve: those asked for, or the GPU's."""
    return options.targets or ((host.target,) if host.target else ())


def engine_name(
    model: str, precision: str, backend: Backend, options: BuildOptions, host: Host
) -> str:
    """Return what an engine is called, such as ``van_b1-fp16-sm89-rtx1.7.1``.

    A hardware compatibility level takes the place of the target; a plan that later versions
    can load says so at the end.
    """
    level = options.hardware_compatibility
    served = "+".join(target.replace("sm_", "sm") for target in targets_of(options, host))
    if level is HardwareCompatibility.AMPERE_PLUS:
        served = "ampere-plus"
    elif level is HardwareCompatibility.SAME_COMPUTE_CAPABILITY:
        served = f"{served}-any"
    marks = "-vc" * options.version_compatible
    return f"{model}-{precision}-{served}-{backend.tag}{backend.release}{marks}"


def engine_from_onnx(
    onnx: Path,
    plan: Path,
    *,
    backend: Backend,
    options: BuildOptions,
    precision: str,
    host: Host | None = None,
    timing_cache: Path | None = None,
    check_reproducible: bool = False,
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
) -> Sidecar:
    """Build ``plan`` from ``onnx``, with its sidecar and its log beside it.

    ``KeyboardInterrupt`` stops TensorRT at its next step and leaves no file.

    Args:
        onnx: the graph; its types are the precision.
        plan: where the plan goes; ``.json`` and ``.log`` of the same stem beside it.
        backend: what builds it.
        options: what is asked of it.
        precision: what the graph is, for the record: ``fp32``, ``fp16`` or ``int8``.
        host: this machine; None looks.
        timing_cache: a file to learn from and add to.
        check_reproducible: build a second time and compare the bytes.
        preprocessing: of the model; travels in the sidecar.
        progress: told of it.

    Raises:
        UsageError: the backend cannot do what is asked.
        InputError: the ONNX file cannot be used.
        MissingDependency: a driver, a GPU, a library or memory is missing.
        ConversionError: TensorRT cannot take the graph, or builds no plan from it.
    """
    host = host or host_here()
    refuse_impossible(backend, options, host, timing_cache)
    source = read_source(onnx)
    source.refuse(options)
    plan.parent.mkdir(parents=True, exist_ok=True)
    name = plan.name.removesuffix(".plan")

    def tell(phase: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{name}: {phase}", done, total or None)

    with tempfile.TemporaryDirectory(prefix=".building-", dir=plan.parent) as building:
        folder = Path(building)
        (folder / ONNX).symlink_to(onnx.absolute())
        job = {
            "backend": backend.name,
            "onnx": ONNX,
            "weights_beside": str(onnx.absolute()) if source.has_external_weights else None,
            "plan": PLAN,
            "log": LOG,
            "options": options.as_dict(),
            "timing_cache": str(timing_cache.absolute()) if timing_cache else None,
        }
        facts = _run(job, folder, backend, tell)
        draft = (folder / PLAN).rename(folder / plan.name)
        log = (folder / LOG).rename(log_path(draft))
        known = {
            "schema": SCHEMA,
            "name": name,
            "plan_sha256": file_sha256(draft),
            "plan_bytes": draft.stat().st_size,
            "onnx_file": onnx.name,
            "onnx_sha256": source.sha256,
            "backend": backend.name,
            "backend_version": backend.version,
            "cuda": backend.cuda,
            "precision": precision,
            "targets": targets_of(options, host),
            "built_on": None if backend.builds_for_absent_gpus else host.gpu,
            "options": options,
            "preprocessing": preprocessing,
        }
        if check_reproducible:
            _run(job, folder, backend, tell)
            known["reproducible"] = file_sha256(folder / PLAN) == known["plan_sha256"]
        warnings = dict(warnings_summary(facts.pop("warnings")))
        sidecar = write_sidecar(draft, validated(Sidecar, {**facts, **known, "warnings": warnings}))
        for path in (log, draft, sidecar_path(draft)):  # the sidecar last
            path.replace(plan.parent / path.name)
    return sidecar


def _run(
    job: Mapping[str, Any], folder: Path, backend: Backend, tell: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Run one build in a process of its own, in ``folder``, and return what it reports."""
    here = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")  # for this package
    descriptor = os.open(folder, os.O_RDONLY)  # the folder goes by descriptor: see isolation.py
    outcome: dict[str, Any] = {}
    program = "van_deploy.engine.isolation", "van_deploy.engine.worker"
    with (
        tempfile.TemporaryFile() as chatter,
        subprocess.Popen(
            [sys.executable, "-m", *program, str(descriptor)],
            cwd="/",
            pass_fds=[descriptor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=chatter,
            encoding="utf-8",
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, here)),
                "PYTHONHASHSEED": "0",
            },
            start_new_session=True,  # Ctrl-C reaches the parent only, which then asks
        ) as process,
    ):
        os.close(descriptor)
        commands, events = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
        try:
            with contextlib.suppress(BrokenPipeError):
                commands.write(json.dumps(job) + "\n")
                commands.flush()
            for event in map(json.loads, events):
                if event["event"] in {"built", "failed"}:
                    outcome = event
                else:
                    tell(event["phase"], event["done"], event["total"])
            status = process.wait()
        except BaseException:  # Ctrl-C, too
            with contextlib.suppress(OSError):
                commands.close()  # asks TensorRT to stop at its next step
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CANCEL_WAIT_S)
            raise
        finally:
            process.kill()
            with contextlib.suppress(OSError):
                commands.close()
        if not outcome:
            chatter.seek(0)
            raise _died(status, backend, chatter.read().decode(errors="replace"))
    if outcome.pop("event") == "failed":
        kind: type[VanDeployError] = getattr(errors, outcome["kind"])
        source = (folder / ONNX).readlink().name
        raise kind(outcome["message"].replace(f"'{ONNX}'", f"'{source}'"), outcome["remedy"])
    return outcome


def _died(status: int, backend: Backend, chatter: str) -> VanDeployError:
    """Return the error for a worker that ended without a word."""
    if -status == signal.SIGKILL:
        return MissingDependency(
            f"The build with {backend.label} was killed, most likely for want of memory. "
            f"This machine has {memory().total_bytes / 2**30:.1f} GiB.",
            "Close other programs, use a smaller --batch maximum, or build on a larger machine. "
            "Nothing was written.",
        )
    last = " ".join(chatter.split()[-60:])
    said = f" Its last words: {last}" if last else ""
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    return ConversionError(
        f"{backend.label} ended the build with {how}.{said}",
        "Nothing was written. Try --optimization-level 0, and report the graph to NVIDIA if it "
        "happens again.",
    )
