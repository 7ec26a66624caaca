"""What to make besides FP32, and how: the table ``[precision]`` and ``van-deploy quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from van_deploy.config.fields import FileOrName, given_of, option
from van_deploy.config.network import ClassOrder, class_order_option
from van_deploy.schema import Contradiction, Settings

Precision = Literal["fp16", "bf16", "int8"]
"""What can be made of an exported graph."""

IMAGES = "Images"
TYPES = "FP16 and BF16"
FOR_INT8 = ("max_drop", "noise", "scope", "rest")
FOR_FP16 = ("half_io", "strict")


class _Quantization(Settings):
    """What ``[precision]`` and ``van-deploy quantize`` have in common."""

    PANEL: ClassVar[str] = "INT8"

    target: Literal["tensorrt", "cpu"] = option(
        "tensorrt", "What will run it: the fast INT8 graphs differ.", panel=""
    )
    images: Path | None = option(
        None, "Folder or .npz of training images to calibrate on.", panel=IMAGES
    )
    calibration: FileOrName = option(
        "",
        "Images that calibrate: a set's name (digits, imagenet-512), its .toml, or a folder or "
        ".npz, which takes the place of images.",
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
    method: Literal["mse", "percentile", "minmax"] = option("mse", "How ranges become scales.")
    percentile: float = option(99.999, "Of the method percentile.", gt=50, le=100)
    scope: tuple[str, ...] = option(
        (),
        "What becomes INT8: pointwise, deep (all but stem and stage 1), all, or regular "
        "expressions over module names; auto times the first three and takes the fastest that "
        "holds its gate.",
        shown_default="pointwise for TensorRT, deep for a CPU",
        commas=False,
    )
    rest: Literal["fp16", "fp32"] | None = option(
        None, "What is not INT8.", shown_default="fp16 for TensorRT, fp32 for a CPU"
    )
    equalize: bool = option(True, "Re-scale and shift channels exactly, so that they round better.")
    bias_correction: bool = option(True, "Take the mean error of every layer out in its bias.")
    max_drop: float | None = option(
        None,
        "Points of top-1 (of agreement without labels) that may be lost; the layers that cost "
        "more stay in higher precision.",
        ge=0,
    )
    evaluations: int = option(16, "Most plans a search for max_drop may try.", ge=1)
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
    allow_inconclusive: bool = option(
        False, "Let pass what the evaluation set cannot decide.", panel=""
    )
    threads: int | None = option(
        None, "Of ONNX Runtime.", shown_default="its own choice", ge=1, panel=""
    )

    @pydantic.model_validator(mode="after")
    def _what_goes_together(self) -> _Quantization:
        if self.noise and (images := given_of(self, "images", "calibration")):
            raise Contradiction(
                f"{{calibrate_on_noise}} and {images} are both given.",
                "Leave one of them out; images are always better.",
            )
        given = given_of(self, *FOR_FP16)
        if self.target == "cpu" and (self.rest == "fp16" or given):
            raise Contradiction(
                f"{given or '{rest} fp16'} is for FP16, and {{target}} cpu keeps what is not INT8 "
                "in FP32: a CPU casts FP16 at every operator.",
                f"Leave {given or '{rest}'} out.",
            )
        if self.rest == "fp32" and given:
            raise Contradiction(
                f"{given} is for FP16, and {{rest}} is fp32.", "Leave one of them out."
            )
        if self.equalize and not self.bias_correction:
            raise Contradiction(
                "{equalize} shifts channels, which loses more than it brings without "
                "{bias_correction}.",
                "Switch off {equalize}, too.",
            )
        if "auto" in self.scope and (len(self.scope) > 1 or self.max_drop is not None):
            other = "other scopes" if len(self.scope) > 1 else "{max_drop}"
            raise Contradiction(
                f"{{scope}} auto times whole scopes, and {other} were given, too.",
                "Find the scope first, then ask for it by its name.",
            )
        return self

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


class _One(Settings):
    precision: Precision = option("int8", "What to make.", flags=["--precision", "-p"])


class QuantizeSettings(_Quantization, _One):
    """One precision to make of a bundle's network: the options of ``van-deploy quantize``."""

    @pydantic.model_validator(mode="after")
    def _for_int8(self) -> QuantizeSettings:
        if self.precision == "int8":
            return self
        if given := given_of(self, *FOR_INT8):
            raise Contradiction(
                f"{given} is for INT8, and {{precision}} is {self.precision}.",
                f"Make int8, or leave {given} out.",
            )
        if self.target == "cpu":
            raise Contradiction(
                f"{self.precision.upper()} makes no sense for {{target}} cpu: ONNX Runtime's CPU "
                "kernels cast it to FP32 and back around every operator, or are not there.",
                "Make int8 for a CPU, or leave the graph in FP32.",
            )
        if self.precision == "bf16" and (given := given_of(self, *FOR_FP16)):
            raise Contradiction(
                f"{given} is for FP16, and {{precision}} is bf16.",
                f"Leave {given} out: BF16 has FP32's own range, and NumPy has no BF16.",
            )
        return self

    @property
    def artefact(self) -> str:
        """What the result is called in the bundle."""
        return "int8-cpu" if self.target == "cpu" else self.precision


class _Several(Settings):
    make: tuple[Precision, ...] = option((), "Also make these.")


class PrecisionSettings(_Quantization, _Several):
    """What to make besides ``fp32``, and on which images. Table ``[precision]``."""

    def of(self, precision: Precision) -> QuantizeSettings:
        """Return what is asked of one precision, without what is for others only.

        Raises:
            UsageError: it contradicts itself.
        """
        others = {"target", *FOR_INT8} if precision != "int8" else set()
        others |= set(FOR_FP16) if precision == "bf16" else set()
        names = (name for name in _Quantization.model_fields if name not in others)
        return QuantizeSettings(precision=precision, **{n: getattr(self, n) for n in names})
