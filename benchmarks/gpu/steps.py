"""The steps of the GPU report: part a needs PyTorch alone, part b every runtime and bundles."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = Path("/tmp/van-gpu-report")
NO_GPU = "no NVIDIA driver answers here"
SKIPPED = 75
"""Exit code with which a step says that it cannot run here; its last line is the reason."""

SPEED, TRAINED, SMALL = "van_b0", "van_b0_cifar10", "van_digits"
"""Bundles of bundles.py: random weights at 224, trained on CIFAR-10 at 64, the embedded one."""

MODES = {
    "compile-fp16": "torch.compile FP16 channels-last, mode max-autotune (CUDA graphs)",
    "compile-fp16-quick": "torch.compile FP16 channels-last, mode reduce-overhead (CUDA graphs)",
    "compile-bf16": "torch.compile BF16 channels-last, mode reduce-overhead (CUDA graphs)",
    "kernels": "this project's kernels as a CUDA graph, tiles as stored",
    "kernels-compile": "this project's kernels through torch.compile (CUDA graphs)",
}


@dataclass(frozen=True)
class Step:
    """One process of the report.

    Attributes:
        name: what ``--only`` calls it; its files are called so, too.
        about: one sentence for the page.
        command: what is run.
        limit_s: it is ended after so many seconds.
        least_s: it is not started with less of the budget left.
        skip: why it does not run here; "" where it does.
        environment: further variables.
    """

    name: str
    about: str
    command: Sequence[str]
    limit_s: float = 60.0
    least_s: float = 10.0
    skip: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The command as the page shows it: without the folders of this run."""
        words = ["python" if word == sys.executable else str(word) for word in self.command]
        return " ".join(
            f"benchmarks/gpu/{Path(word).name}" if word.startswith(str(HERE)) else word
            for word in words
        )


