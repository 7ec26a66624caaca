"""Part b of the GPU report: every runtime, the GPU tests, and the agreement gates."""

from __future__ import annotations

from pathlib import Path

from part_a import NO_GPU
from part_a import steps_of_a as part_a
from step import Context, Step

SPEED, TRAINED, SMALL = "van_b0", "van_b0_cifar10", "van_digits"
"""Bundles of bundles.py: random weights at 224, trained on CIFAR-10 at 64, the embedded one."""

IMAGES = "cifar10"


def steps_of_b(context: Context) -> list[Step]:
    """Return the steps, the most valuable first."""
    folder = context.bundles or Path(".gpu/bundles").resolve()
    batches = "1,8,32,128" if context.on_gpu else "1,2"
    seconds = "0.4" if context.on_gpu else "0.1"

    def step(
        name: str,
        kind: str,
        about: str,
        *more: str,
        bundle: str = SPEED,
        limit: float = 90,
        skip: str = "" if context.on_gpu else NO_GPU,
    ) -> Step:
        command = context.script("runtime_steps.py", kind, name, "--bundle", str(folder / bundle))
        if bundle == SPEED or kind == "bench":
            command += ["--batches", batches, "--seconds", seconds]
        return Step(name, about, [*command, *more], limit, 12, skip)

    def gates(bundle: str, runner: str) -> Step:
        images = folder / IMAGES
        package = [] if bundle != TRAINED else ["--package", "--artifact", "fp16"]
        labelled = ["--images", str(images)] if bundle == TRAINED and images.exists() else []
        return step(
            f"gates-{bundle}-{runner}",
            "agreement",
            f"verify and evaluate of {bundle} by {runner}.",
            *("--runner", runner, *labelled, *package),
            bundle=bundle,
            limit=240,
            skip=NO_GPU if runner != "ort-cpu" and not context.on_gpu else "",
        )

    def ort(artifact: str, *more: str) -> Step:
        name = f"ort-{artifact}" + ("-tf32" if more else "")
        about = f"ONNX Runtime CUDA, {artifact}: NHWC off and on, then a CUDA graph."
        return step(name, "ort", about, "--artifact", artifact, *more, limit=120)

    shared = {one.name: one for one in part_a(context)}
    engines = [
        step(
            f"{backend}-{artifact}",
            "engine",
            f"An engine of the {artifact} file by {backend}, built here.",
            *("--backend", backend, "--artifact", artifact),
            limit=120,
        )
        for backend in ("tensorrt", "tensorrt-rtx")
        for artifact in ("fp16", "int8")
    ]
    tests, packages = "The tests marked gpu.", "inductor or fused or package"
    cpu = ("--artifact", "fp16", "--runner", "ort-cpu")
    first = ("environment", "ceilings", "eager-b0")
    return [
        shared["environment"],
        shared["ceilings"],
        step("gpu-tests", "tests", tests, "--select", f"not ({packages})", limit=280),
        step("gpu-tests-packages", "tests", tests, "--select", packages, limit=280),
        gates(TRAINED, "ort-cuda"),
        gates(SMALL, "ort-cuda"),
        step("inductor-fp16", "inductor", "An AOTInductor package.", *cpu, limit=280),
        step(
            "inductor-fused-fp16",
            "inductor",
            "An AOTInductor package with this project's kernels inside, for one batch size.",
            *(*cpu, "--fused", "--batches", "128" if context.on_gpu else "2"),
            limit=280,
        ),
        ort("fp16"),
        ort("fp32"),
        ort("int8"),
        ort("fp32", "--tf32"),
        *engines,
        step("bench", "bench", "van-deploy bench on the GPU.", limit=120),
        shared["eager-b0"],
        gates(SMALL, "ort-cpu"),
        *(one for one in shared.values() if one.name not in first),
    ]
