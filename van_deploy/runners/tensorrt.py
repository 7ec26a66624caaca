"""TensorRT 10, TensorRT 11 and TensorRT for RTX: engines on the GPU they were built for.

A plan is native code. Before it is deserialised, its bytes are verified with its sidecar, and
backend, version, GPU and driver are compared with this machine.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.config import BatchRange
from van_deploy.engine.backend import RTX, Backend, detect_host, engine_from_plan, load_backend
from van_deploy.engine.compatibility import require_compatible
from van_deploy.engine.messages import BuildLog, error_from_log
from van_deploy.engine.sidecar import load_sidecar
from van_deploy.errors import InputError, VanDeployError
from van_deploy.runners.base import Outputs, Runner, check_input, gpu_index, select_profile
from van_deploy.runners.cuda import DeviceBatch, require_cuda


class TensorRtRunner(Runner):
    """Runs an engine from one thread at a time.

    Args:
        plan: the engine.
        trust_engine: accept a plan that has no sidecar. Loading it runs the code in it.
        backend: for a plan without a sidecar: ``tensorrt`` or ``tensorrt-rtx``.
        device: the GPU.
        cuda_graph: capture a CUDA graph for each batch size and replay it.

    Attributes:
        trt: TensorRT's module, of an open runner.
        contexts: execution contexts of the engine, of an open runner.
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
        self.plan, self.trust_engine, self._default_backend = plan, trust_engine, backend
        self.cuda_graph, self._index = cuda_graph, gpu_index(device) or 0

    def _load(self, stack: ExitStack) -> None:
        """Check the plan and load it.

        Raises:
            InputError: plan or sidecar is missing, damaged, edited or swapped.
            MissingDependency: backend, GPU, driver or cuda-bindings is missing or incompatible.
            ConversionError: TensorRT does not load the plan.
        """
        sidecar = load_sidecar(self.plan, trust_engine=self.trust_engine)
        if sidecar is not None:
            require_compatible(sidecar, detect_host(device=self._index))
        self.backend: Backend = load_backend(sidecar.backend if sidecar else self._default_backend)
        self.cuda = require_cuda(self._index)
        self.trt, self.log = self.backend.module, BuildLog()
        self.contexts: dict[int, Any] = {}
        self._engine = self._runtime = self._config = None
        stack.callback(self._release)
        self._runtime, self._logger = self.backend.runtime(self.log)
        # A version-compatible plan contains host code; only a verified sidecar can allow it.
        host_code = sidecar is not None and sidecar.options.version_compatible
        self._engine = engine_from_plan(
            self._runtime, self.backend, self.plan, self.log, host_code=host_code
        )
        self._read_tensor_specs()
        # TensorRT for RTX captures graphs itself, set in its own runtime configuration.
        self._capture_graphs = self.cuda_graph and self.backend.name != RTX
        if self.backend.name == RTX:
            self._config = self._rtx_config()
        if not self._capture_graphs:
            self._context(0)
        self._stream = self.cuda.create_stream(stack)
        self._binding: tuple[int, ...] = ()
        self._profile: dict[int, int] = {}
        self._largest_batch: DeviceBatch | None = None
        stack.callback(self._free_largest_batch)  # before the stream and the engine

    def _release(self) -> None:
        """Release TensorRT's objects, each before the one that created it."""
        self.contexts.clear()
        self._config = self._engine = self._runtime = None

    def _free_largest_batch(self) -> None:
        """Free the buffers that are kept between calls."""
        if self._largest_batch is not None:
            self._largest_batch.close()
            self._largest_batch = None

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, in the engine's types; see :meth:`Runner.run_all`.

        The buffers for the largest batch are kept between calls with images of one size.
        """
        self._check(batch)
        if self._largest_batch is None:
            self._largest_batch = self._allocate(max(profile.max for profile in self.profiles))
        return self._largest_batch.infer(batch)

    def resident_batch(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return a batch in GPU memory; see :meth:`Runner.resident_batch`."""
        self._check(images)
        batch = self._allocate(len(images))
        batch.fill(images)
        return batch

    def _check(self, images: npt.NDArray[Any]) -> None:
        """Check images, and set their size where the engine's is dynamic."""
        row, dtype = self._specs[self._input]
        check_input(images, self._declared_row, dtype, self.profiles)
        if images.shape[1:] == row:
            return
        row = images.shape[1:]
        self._free_largest_batch()  # else each change of the size would keep one more
        context, profile = self._context(0), self.profiles[self._profile.get(0, 0)]
        if not context.set_input_shape(self._input, (profile.min, *row)):
            raise self._rejected(f"images of {row[1]} x {row[2]}")
        self._specs[self._input] = (row, dtype)
        for name in self._outputs:
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            self._specs[name] = (shape[1:], self._specs[name][1])
        self._binding = ()

    def _allocate(self, rows: int) -> DeviceBatch:
        inputs = {self._input: self._specs[self._input]}
        outputs = {name: self._specs[name] for name in self._outputs}
        arguments = (self.cuda, self._stream, inputs, outputs, rows, self._enqueue)
        return DeviceBatch(*arguments, graph=self._capture_graphs)

    def _enqueue(self, batch: DeviceBatch) -> None:
        """Enqueue one inference on the stream.

        A captured graph keeps using its context, so each batch size then has its own context.
        Profile, batch size and addresses are set on a context only where they change.
        """
        key = batch.rows if self._capture_graphs else 0
        context, request = self._context(key), f"a batch of {batch.rows}"
        binding = (batch.rows, *batch.addresses.values())
        if self._binding != binding:
            profile = select_profile(self.profiles, batch.rows)
            if profile != self._profile.get(key, 0):
                done = context.set_optimization_profile_async(profile, self._stream)
                self.cuda.synchronize(self._stream)
                if not done:
                    raise self._rejected(f"profile {profile}")
                self._profile[key] = profile
            if not context.set_input_shape(self._input, (batch.rows, *self._specs[self._input][0])):
                raise self._rejected(request)
            for name, address in batch.addresses.items():
                if not context.set_tensor_address(name, address):
                    raise self._rejected(f"the memory of '{name}'")
            if missing := context.infer_shapes():
                raise self._rejected(f"{request}: {', '.join(missing)} has no shape")
            self._binding = binding
        if not context.execute_async_v3(self._stream):
            raise self._rejected(request)

    def _context(self, key: int) -> Any:
        if key not in self.contexts:
            engine: Any = self._engine
            config = () if self._config is None else (self._config,)
            context = engine.create_execution_context(*config)
            if context is None:
                raise error_from_log(f"{self.backend.label} created no context", self.log.errors)
            self.contexts[key] = context
        return self.contexts[key]

    def _rtx_config(self) -> Any:
        """Return the runtime configuration of TensorRT for RTX."""
        engine: Any = self._engine
        config, strategy = engine.create_runtime_config(), self.trt.CudaGraphStrategy
        config.cuda_graph_strategy = (
            strategy.WHOLE_GRAPH_CAPTURE if self.cuda_graph else strategy.DISABLED
        )
        # Kernels are compiled before the first batch of each size, not in the background.
        kernels = self.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        return config

    def _read_tensor_specs(self) -> None:
        """Read inputs, outputs and profiles from the engine, not from the sidecar."""
        engine: Any = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode]
        if len(inputs) != 1:
            raise InputError(
                f"The engine has {len(inputs)} inputs ({', '.join(inputs)}); a VAN has one.",
                "Build it from a graph of `van-deploy export`.",
            )
        self._input, self._outputs = inputs[0], [name for name in names if name != inputs[0]]
        shapes = {name: tuple(int(n) for n in engine.get_tensor_shape(name)) for name in names}
        self._specs: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            name: (shapes[name][1:], self._dtype(name)) for name in names
        }
        self._declared_row = self._specs[self._input][0]  # -1 for a dynamic height and width
        self.profiles = [
            BatchRange(*(int(shape[0]) for shape in engine.get_tensor_profile_shape(inputs[0], i)))
            for i in range(engine.num_optimization_profiles)
        ]

    def _dtype(self, name: str) -> np.dtype[Any]:
        engine: Any = self._engine
        kind = engine.get_tensor_dtype(name)
        try:
            return np.dtype(self.trt.nptype(kind))
        except TypeError as error:  # BF16 and FP8 have no NumPy equivalent
            raise InputError(
                f"'{name}' of the engine is {kind.name.lower()}, which NumPy does not have.",
                "Build it from a graph of `van-deploy export`.",
            ) from error

    def _rejected(self, request: str) -> VanDeployError:
        return error_from_log(f"{self.backend.label} refused {request}", self.log.errors[-2:])
