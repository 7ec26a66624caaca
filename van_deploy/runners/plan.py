"""A plan on the GPU: its tensors, profiles and contexts, and what enqueues it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.config import BatchRange
from van_deploy.engine.backend import RTX, Backend
from van_deploy.engine.catalogue import load_failure, run_failure
from van_deploy.engine.load import engine_from_plan, runtime_of
from van_deploy.engine.log import BuildLog
from van_deploy.errors import InputError, VanDeployError
from van_deploy.runners.cuda import Cuda, DeviceBatch

__all__ = ["LoadedPlan", "profile_for"]

DTYPES: Mapping[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def profile_for(profiles: Sequence[BatchRange], batch: int) -> int:
    """Return the index of the profile to run ``batch`` images with.

    Of those that allow it, the one whose optimum is nearest.

    Raises:
        InputError: none allows it.

    >>> profile_for([BatchRange(1, 1, 1), BatchRange(1, 8, 32)], 6)
    1
    """
    fitting = [i for i, profile in enumerate(profiles) if profile.min <= batch <= profile.max]
    if not fitting:
        served = ", ".join(str(profile) for profile in profiles)
        raise InputError(
            f"The engine does not serve a batch of {batch}; its profiles are {served}.",
            f"Send batches it serves, or rebuild it with --batch 1:{batch}:{batch}.",
        )
    return min(fitting, key=lambda i: abs(profiles[i].opt - batch))


class LoadedPlan:
    """An engine on the GPU and everything it runs with.

    Args:
        plan: the file, its digest checked.
        backend: what loads it.
        cuda: the runtime.
        stack: releases everything, in the reverse order of its making.
        cuda_graph: record each batch size once and launch it as one piece from then on.
        host_code: let the plan bring code for the processor.
        runtime_cache: see :class:`~van_deploy.runners.tensorrt.TensorRtRunner`.
    """

    def __init__(
        self,
        plan: Path,
        backend: Backend,
        cuda: Cuda,
        stack: contextlib.ExitStack,
        *,
        cuda_graph: bool,
        host_code: bool,
        runtime_cache: Path | None,
    ) -> None:
        self.backend, self.cuda, self.cache_file = backend, cuda, runtime_cache
        self.trt, self.log = backend.module, BuildLog()
        self.config: Any = None
        self.cache: Any = None
        self.contexts: dict[int, Any] = {}
        self.bound: tuple[int, ...] = ()
        stack.callback(self._forget)
        self.runtime, self.logger = runtime_of(backend, self.log)
        self.engine = engine_from_plan(self.runtime, backend, plan, self.log, host_code=host_code)
        # RTX records graphs itself, in its own runtime configuration.
        self.records_graphs = cuda_graph and backend.name != RTX
        self._read_tensors()
        if backend.name == RTX:
            self._configure_rtx(cuda_graph)
        if not self.records_graphs:
            self._context(0)
        self.stream = cuda.stream(stack)
        self.profile: dict[int, int] = {}
        self.largest = max(profile.max for profile in self.profiles)
        self.late = stack.enter_context(contextlib.ExitStack())  # closed before all else
        self.whole: DeviceBatch | None = None

    def run(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output by name, through memory kept for the largest batch."""
        self._check(images)
        self._sized(images.shape[1:])
        if self.whole is None:
            self.whole = self._room(self.largest)
            self.late.callback(self.whole.close)
        return self.whole.answers(images)

    def batch(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return room for a batch of its own, filled with ``images``."""
        self._check(images)
        self._sized(images.shape[1:])
        room = self._room(len(images))
        room.fill(images)
        return room

    def _sized(self, row: tuple[int, ...]) -> None:
        """Take on the height and width of the images where the engine's are dynamic."""
        if row == self.specs[self.input][0]:
            return
        self.whole = None  # what was kept for another size is released at the end
        context, profile = self._context(0), self.profiles[self.profile.get(0, 0)]
        if not context.set_input_shape(self.input, (profile.min, *row)):
            raise self._refused(f"images of {row[1]} x {row[2]}")
        self.specs[self.input] = (row, self.specs[self.input][1])
        for name in self.outputs:
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            self.specs[name] = (shape[1:], self.specs[name][1])
        self.bound = ()

    def _room(self, rows: int) -> DeviceBatch:
        return DeviceBatch(
            self.cuda,
            self.stream,
            {self.input: self.specs[self.input]},
            {name: self.specs[name] for name in self.outputs},
            rows,
            self._enqueue,
            graph=self.records_graphs,
        )

    def _enqueue(self, batch: DeviceBatch) -> None:
        """Put one inference on the stream.

        A recorded graph keeps using its context, so then each batch size has one of its own.
        """
        key = batch.rows if self.records_graphs else 0
        context = self._context(key)
        wanted = (batch.rows, *batch.addresses.values())
        if self.bound != wanted:
            self._bind(context, key, batch)
            self.bound = wanted
        if not context.execute_async_v3(self.stream):
            raise self._refused(f"a batch of {batch.rows}")

    def _bind(self, context: Any, key: int, batch: DeviceBatch) -> None:
        """Tell a context which profile, which batch and which memory comes next."""
        profile = profile_for(self.profiles, batch.rows)
        if profile != self.profile.get(key, 0):
            done = context.set_optimization_profile_async(profile, self.stream)
            self.cuda.synchronize(self.stream)
            if not done:
                raise self._refused(f"profile {profile}")
            self.profile[key] = profile
        if not context.set_input_shape(self.input, (batch.rows, *self.specs[self.input][0])):
            raise self._refused(f"a batch of {batch.rows}")
        for name, address in batch.addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._refused(f"the memory of '{name}'")
        missing = context.infer_shapes()
        if missing:
            raise self._refused(f"a batch of {batch.rows}, for want of {', '.join(missing)}")

    def _context(self, key: int) -> Any:
        if key not in self.contexts:
            given = () if self.config is None else (self.config,)
            context = self.engine.create_execution_context(*given)
            if context is None:
                raise load_failure(self.backend.label, "the engine's context", self.log.errors)
            self.contexts[key] = context
        return self.contexts[key]

    def _configure_rtx(self, cuda_graph: bool) -> None:
        self.config = self.engine.create_runtime_config()
        strategy = self.trt.CudaGraphStrategy
        self.config.cuda_graph_strategy = (
            strategy.WHOLE_GRAPH_CAPTURE if cuda_graph else strategy.DISABLED
        )
        # Not in the background while batches run: the first of each size waits for its kernels.
        kernels = self.trt.DynamicShapesKernelSpecializationStrategy
        self.config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        self.cache = self.config.create_runtime_cache()
        if self.cache_file is not None and self.cache_file.exists():
            # A cache of another GPU, driver or version is refused and simply made anew.
            self.cache.deserialize(self.cache_file.read_bytes())
        self.config.set_runtime_cache(self.cache)

    def save_runtime_cache(self) -> None:
        """Write the kernels compiled so far, for the next process on this machine."""
        if self.cache is None or self.cache_file is None:
            return
        data = bytes(memoryview(self.cache.serialize()))
        self.cache_file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.cache_file.parent, prefix=".runtime-cache-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(self.cache_file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _read_tensors(self) -> None:
        """Find inputs, outputs and profiles; the engine, not the sidecar, has the last word."""
        engine = self.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode]
        if len(inputs) != 1:
            raise InputError(
                f"The engine has {len(inputs)} inputs ({', '.join(inputs)}); a VAN has one.",
                "Build it from a graph of `van-deploy export`.",
            )
        self.input = inputs[0]
        self.outputs = [name for name in names if name != self.input]
        self.specs: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {}
        for name in names:
            kind = engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise InputError(
                    f"The engine's tensor '{name}' is {kind.lower()}, which has no NumPy type.",
                    "Build it from a graph whose inputs and outputs are float32 or float16.",
                )
            row = tuple(int(size) for size in engine.get_tensor_shape(name))[1:]
            self.specs[name] = (row, np.dtype(DTYPES[kind]))
        self.declared = self.specs[self.input][0]  # with -1 for a dynamic height and width
        self.profiles = []
        for index in range(engine.num_optimization_profiles):
            shapes = engine.get_tensor_profile_shape(self.input, index)
            self.profiles.append(BatchRange(*(int(next(iter(shape))) for shape in shapes)))

    def _check(self, images: npt.NDArray[Any]) -> None:
        profile_for(self.profiles, len(images))
        row, dtype = self.declared, self.specs[self.input][1]
        given = tuple(images.shape[1:])
        if len(given) != len(row) or any(r not in (-1, g) for r, g in zip(row, given, strict=True)):
            raise InputError(
                f"The engine's input '{self.input}' is (N, {', '.join(map(str, row))}); "
                f"the images are {tuple(images.shape)}.",
                "Prepare them with the model's own preprocessing.",
            )
        narrowed = images.dtype == np.float32 and dtype == np.float16
        if images.dtype != dtype and not narrowed:
            raise InputError(
                f"The engine's input '{self.input}' is {dtype}; the images are {images.dtype}.",
                f"Convert them to {dtype}.",
            )

    def _refused(self, what: str) -> VanDeployError:
        return run_failure(self.backend.label, what, self.log.errors[-2:])

    def _forget(self) -> None:
        """Release TensorRT's objects from the inside out."""
        self.contexts.clear()
        self.cache = None
        self.config = None
        self.engine = None
        self.runtime = None
