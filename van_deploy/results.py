"""What the methods of a bundle return, where no stage has a result of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from van_deploy.engine.fleet import Outcome
    from van_deploy.errors import VanDeployError
    from van_deploy.serve.predict import Prediction


@dataclass(frozen=True)
class Tuned:
    """What became of one candidate.

    Attributes:
        candidate: in words.
        engine: its name; "" where it was not built.
        batch: images a call, when it was timed.
        latency_ms: of a batch that stays on the device, the least mean of several rounds;
            None where it was not timed.
        images_per_s: at that batch.
        sqnr_db: of its logits on the golden samples.
        passed: whether it holds its gate.
        error: why it was not built or not timed, or does not hold; "" otherwise.
        kept: whether it is the one that is now in the bundle.
    """

    candidate: str
    engine: str = ""
    batch: int = 0
    latency_ms: float | None = None
    images_per_s: float | None = None
    sqnr_db: float | None = None
    passed: bool = False
    error: str = ""
    kept: bool = False


@dataclass(frozen=True)
class BuildReport:
    """The engines that were asked for.

    Attributes:
        outcomes: one an engine, in order.
        tuned: the candidates that were timed, where that was asked.
    """

    outcomes: tuple[Outcome, ...]
    tuned: tuple[Tuned, ...] = ()

    @property
    def errors(self) -> list[VanDeployError]:
        """Why engines failed, in order."""
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]

    @property
    def passed(self) -> bool:
        """Whether there is one and none failed."""
        return bool(self.outcomes) and not self.errors

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


@dataclass(frozen=True)
class Predictions:
    """The predictions for some images.

    Attributes:
        bundle: whose network answered.
        artefact: which of its artefacts.
        predictions: one an image, in order.
    """

    bundle: Path
    artefact: str
    predictions: tuple[Prediction, ...]

    @property
    def unreadable(self) -> int:
        """How many images could not be read."""
        return sum(answer.error is not None for answer in self.predictions)

    @property
    def passed(self) -> bool:
        """Whether every image could be read."""
        return not self.unreadable

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def __len__(self) -> int:
        """Return how many predictions there are."""
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        """Iterate over the predictions."""
        return iter(self.predictions)


@dataclass(frozen=True)
class WrittenReport:
    """A bundle's report, as files.

    Attributes:
        verdict: ``PASS``, ``FAIL``, ``INCONCLUSIVE`` or ``SKIPPED``, for all checks together.
        checks: how many of each.
        files: the HTML, then the Markdown.
    """

    JSON_PROPERTIES: ClassVar = ("sizes",)

    verdict: str
    checks: str
    files: tuple[Path, ...]

    @property
    def passed(self) -> bool:
        """Whether the verdict is ``PASS``."""
        return self.verdict == "PASS"

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path."""
        return {str(path): path.stat().st_size for path in self.files}


@dataclass(frozen=True)
class Listening:
    """A server that answers.

    Attributes:
        url: where.
        models: what it serves.
    """

    url: str
    models: tuple[str, ...]
