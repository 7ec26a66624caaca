"""Which layers to leave in higher precision so that a budget of accuracy holds.

Every quantised layer is first rounded alone, to see how much it disturbs the
logits. Then layers are returned to higher precision, the worst first: none, one,
two, four, ... until the budget holds, and by halving the gap down to the fewest. Worst
is what disturbs most *for the work it does in INT8*: what is to be kept small is the
work that is given back, not the number of layers.

::

    ranking = rank_layers(plan, images)
    report = search_kept(plan, ranking, evaluate, max_drop=0.5)
    report.plan, report.kept, report.passed

``evaluate`` runs a plan on images and returns how much its logits lost
(:func:`~van_deploy.precision.drop.top1_drop`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from van_deploy.errors import UsageError
from van_deploy.precision.drop import Drop
from van_deploy.precision.plan import QuantizationPlan
from van_deploy.precision.ranking import LayerDisturbance

__all__ = ["SearchReport", "SearchTrial", "search_kept"]


@dataclass(frozen=True)
class SearchTrial:
    """One plan that was evaluated.

    Attributes:
        kept: how many of the worst layers were in higher precision.
        drop: what was measured.
        share: of the network's multiply-adds still in INT8, 0..1.
        holds: whether the budget holds.
    """

    kept: int
    drop: Drop
    share: float
    holds: bool


@dataclass(frozen=True)
class SearchReport:
    """What the search decided, and why.

    Attributes:
        plan: without the layers that are kept in higher precision.
        max_drop: the budget, in percentage points.
        ranking: every layer, the worst first.
        trials: every plan evaluated, in order.
        kept: the layers returned to higher precision, the worst first.
        share: of the network's multiply-adds that is left in INT8, 0..1.
        exhausted: whether the limit of evaluations ended the search early.
    """

    plan: QuantizationPlan
    max_drop: float
    ranking: tuple[LayerDisturbance, ...]
    trials: tuple[SearchTrial, ...]
    kept: tuple[str, ...]
    share: float
    exhausted: bool

    @property
    def passed(self) -> bool:
        """Whether the plan was seen to hold the budget."""
        return any(trial.holds and trial.kept == len(self.kept) for trial in self.trials)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def reasons(self) -> Mapping[str, str]:
        """Return why each kept layer was kept."""
        return {
            layer.name: f"alone it leaves {layer.sqnr_db:.1f} dB "
            f"(KL {layer.kl:.2g}) for {100 * layer.share:.1f} % of the work, "
            f"number {place} of {len(self.ranking)}"
            for place, layer in enumerate(self.ranking[: len(self.kept)], 1)
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "max_drop": self.max_drop,
            "passed": self.passed,
            "exhausted": self.exhausted,
            "int8_share": self.share,
            "kept": dict(self.reasons()),
            "ranking": [_finite(asdict(layer)) for layer in self.ranking],
            "trials": [asdict(trial) for trial in self.trials],
        }


def search_kept(
    plan: QuantizationPlan,
    ranking: Sequence[LayerDisturbance],
    evaluate: Callable[[QuantizationPlan], Drop],
    max_drop: float,
    *,
    limit: int = 16,
    progress: Callable[[SearchTrial], None] | None = None,
) -> SearchReport:
    """Return the plan with the fewest of the worst layers in higher precision that holds.

    Args:
        plan: everything quantised.
        ranking: its layers, the worst first.
        evaluate: how much accuracy a plan costs.
        max_drop: budget in percentage points; a drop's standard error counts against it, and
            so do answers that changed: see
            :meth:`~van_deploy.precision.drop.Drop.holds`.
        limit: most evaluations.
        progress: told of each evaluation.

    Raises:
        UsageError: the budget or the limit makes no sense.
    """
    if not 0.0 <= max_drop <= 100.0 or limit < 1:
        raise UsageError(
            f"A search for at most {max_drop:g} points with {limit} evaluations makes no sense.",
            "Give --max-drop between 0 and 100, and at least one evaluation.",
        )
    search = _Search(plan, ranking, evaluate, max_drop, limit, progress)
    kept = search.fewest()
    chosen = search.plan_with(kept)
    return SearchReport(
        plan=replace(chosen, facts={**chosen.facts, "max_drop": max_drop}),
        max_drop=max_drop,
        ranking=tuple(ranking),
        trials=tuple(search.trials.values()),
        kept=tuple(layer.name for layer in ranking[:kept]),
        share=search.share(kept),
        exhausted=search.exhausted,
    )


class _Search:
    """How many of the worst layers must be kept: galloping up, then halving down."""

    def __init__(
        self,
        plan: QuantizationPlan,
        ranking: Sequence[LayerDisturbance],
        evaluate: Callable[[QuantizationPlan], Drop],
        max_drop: float,
        limit: int,
        progress: Callable[[SearchTrial], None] | None,
    ) -> None:
        self.plan, self.ranking, self.evaluate = plan, ranking, evaluate
        self.max_drop, self.limit, self.progress = max_drop, limit, progress
        self.trials: dict[int, SearchTrial] = {}
        self.exhausted = False

    def fewest(self) -> int:
        """Return the fewest layers with which the budget was seen to hold, else the best seen."""
        every = len(self.ranking)
        failing, holding = -1, 0
        while not self._holds(holding):
            if self.exhausted or holding == every:
                return self._best_seen()
            failing, holding = holding, min(max(2 * holding, 1), every)
        while holding - failing > 1:
            middle = (failing + holding) // 2
            if self._holds(middle):
                holding = middle
            else:
                failing = middle
            if self.exhausted:
                break
        return holding

    def _holds(self, kept: int) -> bool:
        """Return whether the budget holds with so many kept; False once the limit is reached."""
        if len(self.trials) >= self.limit:
            self.exhausted = True
            return False
        drop = self.evaluate(self.plan_with(kept))
        trial = SearchTrial(kept, drop, self.share(kept), drop.holds(self.max_drop))
        self.trials[kept] = trial
        if self.progress is not None:
            self.progress(trial)
        return trial.holds

    def _best_seen(self) -> int:
        return min(self.trials.values(), key=lambda trial: (trial.drop.upper, trial.kept)).kept

    def plan_with(self, kept: int) -> QuantizationPlan:
        """Return the plan without the ``kept`` worst layers."""
        names = {layer.name for layer in self.ranking[:kept]}
        convs = {name: conv for name, conv in self.plan.convs.items() if name not in names}
        return replace(self.plan, convs=convs)

    def share(self, kept: int) -> float:
        """Return the share of multiply-adds left in INT8."""
        return sum(layer.share for layer in self.ranking[kept:])


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` as JSON can hold them: a number that is infinite becomes None."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
