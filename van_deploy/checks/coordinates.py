"""One tensor in two sets of numbers: what equalisation did to it, found again from data.

Equalisation (:mod:`van_deploy.precision.equalize`) re-scales and shifts the
channels of a graph's tensors and lets their neighbours take it back, so an
equalised graph's ``y`` stands for the network's ``x`` with ``y = a x + b`` per
channel. Which ``a`` and ``b`` is found by least squares over the images, and
the way back separately, so that a channel that was rounded away comes back as
its mean and not as noise without bound.

What this hides: a fault that is itself a factor or a shift of one module's
channels looks like equalisation there, and is named at the next module.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Coordinates"]

Array = npt.NDArray[np.float64]


@dataclass
class Coordinates:
    """The sums from which the two lines of each channel are fitted, as images pass.

    Attributes:
        sums: per channel: count, ``x``, ``y``, ``x x``, ``y y``, ``x y``.
    """

    sums: Array | None = field(default=None)

    def add(self, reference: Array, found: Array) -> None:
        """Take in one batch, both ``(N, C, ...)``; another shape or a NaN is left out."""
        if reference.shape != found.shape or not np.isfinite(found).all():
            return
        x, y = (np.moveaxis(v, 1, 0).reshape(v.shape[1], -1) for v in (reference, found))
        count = np.full(len(x), float(x.shape[1]))
        products = ((x * x).sum(1), (y * y).sum(1), (x * y).sum(1))
        sums = np.stack([count, x.sum(1), y.sum(1), *products])
        self.sums = sums if self.sums is None else self.sums + sums

    def forward(self, reference: Array) -> Array:
        """Return the network's tensor in the graph's numbers."""
        return self._mapped(reference, *self._line(source=1))

    def back(self, found: Array) -> Array:
        """Return the graph's tensor in the network's numbers."""
        return self._mapped(found, *self._line(source=2))

    def _line(self, source: int) -> tuple[Array, Array]:
        """Return slope and offset per channel of the other tensor over ``source`` (1: x, 2: y)."""
        if self.sums is None:
            return np.ones(1), np.zeros(1)
        target = 3 - source
        count = self.sums[0]
        means = self.sums / count
        variance = means[2 + source] - means[source] ** 2
        covariance = means[5] - means[1] * means[2]
        # Below the roundoff of the sums there is no slope to be seen.
        visible = variance > 1e-12 * np.maximum(means[2 + source], np.finfo(np.float64).tiny)
        slope = np.where(visible, covariance / np.where(visible, variance, 1.0), 0.0)
        return slope, means[target] - slope * means[source]

    @staticmethod
    def _mapped(values: Array, slope: Array, offset: Array) -> Array:
        shape = (1, -1) + (1,) * (values.ndim - 2)
        return values * slope.reshape(shape) + offset.reshape(shape)
