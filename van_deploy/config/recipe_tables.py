"""The tables of a recipe, and the recipe itself: which network, and what is made of it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from van_deploy.config.fields import ByteSize, FileOrName, Table, Target, option
from van_deploy.config.sizes import BatchRange, ImageSizeOption, SizeRange, format_size

Precision = Literal["fp16", "bf16", "int8"]
"""What can be made of an exported graph."""

Profile = Annotated[BatchRange, pydantic.PlainSerializer(str, return_type=str)]
IMAGES, TYPES = "Images", "FP16 and BF16"
ONLY_TENSORRT = (
    *("targets", "hardware_compatibility", "version_compatible", "workspace_bytes", "tiling"),
    *("optimization_level", "profiling", "timing_cache"),
)
MACHINES, KERNELS = "Where it runs", "What is in the plan"
LEAVE_OUT = "Leave one of them out."
FOR_INT8 = ("max_drop", "noise", "scope", "rest")

ClassOrder = Literal["strings", "natural", "index", "names"]
"""How the classes of images are numbered: `van_deploy.data.labels.CLASS_ORDERS` explains it."""


class ModelSettings(Table):
    """Which network. Table ``[model]``.

    Attributes:
        name: What the bundle is called; a variant's name takes its public weights.
        weights: A checkpoint, a repository, a variant, or 'random'; by default the name's public
            weights.
        sha256: Digest the weights file must have; the first one seen is recorded by default.
        container: Which tensors of a file that holds several networks: keys, and the beginning of
            the names, joined by dots, such as state_dict.student.
        layer_norm_eps: Epsilon of every LayerNorm; by default what stands beside the weights, else
            their framework's own.
        head: Layers of a sequential head, such as linear,relu,linear.
        labels: File with one class name a line.
        seed: Of random weights.
    """

    PANEL = "Weights"

    name: str = option("", panel="")
    weights: FileOrName = option("")
    sha256: str = option("")
    container: str = option("")
    layer_norm_eps: float | None = option(None, gt=0, lt=1)
    head: tuple[str, ...] = option(())
    labels: Path | None = option(None)
    seed: int = option(0, ge=0)


class PreprocessingSettings(Table):
    """What differs from the weights' own preprocessing. Table ``[preprocessing]``.

    Attributes:
        image_size: Pixels of the input: 224, or 224x320 (height x width); any size from 32 on.
        mean: Such as 0.485,0.456,0.406.
        std: Such as 0.229,0.224,0.225.
        interpolation: Filter that resizes images.
        crop_pct: Crop over resized side, in (0, 1].
        crop_mode: Side that is resized: the short one, both, or the long one.
    """

    PANEL = "Preprocessing (the weights' own by default; timm's names)"

    image_size: ImageSizeOption | None = option(None)
    mean: tuple[float, ...] | None = option(None)
    std: tuple[float, ...] | None = option(None)
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = (
        option(None)
    )
    crop_pct: float | None = option(None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = option(None)


class ExportSettings(Table):
    """How the graph is written. Table ``[export]``.

    Attributes:
        opset: ONNX operator set; 20 is the first in which GELU is one operator.
        fold: Make the exact rewrites.
        simplify: Run onnxsim, and keep its graph if it agrees.
        embed_preprocess: Also write graphs that take pixels: uint8 (N,H,W,3) bytes, or normalize
            (N,3,H,W) floats in 0..1.
        outputs: What those graphs give.
        features: Leave the head out, and give feature maps: stage1 to stage4, each after its
            LayerNorm.
        out_indices: Which stages' maps, from 0 as in OpenMMLab and timm, such as 1,2,3; all four
            by default.
        dynamic_size: Make height and width dynamic: sizes min:opt:max that are checked and that
            engines serve, such as 192:224:512 or 192x256:224x320:512x640; opt is the input size
            unless image_size is given.
        golden: Golden samples, on which the bundle is verified anywhere: the images given (they
            travel in the bundle), the package's own samples, or none.
    """

    PANEL = "Graph"

    # From the first with LayerNormalization to the newest tried here.
    opset: int = option(20, ge=17, le=23)
    fold: bool = option(True)
    simplify: bool = option(True)
    embed_preprocess: Literal["none", "normalize", "uint8"] = option("none")
    outputs: tuple[Literal["logits", "probabilities", "top5"], ...] = option(
        ("logits",), min_length=1
    )
    features: bool = option(False)
    out_indices: tuple[int, ...] = option(())
    dynamic_size: SizeRange | None = option(None)
    golden: Literal["images", "samples", "none"] = option("images")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield outputs of classes beside feature maps, and what is given twice or for nothing."""
        outputs = ",".join(self.outputs)
        if len(set(self.outputs)) != len(self.outputs):
            yield "{outputs} names an output twice.", "Give each once."
        if self.features and outputs != "logits":
            message = f"{{features}} gives feature maps, and {{outputs}} {outputs} is of classes."
            yield message, "Leave one of them out."
        if self.out_indices and not self.features:
            message = "{out_indices} chooses feature maps, and none are asked for."
            yield message, "Add --features, or features = true to the table [export]."

    @property
    def embeds(self) -> bool:
        """Whether a second graph is wanted, with something inside that the plain one lacks."""
        return self.embed_preprocess != "none" or self.outputs != ("logits",)


