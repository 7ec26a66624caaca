"""The recipe and its tables: the network, and the artifacts to make."""

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
"""Precisions that an exported graph can be converted to."""

Profile = Annotated[BatchRange, pydantic.PlainSerializer(str, return_type=str)]
IMAGES, TYPES = "Images", "FP16 and BF16"
ONLY_TENSORRT = (
    *("targets", "hardware_compatibility", "version_compatible", "workspace_bytes", "tiling"),
    *("optimization_level", "profiling", "timing_cache"),
)
HARDWARE, PLAN = "Hardware", "Plan contents"
LEAVE_OUT = "Remove one of them."
FOR_INT8 = (
    *("max_drop", "evaluations", "noise", "scope", "rest"),
    *("method", "equalize", "bias_correction"),
)

# timm's names of Pillow's filters.
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]

ClassOrder = Literal["strings", "natural", "index", "names"]
"""How class folders are numbered; see `van_deploy.data.labels.CLASS_ORDERS`."""


class ModelSettings(Table):
    """The network. Table ``[model]``.

    Attributes:
        name: Name of the bundle; a variant's name selects its public weights. van_digits keeps its
            own.
        weights: A checkpoint, a repository, a variant, or 'random'; by default the name's public
            weights.
        sha256: Required digest of the weights file; by default the first download is recorded.
        container: The tensors to load from a file with several networks: keys, and the start of
            the names, joined by dots, such as state_dict.student.
        layer_norm_eps: Epsilon of every LayerNorm; by default from the configuration next to the
            weights, else their framework's own.
        head: Layers of a sequential head, such as linear,relu,linear.
        labels: File with one class name per line.
        seed: Seed of random weights.
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
    """Changes to the weights' own preprocessing. Table ``[preprocessing]``.

    Attributes:
        image_size: Input size in pixels: 224, or 224x320 (height x width); 32 or more.
        mean: Mean per channel, such as 0.485,0.456,0.406.
        std: Standard deviation per channel, such as 0.229,0.224,0.225.
        interpolation: Filter that resizes images.
        crop_pct: Crop over resized side, in (0, 1].
        crop_mode: Side to resize: the short one, both, or the long one.
    """

    PANEL = "Preprocessing (the weights' own by default; timm's names)"

    image_size: ImageSizeOption | None = option(None)
    mean: tuple[float, ...] | None = option(None)
    std: tuple[float, ...] | None = option(None)
    interpolation: Interpolation | None = option(None)
    crop_pct: float | None = option(None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = option(None)


class ExportSettings(Table):
    """How to export the graph. Table ``[export]``.

    Attributes:
        opset: ONNX operator set; 20 is the first with GELU as one operator.
        fold: Apply the exact rewrites.
        simplify: Run onnxsim, and use its graph if the outputs agree.
        embed_preprocess: Also write graphs with pixels as input: uint8 (N,H,W,3) bytes, or
            normalize (N,3,H,W) floats in 0..1.
        outputs: Outputs of those graphs.
        features: Export without the head; the outputs are feature maps: stage1 to stage4, each
            after its LayerNorm.
        out_indices: Stages to output, from 0 as in OpenMMLab and timm, such as 1,2,3; all four by
            default.
        dynamic_size: Make height and width dynamic: sizes min:opt:max to check and to build engines
            for, such as 192:224:512 or 192x256:224x320:512x640; opt is the input size unless
            image_size is set.
        golden: Golden samples, which verify the bundle on any machine: the images of --images (they
            are copied into the bundle), the package's own samples, or none.
    """

    PANEL = "Graph"

    # From the first with LayerNormalization to the newest that was tested.
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
        """Yield repeated outputs, and outputs of classes with feature maps."""
        outputs = ",".join(self.outputs)
        if len(set(self.outputs)) != len(self.outputs):
            yield "{outputs} repeats an output.", "Give each output once."
        if self.features and outputs != "logits":
            message = f"{{features}} exports feature maps, and {{outputs}} {outputs} needs classes."
            yield message, LEAVE_OUT
        if self.out_indices and not self.features:
            message = "{out_indices} selects feature maps, and {features} is not set."
            yield message, "Add --features, or features = true to the table [export]."

    @property
    def embeds(self) -> str:
        """End of the name of a second graph, with preprocessing or other outputs; "" for none."""
        other_outputs = "outputs" * (self.outputs != ("logits",))
        return other_outputs if self.embed_preprocess == "none" else self.embed_preprocess


class EvaluateSettings(Table):
    """Labelled images to measure accuracy on. Table ``[evaluate]``; off by default.

    Attributes:
        images: Labelled images: one folder per class, ImageNet's own layout, or an .npz.
        labels: File with a label for each image: 'file label', or one label per line.
        class_order: How training numbered the class folders, if nothing names the classes:
            strings (torchvision), natural (timm), index (of a number), names.
        label_files: Look for a ground-truth file such as val.txt next to the images.
        limit: Maximum number of images, evenly spread.
    """

    PANEL = "Labels"

    images: Path | None = option(None, panel="")
    labels: Path | None = option(None)
    class_order: ClassOrder | None = option(None)
    label_files: bool = option(True)
    limit: int | None = option(None, ge=1, panel="")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield options of images without images."""
        name = self.first_set("labels", "class_order", "label_files", "limit")
        if self.images is None and name:
            yield f"{name} needs {{images}}.", "Give the folder of images, too."


