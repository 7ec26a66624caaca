"""What verifying a bundle finds: a verdict on each artefact, and all of them together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from van_deploy.checks.derived import Flip, Limits, Noise
from van_deploy.checks.parts import DriftRow
from van_deploy.checks.steps import StepRow
from van_deploy.metrics import Comparison

__all__ = ["SCHEMA", "ArtefactVerdict", "BatchVerdict", "VerifyReport"]

SCHEMA = "van-deploy/verify/1"
SHOWN_ROWS = 10


@dataclass(frozen=True)
class BatchVerdict:
    """One batch size.

    Attributes:
        batch: images in the batch.
        comparison: against the reference; None if it did not run.
        row_relative: against the same images alone, over ``max|logit|``.
        failures: a sentence for each limit that was passed.
    """

    batch: int
    comparison: Comparison | None
    row_relative: float | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class ArtefactVerdict:
    """The verdict on one artefact.

    Attributes:
        artefact: its name.
        precision: ``fp32``, ``fp16`` or ``int8``.
        runner: what ran it.
        outcome: ``passed``, ``failed`` or ``skipped``.
        reason: why it was skipped.
        limits: what was asked.
        comparison: over all images.
        flips: predictions that changed, the widest margin first.
        batches: one entry a batch size.
        modules: every module by the error it adds, worst first.
        steps: every rounded tensor of an INT8 graph, the most suspicious first.
        canary: largest change of a probability of the bundle's canary; None if it was
            not asked.
        failures: everything that failed, one sentence each.
    """

    artefact: str
    precision: str
    runner: str
    outcome: str
    reason: str = ""
    limits: Limits | None = None
    comparison: Comparison | None = None
    flips: tuple[Flip, ...] = ()
    batches: tuple[BatchVerdict, ...] = ()
    modules: tuple[DriftRow, ...] = ()
    steps: tuple[StepRow, ...] = ()
    canary: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def margin_db(self) -> float | None:
        """How far the SQNR is above its limit, in dB: what is left."""
        if self.comparison is None or self.limits is None:
            return None
        return self.comparison.sqnr_db - self.limits.sqnr_db

    @property
    def module_margin_db(self) -> float | None:
        """How far the worst module is above its limit, in dB."""
        if not self.modules or self.limits is None:
            return None
        return float(self.modules[0].added_db or 0.0) - self.limits.module_db


@dataclass(frozen=True)
class VerifyReport:
    """The verdict on every artefact of a bundle.

    Attributes:
        images: what they were compared on.
        names: what each image is called.
        noise: PyTorch in float32 against itself in float64, on these images.
        artefacts: one verdict each.
    """

    images: str
    names: tuple[str, ...]
    noise: Noise
    artefacts: tuple[ArtefactVerdict, ...]

    @property
    def failed(self) -> list[ArtefactVerdict]:
        """The artefacts that did not pass."""
        return [verdict for verdict in self.artefacts if verdict.outcome == "failed"]

    @property
    def passed(self) -> bool:
        """Whether something ran and nothing failed."""
        ran = [verdict for verdict in self.artefacts if verdict.outcome != "skipped"]
        return bool(ran) and not self.failed

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the report, ready for JSON."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "reference": "PyTorch, original network, float64",
            "images": self.images,
            "count": len(self.names),
            "noise": self.noise.as_dict(),
            "artefacts": {v.artefact: self._entry(v) for v in self.artefacts},
        }

    def _entry(self, verdict: ArtefactVerdict) -> dict[str, Any]:
        shown = replace(
            verdict, modules=verdict.modules[:SHOWN_ROWS], steps=verdict.steps[:SHOWN_ROWS]
        )
        entry = asdict(shown)
        entry["margin_db"] = verdict.margin_db
        entry["module_margin_db"] = verdict.module_margin_db
        entry["flips"] = [
            {**asdict(flip), "image": self.names[flip.image]} for flip in verdict.flips
        ]
        return entry