class EvaluateSettings(Table):
    """Labelled images to measure accuracy on. Table ``[evaluate]``; without it, none.

    Attributes:
        images: Labelled images: one folder a class, ImageNet's own layout, or an .npz.
        labels: File with a label for each image: 'file label' or one a line.
        class_order: How training numbered the class folders, where nothing names the classes:
            strings (torchvision), natural (timm), index (of a number), names.
        label_files: Look for a ground-truth file such as val.txt beside the images.
        limit: At most so many images, evenly spread.
    """

    PANEL = "Labels"

    images: Path | None = option(None, panel="")
    labels: Path | None = option(None)
    class_order: ClassOrder | None = option(None)
    label_files: bool = option(True)
    limit: int | None = option(None, ge=1, panel="")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what is said of images that are not there."""
        given = self.first_set("labels", "limit")
        if self.images is None and given:
            yield f"{given} is given, and {{images}} is not.", "Name the folder of images, too."


class GateProfile(Table):
    """What an artifact of one numeric class must reach. Table ``[gates.fp32]`` and its like.

    A limit that is left out is that of :mod:`van_deploy.checks.gates` (see ``docs/gates.md``).

    Attributes:
        sqnr_db: Least SQNR of the logits, in dB.
        module_db: Least isolated SQNR of any module, in dB.
        top1_loss: Points of top-1 (percent) that may be lost on labelled images.
    """

    sqnr_db: float | None = option(None)
    module_db: float | None = option(None)
    top1_loss: float | None = option(None, ge=0, le=100)


class GateSettings(Table):
    """What differs from the built-in limits, by numeric class. Table ``[gates]``.

    Attributes:
        fp32: Limits of FP32 artifacts.
        tf32: Limits of FP32 artifacts that compute in TF32.
        fp16: Limits of FP16 artifacts.
        bf16: Limits of BF16 artifacts.
        int8: Limits of INT8 artifacts.
    """

    fp32: GateProfile = option(GateProfile)
    tf32: GateProfile = option(GateProfile)
    fp16: GateProfile = option(GateProfile)
    bf16: GateProfile = option(GateProfile)
    int8: GateProfile = option(GateProfile)

    def of(self, numeric: str) -> GateProfile:
        """Return the profile of a numeric class."""
        profile: GateProfile = getattr(self, numeric)
        return profile


class _Quantization(Table):
    """What ``[precision]`` and ``van-deploy quantize`` have in common.

    Attributes:
        target: What will run it: the fast INT8 graphs differ.
        images: Folder or .npz of training images to calibrate on.
        calibration: Images that calibrate: a set's name (digits, imagenet-512), its .toml, or a
            folder or .npz, which takes the place of images.
        evaluate: Folder of images to judge on; labels are its sub-folders. By default a held-out
            part of the calibration images.
        class_order: How training numbered the class folders, where nothing names the classes:
            strings (torchvision), natural (timm), index (of a number), names.
        noise: Calibrate on noise, which fits no real image.
        method: How ranges become scales.
        scope: What becomes INT8: pointwise, deep (all but stem and stage 1), all, or regular
            expressions over module names; auto times the first three and takes the fastest that
            holds its gate. By default pointwise for TensorRT, deep for a CPU.
        rest: What is not INT8; by default fp16 for TensorRT, fp32 for a CPU.
        equalize: Re-scale and shift channels exactly, so that they round better.
        bias_correction: Take the mean error of every layer out in its bias.
        max_drop: Points of top-1 (of agreement without labels) that may be lost; the layers that
            cost more stay in higher precision.
        evaluations: Most plans a search for max_drop may try.
        keep: Modules that stay FP32, besides the LayerNorms and the head.
        keep_defaults: Keep the LayerNorms, the pooling and the head in FP32.
        strict: Refuse where FP16 cannot hold a tensor, instead of keeping it FP32.
        allow_inconclusive: Let pass what the evaluation set cannot decide.
        threads: Of ONNX Runtime; its own choice by default.
    """

    PANEL = "INT8"

    target: Literal["tensorrt", "cpu"] = option("tensorrt", panel="")
    images: Path | None = option(None, panel=IMAGES)
    calibration: FileOrName = option("", panel=IMAGES)
    evaluate: Path | None = option(None, flags=["--eval"], panel=IMAGES)
    class_order: ClassOrder | None = option(None, panel=IMAGES)
    noise: bool = option(False, key="calibrate_on_noise", panel=IMAGES)
    method: Literal["mse", "percentile", "minmax"] = option("mse")
    scope: tuple[str, ...] = option((), commas=False)
    rest: Literal["fp16", "fp32"] | None = option(None)
    equalize: bool = option(True)
    bias_correction: bool = option(True)
    max_drop: float | None = option(None, ge=0)
    evaluations: int = option(16, ge=1)
    keep: tuple[str, ...] = option((), panel=TYPES, commas=False)
    keep_defaults: bool = option(True, panel=TYPES)
    strict: bool = option(False, panel=TYPES)
    allow_inconclusive: bool = option(False, panel="")
    threads: int | None = option(None, ge=1, panel="")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what is for FP16 or for images where there are none, and techniques that clash."""
        images, half = self.first_set("images", "calibration"), self.first_set("strict")
        if self.noise and images:
            message = f"{{calibrate_on_noise}} and {images} are both given."
            yield message, "Leave one of them out; images are always better."
        if self.target == "cpu" and (self.rest == "fp16" or half):
            message = (
                f"{half or '{rest} fp16'} is for FP16, and {{target}} cpu keeps what is not INT8 "
                "in FP32: a CPU casts FP16 at every operator."
            )
            yield message, f"Leave {half or '{rest}'} out."
        if self.rest == "fp32" and half:
            yield f"{half} is for FP16, and {{rest}} is fp32.", LEAVE_OUT
        if self.equalize and not self.bias_correction:
            message = (
                "{equalize} shifts channels, which loses more than it brings without "
                "{bias_correction}."
            )
            yield message, "Switch off {equalize}, too."
        if "auto" in self.scope and (len(self.scope) > 1 or self.max_drop is not None):
            other = "other scopes" if len(self.scope) > 1 else "{max_drop}"
            message = f"{{scope}} auto times whole scopes, and {other} were given, too."
            yield message, "Find the scope first, then ask for it by its name."

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scope, the target's default included."""
        return self.scope or (("deep",) if self.target == "cpu" else ("pointwise",))

    @property
    def rest_precision(self) -> Literal["fp16", "fp32"]:
        """What becomes of everything that is not INT8."""
        return self.rest or ("fp32" if self.target == "cpu" else "fp16")

    @property
    def sources(self) -> tuple[Path | None, str | None]:
        """The folder or ``.npz`` to calibrate on, and the calibration set that chooses from it."""
        named = Path(self.calibration)
        if self.calibration and named.suffix != ".toml" and named.exists():
            return named, None
        return self.images, self.calibration or None


class _One(Table):
    """Which precision.

    Attributes:
        precision: What to make.
    """

    precision: Precision = option("int8", flags=["--precision", "-p"])


class QuantizeSettings(_Quantization, _One):
    """One precision to make of a bundle's network: the options of ``van-deploy quantize``."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what is for another precision, too."""
        yield from super().conflicts()
        int8, half = self.first_set(*FOR_INT8), self.first_set("strict")
        if self.precision != "int8" and int8:
            message = f"{int8} is for INT8, and {{precision}} is {self.precision}."
            yield message, f"Make int8, or leave {int8} out."
        if self.precision != "int8" and self.target == "cpu":
            message = (
                f"{self.precision.upper()} makes no sense for {{target}} cpu: ONNX Runtime's CPU "
                "kernels cast it to FP32 and back around every operator, or are not there."
            )
            yield message, "Make int8 for a CPU, or leave the graph in FP32."
        if self.precision == "bf16" and half:
            message = f"{half} is for FP16, and {{precision}} is bf16."
            yield message, f"Leave {half} out: BF16 has FP32's own range."

    @property
    def artifact(self) -> str:
        """What the result is called in the bundle."""
        return "int8-cpu" if self.target == "cpu" else self.precision


class _Several(Table):
    """Which precisions.

    Attributes:
        make: Also make these.
    """

    make: tuple[Precision, ...] = option(())