class GateProfile(Table):
    """Limits of one numeric class of artifacts. Table ``[gates.fp32]``, ``[gates.fp16]``, ...

    The defaults are in :mod:`van_deploy.checks.gates` (see ``docs/gates.md``).

    Attributes:
        sqnr_db: Minimum SQNR of the logits, in dB.
        module_db: Minimum isolated SQNR of any module, in dB.
        top1_loss: Maximum loss of top-1 on labelled images, in percentage points.
    """

    sqnr_db: float | None = option(None)
    module_db: float | None = option(None)
    top1_loss: float | None = option(None, ge=0, le=100)


class GateSettings(Table):
    """Changes to the default limits, by numeric class. Table ``[gates]``.

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
    """Options of both ``[precision]`` and ``van-deploy quantize``.

    Attributes:
        target: Runtime that the graph is for; the fast INT8 graphs differ.
        images: Folder or .npz of training images to calibrate on.
        calibration: Calibration set: its name (digits, imagenet-512), its .toml, or a folder or
            .npz, which replaces images.
        evaluate: Folder of evaluation images; its sub-folders are the labels. By default a held-out
            part of the calibration images.
        class_order: How training numbered the class folders, if nothing names the classes:
            strings (torchvision), natural (timm), index (of a number), names.
        noise: Calibrate on noise, which does not represent real images.
        method: How scales are computed from the observed ranges.
        scope: Layers in INT8: pointwise, deep (all but stem and stage 1), all, or regular
            expressions over module names; auto times the first three and takes the fastest that
            passes its gate. By default pointwise for TensorRT, deep for a CPU.
        rest: Precision of everything that is not INT8; by default fp16 for TensorRT, fp32 for a
            CPU.
        equalize: Scale and shift channels exactly, so that they quantise with less error.
        bias_correction: Correct the mean error of every layer in its bias.
        max_drop: Maximum loss of top-1 (of agreement without labels), in percentage points; the
            layers with the highest cost stay in higher precision.
        evaluations: Maximum plans to evaluate in a search for max_drop.
        keep: Modules that stay FP32, besides the LayerNorms and the head.
        keep_defaults: Keep the LayerNorms, the pooling and the head in FP32.
        strict: Fail if a tensor is outside the FP16 range, instead of keeping it FP32.
        allow_inconclusive: Pass what the evaluation set cannot decide.
        threads: Threads of ONNX Runtime; its own choice by default.
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
        """Yield options of FP16 or images that do not apply, and techniques that conflict."""
        images, half = self.first_set("images", "calibration"), self.first_set("strict")
        if self.noise and images:
            message = f"{{calibrate_on_noise}} and {images} conflict."
            yield message, "Remove one of them; images are always better."
        if self.target == "cpu" and (self.rest == "fp16" or half):
            message = (
                f"{half or '{rest} fp16'} is for FP16, and {{target}} cpu keeps what is not INT8 "
                "in FP32: a CPU casts FP16 at every operator."
            )
            yield message, f"Remove {half or '{rest}'}."
        if self.rest == "fp32" and half:
            yield f"{half} is for FP16, and {{rest}} is fp32.", LEAVE_OUT
        if self.equalize and not self.bias_correction:
            message = "{equalize} shifts channels and needs corrected biases ({bias_correction})."
            yield message, "Switch off {equalize}, too."
        if self.max_drop is None and (evaluations := self.first_set("evaluations")):
            message = f"{evaluations} limits the search for {{max_drop}}, which is not set."
            yield message, f"Give {{max_drop}}, too, or remove {evaluations}."
        if "auto" in self.scope and (len(self.scope) > 1 or self.max_drop is not None):
            other = "other scopes" if len(self.scope) > 1 else "{max_drop}"
            message = f"{{scope}} auto times whole scopes, and conflicts with {other}."
            yield message, "Find the scope first, then give its name."

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes, by default those of the target."""
        return self.scope or (("deep",) if self.target == "cpu" else ("pointwise",))

    @property
    def rest_precision(self) -> Literal["fp16", "fp32"]:
        """Precision of everything that is not INT8."""
        return self.rest or ("fp32" if self.target == "cpu" else "fp16")

    def oldest_opset(self, precision: Precision) -> int:
        """Return the oldest opset of the FP32 graph that can be converted to a precision.

        The operators of a VAN are the same in 18 and in 22, the first with BF16 in Conv;
        QuantizeLinear takes FP16 scales from 19 on.
        """
        oldest = {"bf16": 18, "int8": 19 if self.rest_precision == "fp16" else 17}
        return oldest.get(precision, 17)

    @property
    def sources(self) -> tuple[Path | None, str | None]:
        """The folder or ``.npz`` to calibrate on, and the calibration set that selects from it."""
        named = Path(self.calibration)
        if self.calibration and named.suffix != ".toml" and named.exists():
            return named, None
        return self.images, self.calibration or None


class _One(Table):
    """One precision.

    Attributes:
        precision: Precision to make.
    """

    precision: Precision = option("int8", flags=["--precision", "-p"])


class QuantizeSettings(_Quantization, _One):
    """The options of ``van-deploy quantize``: one precision of a bundle's network."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield options of another precision, besides the base's conflicts."""
        int8, half = self.first_set(*FOR_INT8), self.first_set("strict")
        if self.precision != "int8" and int8:
            message = f"{int8} is for INT8, and {{precision}} is {self.precision}."
            yield message, f"Make int8, or remove {int8}."
        if self.precision != "int8" and self.target == "cpu":
            message = (
                f"{self.precision.upper()} is not useful for {{target}} cpu: ONNX Runtime's CPU "
                "kernels cast it to FP32 and back around every operator, or do not exist."
            )
            yield message, "Make int8 for a CPU, or use the FP32 graph."
        if self.precision == "bf16" and half:
            message = f"{half} is for FP16, and {{precision}} is bf16."
            yield message, f"Remove {half}: BF16 has the range of FP32."
        if self.precision == "int8" and self.rest_precision == "fp32" and not self.keep_defaults:
            message = "{keep_defaults} is for FP16 and BF16, and what is not INT8 is FP32."
            yield message, "Remove {keep_defaults}."
        yield from super().conflicts()

    @property
    def artifact(self) -> str:
        """The name of the result in the bundle."""
        return "int8-cpu" if self.target == "cpu" else self.precision


class _Several(Table):
    """Several precisions.

    Attributes:
        make: Precisions to make besides fp32.
    """

    make: tuple[Precision, ...] = option(())


class PrecisionSettings(_Quantization, _Several):
    """Precisions besides ``fp32``, and how to quantise. Table ``[precision]``."""

    def of(self, precision: Precision) -> QuantizeSettings:
        """Return the settings of one precision, without the options of others.

        Raises:
            UsageError: two options conflict.
        """
        others = {"target", *FOR_INT8} if precision != "int8" else set()
        others |= {"strict"} if precision == "bf16" else set()
        if precision == "int8" and self.rest_precision == "fp32":
            others.add("keep_defaults")
        names = (name for name in _Quantization.model_fields if name not in others)
        return QuantizeSettings(precision=precision, **{n: getattr(self, n) for n in names})


class HardwareCompatibility(str, enum.Enum):
    """Other GPUs that a TensorRT plan supports. TensorRT's own names."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"


