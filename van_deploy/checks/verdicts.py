"""What verifying a bundle finds: the findings on each artifact, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from van_deploy.checks.gates import Allowed, Finding, Limit, Outcome, outcome_of
from van_deploy.checks.judging import BatchRow
from van_deploy.checks.layers import DriftRow
from van_deploy.checks.scales import ScaleRow
from van_deploy.metrics import Comparison, Flip

__all__ = ["ArtefactVerdict", "VerifyReport"]

SCHEMA: Final = "van-deploy/verify/2"
SHOWN_ROWS = 10


@dataclass(frozen=True)
class ArtefactVerdict:
    """What was found of one artifact.

    Attributes:
        artefact: its name.
        precision: of the artifact.
        numeric: the numeric class it was judged in.
        runner: what ran it, or would have.
        findings: one a rule.
        comparison: of its logits with the reference, one image at a time.
        flips: decisions that changed, the widest margin first.
        batches: one row a batch size.
        modules: every module by the error it adds, worst first.
        scales: every scale of an INT8 graph.
    """

    JSON_PROPERTIES: ClassVar = ("outcome", "reason", "limit", "margin_db", "worst_modules")

    artefact: str
    precision: str
    numeric: str
    runner: str
    findings: tuple[Finding, ...]
    comparison: Comparison | None = None
    flips: tuple[Flip, ...] = ()
    batches: tuple[BatchRow, ...] = ()
    modules: tuple[DriftRow, ...] = field(default=(), metadata={"json": False})
    scales: tuple[ScaleRow, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """What all findings say together."""
        return outcome_of(self.findings)

    @property
    def reason(self) -> str:
        """Why it was skipped, or ""."""
        reasons = [f.message for f in self.findings if f.outcome is Outcome.SKIPPED]
        return reasons[0] if self.outcome is Outcome.SKIPPED and reasons else ""

    @property
    def worst_modules(self) -> tuple[DriftRow, ...]:
        """The first of the modules."""
        return self.modules[:SHOWN_ROWS]

    @property
    def failures(self) -> list[str]:
        """The messages of what does not hold."""
        return [f.message for f in self.findings if f.outcome is Outcome.FAIL]

    @property
    def limit(self) -> Limit | None:
        """The limit on the SQNR that decides: the highest of the floor's and the record's."""
        found = [f.limit for f in self.findings if f.rule.startswith("SQNR") and f.limit]
        return max(found, key=lambda limit: limit.value, default=None)

    @property
    def margin_db(self) -> float | None:
        """How far the SQNR is above that limit, in dB."""
        if self.comparison is None or self.limit is None:
            return None
        return self.comparison.sqnr_db - self.limit.value


@dataclass(frozen=True)
class VerifyReport:
    """What was found of every artifact of a bundle.

    Attributes:
        against: what they were compared with.
        images: what they were compared on.
        names: what each image is called.
        noise_db: SQNR of PyTorch in float32 against its float64, on these images.
        modules: what modules were compared with, or "".
        findings: on what belongs to no artifact: how images are read here.
        artefacts: one verdict each, by name.
        allowed: what the user lets pass.
        schema: of the document.
    """

    against: str
    images: str
    names: tuple[str, ...]
    noise_db: float
    modules: str
    findings: tuple[Finding, ...]
    artefacts: Mapping[str, ArtefactVerdict]
    allowed: Allowed
    schema: Literal["van-deploy/verify/2"] = SCHEMA

    def having(self, outcome: Outcome) -> list[ArtefactVerdict]:
        """Return the verdicts with that outcome."""
        return [found for found in self.artefacts.values() if found.outcome is outcome]

    def named(self) -> list[tuple[str, Finding]]:
        """Return every finding and what it is about: the images, or an artifact."""
        about = [("images", finding) for finding in self.findings]
        return about + [(v.artefact, f) for v in self.artefacts.values() for f in v.findings]

    @property
    def passed(self) -> bool:
        """Whether an artifact passed, and nothing else stands in the way."""
        return bool(self.having(Outcome.PASS)) and self.allowed.passes(
            found for _, found in self.named()
        )

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed
