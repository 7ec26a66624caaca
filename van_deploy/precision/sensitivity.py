"""Which layers to leave in higher precision so that a budget of accuracy holds.

Every quantised layer is first rounded alone, to see how much it disturbs the logits. Then
layers are returned to higher precision, the worst first: none, one, two, four, ... until the
budget holds, and by halving the gap down to the fewest. Worst is what disturbs most *for the
work it does in INT8*: what is to be kept small is the work that is given back, not the
number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.errors import ImageError
from van_deploy.metrics import sqnr_db
from van_deploy.precision.plan import QuantizationPlan
from van_deploy.precision.simulate import logits

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one layer alone does to the logits.

    Attributes:
        name: of the layer.
        sqnr_db: signal to noise of the logits.
        share: of the network's multiply-adds, 0..1.
    """

    name: str
    sqnr_db: float
    share: float

    @property
    def worth_db(self) -> float:
        """The work it does in INT8 over the noise it brings, in decibels; the least goes first."""
        return self.sqnr_db + 10 * math.log10(max(self.share, 1e-12))


def rank_layers(
    plan: QuantizationPlan, images: Images, work: Mapping[str, int]
) -> tuple[LayerSensitivity, ...]:
    """Return the layers of ``plan``, first the one that disturbs most for the work it does.

    Args:
        plan: not corrected: without rounding its network must be the original.
        images: ``(N, C, S, S)``; 32 are enough to put layers in order.
        work: multiply-adds of each layer, and of what is not quantised.
    """
    total, expected = sum(work.values()), logits(plan.without(plan.convolutions), images)
    found = [
        LayerSensitivity(name, sqnr_db(expected, logits(plan, images, name)), work[name] / total)
        for name in plan.convolutions
    ]
    return tuple(sorted(found, key=lambda layer: layer.worth_db))


def labels_lost(
    expected: npt.NDArray[np.float32],
    found: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64] | None,
) -> int:
    """Return how many images lose their right label; without labels, how many change it.

    Improvements do not offset regressions.

    >>> labels_lost(np.eye(4), np.eye(4)[[0, 1, 2, 2]], None)
    1
    """
    before, after = expected.argmax(axis=1), found.argmax(axis=1)
    changed = before != after
    return int((changed if labels is None else changed & (before == labels)).sum())


def require_resolution(max_drop: float, images: int) -> None:
    """Do nothing if so many images can tell whether ``max_drop`` points are lost.

    Raises:
        ImageError: a single label is more than the budget.
    """
    if 0 < max_drop < 100 / images:
        raise ImageError(
            f"A budget of {max_drop:g} points cannot be searched on {images} images: "
            f"one label is {100 / images:.2g} points.",
            f"Give {math.ceil(100 / max_drop)} calibration images or more, or a larger --max-drop.",
        )


def search_kept(
    plan: QuantizationPlan,
    ranking: Sequence[LayerSensitivity],
    lost: Callable[[QuantizationPlan], int],
    max_drop: float,
    images: int,
    *,
    of: str = "top-1",
    limit: int = 16,
) -> dict[str, Any]:
    """Return which of the worst layers must be kept in higher precision, the fewest that hold.

    What the manifest keeps of it: the budget ``max_drop``, the ``images`` it was searched on, and
    what is lost ``of`` them; the ``ranking``; every plan that was tried (``trials``: how many
    layers were ``kept``, images ``lost``, whether the budget ``holds``); the layers to be ``kept``,
    the worst first, each with the reason; the ``share`` of the multiply-adds that is left in INT8,
    0..1; ``passed``, whether the budget was seen to hold.

    Args:
        plan: everything quantised.
        ranking: its layers, the worst first.
        lost: how many labels a plan loses.
        max_drop: budget, in percentage points of ``images``.
        images: how many ``lost`` looks at.
        of: what is lost, ``top-1`` or ``agreement``.
        limit: most evaluations.
    """
    trials: dict[int, dict[str, Any]] = {}

    def holds(kept: int) -> bool:
        if kept not in trials:
            count = lost(plan.without([layer.name for layer in ranking[:kept]]))
            within = 100 * count / images <= max_drop
            trials[kept] = {"kept": kept, "lost": count, "holds": within}
        return bool(trials[kept]["holds"])

    failing, holding = -1, 0
    while len(trials) < limit and not holds(holding) and holding < len(ranking):
        failing, holding = holding, min(max(2 * holding, 1), len(ranking))
    while len(trials) < limit and holding in trials and holding - failing > 1:
        middle = (failing + holding) // 2
        failing, holding = (failing, middle) if holds(middle) else (middle, holding)
    kept = holding
    if not (kept in trials and trials[kept]["holds"]):
        kept = min(trials.values(), key=lambda trial: (trial["lost"], trial["kept"]))["kept"]
    reasons = {
        layer.name: f"alone it leaves {layer.sqnr_db:.1f} dB for {100 * layer.share:.1f} % "
        f"of the work, number {place} of {len(ranking)}"
        for place, layer in enumerate(ranking[:kept], 1)
    }
    return {
        "max_drop": max_drop,
        "images": images,
        "of": of,
        "ranking": [asdict(layer) for layer in ranking],
        "trials": list(trials.values()),
        "kept": reasons,
        "share": sum(layer.share for layer in ranking[kept:]),
        "passed": trials[kept]["holds"],
    }