class Profiling(str, enum.Enum):
    """Details that the engine inspector can show. TensorRT's own names."""

    NONE = "none"
    LAYER_NAMES_ONLY = "layer-names-only"
    DETAILED = "detailed"


class PlanSettings(Table):
    """Options that determine a plan, besides the ONNX file, the backend and the GPUs.

    Attributes:
        profiles: Batch sizes min:opt:max, one profile each; by default the bundle's own.
        dynamic_size: Sizes min:opt:max of a graph with dynamic height and width; by default the
            bundle's own.
        hardware_compatibility: Other GPUs to support (TensorRT).
        version_compatible: Let later versions load the plan (TensorRT).
        workspace_bytes: Maximum scratch memory of a layer, such as 4GiB; by default the backend's
            limit.
        optimization_level: 0 builds fast, 5 searches longest; by default the backend's own.
        tiling: How long to search for tilings that keep tensors in the GPU's cache.
        tf32: Let FP32 layers compute in TF32.
        profiling: Details that the engine inspector can show.
    """

    PANEL = PLAN

    profiles: tuple[Profile, ...] = option((), key="batch", panel="")
    dynamic_size: SizeRange | None = option(None, panel="")
    hardware_compatibility: HardwareCompatibility = option(
        HardwareCompatibility.NONE, panel=HARDWARE
    )
    version_compatible: bool = option(False, panel=HARDWARE)
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
        """Return the options of one plan.

        Args:
            targets: GPUs that it runs on.
            batch: its profile if no profiles are set.
            sizes: its sizes if no sizes are set.
        """
        values = {name: getattr(self, name) for name in PlanSettings.model_fields}
        values["profiles"] = self.profiles or (batch or BatchRange(),)
        values["dynamic_size"] = self.dynamic_size or sizes
        return BuildOptions(targets=targets, **values)


