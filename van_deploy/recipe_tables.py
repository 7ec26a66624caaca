"""The tables of a recipe, one frozen dataclass each; each attribute is a key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from van_deploy.errors import UsageError

__all__ = [
    "BatchRange",
    "EngineSettings",
    "EvaluateSettings",
    "ExportSettings",
    "GateProfile",
    "GateSettings",
    "ModelSettings",
    "PrecisionSettings",
    "PreprocessingSettings",
]

PRECISIONS = ("fp16", "int8")


@dataclass(frozen=True)
class ModelSettings:
    """Which network. Table ``[model]``.

    Attributes:
        name: what the bundle is called.
        weights: a variant, a path, a repository or ``random``; "" for the
            public weights of ``name``.
        sha256: digest the weights file must have; "" to record the first one seen.
        labels: file with one class name a line; "" for what the weights say.
    """

    name: str = ""
    weights: str = ""
    sha256: str = ""
    labels: str = ""


@dataclass(frozen=True)
class PreprocessingSettings:
    """What differs from the weights' own preprocessing. Table ``[preprocessing]``.

    None takes the weights' value. Names and meanings are timm's.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class ExportSettings:
    """How the graph is written. Table ``[export]``.

    Attributes:
        opset: ONNX operator set.
        fold: make the exact rewrites.
        simplify: run onnxsim, and keep its graph if it agrees.
        embed_preprocess: beside each plain graph, one with preprocessing inside:
            ``none``, ``normalize`` or ``uint8`` (see :mod:`van_deploy.graph.embed`).
        outputs: of that graph: some of ``logits``, ``probabilities``, ``top5``.
        golden: what the golden samples in the bundle are: the user's ``images`` where there
            are any, the package's own ``samples``, or ``none``.
    """

    opset: int = 20
    fold: bool = True
    simplify: bool = True
    embed_preprocess: str = "none"
    outputs: tuple[str, ...] = ("logits",)
    golden: str = "images"

    @property
    def embeds(self) -> bool:
        """Whether a second graph is wanted, with something inside that the plain one lacks."""
        return self.embed_preprocess != "none" or self.outputs != ("logits",)


@dataclass(frozen=True)
class BatchRange:
    """The batch sizes the artefact must serve. Table ``[batch]``."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        """Refuse a range that is none."""
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"The batch range {self} is not 1 <= min <= opt <= max.",
                "Give three rising numbers, such as 1:8:32.",
            )

    def __str__(self) -> str:
        """Return ``min:opt:max``."""
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Return the range written as ``min:opt:max``.

        Raises:
            UsageError: it is not that.

        >>> BatchRange.parse("1:8:32").opt
        8
        """
        try:
            smallest, optimum, largest = (int(part) for part in text.split(":"))
        except ValueError:
            raise UsageError(
                f"'{text}' is not a batch range.", "Write min:opt:max, such as 1:8:32."
            ) from None
        return cls(smallest, optimum, largest)


@dataclass(frozen=True)
class GateProfile:
    """What an artefact of one numeric class must reach. Table ``[gates.fp32]`` and its like.

    A limit that is left out is that of :mod:`van_deploy.checks.gates`.

    Attributes:
        sqnr_db: least SQNR of the logits, in dB.
        module_db: least isolated SQNR of any module, in dB.
        top1_loss: points of top-1 (percent) that may be lost on labelled images.
    """

    sqnr_db: float | None = None
    module_db: float | None = None
    top1_loss: float | None = None


@dataclass(frozen=True)
class GateSettings:
    """What differs from the limits of :mod:`van_deploy.checks.gates`. Table ``[gates]``."""

    fp32: GateProfile = field(default_factory=GateProfile)
    tf32: GateProfile = field(default_factory=GateProfile)
    fp16: GateProfile = field(default_factory=GateProfile)
    bf16: GateProfile = field(default_factory=GateProfile)
    int8: GateProfile = field(default_factory=GateProfile)

    def of(self, numeric: str) -> GateProfile:
        """Return the profile of a numeric class."""
        profile: GateProfile = getattr(self, numeric)
        return profile


@dataclass(frozen=True)
class PrecisionSettings:
    """What to make besides ``fp32``, and on which images. Table ``[precision]``.

    The values are those of ``van-deploy quantize``.

    Attributes:
        make: ``fp16``, ``int8``, or both.
        images: folder or ``.npz`` of training images to calibrate on.
        calibration: a calibration set, by name or by the path of a ``.toml``.
        evaluate: folder of images to judge on; a held-out part of the others without one.
        method: how ranges become scales.
        scope: what becomes INT8: ``pointwise``, ``deep``, ``all``, or regular expressions.
        target: ``tensorrt`` or ``cpu``.
        rest: what is not INT8: ``fp16`` or ``fp32``; "" for the target's own default.
        keep: modules that stay FP32 besides the LayerNorms and the head.
        equalize: make the exact re-scalings.
        refine: correct biases, scales and rounding against FP32's own answers.
        max_drop: points of top-1 (of agreement without labels) INT8 may lose.
    """

    make: tuple[str, ...] = ()
    images: Path | None = None
    calibration: str = ""
    evaluate: Path | None = None
    method: str = "mse"
    scope: tuple[str, ...] = ()
    target: str = "tensorrt"
    rest: str = ""
    keep: tuple[str, ...] = ()
    equalize: bool = True
    refine: bool = True
    max_drop: float | None = None

    def __post_init__(self) -> None:
        """Refuse precisions that there are not."""
        _all_known("precision", self.make, PRECISIONS)


@dataclass(frozen=True)
class EngineSettings:
    """Which TensorRT engines to build. Table ``[engines]``; without it, none.

    The values are those of ``van-deploy build``.

    Attributes:
        precisions: ``fp32``, ``fp16``, ``int8``: one engine each, for each of the targets.
        targets: compute capabilities, such as ``sm_89``; ``sm_86+sm_89`` is one plan
            for both. Empty for the GPU in this machine.
        backend: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        batch: profiles ``min:opt:max``; empty for the recipe's ``[batch]``.
        workspace: scratch memory a layer may use, such as ``4GiB``.
        optimization_level: 0 to 5.
        tf32: let FP32 layers compute in TF32.
        hardware_compatibility: other GPUs to serve, as TensorRT names them.
        version_compatible: let later versions load the plan.
        strip_weights: leave the weights out of the plan.
        refit: let weights be replaced later.
        profiling: what the engine inspector can tell.
        timing_cache: file of kernel timings to use and add to.
    """

    precisions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    backend: str = "auto"
    batch: tuple[str, ...] = ()
    workspace: str = ""
    optimization_level: int | None = None
    tf32: bool = True
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    strip_weights: bool = False
    refit: bool = False
    profiling: str = "layer-names-only"
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        """Refuse precisions that there are not."""
        _all_known("precision", self.precisions, ("fp32", *PRECISIONS))


@dataclass(frozen=True)
class EvaluateSettings:
    """Labelled images to measure accuracy on. Table ``[evaluate]``; without it, none.

    Attributes:
        images: their folder.
        labels: file with a label for each, where the folder does not tell.
        limit: at most so many, evenly spread.
    """

    images: Path | None = None
    labels: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse labels without images, and no images at all."""
        if self.images is None and (self.labels is not None or self.limit is not None):
            raise UsageError(
                "There are labels or a limit, and no images.", "Name the folder of images, too."
            )
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"A limit of {self.limit} images is none.", "Give 1 or more.")


def _all_known(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    strangers = [name for name in names if name not in known]
    if strangers:
        raise UsageError(f"There is no {what} '{strangers[0]}'.", f"Known: {', '.join(known)}.")
