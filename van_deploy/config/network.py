"""Which network, how its graph is written, and labelled images: tables of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic

from van_deploy.config.fields import FileOrName, given_of, option
from van_deploy.config.sizes import ImageSizeOption, SizeRange
from van_deploy.schema import Contradiction, Settings

LABELS = "Labels"


ClassOrder = Literal["strings", "natural", "index", "names"]
"""How the classes of images are numbered; :data:`van_deploy.data.CLASS_ORDERS` explains them."""


def class_order_option(panel: str) -> Any:
    """Return the option that says how classes are numbered where nothing names them."""
    return option(
        None,
        "How training numbered the class folders, where nothing names the classes: strings "
        "(torchvision), natural (timm), index (of a number), names.",
        panel=panel,
    )


class ModelSettings(Settings):
    """Which network. Table ``[model]``."""

    PANEL: ClassVar[str] = "Weights"

    name: str = option(
        "", "What the bundle is called; a variant's name takes its public weights.", panel=""
    )
    weights: FileOrName = option(
        "",
        "A checkpoint, a repository, a variant, or 'random'; the public weights of the name "
        "by default.",
    )
    sha256: str = option(
        "", "Digest the weights file must have; the first one seen is recorded by default."
    )
    container: str = option(
        "",
        "Which tensors of a file that holds several networks: keys, and the beginning of the "
        "names, joined by dots, such as state_dict.student.",
    )
    layer_norm_eps: float | None = option(
        None,
        "Epsilon of every LayerNorm; by default what stands beside the weights, else their "
        "framework's own.",
        gt=0,
        lt=1,
    )
    head: tuple[str, ...] = option((), "Layers of a sequential head, such as linear,relu,linear.")
    labels: Path | None = option(None, "File with one class name a line.")
    seed: int = option(0, "Of random weights.", ge=0)


class PreprocessingSettings(Settings):
    """What differs from the weights' own preprocessing. Table ``[preprocessing]``."""

    PANEL: ClassVar[str] = "Preprocessing (the weights' own by default; timm's names)"

    image_size: ImageSizeOption | None = option(
        None,
        "Pixels of the input: 224, or 224x320 (height x width); any size from 32 on.",
        metavar="SIDE|HxW",
    )
    mean: tuple[float, ...] | None = option(None, "Such as 0.485,0.456,0.406.")
    std: tuple[float, ...] | None = option(None, "Such as 0.229,0.224,0.225.")
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = (
        option(None, "Filter that resizes images.")
    )
    crop_pct: float | None = option(None, "Crop over resized side, in (0, 1].", gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = option(
        None, "Side that is resized: the short one, both, or the long one."
    )


class ExportSettings(Settings):
    """How the graph is written. Table ``[export]``."""

    PANEL: ClassVar[str] = "Graph"

    opset: int = option(
        20,
        "ONNX operator set; 20 is the first in which GELU is one operator.",
        ge=17,  # the first with LayerNormalization
        le=23,  # the newest tried here
    )
    fold: bool = option(True, "Make the exact rewrites.")
    simplify: bool = option(True, "Run onnxsim, and keep its graph if it agrees.")
    embed_preprocess: Literal["none", "normalize", "uint8"] = option(
        "none",
        "Also write graphs that take pixels: uint8 (N,H,W,3) bytes, or normalize (N,3,H,W) "
        "floats in 0..1.",
    )
    outputs: tuple[Literal["logits", "probabilities", "top5"], ...] = option(
        ("logits",), "What those graphs give.", min_length=1
    )

    features: bool = option(
        False,
        "Leave the head out, and give feature maps: stage1 to stage4, each after its LayerNorm.",
    )
    out_indices: tuple[int, ...] = option(
        (),
        "Which stages' maps, from 0 as in OpenMMLab and timm, such as 1,2,3.",
        shown_default="0,1,2,3",
    )
    dynamic_size: SizeRange | None = option(
        None,
        "Make height and width dynamic: sizes min:opt:max that are checked and that engines "
        "serve, such as 192:224:512 or 192x256:224x320:512x640; opt is the input size unless "
        "image_size is given.",
        metavar="MIN:OPT:MAX",
    )
    golden: Literal["images", "samples", "none"] = option(
        "images",
        "Golden samples, on which the bundle is verified anywhere: the images given (they "
        "travel in the bundle), the package's own samples, or none.",
    )

    @pydantic.model_validator(mode="after")
    def _each_once(self) -> ExportSettings:
        if len(set(self.outputs)) != len(self.outputs):
            raise Contradiction("{outputs} names an output twice.", "Give each once.")
        if self.features and self.outputs != ("logits",):
            raise Contradiction(
                f"{{features}} gives feature maps, and {{outputs}} {','.join(self.outputs)} is of "
                "classes.",
                "Leave one of them out.",
            )
        if self.out_indices and not self.features:
            raise Contradiction(
                "{out_indices} chooses feature maps, and none are asked for.",
                "Add --features, or features = true to the table [export].",
            )
        return self

    @property
    def embeds(self) -> bool:
        """Whether a second graph is wanted, with something inside that the plain one lacks."""
        return self.embed_preprocess != "none" or self.outputs != ("logits",)


class EvaluateSettings(Settings):
    """Labelled images to measure accuracy on. Table ``[evaluate]``; without it, none."""

    PANEL: ClassVar[str] = LABELS

    images: Path | None = option(
        None, "Labelled images: one folder a class, ImageNet's own layout, or an .npz.", panel=""
    )
    labels: Path | None = option(
        None, "File with a label for each image: 'file label' or one a line."
    )
    synsets: Path | None = option(
        None, "What the numbers of ImageNet's development kit mean: a WordNet id a line."
    )
    class_order: ClassOrder | None = class_order_option(LABELS)
    label_files: bool = option(
        True, "Look for a ground-truth file such as val.txt beside the images."
    )
    limit: int | None = option(None, "At most so many images, evenly spread.", ge=1, panel="")

    @pydantic.model_validator(mode="after")
    def _of_images(self) -> EvaluateSettings:
        given = given_of(self, "labels", "synsets", "limit")
        if self.images is None and given:
            raise Contradiction(
                f"{given} is given, and {{images}} is not.", "Name the folder of images, too."
            )
        return self
