"""A plan from an ONNX file: the parent's side of a build.

:func:`engine_from_onnx` checks the request, runs :mod:`van_deploy.engine.worker`,
passes its progress on, and turns whatever happens to it into one error. The plan
lies under a temporary name until the sidecar is complete.

TensorRT for RTX 1.7.1 numbers some internal names by the order of pointers, so with address
space randomisation two builds of one file differ in a few bytes of the plan (measured: 24 bytes
of 17.7 MB for van_b0, in names such as ``__mye13515``). So the worker runs without it, where
that is allowed, and its heap is laid out alike: the layout follows the lengths of the strings a
process holds, so files have the same names every time and the folder goes as a descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import onnx
from google.protobuf.message import DecodeError

from van_deploy import errors
from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import RTX, TENSORRT, Backend, Host, host_here
from van_deploy.engine.compatibility import refuse_impossible
from van_deploy.engine.messages import warnings_summary
from van_deploy.engine.sidecar import SCHEMA, Sidecar, log_path, sidecar_path, write_sidecar
from van_deploy.engine.worker import LOG, ONNX, PLAN
from van_deploy.environment.hardware import memory
from van_deploy.errors import ConversionError, InputError, MissingDependency, VanDeployError
from van_deploy.files import check_external_files, external_files_in, file_sha256
from van_deploy.model.preprocess import Preprocessing
from van_deploy.schema import validate
from van_deploy.stopwatch import Progress, no_progress

TAGS = {TENSORRT: "trt", RTX: "rtx"}  # in names of files
CANCEL_WAIT_S = 5.0  # between asking TensorRT to stop and ending its process
ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>
FORBIDDEN = -1


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
    return f"{model}-{precision}-{served}-{TAGS[backend.name]}{backend.release}{marks}"


def engine_from_onnx(
    source: Path,
    plan: Path,
    *,
    backend: Backend,
    options: BuildOptions,
    precision: str,
    host: Host | None = None,
    timing_cache: Path | None = None,
    preprocessing: Preprocessing | None = None,
    progress: Progress = no_progress,
) -> Sidecar:
    """Build ``plan`` from ``source``, with its sidecar and its log beside it.

    ``KeyboardInterrupt`` stops TensorRT at its next step and leaves no file.

    Args:
        source: the ONNX file; its types are the precision.
        plan: where the plan goes; ``.json`` and ``.log`` of the same stem beside it.
        backend: what builds it.
        options: what is asked of it.
        precision: what the graph is, for the record: ``fp32``, ``fp16`` or ``int8``.
        host: this machine; None looks.
        timing_cache: a file to learn from and add to.
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
    place = str(source.absolute()) if has_weights_beside(source, options) else None
    job = {
        "backend": backend.name,
        "weights_beside": place,
        "options": options.as_dict(),
        "timing_cache": str(timing_cache.absolute()) if timing_cache else None,
    }
    plan.parent.mkdir(parents=True, exist_ok=True)
    name = plan.name.removesuffix(".plan")

    def tell(phase: str, done: int, total: int) -> None:
        progress(f"{name}: {phase}", done, total or None)

    with tempfile.TemporaryDirectory(prefix=".building-", dir=plan.parent) as building:
        folder = Path(building)
        (folder / ONNX).symlink_to(source.absolute())
        facts = _run(job, folder, backend, tell)
        draft = (folder / PLAN).rename(folder / plan.name)
        log = (folder / LOG).rename(log_path(draft))
        facts |= _known(name, source, draft, backend, options, host)
        facts |= {"precision": precision, "preprocessing": preprocessing}
        sidecar = write_sidecar(draft, validate(Sidecar, facts))
        for path in (log, draft, sidecar_path(draft)):  # the sidecar last
            path.replace(plan.parent / path.name)
    return sidecar


