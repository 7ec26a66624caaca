"""The process that holds TensorRT while it builds; started by :mod:`van_deploy.engine.build`.

Why a process of its own: its peak memory is the build's and nothing else's; when
the system kills it for memory, or TensorRT crashes, the command lives on to say
so; and nothing of CUDA stays behind in a program that may build many engines.

It works in the folder whose descriptor is its first argument.
The job is the first line of stdin, as JSON. A second line, or the end of stdin
(the parent is gone), cancels the build at TensorRT's next step; a parent that was
killed cannot tidy up, so then the folder is removed here. Events leave as
JSON lines on the stdout the process was started with; whatever a library prints
goes to stderr.
"""

from __future__ import annotations

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
from van_deploy.engine.backend import backend_named
from van_deploy.engine.messages import BuildLog, failure, memory_facts, parser_failure
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.errors import InputError, VanDeployError
from van_deploy.files import write_atomic
from van_deploy.schema import validate

Send = Callable[..., None]

ONNX, PLAN, LOG = "engine.onnx", "engine.plan", "engine.log"  # always the same: see build.py
TEMPORARY = "van-deploy-engine-"
"""How the temporary folders are called in which engines of a bundle are built."""


class _Cancelled(Exception):  # noqa: N818 - an outcome, not an error
    """The build was stopped on request."""


def main() -> None:
    """Build one plan as stdin says, and tell stdout about it."""
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
            facts = build(job, log, send)
        finally:
            write_atomic(Path(LOG), log.text())
        send("built", **facts)
    except VanDeployError as error:
        send("failed", kind=type(error).__name__, message=error.message, remedy=error.remedy)
    except (_Cancelled, BrokenPipeError):
        pass  # nobody listens any more
    except OSError as error:
        message = f"The engine cannot be written: {error.strerror or error}."
        remedy = "Free some space there, or set TMPDIR to a folder with room. Nothing was written."
        send("failed", kind="MissingDependency", message=message, remedy=remedy)
    finally:
        if os.getppid() != parent:  # which was killed, and cannot tidy up
            folder = Path.cwd()
            shutil.rmtree(folder, ignore_errors=True)
            if folder.parent.name.startswith(TEMPORARY):
                with contextlib.suppress(OSError):  # something else is in there
                    folder.parent.rmdir()


def build(job: Mapping[str, Any], log: BuildLog, send: Send) -> dict[str, Any]:
    """Build the plan of the ONNX file here, and return what there is to know about it.

    Args:
        job: ``backend``, ``options``, ``timing_cache``, and ``weights_beside``: the ONNX file's
            own path if it has external weights.
        log: what TensorRT says goes there.
        send: told of TensorRT's phases: ``progress`` events with ``phase``, ``done``, ``total``.

    Raises:
        VanDeployError: the file cannot be taken or the plan cannot be built.
    """
    backend, options = backend_named(job["backend"]), validate(BuildOptions, job["options"])
    trt, failed = backend.module, f"{backend.label} built no plan from '{ONNX}'"
    # No error recorder: without one every error goes to the logger, and with one
    # RTX 1.7.1 crashes when the parser is released before the network.
    builder, logger = backend.builder(log)
    start = time.perf_counter()
    # Strongly typed: needed on 10, ignored on 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # Parsed from memory: the file's path would otherwise be in the log and in the heap.
    if not parser.parse(Path(ONNX).read_bytes(), job["weights_beside"]):
        raise parser_failure(f"{backend.label} cannot take '{ONNX}'", parser, log.errors)
    parsed = time.perf_counter()
    inputs = [_tensor(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [_tensor(network.get_output(i)) for i in range(network.num_outputs)]
    layers = int(network.num_layers)
    # TensorRT tries a profile's optimum only (RTX 1.7.1): a graph that was frozen at
    # just that size would build, and fail later at every other.
    for output in outputs if inputs[0]["shape"][0] == -1 else ():
        if (size := next(iter(output["shape"]), 0)) != -1:
            said = f"'{output['name']}' has a fixed batch of {size}: violate shape constraints"
            raise failure(failed, [said])
    config = builder.create_builder_config()
    backend.configure_(config, options)
    _add_profiles_(builder, network.get_input(0), config, options)
    monitor = _monitor(trt, send)
    config.progress_monitor = monitor
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    timings = timing_cache_(config, cache) if cache else None
    plan = builder.build_serialized_network(network, config)
    if _is_cancelled():
        raise _Cancelled
    if plan is None:
        raise failure(failed, log.errors)
    built = time.perf_counter()
    if cache:
        save_timings(config, timings, cache)
    write_atomic(Path(PLAN), plan)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "parser_layers": layers,
        "parse_seconds": round(parsed - start, 3),
        "build_seconds": round(built - parsed, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "device_memory": memory_facts(log),
        "warnings": log.warnings,
    }


def _tensor(tensor: Any) -> dict[str, Any]:
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


def timing_cache_(config: Any, path: Path) -> Any:
    """Give a builder's configuration the timings in ``path``; none if there is no file yet.

    Returns:
        TensorRT's timing cache; it must live until the build is over.

    Raises:
        InputError: TensorRT refuses the file.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"TensorRT refuses the timing cache '{path}'; it is of another GPU or version, "
            "or damaged.",
            "Name another file with --timing-cache: one for each GPU and version.",
        )
    return cache


def save_timings(config: Any, cache: Any, path: Path) -> None:
    """Combine ``cache`` with what other builds have written to ``path`` since, and replace it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        other = config.create_timing_cache(path.read_bytes()) if path.exists() else None
        if other is not None:
            cache.combine(other, False)
        write_atomic(path, bytes(memoryview(cache.serialize())))


def _monitor(trt: Any, send: Send) -> Any:
    """Return a progress monitor; TensorRT stops when ``step_complete`` returns False."""
    running: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            running[name] = steps
            send("progress", phase=name, done=0, total=steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name == next(reversed(running), None):  # the innermost
                send("progress", phase=name, done=step + 1, total=running[name])
            return not _is_cancelled()

        def phase_finish(self, name: str) -> None:
            running.pop(name, None)

    return Monitor()


def _is_cancelled() -> bool:
    """Return whether stdin has another line, or has ended."""
    return bool(select.select([0], [], [], 0)[0])


if __name__ == "__main__":
    main()
