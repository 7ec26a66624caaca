"""Steps of the GPU report that need PyTorch alone: environment, ceilings, PyTorch's own modes.

    python benchmarks/gpu/torch_steps.py eager --variant van_b0 --batches 128,1 --out FILE

Started by report.py, each in a process of its own. Random weights of natural statistics:
speed does not depend on them, and every row is compared with FP32 on the same images. "Times
PyTorch" on a GPU is against the fastest of PyTorch's modes at the same batch; eager FP32 is
shown beside it. All inputs and outputs stay on the device.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from result import Result, turn
from torch import Tensor, nn

from van_deploy.bench.gpu import Clock, GpuWatch, clock_of, timed
from van_deploy.bench.profile import by_kernel, by_module
from van_deploy.bench.roofline import measured_ceilings
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import sqnr_db, top1_agreement
from van_deploy.model.random_weights import random_van, smooth_images
from van_deploy.model.variants import variant_named

PACKAGES = (
    *("van-deploy", "torch", "torchvision", "triton", "timm", "onnx", "onnxscript", "onnxsim"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13"),
    *("tensorrt-rtx-cu13-libs", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-ml-py"),
    *("cuda-bindings", "numpy", "pydantic"),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DOCTOR_LIMIT_S = 75
COMPARED = 32  # images on which a row is compared with FP32
SEED = 20


@dataclass(frozen=True)
class Rival:
    """One way PyTorch runs a network.

    Attributes:
        precision: of weights and activations: ``fp32`` (its convolutions compute in TF32, as
            PyTorch has it), ``fp16`` or ``bf16``.
        channels_last: NHWC memory.
        compile_mode: of ``torch.compile``; "" for eager.
        graph: record the launches once as a CUDA graph, and replay it. The modes of
            ``torch.compile`` used here do so by themselves.
    """

    precision: str
    channels_last: bool = True
    compile_mode: str = ""
    graph: bool = False


RIVALS = {
    "eager-fp32": Rival("fp32", channels_last=False),
    "eager-fp16": Rival("fp16"),
    "eager-fp16-graph": Rival("fp16", graph=True),
    "compile-fp16": Rival("fp16", compile_mode="max-autotune"),
    "compile-fp16-quick": Rival("fp16", compile_mode="reduce-overhead"),
    "compile-bf16": Rival("bf16", compile_mode="reduce-overhead"),
    "kernels": Rival("fp16", graph=True),
    "kernels-compile": Rival("fp16", compile_mode="reduce-overhead"),
}
"""By name. ``quick`` and ``bf16`` have CUDA graphs, but no kernels chosen by timing them;
``kernels`` are this project's, the second through ``torch.compile``."""


