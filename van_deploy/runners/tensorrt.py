"""TensorRT 10, TensorRT 11 and TensorRT for RTX: engines on the GPU they were built for.

A plan is native code. Before one is deserialised its sidecar has vouched for its
bytes, and backend, version, GPU and driver have been compared with this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.config import BatchRange
from van_deploy.engine.backend import RTX, Backend, detect_host, engine_from_plan, load_backend
from van_deploy.engine.compatibility import require_compatible
from van_deploy.engine.messages import BuildLog, error_from_log
from van_deploy.engine.sidecar import Sidecar, load_sidecar, sidecar_path
from van_deploy.errors import InputError, VanDeployError
from van_deploy.runners.base import Outputs, Runner, gpu_index, profile_for, require_served
from van_deploy.runners.cuda import DeviceBatch, require_cuda

DTYPES: Mapping[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def admit(plan: Path, *, trust_engine: bool = False, device: int = 0) -> Sidecar | None:
    """Return the sidecar of a plan that may be deserialised here.

    Args:
        plan: the engine.
        trust_engine: take a plan without a sidecar, for which None is returned. A
            sidecar that is there is believed and checked all the same.
        device: CUDA's number of the GPU that is to run it.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
        MissingDependency: backend, version, GPU or driver do not fit.
    """
    if trust_engine and plan.is_file() and not sidecar_path(plan).exists():
        return None
    sidecar = load_sidecar(plan)
    require_compatible(sidecar, detect_host(device=device))
    return sidecar


class TensorRtRunner(Runner):
    """Runs an engine; from one thread at a time.

    Args:
        plan: the engine.
        trust_engine: take a plan that has no sidecar. Loading it runs the code in it.
        backend: for a plan without a sidecar: ``tensorrt`` or ``tensorrt-rtx``.
        device: which GPU.
        cuda_graph: record each batch size once and launch it as one piece from then on.

    Attributes:
        trt: TensorRT's module; once it is open.
        contexts: execution contexts of the engine, likewise.
    """

    on_gpu = tf32 = True

    def __init__(
        self,
        plan: Path,
        *,
        trust_engine: bool = False,
        backend: str = RTX,
        device: str = "cuda:0",
        cuda_graph: bool = False,
    ) -> None:
        self.plan, self.trust_engine, self._named = plan, trust_engine, backend
        self.cuda_graph, self._index = cuda_graph, gpu_index(device) or 0

    def _load(self, stack: ExitStack) -> None:
        """Check the plan and load it.

        Raises:
            InputError: plan or sidecar cannot be used.
            MissingDependency: something the plan needs is not here.
            ConversionError: TensorRT does not load it.
        """
        sidecar = admit(self.plan, trust_engine=self.trust_engine, device=self._index)
        self.backend: Backend = load_backend(sidecar.backend if sidecar else self._named)
        self.cuda = require_cuda(self._index)
        self.trt, self.log = self.backend.module, BuildLog()
        self.contexts: dict[int, Any] = {}
        self._engine = self._runtime = self._config = None
        stack.callback(self._forget)
        self._runtime, self._logger = self.backend.runtime(self.log)
        # A version-compatible plan carries host code; only a verified sidecar says so.
        host_code = sidecar is not None and sidecar.options.version_compatible
        self._engine = engine_from_plan(
            self._runtime, self.backend, self.plan, self.log, host_code=host_code
        )
        self._read_tensors()
        # RTX records graphs itself, in its own runtime configuration.
        self._records = self.cuda_graph and self.backend.name != RTX
        if self.backend.name == RTX:
            self._config = self._rtx_config()
        if not self._records:
            self._context(0)
        self._stream = self.cuda.stream(stack)
        self._bound: tuple[int, ...] = ()
        self._profile: dict[int, int] = {}
        self._late = stack.enter_context(ExitStack())  # closed before all else
        self._whole: DeviceBatch | None = None

    def _forget(self) -> None:
        """Release TensorRT's objects from the inside out."""
        self.contexts.clear()
        self._config = self._engine = self._runtime = None

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, in the engine's types; see :meth:`Runner.run_all`.

        It goes through memory that is kept for the largest batch.
        """
        self._check(batch)
        if self._whole is None:
            self._whole = self._room(max(profile.max for profile in self.profiles))
            self._late.callback(self._whole.close)
        return self._whole.answers(batch)

    def resident_batch(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return a batch that stays on the GPU; see :meth:`Runner.resident_batch`."""
        self._check(images)
        room = self._room(len(images))
        room.fill(images)
        return room

    def _check(self, images: npt.NDArray[Any]) -> None:
        """Refuse what is not served; take on the images' size where the engine's is dynamic."""
        row, dtype = self._specs[self._input]
        require_served(images, self._declared, dtype, self.profiles)
        if images.shape[1:] == row:
            return
        row, self._whole = images.shape[1:], None  # what was kept is released at the end
        context, profile = self._context(0), self.profiles[self._profile.get(0, 0)]
        if not context.set_input_shape(self._input, (profile.min, *row)):
            raise self._refused(f"images of {row[1]} x {row[2]}")
        self._specs[self._input] = (row, dtype)
        for name in self._outputs:
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            self._specs[name] = (shape[1:], self._specs[name][1])
        self._bound = ()

    def _room(self, rows: int) -> DeviceBatch:
        given = {self._input: self._specs[self._input]}
        answers = {name: self._specs[name] for name in self._outputs}
        how = (self.cuda, self._stream, given, answers, rows, self._enqueue)
        return DeviceBatch(*how, graph=self._records)

    def _enqueue(self, batch: DeviceBatch) -> None:
        """Put one inference on the stream.

        A recorded graph keeps using its context, so then each batch size has one of its own. A
        context is told which profile, which batch and which memory comes, where they change.
        """
        key = batch.rows if self._records else 0
        context, what = self._context(key), f"a batch of {batch.rows}"
        wanted = (batch.rows, *batch.addresses.values())
        if self._bound != wanted:
            profile = profile_for(self.profiles, batch.rows)
            if profile != self._profile.get(key, 0):
                done = context.set_optimization_profile_async(profile, self._stream)
                self.cuda.synchronize(self._stream)
                if not done:
                    raise self._refused(f"profile {profile}")
                self._profile[key] = profile
            if not context.set_input_shape(self._input, (batch.rows, *self._specs[self._input][0])):
                raise self._refused(what)
            for name, address in batch.addresses.items():
                if not context.set_tensor_address(name, address):
                    raise self._refused(f"the memory of '{name}'")
            if missing := context.infer_shapes():
                raise self._refused(f"{what}, for want of {', '.join(missing)}")
            self._bound = wanted
        if not context.execute_async_v3(self._stream):
            raise self._refused(what)

    def _context(self, key: int) -> Any:
        if key not in self.contexts:
            engine: Any = self._engine
            given = () if self._config is None else (self._config,)
            context = engine.create_execution_context(*given)
            if context is None:
                raise error_from_log(f"{self.backend.label} makes no context", self.log.errors)
            self.contexts[key] = context
        return self.contexts[key]

    def _rtx_config(self) -> Any:
        """Return RTX's runtime configuration."""
        engine: Any = self._engine
        config, strategy = engine.create_runtime_config(), self.trt.CudaGraphStrategy
        config.cuda_graph_strategy = (
            strategy.WHOLE_GRAPH_CAPTURE if self.cuda_graph else strategy.DISABLED
        )
        # Not in the background while batches run: the first of each size waits for its kernels.
        kernels = self.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        return config

    def _read_tensors(self) -> None:
        """Find inputs, outputs and profiles; the engine, not the sidecar, has the last word."""
        engine: Any = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode]
        kinds = {name: engine.get_tensor_dtype(name).name for name in names}
        unknown = ", ".join(f"'{n}' is {k.lower()}" for n, k in kinds.items() if k not in DTYPES)
        if len(inputs) != 1 or unknown:
            raise InputError(
                f"The engine has {len(inputs)} inputs ({', '.join(inputs)}); a VAN has one. Types "
                f"that NumPy does not have: {unknown or 'none'}.",
                "Build it from a graph of `van-deploy export`.",
            )
        self._input, self._outputs = inputs[0], [name for name in names if name != inputs[0]]
        shapes = {name: tuple(int(n) for n in engine.get_tensor_shape(name)) for name in names}
        self._specs: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            name: (shapes[name][1:], np.dtype(DTYPES[kind])) for name, kind in kinds.items()
        }
        self._declared = self._specs[self._input][0]  # with -1 for a dynamic height and width
        self.profiles = [
            BatchRange(*(int(shape[0]) for shape in engine.get_tensor_profile_shape(inputs[0], i)))
            for i in range(engine.num_optimization_profiles)
        ]

    def _refused(self, what: str) -> VanDeployError:
        return error_from_log(f"{self.backend.label} refused {what}", self.log.errors[-2:])
