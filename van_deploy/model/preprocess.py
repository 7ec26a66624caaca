"""How an image becomes the tensor a set of weights was trained on.

Mean, standard deviation, interpolation, sizes and crop belong to the *weights*:
with the wrong ones a network still answers, only worse. So they travel with
every artifact, and everything that shows them says where they came from. Names
and meanings are timm's.

:func:`pixels_from_image` and :func:`normalise` are the two halves of the evaluation
transforms of timm, torchvision and Transformers, to the last bit, with nothing but Pillow
and NumPy. A graph with embedded preprocessing takes what is between the two; a server or a
client computes it without importing PyTorch. NumPy and Pillow are imported when they are needed:
opening a bundle, which has a :class:`Preprocessing`, is quick.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from van_deploy.config.sizes import ImageSize, format_size, height_width, validate_image_size
from van_deploy.documents import plain
from van_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL import Image

# timm's names of Pillow's filters.
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


_Side = Annotated[int, Field(strict=True, ge=0)]
_Number = Annotated[float, Field(strict=True, ge=-1, le=1)]
_Positive = Annotated[float, Field(strict=True, gt=0, le=1)]


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network sees it.

    It is resized, the centre of ``image_size`` is cut out, values are scaled to
    0..1, then ``(x - mean) / std`` per channel.

    Attributes:
        image_size: of the input in pixels: the side of a square, or ``(height, width)``.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        interpolation: one of :data:`Interpolation`.
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

    image_size: Annotated[_Side | tuple[_Side, _Side], AfterValidator(validate_image_size)]
    mean: Annotated[tuple[_Number, ...], Field(min_length=1)]
    std: tuple[_Positive, ...]
    interpolation: Interpolation
    crop_pct: _Positive
    source: str
    crop_mode: Literal["center", "squash", "border"] = "center"
    resize_size: _Side | tuple[_Side, _Side] = 0
    crop_rounding: Literal["even", "floor"] = "even"

    def __post_init__(self) -> None:
        """Fill in the resized side, and refuse what does not fit together."""
        if not self.resize_size:
            object.__setattr__(self, "resize_size", _covered(self.image_size, self.crop_pct))
        if len(self.mean) != len(self.std):
            raise ValueError(f"has {len(self.mean)} means and {len(self.std)} deviations")
        resized, cut = height_width(self.resize_size), height_width(self.image_size)
        if resized[0] < cut[0] or resized[1] < cut[1]:
            whole = f"an image resized to {self.resize_size}"
            raise ValueError(f"cuts {self.image_size} pixels out of {whole}")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the input tensor."""
        return height_width(self.image_size)

    @property
    def channels(self) -> int:
        """Channels of the input tensor."""
        return len(self.mean)

    def override(self, **given: Any) -> Preprocessing:
        """Return a copy with the given values, saying in ``source`` which were given.

        One value for ``mean`` or ``std`` stands for every channel; None for the value there is.
        With another ``image_size`` or ``crop_pct`` the resized side is timm's again.

        Raises:
            UsageError: a value is not possible, or there is none of that name; it is named.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return self
        resize = {"resize_size": 0} if {"image_size", "crop_pct"} & given.keys() else {}
        source = f"{self.source}, except {', '.join(given)} as asked for"
        for name in {"mean", "std"} & given.keys():
            values = given[name] if isinstance(given[name], list | tuple) else (given[name],)
            if len(values) not in (1, self.channels):
                wrong = f"The {name} has {len(values)} values for {self.channels} channels."
                raise UsageError(wrong, f"Give one value, or {self.channels}.")
            given[name] = tuple(values) * (self.channels // len(values))
        return self.from_dict({**self.as_dict(), **resize, "source": source, **given})

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON can hold them; :meth:`from_dict` reads them back."""
        return dict(plain(self))

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
        text = fault["msg"].removeprefix("Value error, ")
        name = f"{fault['loc'][0]} {reprlib.repr(fault['input'])}" if fault["loc"] else "whole"
        wrong = f"The preprocessing is not possible: {name}: {text}."
        raise UsageError(wrong, "Correct it: mean and std are of values in 0..1, not 0..255.")

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """Return the evaluation transform: an image to ``(C, H, W)`` float32, normalised.

        It raises what :func:`pixels_from_image` does.
        """
        import torch

        return lambda image: torch.from_numpy(
            normalise(pixels_from_image(image, self)[None], self)[0]
        )

    def __str__(self) -> str:
        """Return the values in one line, without their source."""
        side, pct = self.resize_size, f"{self.crop_pct:g}"
        resize = f"resize {side if isinstance(side, int) else format_size(side)}"
        crop = f"crop {pct}" if _covered(self.image_size, float(pct)) == side else resize
        crop += "" if self.crop_mode == "center" else f", {self.crop_mode}"
        mean, std = ("/".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return (
            f"{format_size(self.image_size)} {self.interpolation}, {crop}, mean {mean}, std {std}"
        )


def _covered(size: ImageSize, crop_pct: float) -> ImageSize:
    """Return timm's resized size, of which ``crop_pct`` is cut out."""
    height, width = (math.floor(side / crop_pct) for side in height_width(size))
    return height if isinstance(size, int) else (height, width)


_ADAPTER = TypeAdapter(Preprocessing)

# timm 0.4.12's ``_cfg()``, which the official ``models/van.py`` uses; mmpretrain's configurations
# agree and reproduce the published accuracies.
_TRAINED = "the training of the official VAN weights"
OFFICIAL = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, _TRAINED)


