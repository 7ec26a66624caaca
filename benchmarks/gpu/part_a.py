"""Part a of the GPU report: PyTorch's own modes and this project's kernels. No ONNX, no engine."""

from __future__ import annotations

import sys

from step import HERE, Context, Step

NO_GPU = "no NVIDIA driver answers here"


def steps_of_a(context: Context, kernel_budget: float = 100) -> list[Step]:
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

    def compiled(variant: str, rival: str, about: str, *more: str, limit: float = 280) -> Step:
        short = variant.removeprefix("van_")
        name = f"{rival}-{short}" + ("-folded" if "--folded" in more else "")
        options = ("--variant", variant, "--rival", rival, *more)
        return torch_step(name, "compile", about, *options, limit=limit, least=35)

    def kernels(variant: str, budget: float, *more: str) -> Step:
        return _kernels(context, variant, budget, *more)

    tuned = "torch.compile FP16 channels-last, mode max-autotune (CUDA graphs)."
    quick = "torch.compile FP16 channels-last, mode reduce-overhead (CUDA graphs)."
    bf16 = "torch.compile BF16 channels-last, mode reduce-overhead (CUDA graphs)."
    ours = "This project's kernels as a CUDA graph, tiles as stored."
    ours_compiled = "This project's kernels through torch.compile (CUDA graphs)."
    eager = "Eager PyTorch: FP32 NCHW, FP16 channels-last, the latter as a CUDA graph."
    return [
        torch_step("environment", "environment", "Versions, device, doctor.", limit=100),
        torch_step("ceilings", "ceilings", "The device's own limits.", limit=60),
        compiled("van_b0", "compile-fp16", tuned),
        compiled("van_b2", "compile-fp16", tuned),
        kernels("van_b0", kernel_budget, "--batch", "128,1,8", "--tries", "1"),
        compiled("van_b0", "kernels", ours),
        compiled("van_b0", "kernels-compile", ours_compiled),
        compiled("van_b2", "compile-fp16-quick", quick),
        kernels("van_b2", kernel_budget, "--batch", "128,1"),
        compiled("van_b0", "compile-fp16-quick", quick),
        compiled("van_b0", "compile-bf16", bf16),
        torch_step("eager-b0", "eager", eager, "--variant", "van_b0", limit=90),
        torch_step("eager-b2", "eager", eager, "--variant", "van_b2", limit=90),
        compiled("van_b0", "compile-fp16", tuned + " Of the folded network.", "--folded"),
        compiled("van_b2", "compile-bf16", bf16),
    ]


def _kernels(context: Context, variant: str, budget: float, *more: str) -> Step:
    """Return the step of kernels.py, which compiles first and times from its checks on."""
    script = HERE / "kernels.py"
    name = f"kernels-py-{variant.removeprefix('van_')}"
    out = context.work / f"{name}.json"
    command = [sys.executable, str(script), "all", "--out", str(out), "--budget", str(int(budget))]
    environment = {"TRITON_CACHE_DIR": str(context.work / "triton")}
    skip = "" if script.exists() else "benchmarks/gpu/kernels.py is not in this checkout"
    if context.on_gpu:
        command += ["--variant", variant, *more, "--dtype", "fp16"]
    elif context.rehearse:
        command += ["--variant", "tiny", "--size", "32", "--batch", "1", "--tries", "1"]
        environment["TRITON_INTERPRET"] = "1"
    else:
        skip = skip or NO_GPU
    return Step(
        name,
        f"This project's kernels in {variant}: checked, timed one by one, tuned, as a network.",
        command,
        limit_s=budget + 20,
        least_s=30,
        skip=skip,
        turn_at="step=timing",
        environment=environment,
    )
