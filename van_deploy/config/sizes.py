"""Input sizes, and the ranges of input and batch sizes that an artifact supports."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import pydantic

from van_deploy.config.fields import Table, option

ImageSize = int | tuple[int, int]
"""Pixels: the side of a square, or ``(height, width)``."""

MIN_IMAGE_SIZE = 32
"""Pixels. The four stages divide a side by 32, rounding up: below, the last has one pixel."""

MAX_IMAGE_SIZE = 4096
"""Pixels. A limit that catches typing errors before they fill the memory."""

MAX_BATCH = 65_536
"""Images. A limit that catches typing errors, as :data:`MAX_IMAGE_SIZE` does."""


def height_width(size: ImageSize) -> tuple[int, int]:
    """Return height and width.

    >>> height_width(224), height_width((224, 320))
    ((224, 224), (224, 320))
    """
    return (size, size) if isinstance(size, int) else size


def format_size(size: Any) -> str:
    """Return ``HEIGHTxWIDTH``; also of a list from JSON.

    >>> format_size(224), format_size((224, 320)), format_size([224, 320])
    ('224x224', '224x320', '224x320')
    """
    height, width = height_width(size)
    return f"{height}x{width}"


def parse_image_size(size: object) -> object:
    """Return the size in a text or a list; a square is one number.

    Other types are returned unchanged.

    Raises:
        ValueError: the text is not a size.

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


def validate_image_size(size: ImageSize) -> ImageSize:
    """Return a size that the network supports; a square as one number.

    Raises:
        ValueError: it is smaller than :data:`MIN_IMAGE_SIZE` or larger than
            :data:`MAX_IMAGE_SIZE`.
    """
    height, width = height_width(size)
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"should be greater than or equal to {MIN_IMAGE_SIZE}: the network supports any size "
            "from there on"
        )
    if max(height, width) > MAX_IMAGE_SIZE:
        raise ValueError(f"should be less than or equal to {MAX_IMAGE_SIZE}")
    return height if height == width else size


def _read_size(value: Any, handler: pydantic.ValidatorFunctionWrapHandler) -> ImageSize:
    """Return a size; an error shows the value as the user wrote it."""
    return validate_image_size(handler(parse_image_size(value)))


ImageSizeOption = Annotated[
    int | tuple[int, int], pydantic.WrapValidator(_read_size, json_schema_input_type=int | str)
]
"""A size in an option: ``224``, or ``224x320`` (height x width)."""


class _Range(Table):
    """``min``, ``opt`` and ``max``; can be written ``min:opt:max``."""

    KIND: ClassVar[str]
    TYPES: ClassVar[tuple[str, ...]] = ("object", "string")
    PATTERN: ClassVar[str]
    EXAMPLE: ClassVar[str]

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: pydantic.GetJsonSchemaHandler) -> Any:
        """Return the JSON Schema; a file may also have the text or, of a batch, one number."""
        reference = handler(core)
        if handler.mode == "validation":  # the program writes tables
            table = handler.resolve_ref_schema(reference)
            table |= {"type": [*cls.TYPES], "pattern": f"^({cls.PATTERN})$"}
        return reference

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, dict | cls):
            return value
        match = re.fullmatch(cls.PATTERN, str(value).strip(), re.ASCII)
        if match is None:
            raise ValueError(f"should be min:opt:max, such as {cls.EXAMPLE}")
        texts = [text or match[1] for text in match.groups()]
        sizes = [int(text) if text.isdigit() else text for text in texts]
        return dict(zip(("min", "opt", "max"), sizes, strict=True))

    def _ends(self) -> list[ImageSize]:
        return [getattr(self, name) for name in ("min", "opt", "max")]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield a range that does not rise."""
        sides = zip(*map(height_width, self._ends()), strict=True)
        if not all(low <= middle <= high for low, middle, high in sides):
            message = f"The {self.KIND} range {self} is not min <= opt <= max."
            yield message, f"Give three rising values, such as {self.EXAMPLE}."

    def __str__(self) -> str:
        """Return ``min:opt:max``."""
        return ":".join(str(e) if isinstance(e, int) else format_size(e) for e in self._ends())


class BatchRange(_Range):
    """The batch sizes an artifact must support: table ``[batch]``, or ``min:opt:max``.

    One number, ``8``, makes a static graph, which supports batches of 8 only.

    Attributes:
        min: Smallest batch.
        opt: Batch that engines are optimised for.
        max: Largest batch.
    """

    KIND = "batch"
    TYPES = ("object", "string", "integer")
    PATTERN = r"(\d+)(?::(\d+):(\d+))?"
    EXAMPLE = "1:8:32, or one size"

    min: int = option(1, ge=1, le=MAX_BATCH)
    opt: int = option(8, ge=1, le=MAX_BATCH)
    max: int = option(32, ge=1, le=MAX_BATCH)

    @property
    def fixed(self) -> int | None:
        """The batch size of a static graph; None if the batch is dynamic."""
        return self.max if self.min == self.max else None


class SizeRange(_Range):
    """The input sizes that a graph with dynamic height and width must support.

    Attributes:
        min: Smallest size.
        opt: Size that engines are optimised for.
        max: Largest size.
    """

    KIND = "size"
    PATTERN = r"([^:]+):([^:]+):([^:]+)"
    EXAMPLE = "192:224:512 or 192x256:224x320:512x640"

    min: ImageSizeOption = option(...)
    opt: ImageSizeOption = option(...)
    max: ImageSizeOption = option(...)

    def contains(self, size: ImageSize) -> bool:
        """Return whether a size is in the range."""
        ends = zip(*map(height_width, (self.min, size, self.max)), strict=True)
        return all(low <= side <= high for low, side, high in ends)

    def sample_sizes(self) -> tuple[ImageSize, ...]:
        """Return sizes to check: both ends, the optimum, and an odd size between if there is one.

        >>> SizeRange(64, 96, 128).sample_sizes()
        (64, 96, 97, 128)
        >>> SizeRange((32, 64), (32, 64), (33, 96)).sample_sizes()
        ((32, 64), (33, 81), (33, 96))
        """
        low, high = height_width(self.min), height_width(self.max)
        middle = [(a + b) // 2 | 1 for a, b in zip(low, high, strict=True)]
        height, width = (m if m <= b else a for a, m, b in zip(low, middle, high, strict=True))
        sizes = {*map(height_width, self._ends()), (height, width)}
        return tuple(h if h == w else (h, w) for h, w in sorted(sizes))