@dataclass(frozen=True)
class Context:
    """Where and how a report runs.

    Attributes:
        part: ``a`` or ``b``.
        output: what is kept: results.json, results.md, log.txt and an archive.
        work: working folder of the steps, with their JSON files and logs.
        device: ``cuda:N`` or ``cpu``.
        rehearse: small sizes, and on the CPU whatever can run there.
        bundles: bundles that were made beforehand, for part b.
        command: how the report was started.
    """

    part: str
    output: Path
    work: Path
    device: str
    rehearse: bool
    bundles: Path
    command: str

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every step."""
        return {
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(WORK / "cache"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(min(8, os.cpu_count() or 1)),
            "OMP_NUM_THREADS": "2",  # a dozen steps with a thread a core each wait for each other
            # Inductor's own templates for convolutions cost minutes and never won: on an H200
            # cuDNN was 2.6 times faster for the stem, 80 and 400 times for two depth-wise ones.
            "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS": "ATEN",
            "TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED": "3",
            "PYTHONWARNINGS": "ignore",
        }

    def script(self, file: str, step: str, name: str, *arguments: str) -> list[str]:
        """Return the command of one step of a script beside this file."""
        out = str(self.work / f"{name}.json")
        command = [sys.executable, str(HERE / file), step, "--out", out, "--device", self.device]
        return [*command, *arguments]


def steps_of_a(context: Context) -> list[Step]:
    """Return the steps of part a, the most valuable first."""
    sizes = ["--image-size", "224", "--batches", "128,1"]
    if not context.on_gpu:
        sizes = ["--image-size", "32", "--batches", "2,1", "--seconds", "0.1"]

    def eager(variant: str) -> Step:
        name = f"eager-{variant.removeprefix('van_')}"
        about = "Eager PyTorch: FP32 NCHW, FP16 channels-last, the latter as a CUDA graph."
        command = context.script("torch_steps.py", "eager", name, *sizes, "--variant", variant)
        return Step(name, about, command, 90, 12)

    def mode(variant: str, mode: str, *more: str) -> Step:
        name = f"{mode}-{variant.removeprefix('van_')}" + "-folded" * bool(more)
        words = (*sizes, "--variant", variant, "--rival", mode, *more)
        command = context.script("torch_steps.py", "compile", name, *words)
        skip = "" if context.on_gpu or context.rehearse else NO_GPU
        return Step(name, f"{variant}: {MODES[mode]}.", command, 280, 35, skip)

    facts = context.script("torch_steps.py", "environment", "environment")
    limits = context.script("torch_steps.py", "ceilings", "ceilings")
    return [
        Step("environment", "Versions, device, doctor.", facts, 100, 12),
        Step("ceilings", "The device's own limits.", limits, 60, 12),
        mode("van_b0", "compile-fp16"),
        mode("van_b2", "compile-fp16"),
        _kernels(context, "van_b0", "--batch", "128,1,8", "--tries", "1"),
        mode("van_b0", "kernels"),
        mode("van_b0", "kernels-compile"),
        mode("van_b2", "compile-fp16-quick"),
        _kernels(context, "van_b2", "--batch", "128,1"),
        mode("van_b0", "compile-fp16-quick"),
        mode("van_b0", "compile-bf16"),
        eager("van_b0"),
        eager("van_b2"),
        mode("van_b0", "compile-fp16", "--folded"),
        mode("van_b2", "compile-bf16"),
    ]


def _kernels(context: Context, variant: str, *more: str, budget_s: int = 100) -> Step:
    """Return the step of kernels.py."""
    name = f"kernels-py-{variant.removeprefix('van_')}"
    environment = {"TRITON_CACHE_DIR": str(context.work / "triton")}
    out, budget = str(context.work / f"{name}.json"), ("--budget", str(budget_s))
    words = (*budget, "--variant", variant, *more)
    if not context.on_gpu:
        words = (*budget, "--variant", "tiny", "--size", "32", "--batch", "1", "--tries", "1")
        environment["TRITON_INTERPRET"] = "1"
    return Step(
        name,
        f"This project's kernels in {variant}: checked, timed one by one, tuned, as a network.",
        [sys.executable, str(HERE / "kernels.py"), "all", "--out", out, *words],
        limit_s=budget_s + 20,
        least_s=30,
        skip="" if context.on_gpu or context.rehearse else NO_GPU,
        environment=environment,
    )


def steps_of_b(context: Context) -> list[Step]:
    """Return the steps of part b, the most valuable first."""
    batches = "1,8,32,128" if context.on_gpu else "1,2"
    timed = ("--batches", batches, "--seconds", "0.4" if context.on_gpu else "0.1")
    skip = "" if context.on_gpu else NO_GPU

    def step(
        name: str, kind: str, about: str, *words: str, bundle: str = SPEED, limit: float = 120
    ) -> Step:
        given = ("--bundle", str(context.bundles / bundle), *timed, *words)
        command = context.script("runtime_steps.py", kind, name, *given)
        return Step(name, about, command, limit, 12, "" if "ort-cpu" in name else skip)

    def ort(artifact: str, *more: str) -> Step:
        name = f"ort-{artifact}" + "-tf32" * bool(more)
        about = f"ONNX Runtime CUDA, {artifact}: NCHW, NHWC, and NCHW as a CUDA graph."
        return step(name, "ort", about, "--artifact", artifact, *more)

    def gates(bundle: str, runner: str) -> Step:
        name, about = f"gates-{bundle}-{runner}", f"verify and evaluate of {bundle} by {runner}."
        words, images = ["--runner", runner], context.bundles / "cifar10"
        if bundle == TRAINED:
            words += ["--package", "--artifact", "fp16"]
            words += ["--images", str(images)] * images.exists()
        return step(name, "agreement", about, *words, bundle=bundle, limit=240)

    def engine(backend: str, artifact: str) -> Step:
        about = f"An engine of the {artifact} file by {backend}, built here."
        words = ("--backend", backend, "--artifact", artifact)
        return step(f"{backend}-{artifact}", "engine", about, *words)

    def package(name: str, about: str, *more: str) -> Step:
        words = ("--artifact", "fp16", "--runner", "ort-cpu", *more)
        return step(name, "inductor", about, *words, limit=280)

    def tests(name: str, select: str) -> Step:
        return step(name, "tests", "The tests marked gpu.", "--select", select, limit=280)

    shared = {one.name: one for one in steps_of_a(context)}
    first = [shared.pop(name) for name in ("environment", "ceilings", "eager-b0")]
    fused = "An AOTInductor package with this project's kernels inside, for one batch size."
    packages = "inductor or fused or package"
    return [
        *first[:2],
        tests("gpu-tests", f"not ({packages})"),
        tests("gpu-tests-packages", packages),
        gates(TRAINED, "ort-cuda"),
        gates(SMALL, "ort-cuda"),
        package("inductor-fp16", "An AOTInductor package."),
        package("inductor-fused-fp16", fused, "--fused", "--batches", batches.split(",")[-1]),
        ort("fp16"),
        ort("fp32"),
        ort("int8"),
        ort("fp32", "--tf32"),
        *(engine(b, a) for b in ("tensorrt", "tensorrt-rtx") for a in ("fp16", "int8")),
        step("bench", "bench", "van-deploy bench on the GPU.", *timed),
        first[2],
        gates(SMALL, "ort-cpu"),
        *shared.values(),
    ]
