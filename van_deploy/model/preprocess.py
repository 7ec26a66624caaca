"""How an image becomes the tensor a set of weights was trained on.

Mean, standard deviation, interpolation, sizes and crop belong to the *weights*:
with the wrong ones a network still answers, only worse. So they travel with
every artefact, and everything that shows them says where they came from. Names
and meanings are timm's. :mod:`van_deploy.model.pixels` does what is said here.

Nothing heavy is imported until :meth:`Preprocessing.transform` is called.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from van_deploy.config.sizes import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    ImageSize,
    possible_size,
    sides_of,
    size_text,
)
from van_deploy.errors import UsageError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["INTERPOLATIONS", "MAX_IMAGE_SIZE", "MIN_IMAGE_SIZE", "OFFICIAL", "Preprocessing"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
"""timm's names of Pillow's filters."""


def _positive(values: tuple[float, ...]) -> tuple[float, ...]:
    if min(values) <= 0:
        raise ValueError("is not positive: images are divided by it")
    return values


def _unit(value: float) -> float:
    if abs(value) > 1:
        raise ValueError("is not of values in 0..1: divide those of 0..255 images by 255")
    return value


_Number = Annotated[float, Field(strict=True), AfterValidator(_unit)]
_Side = Annotated[int, Field(strict=True, ge=0)]
_Channels = Annotated[tuple[_Number, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network sees it.

    It is resized, the centre of ``image_size`` is cut out, values are scaled to
    0..1, then ``(x - mean) / std`` per channel.

    Attributes:
        image_size: of the input in pixels: the side of a square, or ``(height, width)``.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        interpolation: one of :data:`INTERPOLATIONS`.
        crop_pct: side of the crop over the resized side, in (0, 1], as the source gave it.
        source: where these values came from, one phrase for the user.
        crop_mode: what is resized to ``resize_size``: the side that just covers it
            (``center``; the short one, for squares), both (``squash``), or the one that just
            fits in (``border``, padded with the mean colour).
        resize_size: in pixels, as ``image_size``; where it is 0, timm's
            ``floor(image_size / crop_pct)``, side by side.
        crop_rounding: the crop's first row and column where the middle is between two:
            the ``even`` one (timm, torchvision, mmpretrain) or the first (``floor``, Transformers).

    >>> OFFICIAL.resize_size
    248
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False, extra="forbid")

    image_size: Annotated[_Side | tuple[_Side, _Side], AfterValidator(possible_size)]
    mean: _Channels
    std: Annotated[_Channels, AfterValidator(_positive)]
    interpolation: Interpolation
    crop_pct: Annotated[float, Field(strict=True, gt=0, le=1)]
    source: str
    crop_mode: Literal["center", "squash", "border"] = "center"
    resize_size: _Side | tuple[_Side, _Side] = 0
    crop_rounding: Literal["even", "floor"] = "even"

    def __post_init__(self) -> None:
        """Fill in the resized side, and refuse what does not fit together."""
        if not self.resize_size:
            object.__setattr__(self, "resize_size", _resized(self.image_size, self.crop_pct))
        if len(self.mean) != len(self.std):
            raise ValueError(f"has {len(self.mean)} means and {len(self.std)} deviations")
        resized, cut = sides_of(self.resize_size), sides_of(self.image_size)
        if resized[0] < cut[0] or resized[1] < cut[1]:
            raise ValueError(
                f"cuts {self.image_size} pixels out of an image resized to {self.resize_size}"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the input tensor."""
        return sides_of(self.image_size)

    @property
    def channels(self) -> int:
        """Channels of the input tensor."""
        return len(self.mean)

    def override(
        self,
        *,
        image_size: ImageSize | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
    ) -> Preprocessing:
        """Return a copy with the given values, saying in ``source`` which were given.

        One value for ``mean`` or ``std`` stands for every channel.

        Raises:
            UsageError: a value is not possible; it is named.
        """
        given = {
            "image_size": image_size,
            "mean": self._per_channel("mean", mean),
            "std": self._per_channel("std", std),
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return self
        resize = {"resize_size": 0} if {"image_size", "crop_pct"} & given.keys() else {}
        source = f"{self.source}, except {', '.join(given)} as asked for"
        return self.from_dict({**self.as_dict(), **resize, **given, "source": source})

    def _per_channel(self, name: str, value: object) -> tuple[Any, ...] | None:
        if value is None:
            return None
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if len(values) not in (1, self.channels):
            raise UsageError(
                f"The {name} has {len(values)} values, but the network takes "
                f"{self.channels} channels.",
                f"Give one value, or {self.channels}.",
            )
        return values * (self.channels // len(values))

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON can hold them; :meth:`from_dict` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Return the preprocessing that :meth:`as_dict` wrote.

        Raises:
            UsageError: a value is missing or not possible; it is named.
        """
        try:
            return _ADAPTER.validate_python({"source": "a stored description", **values})
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
        text = fault["msg"].removeprefix("Input ").removeprefix("Value error, ")
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if fault["type"] == "missing":
            raise UsageError(f"The preprocessing lacks {name}.", "Give it.")
        shown = f"{name} {reprlib.repr(fault['input'])}" if name else "preprocessing"
        raise UsageError(
            f"The {shown} {text}.", "Correct it, or leave it out to take the weights' own."
        )

    def transform(self) -> Callable[[Image], torch.Tensor]:
        """Return the evaluation transform: an image to ``(C, H, W)`` float32, normalised.

        Raises:
            UsageError: the network's channels are not an image's (not 1, 3 or 4).
        """
        import torch

        from van_deploy.model.pixels import image_mode, normalised, pixels_from_image

        image_mode(self.channels)

        def transform(image: Image) -> torch.Tensor:
            return torch.from_numpy(normalised(pixels_from_image(image, self)[None], self)[0])

        return transform

    @property
    def geometry(self) -> str:
        """What is done to the sides, in a few words."""
        ratio = _resized(self.image_size, float(f"{self.crop_pct:g}")) == self.resize_size
        size = self.resize_size
        resize = str(size) if isinstance(size, int) else size_text(size)
        crop = f"crop {self.crop_pct:g}" if ratio else f"resize {resize}"
        return crop if self.crop_mode == "center" else f"{crop}, {self.crop_mode}"

    def __str__(self) -> str:
        """Return the values in one line, without their source."""
        mean = "/".join(f"{value:g}" for value in self.mean)
        std = "/".join(f"{value:g}" for value in self.std)
        size = size_text(self.image_size)
        return f"{size} {self.interpolation}, {self.geometry}, mean {mean}, std {std}"


def _resized(size: ImageSize, crop_pct: float) -> ImageSize:
    """Return timm's resized size, of which ``crop_pct`` is cut out."""
    if isinstance(size, int):
        return math.floor(size / crop_pct)
    return math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)


_ADAPTER = TypeAdapter(Preprocessing)

OFFICIAL = Preprocessing(
    224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "the training of the official VAN weights"
)
"""timm 0.4.12's ``_cfg()``, which the official ``models/van.py`` uses; mmpretrain's
configurations agree and reproduce the published accuracies."""