def _known(
    name: str, source: Path, plan: Path, backend: Backend, options: BuildOptions, host: Host
) -> dict[str, Any]:
    """Return what a sidecar says besides what the worker reports and the caller knows."""
    return {
        "schema": SCHEMA,
        "name": name,
        "plan_sha256": file_sha256(plan),
        "plan_bytes": plan.stat().st_size,
        "onnx_file": source.name,
        "onnx_sha256": file_sha256(source),
        "backend": backend.name,
        "backend_version": backend.version,
        "cuda": backend.cuda,
        "targets": targets_of(options, host),
        "built_on": None if backend.builds_for_absent_gpus else host.gpu,
        "options": options,
    }


def has_weights_beside(path: Path, options: BuildOptions) -> bool:
    """Return whether some weights of an ONNX file are in another, with the graph looked at.

    TensorRT's parser takes UINT8 zero-points without a word and reads them as INT8 (measured
    with TensorRT for RTX 1.7.1), and follows links out of the folder.

    Raises:
        InputError: it is not ONNX; its weights are elsewhere; TensorRT would misread it; or its
            batch or size is fixed at another than asked for, or dynamic where none is asked for.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        model = onnx.ModelProto()
    beside = external_files_in(model)
    check_external_files(path, beside, None)
    dims = [dim for value in model.graph.input[:1] for dim in value.type.tensor_type.shape.dim]
    batch, *row = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims] or [0]
    stored, sizes = model.graph.initializer, options.dynamic_size
    unsigned = {weight.name for weight in stored if weight.data_type == onnx.TensorProto.UINT8}
    quantised = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    profiles = options.profiles if batch != -1 else ()
    misfits = {
        "is not an ONNX file of a network that takes images": not row,
        "has UINT8 zero-points, which TensorRT would read as INT8: it is made for CPUs": any(
            unsigned.intersection(node.input[2:]) for node in quantised
        ),
        f"has a fixed batch of {batch}, so it cannot serve {', '.join(map(str, profiles))}": any(
            {profile.min, profile.opt, profile.max} != {batch} for profile in profiles
        ),
        "has dynamic height and width, and no sizes to build for are given (--dynamic-size)": (
            -1 in row and sizes is None
        ),
        f"takes one image size, so it cannot serve {sizes}": sizes is not None and -1 not in row,
    }
    for problem in (words for words, found in misfits.items() if found):
        raise InputError(
            f"'{path}' {problem}.",
            "Ask for what it serves, or make it again with `van-deploy export` or `quantize`.",
        )
    return bool(beside)


@contextlib.contextmanager
def _fixed_addresses() -> Iterator[bool]:
    """Let what this thread starts have the same memory addresses every time, and yield if it may.

    ``personality(2)`` is a thread's own, and its children's. Some containers forbid it.
    """
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    before = personality(0xFFFFFFFF)  # changes nothing
    try:
        yield personality(before | ADDR_NO_RANDOMIZE) != FORBIDDEN
    finally:
        personality(before)


def _run(
    job: Mapping[str, Any], folder: Path, backend: Backend, tell: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Run one build in a process of its own, in ``folder``, and return what it reports."""
    here = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")  # for this package
    found = {"PYTHONPATH": os.pathsep.join(filter(None, here)), "PYTHONHASHSEED": "0"}
    descriptor = os.open(folder, os.O_RDONLY)
    outcome: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        chatter = stack.enter_context(tempfile.TemporaryFile())
        with _fixed_addresses() as fixed:
            process = subprocess.Popen(
                [sys.executable, "-m", "van_deploy.engine.worker", str(descriptor)],
                cwd="/",
                pass_fds=[descriptor],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=chatter,
                encoding="utf-8",
                env={**os.environ, **found},
                start_new_session=True,  # Ctrl-C reaches the parent only, which then asks
            )
        stack.enter_context(process)
        os.close(descriptor)
        commands, events = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
        try:
            with contextlib.suppress(BrokenPipeError):
                commands.write(json.dumps(job) + "\n")
                commands.flush()
            for event in map(json.loads, events):
                if event["event"] == "progress":
                    tell(event["phase"], event["done"], event["total"])
                else:
                    outcome = event
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
    warnings = dict(warnings_summary(outcome["warnings"]))
    return {**outcome, "warnings": warnings, "fixed_addresses": fixed}


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
