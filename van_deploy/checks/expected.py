"""What the original network says of some pictures, in float64 and in float32."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from van_deploy.checks.gates import Noise, measure_noise
from van_deploy.data import CheckImages
from van_deploy.metrics import Array
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.runners.base import run_in_batches
from van_deploy.runners.pytorch import TorchRunner

__all__ = ["ReferenceLogits", "reference_logits"]

REFERENCE_BATCH = 8


@dataclass(frozen=True)
class ReferenceLogits:
    """What the original network says, and how sure float32 is of it.

    Attributes:
        float64: ``(N, K)``: the reference.
        float32: ``(N, K)``: the same network in float32.
        noise: between the two.
    """

    float64: Array
    float32: Array
    noise: Noise


def reference_logits(loaded: LoadedVan, pictures: CheckImages) -> ReferenceLogits:
    """Return the original network's logits of the pictures in float64 and float32."""
    images = pictures.inputs
    with TorchRunner(loaded.model) as single:
        float32 = run_in_batches(single, images, REFERENCE_BATCH)
    import torch

    double = copy.deepcopy(loaded.model).double()
    with torch.inference_mode():
        pieces = [
            double(torch.from_numpy(images[start : start + REFERENCE_BATCH]).double()).numpy()
            for start in range(0, len(images), REFERENCE_BATCH)
        ]
    float64 = np.concatenate(pieces)
    return ReferenceLogits(float64, float32, measure_noise(float64, float32))
