"""What an evaluation found, as reports and JSON tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from van_deploy.checks.accuracy import Accuracy, PairedDrift
from van_deploy.checks.opened import NotRun
from van_deploy.runners.network import PYTORCH

__all__ = ["SCHEMA", "EvaluateReport"]

SCHEMA = "van-deploy/evaluate/1"


@dataclass(frozen=True)
class EvaluateReport:
    """Accuracy of PyTorch and each artefact.

    Attributes:
        images: what they were evaluated on, and how the labels were found.
        unreadable: file and reason of each image left out.
        accuracies: by name, PyTorch first.
        drifts: by artefact, against PyTorch.
        skipped: artefacts that did not run, with the reason.
        runners: what ran each.
        class_names: for the report, or None.
        seconds: what it took, without what was resumed.
        resumed: images whose answers were there already.
    """

    images: str
    unreadable: tuple[tuple[str, str], ...]
    accuracies: Mapping[str, Accuracy]
    drifts: Mapping[str, PairedDrift]
    skipped: tuple[NotRun, ...]
    runners: Mapping[str, str]
    class_names: tuple[str, ...] | None
    seconds: float
    resumed: int

    @property
    def failed(self) -> list[str]:
        """The artefacts that lost too much."""
        return [name for name, drift in self.drifts.items() if not drift.passed]

    @property
    def passed(self) -> bool:
        """Whether an artefact was evaluated and none lost too much."""
        return bool(self.drifts) and not self.failed

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the report, ready for JSON."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "images": self.images,
            "count": self.accuracies[PYTORCH].images,
            "unreadable": [{"file": file, "reason": reason} for file, reason in self.unreadable],
            "accuracy": {
                name: {"runner": self.runners[name], **asdict(accuracy)}
                for name, accuracy in self.accuracies.items()
            },
            "drift": {name: drift.as_dict() for name, drift in self.drifts.items()},
            "skipped": [
                {"artefact": entry.artefact, "runner": entry.runner, "reason": entry.reason}
                for entry in self.skipped
            ],
            "class_names": list(self.class_names) if self.class_names else None,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
        }
