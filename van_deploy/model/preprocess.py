"""Image preprocessing: from an image to the input tensor that the weights were trained with.

Mean, standard deviation, interpolation, sizes and crop belong to the *weights*:
with other values the network still runs, but is less accurate. So they are stored with
every artifact, with the source of the values. Names and meanings are timm's.

:func:`pixels_from_image` and :func:`normalise` are the two halves of the evaluation
transforms of timm, torchvision and Transformers, bit-identical, with only Pillow and NumPy.
A graph with embedded preprocessing takes the pixels between the two; a server or a client
computes them without importing PyTorch. NumPy and Pillow are imported on first use, so that
a bundle, which has a :class:`Preprocessing`, opens quickly.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from van_deploy.config.recipe_tables import Interpolation as Interpolation
from van_deploy.config.sizes import ImageSize, format_size, height_width, validate_image_size
from van_deploy.documents import plain
from van_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image


_Side = Annotated[int, Field(strict=True, ge=0)]
_Number = Annotated[float, Field(strict=True, ge=-1, le=1)]
_Positive = Annotated[float, Field(strict=True, gt=0, le=1)]


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an input image.

    The image is resized and centre-cropped to ``image_size``, its values are scaled to
    0..1 and normalised, ``(x - mean) / std`` per channel.

    Attributes:
        image_size: of the input in pixels: the side of a square, or ``(height, width)``.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        interpolation: one of :data:`Interpolation`.
        crop_pct: side of the crop divided by the resized side, in (0, 1].
        source: of these values, one phrase for the user.
        crop_mode: how the image is resized to ``resize_size``: to cover it (``center``; for
            squares, by the short side), to fill it without keeping the aspect ratio
            (``squash``), or to fit inside (``border``, padded with the mean colour).
        resize_size: in pixels, as ``image_size``; 0 stands for timm's
            ``floor(image_size / crop_pct)`` of each side.
        crop_rounding: of the crop's first row and column if half a pixel is left:
            to ``even`` (timm, torchvision, mmpretrain) or down (``floor``, Transformers).

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
        """Set the default ``resize_size`` and check that the values are consistent."""
        if not self.resize_size:
            object.__setattr__(self, "resize_size", _timm_resize(self.image_size, self.crop_pct))
        if len(self.mean) != len(self.std):
            raise ValueError(f"has {len(self.mean)} means and {len(self.std)} deviations")
        resized, crop = height_width(self.resize_size), height_width(self.image_size)
        if resized[0] < crop[0] or resized[1] < crop[1]:
            raise ValueError(f"has image_size {self.image_size} > resize_size {self.resize_size}")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the input tensor."""
        return height_width(self.image_size)

    @property
    def channels(self) -> int:
        """Channels of the input tensor."""
        return len(self.mean)

    def override(self, **values: Any) -> Preprocessing:
        """Return a copy with other values, whose names are added to ``source``.

        One value for ``mean`` or ``std``, or equal ones, is used for every channel; None keeps the
        present value. Another ``image_size`` or ``crop_pct`` resets ``resize_size`` to timm's.

        Raises:
            UsageError: a value or its name is invalid.
        """
        values = {name: value for name, value in values.items() if value is not None}
        if not values:
            return self
        resize = {"resize_size": 0} if {"image_size", "crop_pct"} & values.keys() else {}
        source = f"{self.source}, except {', '.join(values)} as requested"
        for name in {"mean", "std"} & values.keys():
            value = values[name] if isinstance(values[name], list | tuple) else (values[name],)
            value = value[:1] if len({*value}) == 1 else value
            if len(value) not in (1, self.channels):
                message = f"The {name} has {len(value)} values for {self.channels} channels."
                raise UsageError(message, f"Give one value, or {self.channels}.")
            values[name] = tuple(value) * (self.channels // len(value))
        return self.from_dict({**self.as_dict(), **resize, "source": source, **values})

    def as_dict(self) -> dict[str, Any]:
        """Return the values in the types of JSON; :meth:`from_dict` is the inverse."""
        return dict(plain(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Return the preprocessing of a dict from :meth:`as_dict`.

        Raises:
            UsageError: a value is missing or invalid.
        """
        try:
            return _ADAPTER.validate_python({"source": "a stored description", **values})
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
        text = detail["msg"].removeprefix("Value error, ")
        value = f"{detail['loc'][0]} {reprlib.repr(detail['input'])}: " if detail["loc"] else "it "
        message = f"The preprocessing is invalid: {value}{text}."
        raise UsageError(message, "Correct it: mean and std are of values in 0..1, not 0..255.")

    def transform(self) -> Callable[[Image.Image], Any]:
        """Return the evaluation transform, from an image to ``(C, H, W)`` float32, normalised.

        It raises the errors of :func:`pixels_from_image`.
        """
        from torch import from_numpy

        return lambda image: from_numpy(normalise(pixels_from_image(image, self)[None], self)[0])

    def __str__(self) -> str:
        """Return the values on one line, without their source."""
        size, side, pct = format_size(self.image_size), self.resize_size, f"{self.crop_pct:g}"
        resize = f"resize {side if isinstance(side, int) else format_size(side)}"
        crop = f"crop {pct}" if _timm_resize(self.image_size, float(pct)) == side else resize
        crop += "" if self.crop_mode == "center" else f", {self.crop_mode}"
        mean, std = ("/".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"{size} {self.interpolation}, {crop}, mean {mean}, std {std}"


def _timm_resize(size: ImageSize, crop_pct: float) -> ImageSize:
    """Return timm's size to resize to before a crop of ``crop_pct``."""
    height, width = (math.floor(side / crop_pct) for side in height_width(size))
    return height if isinstance(size, int) else (height, width)


_ADAPTER = TypeAdapter(Preprocessing)

# timm 0.4.12's ``_cfg()``, which the official ``models/van.py`` uses; mmpretrain's configurations
# agree and reproduce the published accuracies.
_OFFICIAL_SOURCE = "the training of the official VAN weights"
OFFICIAL = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, _OFFICIAL_SOURCE)


# --- images ---------------------------------------------------------------------------------

# ``(H, W, C)`` or ``(N, H, W, C)`` uint8.
Pixels: TypeAlias = "npt.NDArray[np.uint8]"

# 256 MiB as RGB; above this Pillow warns of a decompression bomb.
MAX_PIXELS = 89_478_485

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_mode(channels: int) -> str:
    """Return Pillow's mode for a number of channels.

    Raises:
        UsageError: ``channels`` is not 1, 3 or 4.
    """
    if channels not in _MODES:
        message = f"The network takes {channels} channels, and image files have 1, 3 or 4."
        arrays = f"uint8 (N, H, W, {channels}) or normalised float32 (N, {channels}, H, W)"
        raise UsageError(message, f"Give an .npz with 'images', {arrays}; a server takes tensors.")
    return _MODES[channels]


def pixels_from_image(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return an image resized and cropped to the network's input, ``(H, W, C)`` uint8.

    Raises:
        UsageError: the network's number of channels is not 1, 3 or 4.
        ImageError: the image is so narrow that the resized image would not fit in memory.
    """
    import numpy as np
    from PIL import Image

    mode = image_mode(preprocessing.channels)
    image = image if image.mode == mode else image.convert(mode)
    size, (height, width) = _resized_size(image.size, preprocessing), preprocessing.sides
    if size != image.size:
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    rounding = preprocessing.crop_rounding
    left, top = _crop_offset(size[0] - width, rounding), _crop_offset(size[1] - height, rounding)
    if size[0] < width or size[1] < height:  # a border is needed
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        padded = Image.new(mode, (width, height), fill)
        padded.paste(image, (-left, -top))
        image = padded
    else:
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def normalise(pixels: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Return ``(N, H, W, C)`` uint8 as the network's input ``(N, C, H, W)`` float32.

    The three float32 operations and their order are those of torchvision's
    ``ToTensor`` and ``Normalize``, so the result is bit-identical.
    """
    import numpy as np

    values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    values /= np.float32(255)
    shape = (1, preprocessing.channels, 1, 1)
    values -= np.array(preprocessing.mean, np.float32).reshape(shape)
    values /= np.array(preprocessing.std, np.float32).reshape(shape)
    return values


def _resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return width and height after resizing, rounded as the source of ``crop_mode`` does."""
    target, (width, height) = preprocessing.resize_size, size
    rows, columns = height_width(target)
    if preprocessing.crop_mode == "squash":
        return columns, rows
    ratios = (height / rows, width / columns)  # of timm's ResizeKeepRatio
    if preprocessing.crop_mode == "border":
        return _divide_size(size, max(ratios))
    if isinstance(target, int):  # rounded as in torchvision and Transformers
        long_side = int(target * max(size) / min(size))
        resized = (target, long_side) if width <= height else (long_side, target)
    else:
        resized = _divide_size(size, min(ratios))
    if resized[0] * resized[1] > MAX_PIXELS:
        message = f"An image of {width} x {height} pixels resizes to {max(resized)} pixels."
        raise ImageError(message, "Crop the image to the relevant part first.")
    return resized


def _divide_size(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _crop_offset(margin: int, rounding: str) -> int:
    """Return the crop's first pixel for a total ``margin``, which is negative for a border."""
    return int(margin / 2) if margin < 0 or rounding == "floor" else round(margin / 2)
