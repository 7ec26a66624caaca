"""How a picture becomes the tensor a set of weights was trained on.

Mean, standard deviation, interpolation, crop ratio and size belong to the
*weights*: with the wrong ones a network still answers, only worse. So they
travel with every artefact, and everything that shows them says where they came
from. Names and meanings are timm's.

Nothing heavy is imported until :meth:`Preprocessing.transform` is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from van_deploy.errors import UsageError
from van_deploy.forms import number

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["INTERPOLATIONS", "MAX_IMAGE_SIZE", "MIN_IMAGE_SIZE", "OFFICIAL", "Preprocessing"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""timm's names of Pillow's filters."""

MIN_IMAGE_SIZE = 32
"""Pixels. The four stages divide the side by 32: below, the last has no picture left."""

MAX_IMAGE_SIZE = 4096
"""Pixels. A limit that catches slips of the keyboard before they fill the memory."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture before the network sees it.

    The picture's short side is resized to ``floor(image_size / crop_pct)``, the
    centre square of ``image_size`` is cut out, values are scaled to 0..1, then
    ``(x - mean) / std`` per channel.

    Attributes:
        image_size: side of the square input, in pixels.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        interpolation: one of :data:`INTERPOLATIONS`.
        crop_pct: side of the crop over the resized short side, in (0, 1].
        source: where these values came from, one phrase for the user.

    >>> OFFICIAL.resize_size
    248
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    source: str

    @property
    def channels(self) -> int:
        """Channels of the input tensor."""
        return len(self.mean)

    @property
    def resize_size(self) -> int:
        """Short side of the resized picture before the crop, in pixels."""
        return math.floor(self.image_size / self.crop_pct)

    def override(
        self,
        *,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
    ) -> Preprocessing:
        """Return a copy with the given values, saying in ``source`` which were given.

        One value for ``mean`` or ``std`` stands for every channel.

        Raises:
            UsageError: a value is not possible; it is named.
        """
        channels = self.channels
        given: dict[str, Any] = {}
        if image_size is not None:
            given["image_size"] = _image_size(image_size)
        if mean is not None:
            given["mean"] = _per_channel("mean", mean, channels)
        if std is not None:
            given["std"] = _per_channel("std", std, channels)
        if interpolation is not None:
            given["interpolation"] = _interpolation(interpolation)
        if crop_pct is not None:
            given["crop_pct"] = _crop_pct(crop_pct)
        if not given:
            return self
        names = ", ".join(given)
        return replace(self, **given, source=f"{self.source}, except {names} as asked for")

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON can hold them; :meth:`from_dict` reads them back."""
        values = asdict(self)
        values["mean"], values["std"] = list(self.mean), list(self.std)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Return the preprocessing that :meth:`as_dict` wrote.

        Raises:
            UsageError: a value is missing or not possible; it is named.
        """
        fields = ("image_size", "mean", "std", "interpolation", "crop_pct")
        missing = [name for name in fields if name not in values]
        if missing:
            raise UsageError(
                f"The preprocessing lacks {', '.join(missing)}.",
                f"It needs all of {', '.join(fields)}.",
            )
        mean = values["mean"]
        channels = len(mean) if isinstance(mean, list | tuple) else 1
        return cls(
            image_size=_image_size(values["image_size"]),
            mean=_per_channel("mean", mean, channels),
            std=_per_channel("std", values["std"], channels),
            interpolation=_interpolation(values["interpolation"]),
            crop_pct=_crop_pct(values["crop_pct"]),
            source=str(values.get("source", "a stored description")),
        )

    def transform(self) -> Callable[[Image], torch.Tensor]:
        """Return timm's evaluation transform: a picture to ``(C, S, S)`` float32, normalised.

        Pictures of any Pillow mode are converted to as many channels as the
        network takes (1: grey, 3: RGB, 4: RGBA).

        Raises:
            UsageError: the network's channels are not a picture's (not 1, 3 or 4).
        """
        mode = _MODES.get(self.channels)
        if mode is None:
            raise UsageError(
                f"No picture has {self.channels} channels.",
                "Networks for 1, 3 or 4 input channels can be fed from picture files.",
            )
        from timm.data.transforms_factory import create_transform

        timm_transform = create_transform(
            (self.channels, self.image_size, self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )

        def transform(image: Image) -> torch.Tensor:
            tensor: torch.Tensor = timm_transform(image.convert(mode))
            return tensor

        return transform

    def __str__(self) -> str:
        """Return the values in one line, without their source."""
        mean = "/".join(f"{value:g}" for value in self.mean)
        std = "/".join(f"{value:g}" for value in self.std)
        return (
            f"{self.image_size}x{self.image_size} {self.interpolation}, "
            f"crop {self.crop_pct:g}, mean {mean}, std {std}"
        )


OFFICIAL = Preprocessing(
    224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "the training of the official VAN weights"
)
"""timm 0.4.12's ``_cfg()``, which the official ``models/van.py`` uses; mmpretrain's
configurations agree and reproduce the published accuracies."""


def _image_size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(
            f"The image size {value!r} is not a whole number.",
            "Give the side of the square input in pixels, such as 224.",
        )
    if not MIN_IMAGE_SIZE <= value <= MAX_IMAGE_SIZE:
        raise UsageError(
            f"The image size {value} is outside {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels.",
            "VAN divides the side by 32; give a size in that range, such as 224.",
        )
    return value


def _number(name: str, value: object) -> float:
    if not number(value):
        shown = repr(value)[:80]
        raise UsageError(f"The {name} {shown} is not a number.", "Give a number such as 0.5.")
    return float(value)  # type: ignore[arg-type]


def _per_channel(name: str, value: object, channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else (value,)
    numbers = tuple(_number(name, item) for item in values)
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels:
        raise UsageError(
            f"The {name} has {len(numbers)} values, but the network takes {channels} channels.",
            f"Give one value, or {channels}.",
        )
    if name == "std" and min(numbers) <= 0:
        raise UsageError(
            f"The std {min(numbers):g} is not positive.",
            "Pictures are divided by it; 0.5 is what the official weights want.",
        )
    if max(map(abs, numbers)) > 1:
        raise UsageError(
            f"The {name} {max(numbers, key=abs):g} is not of values in 0..1.",
            "Divide means and deviations of 0..255 pictures by 255.",
        )
    return numbers


def _interpolation(value: object) -> str:
    if value not in INTERPOLATIONS:
        raise UsageError(
            f"There is no interpolation called {value!r}.",
            f"Known: {', '.join(INTERPOLATIONS)}.",
        )
    return str(value)


def _crop_pct(value: object) -> float:
    number = _number("crop ratio", value)
    if not 0.0 < number <= 1.0:
        raise UsageError(
            f"The crop ratio {number:g} is outside (0, 1].",
            "1 keeps the whole short side; 0.9 is what the official weights want.",
        )
    return number
