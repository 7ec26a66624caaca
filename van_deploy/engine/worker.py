"""The subprocess that runs the TensorRT builder; :mod:`van_deploy.engine.build` starts it.

A separate process isolates the build: its peak memory is that of the build alone; the command
can report when the system kills the process for memory or TensorRT crashes; and no CUDA state
remains in a program that may build many engines.

The process works in the folder whose file descriptor is its first argument. The first line of
stdin is the job as JSON. A second line, or the end of stdin (the parent exited), cancels the
build at TensorRT's next step; if the parent was killed, this process removes the folder. Events
are JSON lines on the original stdout; all other output goes to stderr.
"""

import contextlib
import json
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from van_deploy.config import BuildOptions
from van_deploy.config.sizes import height_width
from van_deploy.engine.backend import load_backend
from van_deploy.engine.messages import BuildLog, device_memory, error_from_log, error_from_parser
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.errors import InputError, VanDeployError
from van_deploy.files import write_atomic
from van_deploy.schema import validate

Send = Callable[..., None]

ONNX, PLAN, LOG = "engine.onnx", "engine.plan", "engine.log"  # constant names: see build.py
TEMPORARY_PREFIX = "van-deploy-engine-"  # of the folders in which engines of a bundle are built


class _BuildCancelled(Exception):  # noqa: N818 - not an error
    """The parent cancelled the build."""


def main() -> None:
    """Build the plan of the job on stdin, and write events to stdout."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(event: str, **facts: Any) -> None:
        channel.write(json.dumps({"event": event, **facts}) + "\n")
        channel.flush()

    os.fchdir(int(sys.argv[1]))
    parent, log = os.getppid(), BuildLog()
    try:
        job = json.loads(sys.stdin.readline())
        try:
            facts = build_plan(job, log, send)
        finally:
            write_atomic(Path(LOG), log.text())
        send("built", **facts)
    except VanDeployError as error:
        send("failed", kind=type(error).__name__, message=error.message, remedy=error.remedy)
    except (_BuildCancelled, BrokenPipeError):
        pass  # the parent no longer reads events
    except OSError as error:
        message = f"The engine cannot be written: {error.strerror or error}."
        remedy = "Free some space there, or set TMPDIR to a folder with room. Nothing was written."
        send("failed", kind="MissingDependency", message=message, remedy=remedy)
    finally:
        if os.getppid() != parent:  # the parent was killed and cannot remove the folder
            folder = Path.cwd()
            shutil.rmtree(folder, ignore_errors=True)
            if folder.parent.name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(OSError):  # the folder is not empty
                    folder.parent.rmdir()


def build_plan(job: Mapping[str, Any], log: BuildLog, send: Send) -> dict[str, Any]:
    """Build the plan of the ONNX file in the current folder, and return its sidecar's facts.

    Args:
        job: ``backend``, ``options``, ``timing_cache``, and ``external_weights``: the original
            path of the ONNX file if it has external weights.
        log: receives TensorRT's messages.
        send: called with ``progress`` events that have ``phase``, ``done`` and ``total``.

    Raises:
        VanDeployError: TensorRT rejects the file or builds no plan.
    """
    backend, options = load_backend(job["backend"]), validate(BuildOptions, job["options"])
    trt, failed = backend.module, f"{backend.label} built no plan from '{ONNX}'"
    # No error recorder: without one every error goes to the logger, and with one RTX 1.7.1
    # crashes when the parser is released before the network.
    builder, logger = backend.builder(log)
    start = time.perf_counter()
    # Strongly typed: required in TensorRT 10, ignored in 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # Parsed from memory, because otherwise the path of the file is in the log and on the heap.
    if not parser.parse(Path(ONNX).read_bytes(), job["external_weights"]):
        raise error_from_parser(f"{backend.label} cannot parse '{ONNX}'", parser, log.errors)
    parsed = time.perf_counter()
    inputs = [_describe_tensor(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [_describe_tensor(network.get_output(i)) for i in range(network.num_outputs)]
    layers = int(network.num_layers)
    # TensorRT checks only the optimum of a profile (RTX 1.7.1): a graph whose output is frozen at
    # that batch would build, and fail later at every other batch.
    for output in outputs if inputs[0]["shape"][0] == -1 else ():
        if (size := next(iter(output["shape"]), 0)) != -1:
            problem = f"'{output['name']}' has a fixed batch of {size}: violate shape constraints"
            raise error_from_log(failed, [problem])
    config = builder.create_builder_config()
    backend.configure_(config, options)
    _add_profiles_(builder, network.get_input(0), config, options)
    monitor = _progress_monitor(trt, send)
    config.progress_monitor = monitor
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    timings = load_timing_cache(config, cache) if cache else None
    plan = builder.build_serialized_network(network, config)
    if _is_cancelled():
        raise _BuildCancelled
    if plan is None:
        raise error_from_log(failed, log.errors)
    built = time.perf_counter()
    if cache:
        save_timing_cache(config, timings, cache)
    write_atomic(Path(PLAN), plan)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "parser_layers": layers,
        "parse_seconds": round(parsed - start, 3),
        "build_seconds": round(built - parsed, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "device_memory": device_memory(log),
        "warnings": log.warnings,
    }


def _describe_tensor(tensor: Any) -> dict[str, Any]:
    shape = [int(size) for size in tensor.shape]
    return {"name": tensor.name, "shape": shape, "dtype": tensor.dtype.name.lower()}


def _add_profiles_(builder: Any, images: Any, config: Any, options: BuildOptions) -> None:
    for batch in options.profiles:
        profile = builder.create_optimization_profile()
        shapes = []
        for end in ("min", "opt", "max"):
            sizes = options.dynamic_size
            sides = iter(height_width(getattr(sizes, end))) if sizes is not None else iter(())
            row = (next(sides) if length == -1 else int(length) for length in images.shape[1:])
            shapes.append((getattr(batch, end), *row))
        profile.set_shape(images.name, *shapes)
        config.add_optimization_profile(profile)


def load_timing_cache(config: Any, path: Path) -> Any:
    """Load the timing cache in ``path`` into a builder configuration; a missing file is empty.

    Returns:
        TensorRT's timing cache, which must outlive the build.

    Raises:
        InputError: TensorRT rejects the file.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"TensorRT rejects the timing cache '{path}': it is damaged, or from another GPU or "
            "version.",
            "Give another file with --timing-cache: one for each GPU and version.",
        )
    return cache


def save_timing_cache(config: Any, cache: Any, path: Path) -> None:
    """Merge ``cache`` with the current content of ``path``, and replace the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        other = config.create_timing_cache(path.read_bytes()) if path.exists() else None
        if other is not None:
            cache.combine(other, False)
        write_atomic(path, bytes(memoryview(cache.serialize())))


def _progress_monitor(trt: Any, send: Send) -> Any:
    """Return a progress monitor; its ``step_complete`` returns False to stop TensorRT."""
    running: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            running[name] = steps
            send("progress", phase=name, done=0, total=steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name == next(reversed(running), None):  # the innermost phase
                send("progress", phase=name, done=step + 1, total=running[name])
            return not _is_cancelled()

        def phase_finish(self, name: str) -> None:
            running.pop(name, None)

    return Monitor()


def _is_cancelled() -> bool:
    """Return whether stdin has another line or is at its end."""
    return bool(select.select([0], [], [], 0)[0])


if __name__ == "__main__":
    main()
