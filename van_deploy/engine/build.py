"""Build a TensorRT plan from an ONNX file: the parent process.

:func:`engine_from_onnx` checks the options, runs :mod:`van_deploy.engine.worker`, forwards its
progress and turns every failure into one error. The plan has a temporary name until its sidecar
is complete.

TensorRT for RTX 1.7.1 numbers some internal names by the order of pointers, so with address
space layout randomisation (ASLR) two builds of one file differ in a few bytes (measured: 24 bytes
of 17.7 MB for van_b0, in names such as ``__mye13515``). The worker therefore runs without ASLR
where the system permits it, and with the same heap layout every time: the layout depends on the
lengths of the strings a process holds, so the file names are constant and the folder is passed as
a file descriptor.
"""

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
from van_deploy.engine.backend import RTX, TENSORRT, Backend, Host, detect_host
from van_deploy.engine.compatibility import require_supported
from van_deploy.engine.messages import count_warnings
from van_deploy.engine.sidecar import SCHEMA, Sidecar, log_path, sidecar_path, write_sidecar
from van_deploy.engine.worker import LOG, ONNX, PLAN
from van_deploy.environment.hardware import memory
from van_deploy.errors import ConversionError, InputError, MissingDependency, VanDeployError
from van_deploy.files import check_external_files, external_files_in, file_sha256
from van_deploy.model.preprocess import Preprocessing
from van_deploy.schema import validate
from van_deploy.stopwatch import Progress, no_progress

FILE_TAGS = {TENSORRT: "trt", RTX: "rtx"}  # backends in file names
CANCEL_TIMEOUT_S = 5.0  # from the request to cancel until the worker is killed
ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>


def served_targets(options: BuildOptions, host: Host) -> tuple[str, ...]:
    """Return the compute capabilities of a plan: the requested ones, or that of the host's GPU."""
    return options.targets or ((host.target,) if host.target else ())


def engine_name(
    model: str, precision: str, backend: Backend, options: BuildOptions, host: Host
) -> str:
    """Return the name of an engine, such as ``van_b1-fp16-sm89-rtx1.7.1``.

    A hardware compatibility level replaces the target; ``-vc`` marks a version-compatible plan.
    """
    level = options.hardware_compatibility
    served = "+".join(target.replace("sm_", "sm") for target in served_targets(options, host))
    if level is HardwareCompatibility.AMPERE_PLUS:
        served = "ampere-plus"
    elif level is HardwareCompatibility.SAME_COMPUTE_CAPABILITY:
        served = f"{served}-any"
    suffix = "-vc" * options.version_compatible
    return f"{model}-{precision}-{served}-{FILE_TAGS[backend.name]}{backend.release}{suffix}"


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
    """Build ``plan`` from ``source``, and write its sidecar and log to the same folder.

    ``KeyboardInterrupt`` stops TensorRT at its next step and leaves no file.

    Args:
        source: the ONNX file; its data types determine the precision.
        plan: path of the plan; the sidecar has the same stem and ``.json``, the log ``.log``.
        backend: the TensorRT to build with.
        options: the build options.
        precision: of the graph, recorded in the sidecar: ``fp32``, ``fp16`` or ``int8``.
        host: this machine; None detects it.
        timing_cache: file of kernel timings to read and update.
        preprocessing: of the model, recorded in the sidecar.
        progress: called with TensorRT's build phases.

    Raises:
        UsageError: the backend does not support the options.
        InputError: the ONNX file cannot be used.
        MissingDependency: a driver, GPU, library or memory is missing.
        ConversionError: TensorRT rejects the graph or builds no plan from it.
    """
    host = host or detect_host()
    require_supported(backend, options, host, timing_cache)
    job = {
        "backend": backend.name,
        "external_weights": (
            str(source.absolute()) if has_external_weights(source, options) else None
        ),
        "options": options.as_dict(),
        "timing_cache": str(timing_cache.absolute()) if timing_cache else None,
    }
    plan.parent.mkdir(parents=True, exist_ok=True)
    name = plan.name.removesuffix(".plan")

    def report_phase(phase: str, done: int, total: int) -> None:
        progress(f"{name}: {phase}", done, total or None)

    with tempfile.TemporaryDirectory(prefix=".building-", dir=plan.parent) as temporary:
        folder = Path(temporary)
        (folder / ONNX).symlink_to(source.absolute())
        facts = _run_worker(job, folder, backend, report_phase)
        draft = (folder / PLAN).rename(folder / plan.name)
        log = (folder / LOG).rename(log_path(draft))
        facts |= {
            "schema": SCHEMA,
            "name": name,
            "plan_sha256": file_sha256(draft),
            "plan_bytes": draft.stat().st_size,
            "onnx_file": source.name,
            "onnx_sha256": file_sha256(source),
            "backend": backend.name,
            "backend_version": backend.version,
            "cuda": backend.cuda,
            "targets": served_targets(options, host),
            "built_on": None if backend.cross_compiles else host.gpu,
            "options": options,
            "precision": precision,
            "preprocessing": preprocessing,
        }
        sidecar = write_sidecar(draft, validate(Sidecar, facts))
        for path in (log, draft, sidecar_path(draft)):  # the sidecar last
            path.replace(plan.parent / path.name)
    return sidecar


