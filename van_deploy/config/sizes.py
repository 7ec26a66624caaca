"""Sizes of the network's input: one side of a square, or height and width; and ranges of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from van_deploy.config.fields import option
from van_deploy.schema import Contradiction, Settings

ImageSize = int | tuple[int, int]
"""Pixels: the side of a square, or ``(height, width)``."""


MIN_IMAGE_SIZE = 32
"""Pixels. The four stages divide a side by 32 (rounding up): below, the last has one place left."""

MAX_IMAGE_SIZE = 4096
"""Pixels. A limit that catches slips of the keyboard before they fill the memory."""


def sides_of(size: ImageSize) -> tuple[int, int]:
    """Return height and width.

    >>> sides_of(224), sides_of((224, 320))
    ((224, 224), (224, 320))
    """
    return (size, size) if isinstance(size, int) else size


def size_text(size: Any) -> str:
    """Return a size as people write it; one from JSON, too.

    >>> size_text(224), size_text((224, 320)), size_text([224, 320])
    ('224x224', '224x320', '224x320')
    """
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height}x{width}"


def parse_image_size(size: object) -> object:
    """Return a size from how it is written; a square is its side.

    What is neither a text nor a pair is returned as it is.

    Raises:
        ValueError: it is not a size; the end of a sentence.

    >>> parse_image_size("224"), parse_image_size("224x320"), parse_image_size([64, 64])
    (224, (224, 320), 64)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", size.strip(), re.ASCII)
        if match is None:
            raise ValueError("should be a side or height x width in pixels: 224, or 224x320")
        size = (int(match[1]), int(match[2] or match[1]))
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0] if size[0] == size[1] else tuple(size)
    return size


def possible_size(size: ImageSize) -> ImageSize:
    """Return a size that the network takes: any, from :data:`MIN_IMAGE_SIZE` on.

    Raises:
        ValueError: it is not; the end of a sentence.
    """
    if isinstance(size, tuple) and size[0] == size[1]:
        size = size[0]
    if min(sides_of(size)) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"should be greater than or equal to {MIN_IMAGE_SIZE}: the network takes any size "
            "from there on"
        )
    if max(sides_of(size)) > MAX_IMAGE_SIZE:
        raise ValueError(f"should be less than or equal to {MAX_IMAGE_SIZE}")
    return size


def _possible(value: Any, checked: pydantic.ValidatorFunctionWrapHandler) -> ImageSize:
    """Return a size from what was written, which is what an error then shows."""
    return possible_size(checked(parse_image_size(value)))


ImageSizeOption = Annotated[
    int | tuple[int, int],
    pydantic.WrapValidator(_possible, json_schema_input_type=int | str),
]
"""A size as an option takes it: ``224``, or ``224x320`` (height x width)."""


class SizeRange(Settings):
    """The input sizes a graph with dynamic height and width must serve; ``min:opt:max``, too."""

    min: ImageSizeOption = option(..., "Smallest size.")
    opt: ImageSizeOption = option(..., "Size that engines are optimised for.")
    max: ImageSizeOption = option(..., "Largest size.")

    if TYPE_CHECKING:

        def __init__(self, min: ImageSize, opt: ImageSize, max: ImageSize) -> None: ...

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(":")
        if len(parts) != 3:
            raise ValueError(
                "should be min:opt:max, such as 192:224:512 or 192x256:224x320:512x640"
            )
        return dict(zip(("min", "opt", "max"), parts, strict=True))

    @pydantic.model_validator(mode="after")
    def _rises(self) -> SizeRange:
        low, middle, high = map(sides_of, (self.min, self.opt, self.max))
        if not all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True)):
            raise Contradiction(
                f"The sizes {self} are not min <= opt <= max in height and in width.",
                "Give three rising sizes, such as 192:224:512 or 192x256:224x320:512x640.",
            )
        return self

    def __str__(self) -> str:
        """Return ``min:opt:max``."""
        ends = (self.min, self.opt, self.max)
        return ":".join(str(e) if isinstance(e, int) else size_text(e) for e in ends)

    def holds(self, size: ImageSize) -> bool:
        """Return whether a size is in the range."""
        ends = zip(*map(sides_of, (self.min, size, self.max)), strict=True)
        return all(low <= side <= high for low, side, high in ends)

    def tried(self) -> tuple[ImageSize, ...]:
        """Return the sizes to try: both ends, the optimum, and an odd one inside if there is one.

        >>> SizeRange(64, 96, 128).tried(), SizeRange((32, 64), (32, 64), (33, 96)).tried()
        ((64, 96, 97, 128), ((32, 64), (33, 81), (33, 96)))
        """
        low, high = sides_of(self.min), sides_of(self.max)
        odd = tuple(_odd_between(a, b) for a, b in zip(low, high, strict=True))
        sizes = {sides_of(size) for size in (self.min, self.opt, self.max)} | {(odd[0], odd[1])}
        return tuple(h if h == w else (h, w) for h, w in sorted(sizes))


def _odd_between(low: int, high: int) -> int:
    """Return an odd number from ``low`` to ``high``, near the middle; ``low`` if there is none."""
    odd = (low + high) // 2 | 1
    return odd if odd <= high else low
