"""What exporting, runs and a bundle's methods return, where no stage has a result of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from van_deploy.bundle import Bundle, Manifest
    from van_deploy.checks.evaluate import EvaluateReport
    from van_deploy.checks.verify import VerifyReport
    from van_deploy.engine.bundled import Outcome
    from van_deploy.errors import VanDeployError
    from van_deploy.precision.pipeline import QuantizeResult
    from van_deploy.serve.embedded import Embedded
    from van_deploy.serve.predict import Prediction


class _Judged:
    """A result that is true if it passed."""

    @property
    def passed(self) -> bool:
        """Whether it passed."""
        raise NotImplementedError

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        bundle: the bundle as written.
        reused: whether everything was there already, from the same ingredients.
        reason: why it was reused or made anew.
        notes: what the user should know about the weights.
        seconds: time of each stage that ran.
        embedded: the graphs with preprocessing inside that were asked for.
    """

    bundle: Bundle
    reused: bool
    reason: str
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    embedded: tuple[Embedded, ...] = ()


@dataclass(frozen=True)
class ExportReport(_Judged):
    """What an export made, in every precision that was asked for.

    Attributes:
        export: of the FP32 graph.
        precisions: the others.
        manifest: of the bundle.
    """

    export: ExportResult
    precisions: tuple[QuantizeResult, ...]
    manifest: Manifest

    @property
    def passed(self) -> bool:
        """Whether every precision holds its gate; an FP32 graph that does not is never written."""
        return all(self.precisions)


@dataclass(frozen=True)
class Made:
    """One artefact that was made after exporting.

    Attributes:
        artefact: its name.
        reason: why it was made anew or reused.
        passed: whether it holds the gate of its own stage.
    """

    artefact: str
    reason: str
    passed: bool


@dataclass(frozen=True)
class RunResult(_Judged):
    """What a run made and what its gates said.

    Attributes:
        bundle: as written.
        export: what exporting did.
        made: the artefacts made after it: precisions, then engines.
        verify: the verdict on each artefact.
        evaluate: accuracy, if there were labelled images.
    """

    bundle: Bundle
    export: ExportResult
    made: tuple[Made, ...]
    verify: VerifyReport
    evaluate: EvaluateReport | None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        accurate = self.evaluate is None or self.evaluate.passed
        return self.verify.passed and accurate and all(made.passed for made in self.made)


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
class BuildReport(_Judged):
    """The engines that were asked for.

    Attributes:
        outcomes: one an engine, in order.
        tuned: the candidates that were timed, where that was asked.
        remarks: a sentence for each precision that was made on the way.
    """

    outcomes: tuple[Outcome, ...]
    tuned: tuple[Tuned, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def errors(self) -> list[VanDeployError]:
        """Why engines failed, in order."""
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]

    @property
    def passed(self) -> bool:
        """Whether there is one and none failed."""
        return bool(self.outcomes) and not self.errors


@dataclass(frozen=True)
class Predictions(_Judged):
    """The predictions for some images.

    Attributes:
        bundle: whose network answered.
        artefact: which of its artefacts.
        images_per_s: answered, over the whole call.
        predictions: one an image, in order.
    """

    bundle: Path
    artefact: str
    images_per_s: float
    predictions: tuple[Prediction, ...]

    @property
    def unreadable(self) -> int:
        """How many images could not be read."""
        return sum(answer.error is not None for answer in self.predictions)

    @property
    def passed(self) -> bool:
        """Whether every image could be read."""
        return not self.unreadable

    def __len__(self) -> int:
        """Return how many predictions there are."""
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        """Iterate over the predictions."""
        return iter(self.predictions)


@dataclass(frozen=True)
class WrittenReport(_Judged):
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
