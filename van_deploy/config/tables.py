"""Which network, how its graph is written, labelled images, and gates: tables of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from van_deploy.config.fields import FileOrName, Table, option
from van_deploy.config.sizes import ImageSizeOption, SizeRange

LABELS = "Labels"

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

    def contradictions(self) -> Iterator[tuple[str, str]]:
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

    PANEL = LABELS

    images: Path | None = option(None, panel="")
    labels: Path | None = option(None)
    class_order: ClassOrder | None = option(None)
    label_files: bool = option(True)
    limit: int | None = option(None, ge=1, panel="")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield what is said of images that are not there."""
        given = self.given_of("labels", "limit")
        if self.images is None and given:
            yield f"{given} is given, and {{images}} is not.", "Name the folder of images, too."


class GateProfile(Table):
    """What an artefact of one numeric class must reach. Table ``[gates.fp32]`` and its like.

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
        fp32: Limits of FP32 artefacts.
        tf32: Limits of FP32 artefacts that compute in TF32.
        fp16: Limits of FP16 artefacts.
        bf16: Limits of BF16 artefacts.
        int8: Limits of INT8 artefacts.
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
