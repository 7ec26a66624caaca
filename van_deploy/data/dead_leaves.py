"""Synthetic images with the statistics of natural ones.

A dead-leaves image is what one sees looking down on fallen leaves: textured
discs that hide each other, with radii following a power law. With an exponent
of 3 it is scale-invariant and its edges, contrasts and power spectrum resemble
those of photographs (A. B. Lee, D. Mumford and J. Huang, "Occlusion models for
natural images: a statistical study of a scale-invariant dead leaves model",
International Journal of Computer Vision 41, 2001).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["dead_leaves_image"]

SMALLEST_RADIUS, LARGEST_SHARE = 2.0, 0.35  # pixels; share of the side


def dead_leaves_image(
    seed: int, size: int = 320, leaves: int = 4000, channels: int = 3
) -> NDArray[np.uint8]:
    """Return a synthetic image ``(size, size, channels)`` uint8, always the same one."""
    rng = np.random.default_rng(seed)
    canvas = np.tile(rng.uniform(0, 255, channels), (size, size, 1))
    radii = _power_law_radii(rng, leaves, SMALLEST_RADIUS, LARGEST_SHARE * size)
    for radius in radii:
        _drop_leaf_(canvas, radius, rng)
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


def _power_law_radii(
    rng: np.random.Generator, count: int, low: float, high: float
) -> NDArray[np.float64]:
    """Return radii with density proportional to ``r**-3`` between ``low`` and ``high``."""
    share = rng.uniform(size=count)
    radii: NDArray[np.float64] = (low**-2 - share * (low**-2 - high**-2)) ** -0.5
    return radii


def _drop_leaf_(canvas: NDArray[np.float64], radius: float, rng: np.random.Generator) -> None:
    """Paint one textured disc over ``canvas`` ``(size, size, C)`` in place."""
    size = len(canvas)
    y, x = rng.uniform(-radius, size + radius, 2)
    top, bottom = np.clip([y - radius, y + radius + 1], 0, size).astype(int)
    left, right = np.clip([x - radius, x + radius + 1], 0, size).astype(int)
    rows, columns = np.ogrid[top:bottom, left:right]
    inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    colour = rng.uniform(0, 255, canvas.shape[2])
    shade = _texture(rows - y, columns - x, radius, rng)
    canvas[top:bottom, left:right][inside] = (colour + shade[..., None])[inside]


def _texture(
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    radius: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Return a disc's shading: a slope of light, ripples, and a little grain."""
    light, ripple = rng.uniform(0, 2 * np.pi, 2)
    slope = (rows * np.sin(light) + columns * np.cos(light)) / radius
    wave = 2 * np.pi / rng.uniform(4, 4 + radius)  # radians a pixel
    ripples = np.sin(wave * (rows * np.sin(ripple) + columns * np.cos(ripple)))
    grain = rng.normal(0, 4, np.broadcast_shapes(rows.shape, columns.shape))
    shade: NDArray[np.float64] = rng.uniform(0, 40) * slope + rng.uniform(0, 25) * ripples + grain
    return shade