class BuildOptions(PlanSettings):
    """Everything that determines one plan, besides the ONNX file and the backend.

    Attributes:
        targets: Compute capabilities that the plan runs on; empty for the GPU of this machine.
    """

    profiles: tuple[Profile, ...] = option(lambda: (BatchRange(),), key="batch", min_length=1)
    targets: Target = option(())


class EngineSettings(PlanSettings):
    """TensorRT engines to build. Table ``[engines]``; none by default.

    Attributes:
        precisions: fp32, fp16, bf16, int8 or another ONNX artifact of the bundle, such as
            fp32-uint8: one engine each, for each of the targets. Inductor supports fp32, fp16 and
            bf16.
        targets: Compute capabilities: sm_86,sm_89 are two plans, sm_86+sm_89 is one for both; by
            default that of the GPU in this machine.
        backend: Compiler and runtime. inductor, which recipes do not support: a package that
            PyTorch compiles ahead of time, for the GPU or the CPU of this machine.
        timing_cache: File of kernel timings to use and add to (TensorRT).
    """

    PANEL = HARDWARE

    precisions: tuple[str, ...] = option((), flags=["--precision"], panel="")
    targets: tuple[Target, ...] = option((), flags=["--target"])
    backend: Literal["auto", "tensorrt", "tensorrt-rtx", "inductor"] = option("auto")
    timing_cache: Path | None = option(None, panel=PLAN)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield a plan that is requested twice, and targets if no precisions are given."""
        if len(set(self.targets)) != len(self.targets):
            yield "{targets} repeats a plan.", "Give each target once."
        if self.targets and not self.precisions and "precisions" not in self.model_fields_set:
            yield "{targets} needs {precisions}: no engine is built without.", "Give both, or none."


class BuildSettings(EngineSettings):
    """The options of ``van-deploy build``.

    Attributes:
        precisions: fp32, fp16, bf16, int8 or another ONNX artifact of the bundle, such as
            fp32-uint8: one engine each, for each of the targets. Inductor supports fp32, fp16 and
            bf16.
        device: Device to build on: cuda:N, or cpu (inductor); by default cuda:0, or cpu for
            inductor without a GPU.
        max_autotune: Choose Inductor's GPU kernels by timing them, which takes minutes.
        fused_kernels: Compile a package with this project's fused kernels: FP16 or BF16 on a GPU,
            one batch size.
        tune: Build candidate settings (precision, INT8 scope, optimization level, tiling,
            autotuning), time them on this device, and keep the fastest that passes its gate.
        images: Folder of images to make a missing fp16, bf16 or int8 file with, as `van-deploy
            quantize` does.
    """

    PANEL = PLAN

    precisions: tuple[str, ...] = option(("fp32",), flags=["--precision"], panel="", min_length=1)
    device: str | None = option(None, panel=HARDWARE, pattern=r"^(cpu|cuda(:\d+)?)$")
    max_autotune: bool = option(False)
    fused_kernels: bool = option(False)
    tune: bool = option(False)
    images: Path | None = option(None, panel="")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield options that only the other backend has, besides the base's conflicts."""
        yield from super().conflicts()
        inductor = self.backend == "inductor"
        others = ONLY_TENSORRT if inductor else ("max_autotune", "fused_kernels")
        foreign = self.first_set(*others)
        if not inductor and self.device == "cpu":
            foreign = "{device} cpu"
        if foreign:
            owner = "TensorRT" if inductor else "Inductor"
            remedy = f"Remove {foreign}, or give another {{backend}}."
            yield f"{foreign} is an option of {owner}, and {{backend}} is {self.backend}.", remedy
        if inductor and len(self.profiles) > 1:
            message = "A package supports one range of batches, and {batch} has several."
            yield message, "Give one, such as 1:8:32."