def has_external_weights(path: Path, options: BuildOptions) -> bool:
    """Return whether an ONNX file stores weights in another file, after checking the graph.

    TensorRT's parser accepts UINT8 zero-points silently and reads them as INT8 (measured with
    TensorRT for RTX 1.7.1), and follows links that leave the folder.

    Raises:
        InputError: the file is not ONNX; its external weights are missing or outside the folder;
            TensorRT would misread it; or its batch or image size does not match the options.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        model = onnx.ModelProto()
    external = external_files_in(model)
    check_external_files(path, external, None)
    dims = [dim for value in model.graph.input[:1] for dim in value.type.tensor_type.shape.dim]
    batch, *row = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims] or [0]
    stored, sizes = model.graph.initializer, options.dynamic_size
    unsigned = {weight.name for weight in stored if weight.data_type == onnx.TensorProto.UINT8}
    quantised = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    profiles = options.profiles if batch != -1 else ()
    problems = {
        "is not an ONNX file of a network that takes images": not row,
        "has UINT8 zero-points, which TensorRT would read as INT8: it is quantised for CPUs": any(
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
    for problem in (text for text, applies in problems.items() if applies):
        raise InputError(
            f"'{path}' {problem}.",
            "Change --batch or --dynamic-size to match the file, or write the file again with "
            "`van-deploy export` or `van-deploy quantize`.",
        )
    return bool(external)


@contextlib.contextmanager
def _disable_aslr() -> Iterator[bool]:
    """Start child processes without ASLR; yield whether the system permits it.

    ``personality(2)`` applies to the calling thread and its children. Some containers forbid it.
    """
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    before = personality(0xFFFFFFFF)  # only reads the current value
    try:
        yield personality(before | ADDR_NO_RANDOMIZE) != -1
    finally:
        personality(before)


def _run_worker(
    job: Mapping[str, Any],
    folder: Path,
    backend: Backend,
    report_phase: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Run one build in a subprocess that works in ``folder``, and return its results."""
    paths = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")  # of this package
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONHASHSEED": "0"}
    descriptor = os.open(folder, os.O_RDONLY)
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(tempfile.TemporaryFile())
        with _disable_aslr() as fixed_addresses:
            process = subprocess.Popen(
                [sys.executable, "-m", "van_deploy.engine.worker", str(descriptor)],
                cwd="/",
                pass_fds=[descriptor],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                env={**os.environ, **variables},
                start_new_session=True,  # Ctrl-C reaches only the parent, which cancels the build
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
                    report_phase(event["phase"], event["done"], event["total"])
                else:
                    result = event
            status = process.wait()
        except BaseException:  # KeyboardInterrupt included
            with contextlib.suppress(OSError):
                commands.close()  # cancels the build at TensorRT's next step
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CANCEL_TIMEOUT_S)
            raise
        finally:
            process.kill()
            with contextlib.suppress(OSError):
                commands.close()
        if not result:
            stderr.seek(0)
            raise _crash_error(status, backend, stderr.read().decode(errors="replace"))
    if result.pop("event") == "failed":
        kind: type[VanDeployError] = getattr(errors, result["kind"])
        source = (folder / ONNX).readlink().name
        raise kind(result["message"].replace(f"'{ONNX}'", f"'{source}'"), result["remedy"])
    warnings = dict(count_warnings(result["warnings"]))
    return {**result, "warnings": warnings, "fixed_addresses": fixed_addresses}


def _crash_error(status: int, backend: Backend, stderr: str) -> VanDeployError:
    """Return the error for a worker that exited without a result."""
    if -status == signal.SIGKILL:
        return MissingDependency(
            f"The build with {backend.label} was killed, most likely because memory ran out. "
            f"This machine has {memory().total_bytes / 2**30:.1f} GiB.",
            "Close other programs, use a smaller --batch maximum, or build on a larger machine. "
            "Nothing was written.",
        )
    last = " ".join(stderr.split()[-60:])
    output = f" Its last output: {last}" if last else ""
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    return ConversionError(
        f"{backend.label} ended the build with {how}.{output}",
        "Nothing was written. Try --optimization-level 0, and report the graph to NVIDIA if it "
        "happens again.",
    )
