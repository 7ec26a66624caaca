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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from van_deploy import errors
from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import Backend
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.log import warnings_summary
from van_deploy.engine.refusals import refuse_impossible
from van_deploy.engine.sidecar import SCHEMA, Sidecar, log_path, sidecar_path, write_sidecar
from van_deploy.engine.source import OnnxSource, read_source
from van_deploy.environment.hardware import memory
from van_deploy.errors import ConversionError, MissingDependency, VanDeployError
from van_deploy.files import file_sha256
from van_deploy.model.preprocess import Preprocessing
from van_deploy.schema import validated

__all__ = [
    "BuildProgress",
    "engine_from_onnx",
    "engine_name",
    "targets_of",
]

ONNX, PLAN, LOG = (
    "engine.onnx",
    "engine.plan",
    "engine.log",
)  # the same for every build: see isolation.py
CANCEL_WAIT_S = 5.0  # between asking TensorRT to stop and ending its process


@dataclass(frozen=True)
class BuildProgress:
    """One event of a running build.

    Attributes:
        event: ``phase`` (one begins), ``step`` or ``done`` (it ended).
        name: TensorRT's name of the phase.
        parent: of a ``phase``: the one it is part of, or None.
        steps: of a ``phase``: how many there will be; of a ``step``: how many are done.
    """

    event: str
    name: str
    parent: str | None = None
    steps: int = 0


Progress = Callable[[BuildProgress], None]


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
        progress: told what TensorRT is doing.

    Raises:
        UsageError: the back end cannot do what is asked.
        InputError: the ONNX file cannot be used.
        MissingDependency: a driver, a GPU, a library or memory is missing.
        ConversionError: TensorRT cannot take the graph, or builds no plan from it.
    """
    host = host or host_here()
    refuse_impossible(backend, options, host, timing_cache)
    source = read_source(onnx)
    source.refuse_sizes(options.dynamic_size)
    for profile in options.profiles:
        source.refuse_profile(profile)
    plan.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=plan.parent) as folder:
        draft = Path(folder) / plan.name
        job = {
            "backend": backend.name,
            "onnx": ONNX,
            "weights_beside": str(onnx.absolute()) if source.has_external_weights else None,
            "plan": PLAN,
            "log": LOG,
            "options": options.as_dict(),
            "timing_cache": str(timing_cache.absolute()) if timing_cache else None,
        }
        (Path(folder) / ONNX).symlink_to(onnx.absolute())
        facts = _run(job, Path(folder), backend, progress)
        (Path(folder) / PLAN).replace(draft)
        (Path(folder) / LOG).replace(log_path(draft))
        sidecar = _sidecar(facts, draft, source, backend, options, precision, host)
        sidecar = sidecar.model_copy(update={"preprocessing": preprocessing})
        if check_reproducible:
            _run(job, Path(folder), backend, progress)
            same = file_sha256(Path(folder) / PLAN) == sidecar.plan_sha256
            sidecar = sidecar.model_copy(update={"reproducible": same})
        sidecar = write_sidecar(draft, sidecar)
        for path in (log_path(draft), draft, sidecar_path(draft)):  # the sidecar last
            path.replace(plan.parent / path.name)
    return sidecar


def _sidecar(
    facts: Mapping[str, Any],
    plan: Path,
    source: OnnxSource,
    backend: Backend,
    options: BuildOptions,
    precision: str,
    host: Host,
) -> Sidecar:
    return validated(
        Sidecar,
        {
            **{name: value for name, value in facts.items() if name in Sidecar.model_fields},
            "schema": SCHEMA,
            "name": plan.name.removesuffix(".plan"),
            "plan_sha256": file_sha256(plan),
            "plan_bytes": plan.stat().st_size,
            "onnx_file": source.path.name,
            "onnx_sha256": source.sha256,
            "backend": backend.name,
            "backend_version": backend.version,
            "cuda": backend.cuda,
            "precision": precision,
            "targets": targets_of(options, host),
            "built_on": None if backend.builds_for_absent_gpus else host.gpu,
            "options": options,
            "warnings": dict(warnings_summary(facts["warnings"])),
        },
    )


def _run(
    job: Mapping[str, Any], folder: Path, backend: Backend, progress: Progress | None
) -> Mapping[str, Any]:
    """Run one build in a process of its own, in ``folder``, and return what it reports."""
    with tempfile.TemporaryFile() as chatter, _worker(chatter, folder) as process:
        commands, events = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
        with contextlib.suppress(BrokenPipeError):
            commands.write(json.dumps(job) + "\n")
            commands.flush()
        outcome: Mapping[str, Any] | None = None
        for line in events:
            event = json.loads(line)
            if event["event"] in {"built", "failed", "cancelled"}:
                outcome = event
            elif progress is not None:
                progress(_progress(event))
        status = process.wait()
        if outcome is None:
            chatter.seek(0)
            raise _died(status, backend, chatter.read().decode(errors="replace"))
    if outcome["event"] == "failed":
        raise _error(outcome, source=(folder / ONNX).readlink().name)
    return outcome


@contextlib.contextmanager
def _worker(chatter: Any, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the worker; on any exception ask it to stop, and end it if it does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "van_deploy.engine.isolation"),
            *("van_deploy.engine.worker", str(descriptor)),
        ],
        cwd="/",  # the folder goes by descriptor: see isolation.py
        pass_fds=[descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=chatter,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": _python_path(), "PYTHONHASHSEED": "0"},
        start_new_session=True,  # Ctrl-C reaches the parent only, which then asks
    )
    os.close(descriptor)
    try:
        yield process
    except BaseException:
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()  # asks TensorRT to stop at its next step
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CANCEL_WAIT_S)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _python_path() -> str:
    """Return where the worker finds this package, besides where it always looks."""
    root = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))


def _progress(event: Mapping[str, Any]) -> BuildProgress:
    count = event.get("steps", event.get("step", 0))
    return BuildProgress(event["event"], event["name"], event.get("parent"), int(count))


def _error(outcome: Mapping[str, Any], source: str) -> VanDeployError:
    kind = getattr(errors, outcome["kind"], ConversionError)
    message = outcome["message"].replace(f"'{ONNX}'", f"'{source}'")
    error: VanDeployError = kind(message, outcome["remedy"])
    return error


def _died(status: int, backend: Backend, chatter: str) -> VanDeployError:
    """Return the error for a worker that ended without a word."""
    last = " ".join(chatter.split()[-60:])
    said = f" Its last words: {last}" if last else ""
    if -status == signal.SIGKILL:
        total = memory().total_bytes
        here = f" This machine has {total / 2**30:.1f} GiB." if total else ""
        return MissingDependency(
            f"The build with {backend.label} was killed, most likely for want of memory.{here}",
            "Close other programs, use a smaller --batch maximum, or build on a larger machine. "
            "Nothing was written.",
        )
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    return ConversionError(
        f"{backend.label} ended the build with {how}.{said}",
        "Nothing was written. Try --optimization-level 0, and report the graph to NVIDIA if it "
        "happens again.",
    )
