"""TensorRT 10, TensorRT 11 and TensorRT for RTX: engines on the GPU they were built for.

A plan is native code. Before one is deserialised its sidecar has vouched for its
bytes, and back end, version, GPU and driver have been compared with this machine.
Nothing in this module was ever run on a GPU here: see docs/gpu-host.md.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.config import BatchRange
from van_deploy.engine.backend import RTX, Backend, backend_named
from van_deploy.engine.catalogue import load_failure
from van_deploy.engine.compatibility import require_compatible
from van_deploy.engine.host import host_here
from van_deploy.engine.log import BuildLog, trt_logger
from van_deploy.engine.sidecar import Sidecar, sidecar_path, verified_sidecar
from van_deploy.errors import ConversionError, InputError, UsageError
from van_deploy.runners.base import Images, Logits
from van_deploy.runners.cuda import (
    Cuda,
    CudaGraph,
    DeviceBuffer,
    PinnedArray,
    Stream,
    require_cuda,
)

__all__ = ["TensorRtRunner", "admit", "profile_for"]

DTYPES: Mapping[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def admit(plan: Path, *, trust_engine: bool = False) -> Sidecar | None:
    """Return the sidecar of a plan that may be deserialised here.

    Args:
        plan: the engine.
        trust_engine: take a plan without a sidecar, for which None is returned. A
            sidecar that is there is believed and checked all the same.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
        MissingDependency: back end, version, GPU or driver do not fit.
    """
    if trust_engine and plan.is_file() and not sidecar_path(plan).exists():
        return None
    sidecar = verified_sidecar(plan)
    require_compatible(sidecar, host_here())
    return sidecar


def profile_for(profiles: Sequence[BatchRange], batch: int) -> int:
    """Return the index of the profile to run ``batch`` images with.

    Of those that allow it, the one whose optimum is nearest.

    Raises:
        UsageError: none allows it.

    >>> profile_for([BatchRange(1, 1, 1), BatchRange(1, 8, 32)], 6)
    1
    """
    fitting = [i for i, profile in enumerate(profiles) if profile.min <= batch <= profile.max]
    if not fitting:
        served = ", ".join(str(profile) for profile in profiles)
        raise UsageError(
            f"The engine does not serve a batch of {batch}; its profiles are {served}.",
            f"Send batches it serves, or rebuild it with --batch 1:{batch}:{batch}.",
        )
    return min(fitting, key=lambda i: abs(profiles[i].opt - batch))


class TensorRtRunner:
    """Runs an engine. Open it with ``with``; it holds GPU memory until the end.

    Not to be used from several threads at once.

    Args:
        plan: the engine.
        trust_engine: take a plan that has no sidecar. Loading it runs the code in it.
        backend: for a plan without a sidecar: ``tensorrt`` or ``tensorrt-rtx``.
        cuda_graph: record each batch size once and launch it as one piece from then on.
        runtime_cache: TensorRT for RTX only: file of kernels compiled on this machine,
            read at the start and written at the end.
        name: what reports call it.
    """

    def __init__(
        self,
        plan: Path,
        *,
        trust_engine: bool = False,
        backend: str = RTX,
        cuda_graph: bool = False,
        runtime_cache: Path | None = None,
        name: str = "tensorrt",
    ) -> None:
        self.plan = plan
        self.trust_engine = trust_engine
        self.backend = backend
        self.cuda_graph = cuda_graph
        self.runtime_cache = runtime_cache
        self.name = name
        self._stack = contextlib.ExitStack()
        self._loaded: _Loaded | None = None

    def __enter__(self) -> TensorRtRunner:
        """Check the plan, load it and take the memory for its largest batch.

        Raises:
            InputError: plan or sidecar cannot be used.
            MissingDependency: something the plan needs is not here.
            ConversionError: TensorRT does not load it.
            UsageError: a run-time cache is asked of a back end that has none.
        """
        sidecar = admit(self.plan, trust_engine=self.trust_engine)
        backend = backend_named(sidecar.backend if sidecar else self.backend)
        if self.runtime_cache is not None and backend.name != RTX:
            raise UsageError(
                f"{backend.title} has no run-time cache.", "Leave it out; plans are compiled."
            )
        cuda = require_cuda()
        with self._stack as stack:
            self._loaded = _Loaded(
                self.plan, backend, cuda, stack, self.cuda_graph, self.runtime_cache
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release everything, in the reverse order of its making."""
        loaded, self._loaded = self._loaded, None
        stack, self._stack = self._stack, contextlib.ExitStack()
        with stack:
            if loaded is not None and kind is None:
                loaded.save_runtime_cache()

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, S, S)``: the engine's first output.

        Raises:
            InputError: the images have another shape or type than the engine's input.
            UsageError: no profile allows this batch.
        """
        return next(iter(self.run_all(images).values())).astype(np.float32)

    def run_all(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output by name, in the engine's types; the arrays are the caller's.

        Raises:
            InputError: the images have another shape or type than the engine's input.
            UsageError: no profile allows this batch, or the runner is not open.
        """
        if self._loaded is None:
            raise UsageError("The engine is not open.", "Use the runner in a `with` block.")
        return self._loaded.run(images)