class TorchResident:
    """A PyTorch network with its input and output on the device.

    Args:
        model: a network in eval mode, without gradients. It becomes this one's.
        images: ``(N, C, S, S)`` float32, normalised, on the host.
        rival: how it runs.
        device: such as ``cuda:0``. On ``cpu`` a launch is a run, and nothing is pinned.

    Attributes:
        stream: handle of the stream; PyTorch's current one.
        compile_s: seconds until the first answer: compiling, tuning and recording.
    """

    def __init__(self, model: nn.Module, images: Tensor, rival: Rival, device: str) -> None:
        """See the class."""
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        dtype = DTYPES[rival.precision]
        layout = torch.channels_last if rival.channels_last else torch.contiguous_format
        self._model: Any = model.to(self.device)
        if model.__class__.__name__ != "FusedVan":  # it has its types and layouts by itself
            self._model = model.to(dtype).to(memory_format=layout)
        host = images.to(dtype).contiguous(memory_format=layout)
        self._host_in = host.pin_memory() if on_gpu else host
        self._input = self._host_in.to(self.device)
        self._compiled = bool(rival.compile_mode)
        if self._compiled:
            torch.compiler.reset()
            self._model = torch.compile(self._model, mode=rival.compile_mode, dynamic=False)
        self.stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        self._output: Tensor | None = None
        self._graph: Any = None
        start = time.perf_counter()
        for _ in range(3):  # torch.compile records its CUDA graph in the second call
            self.launch()
        if rival.graph and on_gpu:
            self._record()
        output = self._ready()
        self._host_out = torch.empty_like(output, device="cpu", pin_memory=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self.compile_s = time.perf_counter() - start

    def upload(self) -> None:
        """Copy the images to the device."""
        self._input.copy_(self._host_in, non_blocking=True)

    @torch.no_grad()
    def launch(self) -> None:
        """Put one run on the stream."""
        if self._graph is not None:
            self._graph.replay()
            return
        self._output = None  # a compiled network writes over what it gave before
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        self._output = self._model(self._input)

    def download(self) -> None:
        """Copy the logits to the host."""
        self._host_out.copy_(self._ready(), non_blocking=True)

    def outputs(self) -> Any:
        """Wait, and return the logits ``(N, K)`` float32 of NumPy."""
        return self._ready().float().cpu().numpy()

    def _ready(self) -> Tensor:
        if self._output is None:
            raise RuntimeError("the network was not launched yet")
        return self._output

    @torch.no_grad()
    def _record(self) -> None:
        """Record one run as a CUDA graph. The runs before it have chosen cuDNN's algorithms."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._model(self._input)
        self._graph = graph
        self.launch()


def environment(result: Result, options: argparse.Namespace) -> None:
    """Record what ran: device, driver, versions, and what ``van-deploy doctor`` says."""
    installed = {found.name.lower(): found.version for found in distributions()}
    result.fact("versions", {name: installed[name] for name in PACKAGES if name in installed})
    result.fact("python", platform.python_version())
    result.fact("platform", platform.platform())
    result.fact("processors", os.cpu_count())
    result.fact("cuda_of_torch", torch.version.cuda)
    if options.device.startswith("cuda"):
        properties, watch = (
            torch.cuda.get_device_properties(options.device),
            GpuWatch(options.device),
        )
        result.fact(
            "device",
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
                "memory_bytes": properties.total_memory,
                "cudnn": torch.backends.cudnn.version(),
            },
        )
        driver, limit = nvidia_driver(), watch.ask("nvmlDeviceGetEnforcedPowerLimit")
        result.fact(
            "nvml",
            {
                "driver": driver.version if driver else None,
                "max_sm_mhz": watch.ask("nvmlDeviceGetMaxClockInfo", 1),  # NVML_CLOCK_SM
                "power_limit_w": limit / 1e3 if limit else None,
                "state": watch.state(),
            },
        )
    command = [sys.executable, "-m", "van_deploy", "doctor", "--json"]
    how = {"capture_output": True, "text": True, "check": False, "timeout": DOCTOR_LIMIT_S}
    try:
        done = subprocess.run(command, **how)
    except subprocess.TimeoutExpired:
        result.note(f"`van-deploy doctor --json` took more than {DOCTOR_LIMIT_S} s.")
        return
    result.fact("doctor_exit_code", done.returncode)
    result.fact("doctor_stderr", done.stderr.strip()[-4000:])
    result.fact("doctor", json.loads(done.stdout) if done.stdout else {})


def ceilings(result: Result, options: argparse.Namespace) -> None:
    """Measure what the device can do at best: a large copy, and matrix products."""
    torch.zeros(1, device=options.device)  # starts CUDA outside the turn
    with turn():
        found = measured_ceilings(options.device, os.cpu_count() or 1, options.seconds)
    result.fact("ceilings", found)


def eager(result: Result, options: argparse.Namespace) -> None:
    """Time eager PyTorch: FP32, FP16 in NHWC, and the latter as one CUDA graph."""
    subject = _Subject(options)
    names = ["eager-fp32", *(["eager-fp16", "eager-fp16-graph"] if subject.on_gpu else [])]
    for batch in options.batches:
        for name in names:
            with turn():  # cuDNN chooses its algorithms by timing them
                subject.measure(result, name, batch)
    _profile_eager(result, subject)


def compiled(result: Result, options: argparse.Namespace) -> None:
    """Time one mode of torch.compile; what it compiles and tunes is done outside the turn."""
    subject = _Subject(options)
    for batch in options.batches:
        resident = subject.resident(options.rival, batch)
        with turn():
            subject.measure(result, options.rival, batch, resident)
            if batch == options.batches[0] and subject.on_gpu:
                _profile_launch(result, subject, options.rival, batch, resident)


class _Subject:
    """A network, its images and the device: what every row of one step has in common."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.backends.cudnn.benchmark = True
        self.options, self.device = options, options.device
        self.on_gpu = self.device.startswith("cuda")
        config = variant_named(options.variant).config
        self.model: Any = random_van(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            size = options.image_size
            self.images = smooth_images(max(options.batches), config.in_chans, size)
        self.expected = self._fp32(self.images[:COMPARED])
        self.note = ""
        if options.folded:
            self.model = fold_van(self.model, self.images[:1]).model
            self.note = "the network as van-deploy folds it"
        if options.rival.startswith("kernels"):
            from van_deploy.kernels.network import fused  # where there is Triton

            half = torch.float16 if self.on_gpu else torch.float32
            self.model = fused(self.model, half, fallback=not self.on_gpu)
            self.note = "this project's kernels"
        self.watch = GpuWatch(self.device)

    def _fp32(self, images: Tensor) -> Any:
        """Return the original's logits in FP32 without TF32."""
        backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [backend.allow_tf32 for backend in backends]
        for backend in backends:
            backend.allow_tf32 = False
        model = copy.deepcopy(self.model).to(self.device)
        with torch.no_grad():
            logits = model(images.to(self.device)).float().cpu().numpy()
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
        return logits

    def rival(self, name: str) -> Rival:
        """Return one of PyTorch's modes; on a CPU, whose FP16 takes seconds, in FP32."""
        rival = RIVALS[name]
        return rival if self.on_gpu else replace(rival, precision="fp32", graph=False)

    def resident(self, name: str, batch: int) -> TorchResident:
        """Return the network in one of PyTorch's modes, compiled and warm."""
        model = copy.deepcopy(self.model)
        return TorchResident(model, self.images[:batch], self.rival(name), self.device)

    def measure(self, result: Result, name: str, batch: int, resident: Any = None) -> None:
        """Add the row of one mode at one batch size."""
        resident = resident or self.resident(name, batch)
        clock = clock_of(resident, self.device) if self.on_gpu else Clock()
        timing = timed(resident, batch, clock, self.watch, seconds=self.options.seconds)
        logits = resident.outputs()[:COMPARED]
        expected = self.expected[: len(logits)]
        ours = name.startswith("kernels")
        result.row(
            network=self.options.variant,
            image_size=self.options.image_size,
            runner=name if ours else f"pytorch-{name}" + "+folded" * self.options.folded,
            group="van-deploy" if self.note else "pytorch",
            precision=self.rival(name).precision,
            compile_s=resident.compile_s,
            sqnr_db=sqnr_db(expected, logits),
            top1_agreement=top1_agreement(expected, logits),
            note=self.note,
            batch=batch,
            latency_ms=timing.pop("latency"),
            **timing,
        )


def _profile_eager(result: Result, subject: _Subject) -> None:
    """Add the eager network's time by kind of PyTorch module, at the largest batch."""
    batch = max(subject.options.batches)
    dtype = torch.float16 if subject.on_gpu else torch.float32
    place = {"memory_format": torch.channels_last, "device": subject.device, "dtype": dtype}
    model = copy.deepcopy(subject.model).to(**place)
    images = subject.images[:batch].to(**place)
    with turn():
        lines = by_module(model, images)
    kind = "FP16" if subject.on_gpu else "FP32 on the processor"
    what = f"{subject.options.variant}, batch {batch}: eager {kind} channels-last"
    result.table(f"{what}, by PyTorch module", lines)


def _profile_launch(
    result: Result, subject: _Subject, name: str, batch: int, resident: Any
) -> None:
    kinds, kernels = by_kernel(resident.launch)
    what = f"{subject.options.variant}, batch {batch}: {name}"
    result.table(f"{what}, by kind of kernel", kinds)
    result.table(f"{what}, longest kernels", kernels)


STEPS = {"environment": environment, "ceilings": ceilings, "eager": eager, "compile": compiled}


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--variant", default="van_b0")
    parser.add_argument("--batches", default="128,1", type=_numbers)
    parser.add_argument("--image-size", default=224, type=int)
    parser.add_argument("--rival", default="compile-fp16")
    parser.add_argument("--folded", action="store_true", help="the network as van-deploy folds it")
    parser.add_argument("--seconds", default=0.6, type=float, help="measured, a row")
    options = parser.parse_args()
    STEPS[options.step](Result(options.out), options)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