class PrecisionSettings(_Quantization, _Several):
    """What to make besides ``fp32``, and on which images. Table ``[precision]``."""

    def of(self, precision: Precision) -> QuantizeSettings:
        """Return what is asked of one precision, without what is for others only.

        Raises:
            UsageError: it contradicts itself.
        """
        others = {"target", *FOR_INT8} if precision != "int8" else set()
        others |= {"strict"} if precision == "bf16" else set()
        names = (name for name in _Quantization.model_fields if name not in others)
        return QuantizeSettings(precision=precision, **{n: getattr(self, n) for n in names})


class HardwareCompatibility(str, enum.Enum):
    """Which other GPUs a plan of TensorRT is made for. TensorRT's own names."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"


class Profiling(str, enum.Enum):
    """How much of itself a plan can tell afterwards. TensorRT's own names."""

    NONE = "none"
    LAYER_NAMES_ONLY = "layer-names-only"
    DETAILED = "detailed"


class PlanSettings(Table):
    """What decides the contents of a plan, besides the ONNX file, the backend and the GPUs.

    Attributes:
        profiles: Batch sizes min:opt:max, one profile each; by default the bundle's own.
        dynamic_size: Sizes min:opt:max that the plan serves, of a graph with dynamic height and
            width; by default the bundle's own.
        hardware_compatibility: Other GPUs to serve (TensorRT).
        version_compatible: Let later versions load it (TensorRT).
        workspace_bytes: Scratch memory a layer may use, as 4GiB; by default the backend's limit.
        optimization_level: 0 builds fast, 5 searches longest; by default the backend's own.
        tiling: How long to search for ways to keep tensors in the GPU's cache.
        tf32: Let FP32 layers compute in TF32.
        profiling: What the engine inspector can tell.
    """

    PANEL = KERNELS

    profiles: tuple[Profile, ...] = option((), key="batch", panel="")
    dynamic_size: SizeRange | None = option(None, panel="")
    hardware_compatibility: HardwareCompatibility = option(
        HardwareCompatibility.NONE, panel=MACHINES
    )
    version_compatible: bool = option(False, panel=MACHINES)
    workspace_bytes: ByteSize | None = option(None, key="workspace")
    optimization_level: int | None = option(None, ge=0, le=5)
    tiling: Literal["none", "fast", "moderate", "full"] = option("none")
    tf32: bool = option(True)
    profiling: Profiling = option(Profiling.LAYER_NAMES_ONLY)

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
    """Everything that decides what is in one plan, besides the ONNX file and the backend.

    Attributes:
        targets: Compute capabilities the plan serves; empty for the GPU here.
    """

    profiles: tuple[Profile, ...] = option(lambda: (BatchRange(),), key="batch", min_length=1)
    targets: Target = option(())