class _Loaded:
    """An engine on the GPU and everything it runs with."""

    def __init__(
        self,
        plan: Path,
        backend: Backend,
        cuda: Cuda,
        stack: contextlib.ExitStack,
        cuda_graph: bool,
        runtime_cache: Path | None,
    ) -> None:
        self.backend, self.cuda, self.cache_file = backend, cuda, runtime_cache
        self.trt, self.log, self.stack = backend.module, BuildLog(), stack
        self.engine: Any = None
        self.context: Any = None
        self.config: Any = None
        self.cache: Any = None
        self.logger = trt_logger(self.trt, self.log)
        self.runtime = self.trt.Runtime(self.logger)
        stack.callback(self._forget)
        if self.runtime is not None:
            self.runtime.engine_host_code_allowed = False
            self.engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.runtime is None or self.engine is None:
            raise load_failure(backend.label, str(plan), self.log.errors)
        self.context = self._make_context(cuda_graph)
        # RTX records graphs itself, in its own run-time configuration.
        self.records_graphs = cuda_graph and backend.name != RTX
        self.graph: CudaGraph | None = None
        self.recorded: tuple[int, int] | None = None
        self.profile = 0
        self.profiles = self._read_profiles()
        self.stream = Stream(cuda)
        stack.callback(self.stream.close)
        self.largest = max(profile.max for profile in self.profiles)
        self.host: dict[str, PinnedArray] = {}
        self.device: dict[str, DeviceBuffer] = {}
        for name in (self.input, *self.outputs):
            self._take_memory(name)
        stack.callback(self._drop_graph)
        stack.callback(self.stream.synchronize)  # first of all, before memory is given back

    def run(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        batch = len(images)
        profile = profile_for(self.profiles, batch)
        self._check(images)
        self.host[self.input].array[:batch] = images
        fresh = self.recorded != (profile, batch)
        if self.records_graphs and not fresh and self.graph is not None:
            self.graph.launch()
        else:
            self._select(profile, batch)
            self._enqueue(batch)  # also the warm-up a recording needs
            if self.records_graphs:
                self.stream.synchronize()
                self._drop_graph()
                self.graph = CudaGraph(self.cuda, self.stream, lambda: self._enqueue(batch))
                self.recorded = (profile, batch)
        self.stream.synchronize()
        return {name: self.host[name].array[:batch].copy() for name in self.outputs}

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

    def _make_context(self, cuda_graph: bool) -> Any:
        context = None
        if self.backend.name == RTX:
            self.config = self.engine.create_runtime_config()
            strategy = self.trt.CudaGraphStrategy
            self.config.cuda_graph_strategy = (
                strategy.WHOLE_GRAPH_CAPTURE if cuda_graph else strategy.DISABLED
            )
            self.cache = self.config.create_runtime_cache()
            if self.cache_file is not None and self.cache_file.exists():
                # A cache of another GPU, driver or version is refused and simply made anew.
                self.cache.deserialize(self.cache_file.read_bytes())
            self.config.set_runtime_cache(self.cache)
            context = self.engine.create_execution_context(self.config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise load_failure(self.backend.label, "the engine's context", self.log.errors)
        return context

    def _read_profiles(self) -> list[BatchRange]:
        """Find inputs, outputs and profiles; the engine, not the sidecar, has the last word."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == mode]
        if len(inputs) != 1:
            raise InputError(
                f"The engine has {len(inputs)} inputs ({', '.join(inputs)}); a VAN has one.",
                "Build it from a graph of `van-deploy export`.",
            )
        self.input = inputs[0]
        self.outputs = [name for name in names if name != self.input]
        self.shape = tuple(int(size) for size in self.engine.get_tensor_shape(self.input))
        self.dtype = np.dtype(DTYPES[self.engine.get_tensor_dtype(self.input).name])
        profiles = []
        for index in range(self.engine.num_optimization_profiles):
            shapes = self.engine.get_tensor_profile_shape(self.input, index)
            profiles.append(BatchRange(*(int(next(iter(shape))) for shape in shapes)))
        return profiles

    def _take_memory(self, name: str) -> None:
        """Allocate a tensor's host and device memory for the largest batch."""
        rest = tuple(int(size) for size in self.engine.get_tensor_shape(name))[1:]
        dtype = np.dtype(DTYPES[self.engine.get_tensor_dtype(name).name])
        self.host[name] = PinnedArray(self.cuda, (self.largest, *rest), dtype)
        self.stack.callback(self.host[name].close)
        self.device[name] = DeviceBuffer(self.cuda, self.host[name].array.nbytes)
        self.stack.callback(self.device[name].close)
        if not self.context.set_tensor_address(name, self.device[name].address):
            raise load_failure(self.backend.label, f"tensor '{name}'", self.log.errors)

    def _check(self, images: npt.NDArray[Any]) -> None:
        if tuple(images.shape[1:]) != self.shape[1:]:
            raise InputError(
                f"The engine's input '{self.input}' is (N, {', '.join(map(str, self.shape[1:]))}); "
                f"the images are {tuple(images.shape)}.",
                "Prepare them with the model's own preprocessing.",
            )
        narrowed = images.dtype == np.float32 and self.dtype == np.float16
        if images.dtype != self.dtype and not narrowed:
            raise InputError(
                f"The engine's input '{self.input}' is {self.dtype}; the images are "
                f"{images.dtype}.",
                f"Convert them to {self.dtype}.",
            )

    def _select(self, profile: int, batch: int) -> None:
        """Tell the context which profile and which batch comes next."""
        if profile != self.profile:
            done = self.context.set_optimization_profile_async(profile, int(self.stream.handle))
            self.stream.synchronize()
            if not done:
                raise self._refused(f"profile {profile}")
            self.profile = profile
        if not self.context.set_input_shape(self.input, (batch, *self.shape[1:])):
            raise self._refused(f"a batch of {batch}")
        missing = self.context.infer_shapes()
        if missing:
            raise self._refused(f"a batch of {batch}, for want of {', '.join(missing)}")

    def _enqueue(self, batch: int) -> None:
        """Put one inference on the stream: images in, kernels, answers out."""
        source = self.host[self.input]
        source.copy_to(self.device[self.input], self._bytes(self.input, batch), self.stream)
        if not self.context.execute_async_v3(int(self.stream.handle)):
            raise self._refused(f"a batch of {batch}")
        for name in self.outputs:
            size = self._bytes(name, batch)
            self.host[name].copy_from(self.device[name], size, self.stream)

    def _bytes(self, name: str, batch: int) -> int:
        return int(self.host[name].array[:batch].nbytes)

    def _refused(self, what: str) -> ConversionError:
        said = " ".join(self.log.errors[-2:]) or "nothing"
        return ConversionError(
            f"{self.backend.label} refused {what}. It says: {said}",
            "Rebuild the engine; if that does not help, please report it.",
        )

    def _drop_graph(self) -> None:
        if self.graph is not None:
            self.graph.close()
        self.graph, self.recorded = None, None

    def _forget(self) -> None:
        """Release TensorRT's objects from the inside out."""
        self.context = None
        self.cache = None
        self.config = None
        self.engine = None
        self.runtime = None
