"""A benchmark's document: what was measured, and everything needed to measure it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.machine import During, Machine
from van_deploy.bench.profile import ProfileLine
from van_deploy.bench.roofline import Reached
from van_deploy.bench.timing import Loading, Row
from van_deploy.config import BatchRange, BenchSettings
from van_deploy.config.sizes import ImageSize
from van_deploy.errors import InputError
from van_deploy.model.variants import WeightsSource
from van_deploy.schema import Versioned, read_versioned

SCHEMA: Final = "van-deploy/bench/5"


@dataclass(frozen=True)
class Subject:
    """The bundle that was timed.

    Attributes:
        bundle: its folder.
        parameters: of its network.
        weights: where they came from.
        batch_range: what the bundle is made for.
    """

    bundle: str
    parameters: int
    weights: WeightsSource
    batch_range: BatchRange


@dataclass(frozen=True)
class Best:
    """A contender's batch of most images a second under a latency limit.

    Attributes:
        batch: images a call.
        p99_ms: its 99th percentile.
        images_per_s: its throughput.
    """

    batch: int
    p99_ms: float
    images_per_s: float


@dataclass(frozen=True)
class BestUnder:
    """The best batches under a latency limit.

    Attributes:
        limit_ms: for the 99th percentile.
        best: by contender; None where no batch keeps the limit.
    """

    limit_ms: float
    best: Mapping[str, Best | None]


@dataclass(frozen=True)
class Seconds:
    """Where the time went.

    Attributes:
        wall: from the first to the last.
        timed: in timed calls.
    """

    wall: float
    timed: float


@dataclass(frozen=True)
class Change:
    """One row in two benchmarks.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: of the input.
        before_ms: median latency in the old file.
        after_ms: median latency in the new one.
        speedup: ``before_ms / after_ms``.
        ratio_before: times faster than the reference, old; None without one.
        ratio_after: the same, new.
        ratio_change_percent: from the one to the other: what two runs should agree on.
        uncertainty_percent: how much of that the two 95 % intervals leave open.
        moved: whether the ratio changed by more than that and by more than 5 %.
        same_file: whether both timed the same bytes.
    """

    contender: str
    batch: int
    image_size: ImageSize
    before_ms: float
    after_ms: float
    speedup: float
    ratio_before: float | None
    ratio_after: float | None
    ratio_change_percent: float | None
    uncertainty_percent: float | None
    moved: bool
    same_file: bool


@dataclass(frozen=True)
class Agreement:
    """In how many ratios two benchmarks agree.

    Attributes:
        within_percent: a change of no more is agreement.
        ratios: that both have.
        within: that agree.
        open: that changed by more, but by no more than their own uncertainty.
        moved: names of those that changed by more than both.
        worst: name of the one that changed most.
        worst_percent: by how much.
    """

    within_percent: float
    ratios: int
    within: int
    open: int
    moved: tuple[str, ...]
    worst: str | None
    worst_percent: float | None


class BenchReport(Versioned):
    """What was measured, and everything needed to measure it again.

    Attributes:
        date: when (ISO 8601, UTC).
        model: what was timed.
        subject: the bundle; None for files alone.
        settings: what was asked.
        device: ``cpu`` or ``cuda:N``.
        threads: of each contender.
        images: what the inputs are, in words.
        machine: where it ran.
        python: version.
        versions: of the runtimes, by package.
        environment: variables that change how fast things run.
        contenders: by name.
        reference: what ratios are against; None where there is none.
        rows: one a contender, batch and image size.
        skipped: who did not start, and why.
        loading: what loading each contender took, by name.
        ceilings: what the device can do; None where it was not measured.
        roofline: each row against them.
        profiles: time by kind of layer at the largest batch, by contender, where asked for.
        best_under_p99: the best batches under the limit that was asked for, if one was.
        during: what else the machine did meanwhile.
        seconds: where the time went.
        warnings: what to keep in mind, one sentence each.
        changes: since an older benchmark that this one is compared with.
        agreement: with that one; None without one.
    """

    schema_: Literal["van-deploy/bench/5"] = Field(alias="schema")
    date: str
    model: str
    subject: Subject | None
    settings: BenchSettings
    device: str
    threads: int
    images: str
    machine: Machine
    python: str
    versions: dict[str, str]
    environment: dict[str, str]
    contenders: dict[str, Contender]
    reference: str | None
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    loading: dict[str, Loading]
    ceilings: Ceilings | None
    roofline: tuple[Reached, ...]
    profiles: dict[str, tuple[ProfileLine, ...]]
    best_under_p99: BestUnder | None
    during: During
    seconds: Seconds
    warnings: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    agreement: Agreement | None = None

    @property
    def measured(self) -> list[Row]:
        """The rows with figures."""
        return [row for row in self.rows if row.latency is not None]

    @property
    def passed(self) -> bool:
        """Whether every contender that started could be timed."""
        return bool(self.rows) and len(self.measured) == len(self.rows)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def read_report(path: Path) -> BenchReport:
    """Return a benchmark's JSON file.

    Raises:
        InputError: it cannot be read, is something else, or is of another version.
    """
    return read_versioned(
        BenchReport,
        path,
        "benchmark",
        InputError,
        "Measure again with this version: `van-deploy bench BUNDLE --output FILE`.",
    )