class Recipe(Table):
    """A deployment; each attribute is a table of the file.

    Attributes:
        model: The network.
        preprocessing: Changes to the weights' own preprocessing.
        batch: Batch sizes min:opt:max to support; one size makes a static graph.
        export: How to export the graph.
        precision: Precisions besides FP32, as with `van-deploy quantize`.
        engines: Engines to build, as with `van-deploy build`; none by default.
        evaluate: Labelled images to measure accuracy on; none by default.
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
        """Yield engines of missing graphs, classes with feature maps, and a size out of range."""
        if self.engines.backend == "inductor":
            remedy = "Build a package with `van-deploy build BUNDLE --backend inductor`."
            yield "{engines.backend} inductor is not supported in a recipe.", remedy
        cpu = self.precision.target == "cpu"  # its INT8 graph is not for TensorRT
        graphs = ["fp32", *(n for n in self.precision.make if not (cpu and n == "int8"))]
        if self.export.embeds:
            graphs += [f"{name}-{self.export.embeds}" for name in graphs]
        for name in set(self.engines.precisions) - {*graphs}:
            message = f"{{engines.precisions}} has '{name}', not made by the recipe for TensorRT."
            make = "Add it to {precision.make} with {precision.target} tensorrt"
            yield message, f"{make}, or use one of: {', '.join(graphs)}."
        opset = self.export.opset
        for made in self.precision.make:
            if opset < (oldest := self.precision.oldest_opset(made)):
                message = f"{made} in {{precision.make}} needs opset {oldest} or newer, and "
                yield f"{message}{{export.opset}} is {opset}.", "Use opset 20."
        of_classes = ("model.labels", "model.head", "precision.max_drop", "evaluate.images")
        used = [key for key in of_classes if attrgetter(key)(self) not in (None, ())]
        if self.export.features and used:
            message = f"{{export.features}} exports feature maps, and {{{used[0]}}} needs classes."
            yield message, LEAVE_OUT
        size, sizes = self.preprocessing.image_size, self.export.dynamic_size
        if size is not None and sizes is not None and not sizes.contains(size):
            given = f"{{preprocessing.image_size}} {format_size(size)}"
            message = f"{given} is outside {{export.dynamic_size}} {sizes}."
            yield message, "Give a size in the range, or remove it to use the middle one."
