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
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from van_deploy.config import BuildOptions
from van_deploy.config.sizes import sides_of
from van_deploy.engine import timing_cache
from van_deploy.engine.backend import backend_named
from van_deploy.engine.catalogue import CATALOGUE, build_failure, parser_failure
from van_deploy.engine.isolation import addresses_are_fixed
from van_deploy.engine.load import builder_of
from van_deploy.engine.log import BuildLog, memory_facts
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.errors import ConversionError, VanDeployError
from van_deploy.files import write_atomic
from van_deploy.schema import validated

Send = Callable[..., None]

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
    parent = os.getppid()
    job = json.loads(sys.stdin.readline())
    cancelled = threading.Event()
    threading.Thread(target=_listen, args=(cancelled,), daemon=True).start()
    try:
        send("built", **build(job, send, cancelled.is_set))
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


def build(job: Mapping[str, Any], send: Send, is_cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Return what there is to know about the plan just written to ``job["plan"]``.

    Args:
        job: ``backend``, ``onnx``, ``plan``, ``log``, ``options``, ``timing_cache``,
            and ``weights_beside``: the ONNX file's own path if it has external weights.
        send: told of TensorRT's phases: ``progress`` events with ``phase``, ``done``, ``total``.
        is_cancelled: asked at each of TensorRT's steps.

    Raises:
        VanDeployError: the file cannot be taken or the plan cannot be built.
    """
    log = BuildLog()
    try:
        return _build(job, log, send, is_cancelled)
    finally:
        write_atomic(Path(job["log"]), log.text())


def _build(
    job: Mapping[str, Any], log: BuildLog, send: Send, is_cancelled: Callable[[], bool]
) -> dict[str, Any]:
    backend = backend_named(job["backend"])
    options = validated(BuildOptions, job["options"])
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    trt, path = backend.module, Path(job["onnx"])
    # No error recorder: without one every error goes to the logger, and with one
    # RTX 1.7.1 crashes when the parser is released before the network.
    builder, logger = builder_of(backend, log, path.name)
    start = time.perf_counter()
    # Strongly typed: needed on 10, ignored on 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # Parsed from memory: the file's path would otherwise be in the log and in the heap.
    if not parser.parse(path.read_bytes(), job["weights_beside"]):
        raise parser_failure(backend.label, path.name, parser, log.errors)
    parsed = time.perf_counter()
    inputs = [_tensor(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [_tensor(network.get_output(i)) for i in range(network.num_outputs)]
    layers = int(network.num_layers)
    _refuse_frozen_batch(inputs, outputs, f"{backend.label} built no plan from '{path.name}'")
    config = builder.create_builder_config()
    backend.configure_(config, options)
    _add_profiles_(builder, network.get_input(0), config, options)
    monitor = _monitor(trt, send, is_cancelled)
    config.progress_monitor = monitor
    held = timing_cache.attach_(config, cache) if cache else None
    plan = builder.build_serialized_network(network, config)
    if is_cancelled():
        raise _Cancelled
    if plan is None:
        raise build_failure(backend.label, path.name, log.errors)
    built = time.perf_counter()
    if cache and held is not None:
        timing_cache.save(config, held, cache)
    with Path(job["plan"]).open("wb") as file:
        file.write(memoryview(plan))
        file.flush()
        os.fsync(file.fileno())
    return {
        "inputs": inputs,
        "outputs": outputs,
        "parser_layers": layers,
        "parse_seconds": round(parsed - start, 3),
        "build_seconds": round(built - parsed, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "workspace_bytes": int(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)),
        "device_memory": memory_facts(log),
        "warnings": log.warnings,
        "fixed_addresses": addresses_are_fixed(),
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": [int(size) for size in tensor.shape],
        "dtype": tensor.dtype.name.lower(),
    }


def _refuse_frozen_batch(
    inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], what: str
) -> None:
    """Return if the outputs' batch is free where the input's is.

    TensorRT tries a profile's optimum only (RTX 1.7.1): a graph that was frozen at
    just that size would build, and fail later at every other.

    Raises:
        ConversionError: an output's batch is fixed.
    """
    for output in outputs if inputs[0]["shape"][0] == -1 else ():
        size = next(iter(output["shape"]), 0)
        if size != -1:
            entry = next(entry for entry in CATALOGUE if entry.name == "frozen batch")
            raise ConversionError(
                f"{what}: {entry.cause}. The output '{output['name']}' has a fixed batch of "
                f"{size}.",
                entry.remedy,
            )


def _add_profiles_(builder: Any, images: Any, config: Any, options: BuildOptions) -> None:
    for batch in options.profiles:
        profile = builder.create_optimization_profile()
        shapes = []
        for end in ("min", "opt", "max"):
            sizes = options.dynamic_size
            sides = iter(sides_of(getattr(sizes, end))) if sizes is not None else iter(())
            row = (next(sides) if length == -1 else int(length) for length in images.shape[1:])
            shapes.append((getattr(batch, end), *row))
        profile.set_shape(images.name, *shapes)
        config.add_optimization_profile(profile)


def _monitor(trt: Any, send: Send, is_cancelled: Callable[[], bool]) -> Any:
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
            return not is_cancelled()

        def phase_finish(self, name: str) -> None:
            running.pop(name, None)

    return Monitor()


def _listen(cancelled: threading.Event) -> None:
    """Wait for one more byte of stdin, or its end.

    Not through ``sys.stdin``: a thread that holds its lock would keep the process
    from ending in peace.
    """
    os.read(0, 1)
    cancelled.set()


if __name__ == "__main__":
    main()