# --- images ---------------------------------------------------------------------------------

# ``(H, W, C)`` or ``(N, H, W, C)`` uint8.
Pixels: TypeAlias = "npt.NDArray[np.uint8]"

# A quarter of a GiB as RGB; Pillow's own warning limit.
MAX_PIXELS = 89_478_485

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_mode(channels: int) -> str:
    """Return Pillow's mode of an image with so many channels.

    Raises:
        UsageError: no image has so many.
    """
    if channels not in _MODES:
        wrong = f"The network takes {channels} channels, and image files have 1, 3 or 4."
        arrays = f"uint8 (N, H, W, {channels}) or normalised float32 (N, {channels}, H, W)"
        raise UsageError(wrong, f"Give an .npz with 'images', {arrays}; a server takes tensors.")
    return _MODES[channels]


def pixels_from_image(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return an image resized and cropped as its network wants it, ``(H, W, C)`` uint8.

    Raises:
        UsageError: the network's channels are not an image's (not 1, 3 or 4).
        ImageError: the image is so narrow that its resized form would not fit in memory.
    """
    import numpy as np
    from PIL import Image

    mode = image_mode(preprocessing.channels)
    image = image if image.mode == mode else image.convert(mode)
    size, (height, width) = _resized(image.size, preprocessing), preprocessing.sides
    if size != image.size:
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    rounding = preprocessing.crop_rounding
    left, top = _offset(size[0] - width, rounding), _offset(size[1] - height, rounding)
    if size[0] < width or size[1] < height:  # a border
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        padded = Image.new(mode, (width, height), fill)
        padded.paste(image, (-left, -top))
        image = padded
    else:
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def normalise(pixels: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Return ``(N, H, W, C)`` bytes as the network's input ``(N, C, H, W)`` float32.

    The same three float32 operations in the same order as torchvision's
    ``ToTensor`` and ``Normalize``, so the result is the same to the last bit.
    """
    import numpy as np

    values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    values /= np.float32(255)
    shape = (1, preprocessing.channels, 1, 1)
    values -= np.array(preprocessing.mean, np.float32).reshape(shape)
    values /= np.array(preprocessing.std, np.float32).reshape(shape)
    return values


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return width and height after resizing, with each source's own rounding."""
    target, (width, height) = preprocessing.resize_size, size
    rows, columns = height_width(target)
    if preprocessing.crop_mode == "squash":
        return columns, rows
    ratios = (height / rows, width / columns)  # of timm's ResizeKeepRatio
    if preprocessing.crop_mode == "border":
        return _scaled(size, max(ratios))
    if isinstance(target, int):  # as torchvision rounds, and Transformers
        long_side = int(target * max(size) / min(size))
        resized = (target, long_side) if width <= height else (long_side, target)
    else:
        resized = _scaled(size, min(ratios))
    if resized[0] * resized[1] > MAX_PIXELS:
        wrong = (
            f"An image of {width} x {height} pixels would be {max(resized)} pixels long, resized."
        )
        raise ImageError(wrong, "Cut out the part that matters first.")
    return resized


def _scaled(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _offset(spare: int, rounding: str) -> int:
    """Return how many of ``spare`` pixels lie before the crop; negative: before the image."""
    return int(spare / 2) if spare < 0 or rounding == "floor" else round(spare / 2)
