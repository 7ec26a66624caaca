"""Which engines to build, and how: the table ``[engines]`` and ``van-deploy build``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from van_deploy.config.fields import (
    BatchRange,
    HardwareCompatibility,
    Profiling,
    Size,
    Target,
    given_of,
    option,
)
from van_deploy.config.sizes import SizeRange
from van_deploy.schema import Contradiction, Settings, validated

MACHINES = "Where it runs"
KERNELS = "What is in the plan"
ARTEFACTS = (
    "fp32, fp16, bf16, int8 or another ONNX artefact of the bundle, such as fp32-uint8: an engine "
    "each, for each of the targets. Inductor computes in fp32, fp16 or bf16."
)
ONLY_INDUCTOR = ("max_autotune", "fused_kernels")
ONLY_TENSORRT = (
    *("targets", "hardware_compatibility", "version_compatible", "workspace_bytes", "tiling"),
    *("optimization_level", "profiling", "timing_cache"),
)
Profile = Annotated[BatchRange, pydantic.PlainSerializer(str)]


class PlanSettings(Settings):
    """What decides the contents of a plan, besides the ONNX file, the backend and the GPUs."""

    PANEL: ClassVar[str] = KERNELS

    profiles: tuple[Profile, ...] = option(
        (),
        "Batch sizes min:opt:max, one profile each.",
        key="batch",
        shown_default="the bundle's own",
        panel="",
    )
    dynamic_size: SizeRange | None = option(
        None,
        "Sizes min:opt:max that the plan serves, of a graph with dynamic height and width.",
        metavar="MIN:OPT:MAX",
        shown_default="the bundle's own",
        panel="",
    )
    hardware_compatibility: HardwareCompatibility = option(
        HardwareCompatibility.NONE, "Other GPUs to serve (TensorRT).", panel=MACHINES
    )
    version_compatible: bool = option(
        False, "Let later versions load it (TensorRT).", panel=MACHINES
    )
    workspace_bytes: Size | None = option(
        None,
        "Scratch memory a layer may use, as 4GiB.",
        key="workspace",
        shown_default="the backend's own limit",
    )
    optimization_level: int | None = option(
        None, "0 builds fast, 5 searches longest.", shown_default="the backend's own", ge=0, le=5
    )
    tiling: Literal["none", "fast", "moderate", "full"] = option(
        "none", "How long to search for ways to keep tensors in the GPU's cache."
    )
    tf32: bool = option(True, "Let FP32 layers compute in TF32.")
    profiling: Profiling = option(Profiling.LAYER_NAMES_ONLY, "What the engine inspector can tell.")

    def of(
        self,
        targets: tuple[str, ...] = (),
        batch: BatchRange | None = None,
        sizes: SizeRange | None = None,
    ) -> BuildOptions:
        """Return what is asked of one plan.

        Args:
            targets: what it serves.
            batch: what it serves where no profiles are given.
            sizes: what it serves where no sizes are given.
        """
        given = {name: getattr(self, name) for name in PlanSettings.model_fields}
        given["profiles"] = self.profiles or (batch or BatchRange(),)
        given["dynamic_size"] = self.dynamic_size or sizes
        return BuildOptions(targets=targets, **given)


class BuildOptions(PlanSettings):
    """Everything that decides what is in one plan, besides the ONNX file and the backend."""

    profiles: tuple[Profile, ...] = option(
        lambda: (BatchRange(),),
        "Batch sizes min:opt:max, one profile each.",
        key="batch",
        min_length=1,
    )
    targets: Target = option((), "Compute capabilities the plan serves; empty for the GPU here.")

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> BuildOptions:
        """Return the options that :meth:`as_dict` wrote.

        Raises:
            UsageError: they are none.

        >>> BuildOptions.from_dict(BuildOptions(targets=("sm_89",)).as_dict()).targets
        ('sm_89',)
        """
        return validated(cls, plain)


class EngineSettings(PlanSettings):
    """Which TensorRT engines to build. Table ``[engines]``; without it, none."""

    PANEL: ClassVar[str] = MACHINES

    precisions: tuple[str, ...] = option((), ARTEFACTS, flags=["--precision"], panel="")
    targets: tuple[Target, ...] = option(
        (),
        "Compute capabilities: sm_86,sm_89 are two plans, sm_86+sm_89 is one for both.",
        flags=["--target"],
        shown_default="the GPU in this machine",
    )
    backend: Literal["auto", "tensorrt", "tensorrt-rtx", "inductor"] = option(
        "auto",
        "What builds and will run it. inductor: a package that PyTorch compiles ahead of time, "
        "for the GPU or the processor of this machine.",
    )

    timing_cache: Path | None = option(
        None, "File of kernel timings to use and add to (TensorRT).", panel=KERNELS
    )

    @pydantic.model_validator(mode="after")
    def _each_once(self) -> EngineSettings:
        if len(set(self.targets)) != len(self.targets):
            raise Contradiction("{targets} names a plan twice.", "Name each once.")
        return self


class BuildSettings(EngineSettings):
    """The options of ``van-deploy build``."""

    PANEL: ClassVar[str] = KERNELS

    precisions: tuple[str, ...] = option(("fp32",), ARTEFACTS, flags=["--precision"], panel="")
    device: str | None = option(
        None,
        "What it is built on: cuda:N, or cpu (inductor).",
        panel=MACHINES,
        shown_default="cuda:0; without a GPU, cpu for inductor",
        pattern=r"^(cpu|cuda(:\d+)?)$",
    )
    max_autotune: bool = option(
        False, "Choose Inductor's kernels by timing them, which takes minutes."
    )
    fused_kernels: bool = option(
        False,
        "Compile a package on this project's fused kernels: FP16 or BF16 on a GPU, one batch size.",
    )
    tune: bool = option(
        False,
        "Build candidate settings (precision, INT8 scope, optimization level, tiling, autotuning), "
        "time them on this device, and keep the fastest that holds its gate.",
    )
    images: Path | None = option(
        None,
        "Folder of images to make a missing fp16, bf16 or int8 file with, as `van-deploy quantize` "
        "does.",
        panel="",
    )

    @pydantic.model_validator(mode="after")
    def _of_one_kind(self) -> BuildSettings:
        inductor = self.backend == "inductor"
        foreign = given_of(self, *(ONLY_TENSORRT if inductor else ONLY_INDUCTOR))
        if not inductor and self.device == "cpu":
            foreign = "{device} cpu"
        if foreign:
            whose, what = ("TensorRT", "a package") if inductor else ("Inductor", "an engine")
            raise Contradiction(
                f"{foreign} is {whose}'s, and {what} is asked for.",
                f"Leave {foreign} out, or give another {{backend}}.",
            )
        return self


class FleetSettings(Settings):
    """Many engines at once: options of ``van-deploy build``."""

    PANEL: ClassVar[str] = "Many engines"

    matrix: Path | None = option(None, "Build bundles x precisions x targets of this TOML file.")
    on: Literal["here", "ray"] = option("here", "Where the matrix is built.")
    ray_address: str = option("", "Of the Ray cluster.", shown_default="the local one")

    @pydantic.model_validator(mode="after")
    def _of_a_matrix(self) -> FleetSettings:
        if self.matrix is None and self.on != "here":
            raise Contradiction(
                "{on} is for {matrix}.", "Write a fleet file, and give it with {matrix}."
            )
        return self