class EngineSettings(PlanSettings):
    """Which TensorRT engines to build. Table ``[engines]``; without it, none.

    Attributes:
        precisions: fp32, fp16, bf16, int8 or another ONNX artifact of the bundle, such as
            fp32-uint8: an engine each, for each of the targets. Inductor computes in fp32, fp16 or
            bf16.
        targets: Compute capabilities: sm_86,sm_89 are two plans, sm_86+sm_89 is one for both; by
            default that of the GPU in this machine.
        backend: What builds and will run it. inductor: a package that PyTorch compiles ahead of
            time, for the GPU or the processor of this machine.
        timing_cache: File of kernel timings to use and add to (TensorRT).
    """

    PANEL = MACHINES

    precisions: tuple[str, ...] = option((), flags=["--precision"], panel="")
    targets: tuple[Target, ...] = option((), flags=["--target"])
    backend: Literal["auto", "tensorrt", "tensorrt-rtx", "inductor"] = option("auto")
    timing_cache: Path | None = option(None, panel=KERNELS)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield that a plan is asked for twice."""
        if len(set(self.targets)) != len(self.targets):
            yield "{targets} names a plan twice.", "Name each once."


class BuildSettings(EngineSettings):
    """The options of ``van-deploy build``.

    Attributes:
        precisions: fp32, fp16, bf16, int8 or another ONNX artifact of the bundle, such as
            fp32-uint8: an engine each, for each of the targets. Inductor computes in fp32, fp16 or
            bf16.
        device: What it is built on: cuda:N, or cpu (inductor); by default cuda:0, without a GPU cpu
            for inductor.
        max_autotune: Choose Inductor's kernels by timing them, which takes minutes.
        fused_kernels: Compile a package on this project's fused kernels: FP16 or BF16 on a GPU, one
            batch size.
        tune: Build candidate settings (precision, INT8 scope, optimization level, tiling,
            autotuning), time them on this device, and keep the fastest that holds its gate.
        images: Folder of images to make a missing fp16, bf16 or int8 file with, as `van-deploy
            quantize` does.
    """

    PANEL = KERNELS

    precisions: tuple[str, ...] = option(("fp32",), flags=["--precision"], panel="")
    device: str | None = option(None, panel=MACHINES, pattern=r"^(cpu|cuda(:\d+)?)$")
    max_autotune: bool = option(False)
    fused_kernels: bool = option(False)
    tune: bool = option(False)
    images: Path | None = option(None, panel="")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what only the other backend has."""
        yield from super().conflicts()
        inductor = self.backend == "inductor"
        foreign = self.first_set(
            *(ONLY_TENSORRT if inductor else ("max_autotune", "fused_kernels"))
        )
        if not inductor and self.device == "cpu":
            foreign = "{device} cpu"
        if foreign:
            whose, what = ("TensorRT", "a package") if inductor else ("Inductor", "an engine")
            remedy = f"Leave {foreign} out, or give another {{backend}}."
            yield f"{foreign} is {whose}'s, and {what} is asked for.", remedy
        if inductor and len(self.profiles) > 1:
            message = "A package serves one range of batches, and {batch} gives several."
            yield message, "Give one, such as 1:8:32."


class Recipe(Table):
    """Everything about one deployment; each attribute is a table of the file.

    Attributes:
        model: Which network.
        preprocessing: What differs from the weights' own preprocessing.
        batch: Batch sizes min:opt:max to serve; one size alone makes a static graph.
        export: How the graph is written.
        precision: What to make besides FP32, as `van-deploy quantize` does.
        engines: Which engines to build, as `van-deploy build` does; without it, none.
        evaluate: Labelled images to measure accuracy on; without it, none is measured.
        gates: Limits that replace those of docs/gates.md.
    """

    model: ModelSettings = option(ModelSettings)
    preprocessing: PreprocessingSettings = option(PreprocessingSettings)
    batch: BatchRange = option(BatchRange, panel="Graph")
    export: ExportSettings = option(ExportSettings)
    precision: PrecisionSettings = option(PrecisionSettings)
    engines: EngineSettings = option(EngineSettings)
    evaluate: EvaluateSettings = option(EvaluateSettings)
    gates: GateSettings = option(GateSettings)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield engines of what is not made, classes of feature maps, and a size out of range."""
        if self.engines.backend == "inductor":
            remedy = "Build a package with `van-deploy build BUNDLE --backend inductor`."
            yield "A recipe's {engines.backend} is a TensorRT.", remedy
        made = ["fp32", *self.precision.make]
        if self.export.embed_preprocess != "none":
            made += [f"{name}-{self.export.embed_preprocess}" for name in made]
        for name in set(self.engines.precisions) - {*made}:
            message = f"{{engines.precisions}} wants '{name}', which is not made."
            yield message, f"Add it to {{precision.make}}, or take one of: {', '.join(made)}."
        of_classes = ("model.labels", "model.head", "precision.max_drop", "evaluate.images")
        given = [key for key in of_classes if attrgetter(key)(self) not in (None, ())]
        if self.export.features and given:
            message = f"{{export.features}} gives feature maps, and {{{given[0]}}} is of classes."
            yield message, LEAVE_OUT
        size, sizes = self.preprocessing.image_size, self.export.dynamic_size
        if size is not None and sizes is not None and not sizes.contains(size):
            message = (
                f"{{preprocessing.image_size}} {format_size(size)} is outside of "
                f"{{export.dynamic_size}} {sizes}."
            )
            yield (
                message,
                "Give a size inside of the range, or leave it out to take the middle one.",
            )
