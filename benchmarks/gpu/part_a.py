"""Part a of the GPU report: PyTorch's own modes and this project's kernels. No ONNX, no engine."""

from __future__ import annotations

import sys

from step import HERE, Context, Step

NO_GPU = "no NVIDIA driver answers here"


def steps_of_a(context: Context) -> list[Step]:
    """Return the steps, the most valuable first."""
    small = context.rehearse
    skip = "" if context.on_gpu or small else NO_GPU
    sizes = ["--image-size", "224", "--batches", "128,1"]
    if not context.on_gpu:
        sizes = ["--image-size", "32", "--batches", "2,1", "--seconds", "0.1"]

    def torch_step(
        name: str, step: str, about: str, *more: str, limit: float = 60, least: float = 12
    ) -> Step:
        sized = [] if step in ("environment", "ceilings") else sizes
        command = context.script("torch_steps.py", step, name, *sized, *more)
        needs_gpu = step == "compile"
        return Step(name, about, command, limit, least, skip if needs_gpu else "")

    def compiled(variant: str, rival: str, about: str, *more: str, limit: float = 120) -> Step:
        short = variant.removeprefix("van_")
        name = f"{rival}-{short}" + ("-folded" if "--folded" in more else "")
        options = ("--variant", variant, "--rival", rival, *more)
        return torch_step(name, "compile", about, *options, limit=limit, least=35)

    def kernels(step: str, variant: str, batch: int, limit: float) -> Step:
        short = variant.removeprefix("van_")
        return _kernel_step(context, f"kernels-{step}-{short}-{batch}", step, variant, batch, limit)

    tuned = "torch.compile FP16 channels-last, mode max-autotune (CUDA graphs)."
    quick = "torch.compile FP16 channels-last, mode reduce-overhead (CUDA graphs)."
    bf16 = "torch.compile BF16 channels-last, mode reduce-overhead (CUDA graphs)."
    eager = "Eager PyTorch: FP32 NCHW, FP16 channels-last, the latter as a CUDA graph."
    return [
        torch_step("environment", "environment", "Versions, device, doctor.", limit=100),
        torch_step("ceilings", "ceilings", "The device's own limits.", limit=60),
        torch_step("eager-b0", "eager", eager, "--variant", "van_b0", limit=90),
        compiled("van_b0", "compile-fp16", tuned, limit=150),
        kernels("check", "van_b0", 128, 60),
        compiled("van_b0", "compile-fp16-quick", quick),
        kernels("network", "van_b0", 128, 60),
        kernels("each", "van_b0", 128, 60),
        kernels("network", "van_b0", 1, 45),
        compiled("van_b0", "compile-bf16", bf16),
        torch_step("eager-b2", "eager", eager, "--variant", "van_b2", limit=90),
        compiled("van_b2", "compile-fp16", tuned, limit=150),
        kernels("network", "van_b2", 128, 60),
        compiled("van_b2", "compile-fp16-quick", quick),
        compiled("van_b0", "compile-fp16", tuned + " Of the folded network.", "--folded"),
        kernels("network", "van_b2", 1, 45),
        compiled("van_b2", "compile-bf16", bf16),
    ]


def _kernel_step(
    context: Context, name: str, step: str, variant: str, batch: int, limit: float
) -> Step:
    """Return a step of kernels.py. It runs alone unless it takes turns by itself."""
    script = HERE / "kernels.py"
    skip = ""
    if not script.exists():
        skip = "benchmarks/gpu/kernels.py is not in this checkout"
    elif not context.on_gpu:
        skip = NO_GPU
    command = [sys.executable, str(script), step, "--variant", variant, "--batch", str(batch)]
    command += ["--dtype", "fp16", "--out", str(context.work / f"{name}.json")]
    command += ["--budget", str(int(limit) - 5)]
    takes_turns = script.exists() and "turns import" in script.read_text(encoding="utf-8")
    about = {
        "check": "This project's kernels against PyTorch.",
        "each": "Each of this project's kernels by itself.",
        "network": "The whole network with this project's kernels.",
    }[step]
    return Step(name, about, command, limit, 15, skip, alone=not (takes_turns or step == "check"))
