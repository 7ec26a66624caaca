"""What to make besides FP32, and how: the table ``[precision]`` and ``van-deploy quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from van_deploy.config.fields import FileOrName, option
from van_deploy.config.network import ClassOrder, class_order_option
from van_deploy.schema import Contradiction, Settings

__all__ = ["Precision", "PrecisionSettings", "QuantizeSettings"]

Precision = Literal["fp16", "int8"]
"""What can be made of an exported graph."""

IMAGES = "Images"
NUMBERS = "INT8"
TYPES = "FP16"


class _Quantization(Settings):
    """What ``[precision]`` and ``van-deploy quantize`` have in common."""

    target: Literal["tensorrt", "cpu"] = option(
        "tensorrt", "What will run it: the fast INT8 graphs differ."
    )
    images: Path | None = option(
        None, "Folder or .npz of training images to calibrate on.", panel=IMAGES
    )
    calibration: FileOrName = option(
        "",
        "Images that calibrate: a set's name (digits, imagenet-512), its .toml, a folder or a "
        ".npz.",
        panel=IMAGES,
    )
    evaluate: Path | None = option(
        None,
        "Folder of images to judge on; labels are its sub-folders. By default a held-out part "
        "of the calibration images.",
        flags=["--eval"],
        panel=IMAGES,
    )
    class_order: ClassOrder | None = class_order_option(IMAGES)
    noise: bool = option(
        False,
        "Calibrate on noise, which fits no real image.",
        key="calibrate_on_noise",
        panel=IMAGES,
    )
    method: Literal["minmax", "average", "percentile", "mse", "entropy", "auto"] = option(
        "mse",
        "How ranges become scales; auto takes the best on held-out images.",
        panel=NUMBERS,
    )
    percentile: float = option(99.999, "Of the method percentile.", panel=NUMBERS, gt=50, le=100)
    scope: tuple[str, ...] = option(
        (),
        "What becomes INT8: pointwise, deep (all but stem and stage 1), all, or regular "
        "expressions over module names.",
        panel=NUMBERS,
        shown_default="pointwise for TensorRT, deep for a CPU",
        commas=False,
    )
    rest: Literal["fp16", "fp32"] | None = option(
        None,
        "What is not INT8.",
        panel=NUMBERS,
        shown_default="fp16 for TensorRT, fp32 for a CPU",
    )
    equalize: bool = option(
        True, "Make the exact re-scalings before the ranges are recorded.", panel=NUMBERS
    )
    refine: bool = option(
        True, "Correct biases, scales and rounding against FP32's own answers.", panel=NUMBERS
    )
    max_drop: float | None = option(
        None,
        "Points of top-1 (of agreement without labels) that may be lost; the layers that cost "
        "more stay in higher precision.",
        panel=NUMBERS,
        ge=0,
    )
    evaluations: int = option(16, "Most plans a search for max_drop may try.", panel=NUMBERS, ge=1)
    keep: tuple[str, ...] = option(
        (),
        "Modules that stay FP32, besides the LayerNorms and the head.",
        panel=TYPES,
        commas=False,
    )
    keep_defaults: bool = option(
        True, "Keep the LayerNorms, the pooling and the head in FP32.", panel=TYPES
    )
    half_io: bool = option(False, "Make input and output FP16.", panel=TYPES)
    strict: bool = option(
        False,
        "Refuse where FP16 cannot hold a tensor, instead of keeping it FP32.",
        panel=TYPES,
    )
    threads: int | None = option(None, "Of ONNX Runtime.", shown_default="its own choice", ge=1)

    @pydantic.model_validator(mode="after")
    def _one_kind_of_images(self) -> _Quantization:
        if self.noise and (self.images is not None or self.calibration):
            given = "{images}" if self.images is not None else "{calibration}"
            raise Contradiction(
                f"{{calibrate_on_noise}} and {given} are both given.",
                "Leave one of them out; images are always better.",
            )
        if self.target == "cpu" and (self.rest == "fp16" or self.half_io):
            raise Contradiction(
                "{target} cpu keeps what is not INT8 in FP32: a CPU casts FP16 at every operator.",
                "Leave out {rest} fp16 and {half_io}.",
            )
        return self

    @property
    def sources(self) -> tuple[Path | None, str | None]:
        """The folder or ``.npz`` to calibrate on, and the calibration set that chooses from it."""
        named = Path(self.calibration)
        if self.images is None and self.calibration and named.suffix != ".toml" and named.exists():
            return named, None
        return self.images, self.calibration or None


class _One(Settings):
    precision: Precision = option("int8", "What to make.", flags=["--precision", "-p"])


class QuantizeSettings(_Quantization, _One):
    """One precision to make of a bundle's network: the options of ``van-deploy quantize``."""

    @pydantic.model_validator(mode="after")
    def _for_int8(self) -> QuantizeSettings:
        if self.precision == "int8":
            return self
        if self.max_drop is not None or self.noise:
            given = "{max_drop}" if self.max_drop is not None else "{calibrate_on_noise}"
            raise Contradiction(
                f"{given} is for INT8, and {{precision}} is fp16.",
                f"Make int8, or leave {given} out.",
            )
        if self.target == "cpu":
            raise Contradiction(
                "FP16 makes no sense for {target} cpu: ONNX Runtime's CPU kernels cast it to "
                "FP32 and back around every operator.",
                "Make int8 for a CPU, or leave the graph in FP32.",
            )
        return self

    @property
    def artefact(self) -> str:
        """What the result is called in the bundle."""
        return "int8-cpu" if self.target == "cpu" else self.precision


_FOR_INT8 = {"max_drop", "noise", "rest", "scope", "target"}


class _Several(Settings):
    make: tuple[Precision, ...] = option((), "Also make these.")


class PrecisionSettings(_Quantization, _Several):
    """What to make besides ``fp32``, and on which images. Table ``[precision]``."""

    def of(self, precision: Precision) -> QuantizeSettings:
        """Return what is asked of one precision; what is for INT8 only is not asked of FP16.

        Raises:
            UsageError: it contradicts itself.
        """
        given = {name: getattr(self, name) for name in _Quantization.model_fields}
        if precision == "fp16":
            given = {k: v for k, v in given.items() if k not in _FOR_INT8}
        return QuantizeSettings(precision=precision, **given)
