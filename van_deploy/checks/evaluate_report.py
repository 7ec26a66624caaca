"""What an evaluation found, as reports and JSON tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from van_deploy.checks.accuracy import Accuracy, ArtefactLoss
from van_deploy.checks.gates import Allowed, Finding, Outcome, skipped
from van_deploy.checks.opened import NotRun
from van_deploy.metrics import Task
from van_deploy.runners.network import PYTORCH

__all__ = ["SCHEMA", "EvaluateReport"]

SCHEMA: Final = "van-deploy/evaluate/2"


@dataclass(frozen=True)
class EvaluateReport:
    """Accuracy of PyTorch and each artifact.

    Attributes:
        images: what they were evaluated on, and how the labels were found.
        dataset_sha256: digest of the evaluation set: names, contents and labels.
        task: how logits become labels.
        unreadable: file and reason of each image left out.
        accuracy: by name, PyTorch first.
        losses: by artifact, against PyTorch.
        skipped: artifacts that did not run, with the reason.
        runners: what ran each.
        class_names: for the report, or None.
        seconds: what it took.
        allowed: what the user lets pass.
        schema: of the document.
    """

    JSON_PROPERTIES: ClassVar = ("count",)

    images: str
    dataset_sha256: str
    task: Task
    unreadable: tuple[tuple[str, str], ...]
    accuracy: Mapping[str, Accuracy]
    losses: Mapping[str, ArtefactLoss]
    skipped: tuple[NotRun, ...]
    runners: Mapping[str, str]
    class_names: tuple[str, ...] | None
    seconds: float
    allowed: Allowed
    schema: Literal["van-deploy/evaluate/2"] = SCHEMA

    @property
    def count(self) -> int:
        """How many images were answered."""
        return self.accuracy[PYTORCH].images

    def having(self, outcome: Outcome) -> list[str]:
        """Return the artifacts with that outcome."""
        return [name for name, loss in self.losses.items() if loss.outcome is outcome]

    def named(self) -> list[tuple[str, Finding]]:
        """Return every finding and its artifact, those of skipped artifacts included."""
        found = [(name, f) for name, loss in self.losses.items() for f in loss.findings]
        return found + [(s.artefact, skipped("runs", s.reason, s.kind)) for s in self.skipped]

    @property
    def passed(self) -> bool:
        """Whether an artifact passed, and nothing else stands in the way."""
        return self.allowed.passes(found for _, found in self.named())

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed
