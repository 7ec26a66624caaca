"""What can be asked of :mod:`van_deploy.precision.refine`."""

from __future__ import annotations

from dataclasses import dataclass

from van_deploy.errors import UsageError

__all__ = ["RefineSettings"]


@dataclass(frozen=True)
class RefineSettings:
    """What to refine, and how long.

    Attributes:
        bias_correction: see the table of :mod:`van_deploy.precision.refine`.
        rounding: likewise.
        scales: likewise.
        biases: likewise.
        turns: likewise.
        steps: of gradient descent, each on one batch.
        batch: images a step; fewer where the images are large.
        scale_rate: Adam's rate for the logarithms of steps.
        bias_rate: Adam's rate for biases, in each output channel's standard deviation.
        turn_rate: Adam's rate for weights, in integer steps.
        held_out: share (0..1) of the images that only judge.
        seed: of the shuffling and of the choice of the held-out part.
    """

    bias_correction: bool = True
    rounding: bool = True
    scales: bool = False
    biases: bool = False
    turns: bool = False
    steps: int = 64
    batch: int = 32
    scale_rate: float = 0.005
    bias_rate: float = 0.001
    turn_rate: float = 0.005
    held_out: float = 0.25
    seed: int = 0

    @property
    def learns(self) -> bool:
        """Whether anything is learnt by gradient descent."""
        return self.scales or self.biases or self.turns

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        if self.steps < 1 or self.batch < 1 or not 0.0 < self.held_out < 1.0:
            raise UsageError(
                f"Refining with {self.steps} steps of {self.batch} images and a held-out share "
                f"of {self.held_out} makes no sense.",
                "Give at least one step and one image, and a share between 0 and 1.",
            )
