"""Steps of the GPU report that need PyTorch alone: environment, ceilings, PyTorch's own modes.

    python benchmarks/gpu/torch_steps.py eager --variant van_b0 --batches 128,1 --out FILE

Started by report.py, each in a process of its own. Random weights of natural statistics:
speed does not depend on them, and every row is compared with FP32 on the same images.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from result import Result
from turns import turn

PACKAGES = (
    *("van-deploy", "torch", "torchvision", "triton", "timm", "onnx", "onnxscript", "onnxsim"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13"),
    *("tensorrt-rtx-cu13-libs", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-ml-py"),
    *("cuda-bindings", "numpy", "pydantic"),
)
DOCTOR_LIMIT_S = 75
COMPARED = 32  # images on which a row is compared with FP32
SEED = 20


def environment(result: Result, options: argparse.Namespace) -> None:
    """Record what ran: device, driver, versions, and what ``van-deploy doctor`` says."""
    installed = {found.name.lower(): found.version for found in distributions()}
    known = {name: installed[name] for name in PACKAGES if name in installed}
    result.fact("versions", known)
    result.fact("python", platform.python_version())
    result.fact("platform", platform.platform())
    result.fact("processors", os.cpu_count())
    _device_facts(result, options.device)
    command = [sys.executable, "-m", "van_deploy", "doctor", "--json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=DOCTOR_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        result.note(f"`van-deploy doctor --json` took more than {DOCTOR_LIMIT_S} s.")
        return
    result.fact("doctor_exit_code", done.returncode)
    if done.stderr.strip():
        result.fact("doctor_stderr", done.stderr.strip()[-4000:])
    try:
        result.fact("doctor", json.loads(done.stdout))
    except json.JSONDecodeError:
        result.fact("doctor", done.stdout[-4000:])


def _device_facts(result: Result, device: str) -> None:
    import torch

    result.fact("cuda_of_torch", torch.version.cuda)
    if not device.startswith("cuda"):
        return
    from van_deploy.bench.gpu_state import GpuWatch

    properties = torch.cuda.get_device_properties(device)
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
    watch = GpuWatch(device)
    result.fact("nvml", {**watch.described(), "state": watch.state()})


def ceilings(result: Result, options: argparse.Namespace) -> None:
    """Measure what the device can do at best: a large copy, and matrix products."""
    import torch

    from van_deploy.bench.ceilings import measured_ceilings

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
        import torch

        from van_deploy.bench.gpu_state import GpuWatch
        from van_deploy.model.random_weights import random_van, smooth_pictures
        from van_deploy.model.variants import variant_named

        torch.backends.cudnn.benchmark = True
        self.options = options
        self.device: str = options.device
        self.on_gpu = self.device.startswith("cuda")
        self.config = variant_named(options.variant).config
        self.model: Any = random_van(self.config)
        size = options.image_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            pictures = smooth_pictures(max(options.batches), self.config.in_chans, size)
        self.images = pictures.numpy()
        self.expected = self._fp32(pictures[:COMPARED])
        self.note = ""
        if options.folded:
            from van_deploy.graph.fold import fold_van

            self.model = fold_van(self.model, pictures[:1]).model
            self.note = "the network as van-deploy folds it"
        if options.rival.startswith("kernels"):
            from van_deploy.kernels.network import fused

            half = torch.float16 if self.on_gpu else torch.float32
            self.model = fused(self.model, half, fallback=not self.on_gpu)
            self.note = "this project's kernels"
        self.watch = GpuWatch(self.device)

    def _fp32(self, images: Any) -> Any:
        """Return the original's logits in FP32 without TF32."""
        import torch

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

    def resident(self, name: str, batch: int) -> Any:
        """Return the network in one of PyTorch's modes, compiled and warm."""
        from rivals import TorchResident

        model, images = copy.deepcopy(self.model), self.images[:batch]
        return TorchResident(model, images, self.rival(name), self.device)

    def rival(self, name: str) -> Any:
        """Return one of PyTorch's modes; on a CPU, whose FP16 takes seconds, in FP32."""
        from dataclasses import replace

        from rivals import RIVALS

        rival = RIVALS[name]
        return rival if self.on_gpu else replace(rival, precision="fp32", graph=False)

    def measure(self, result: Result, name: str, batch: int, resident: Any = None) -> None:
        """Add the row of one mode at one batch size."""
        from van_deploy.bench.gpu import HostClock, clock_of, timed
        from van_deploy.metrics import sqnr_db, top1_agreement

        resident = resident or self.resident(name, batch)
        clock = clock_of(resident, self.device) if self.on_gpu else HostClock()
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
            batch=batch,
            compile_s=resident.compile_s,
            sqnr_db=sqnr_db(expected, logits),
            top1_agreement=top1_agreement(expected, logits),
            note=self.note,
            **timing_row(timing),
        )


def timing_row(timing: Any) -> dict[str, Any]:
    """Return a DeviceTiming as keys of a row."""
    from dataclasses import asdict

    values = asdict(timing)
    values.pop("batch")
    values["latency_ms"] = values.pop("latency")
    return values


def _profile_eager(result: Result, subject: _Subject) -> None:
    """Add the eager network's time by kind of PyTorch module, at the largest batch."""
    import torch

    from van_deploy.bench.profile import by_module

    batch = max(subject.options.batches)
    dtype = torch.float16 if subject.on_gpu else torch.float32
    place = {"memory_format": torch.channels_last, "device": subject.device, "dtype": dtype}
    model = copy.deepcopy(subject.model).to(**place)
    images = torch.from_numpy(subject.images[:batch]).to(**place)
    with turn():
        lines = by_module(model, images)
    kind = "FP16" if subject.on_gpu else "FP32 on the processor"
    what = f"{subject.options.variant}, batch {batch}: eager {kind} channels-last"
    title = f"{what}, by PyTorch module"
    result.table(title, lines)


def _profile_launch(
    result: Result, subject: _Subject, name: str, batch: int, resident: Any
) -> None:
    from van_deploy.bench.profile import by_kernel

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
