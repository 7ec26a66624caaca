"""One contender in a race: its process, and what was measured of it at the current batch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import Contender
from van_deploy.bench.process import WorkerError, WorkerProcess
from van_deploy.bench.timing import Loading, Ratio, Row, latency_of, ratio_of
from van_deploy.config import Budget
from van_deploy.config.commands import LEAST_ROUNDS


@dataclass
class Lane:
    """A contender, its process, and what was measured of it at the current batch.

    Attributes:
        contender: which one.
        process: its process; None before :meth:`load`.
        loaded: what loading it took; None before, and where it failed.
        failure: why it does not run at this batch.
        latencies: in ms, of all calls.
        rounds: of each round its mean in ms and what the product took at most beside it.
        ratios: of each round; none without a reference.
        timed_s: seconds of timed calls at this batch.
        call_ms: the fastest call while warming up.
        first_call_ms: the first call with this batch.
        peak_rss: of its process at this batch, in bytes.
    """

    contender: Contender
    process: WorkerProcess | None = None
    loaded: Loading | None = None
    failure: WorkerError | None = None
    latencies: list[float] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    timed_s: float = 0.0
    call_ms: float = 0.0
    first_call_ms: float | None = None
    peak_rss: int = 0

    def load(self, process: WorkerProcess, streams: int) -> None:
        """Open the contender in ``process``; a failure is kept."""
        self.process, self.failure = process, None
        given = {"contender": self.contender, "threads": process.threads, "streams": streams}
        self.loaded = self.ask("load", **given) or self.loaded

    def start(self, images: Path, batch: int) -> dict[str, Any]:
        """Forget the last batch; return which images the process is to take for the next one.

        Args:
            images: folder with a ``.npy`` file of images for each kind of input.
            batch: images a call.
        """
        self.latencies, self.rounds, self.ratios, self.timed_s = [], [], [], 0.0
        if self.loaded:  # else it will not open now
            refusal = self.contender.refuses(batch)
            self.failure = WorkerError(refusal, kind="batch") if refusal else None
        return {"images": images / f"{self.contender.embedded}.npy", "batch": batch}

    def feed(self, images: Path, batch: int, warmup_s: float) -> None:
        """Take the next batch and warm up; a failure is kept."""
        answer = self.ask("feed", **self.start(images, batch), warmup_s=warmup_s)
        self.first_call_ms, self.call_ms = answer or (None, 0.0)

    def time_slice(self, seconds: float) -> float:
        """Time calls for ``seconds``, one at least; return their mean in ms, 0 on failure.

        The mean, not the median: that forgets a short disturbance where a slice holds many
        calls and cannot where it holds one, and so would flatter the faster of two.
        """
        if (answer := self.ask("time", seconds=seconds)) is None:
            return 0.0
        latencies, wall_s, self.peak_rss = answer
        self.latencies += latencies
        self.timed_s += wall_s
        return statistics.fmean(latencies)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return the process's answer; None once it has failed, and the failure is kept."""
        if self.failure is None and self.process is not None:
            try:
                return self.process.ask(do, **arguments)
            except WorkerError as error:
                self.failure = error
        return None

    def quiet_ratio(self, limit_ms: float) -> Ratio | None:
        """Return the ratio over the quiet rounds; None where they are too few to stand alone."""
        rounds = zip(self.ratios, self.rounds, strict=False)
        quiet = [ratio for ratio, (_, look) in rounds if look <= limit_ms]
        return ratio_of(quiet) if len(quiet) >= LEAST_ROUNDS else None

    def is_settled(self, budget: Budget, limit_ms: float) -> bool:
        """Return whether the ratio over the quiet rounds is known well enough."""
        ratio = self.quiet_ratio(limit_ms)
        return ratio is not None and ratio.uncertainty_percent <= budget.tolerance_percent

    def is_done(self, budget: Budget, limit_ms: float, *, compared: bool) -> bool:
        """Return whether it need not be timed again.

        Args:
            budget: how long it is to be timed.
            limit_ms: what the product takes at most when the machine is quiet.
            compared: whether it is compared with a reference other than itself.
        """
        rounds = len(self.rounds)
        if self.failure is not None or budget.is_over(self.timed_s, rounds):
            return True
        met = budget.is_met(self.timed_s, len(self.latencies), rounds)
        return met and (not compared or self.is_settled(budget, limit_ms))

    def failed(self, row: Row) -> Row:
        """Return ``row`` with why there are no figures."""
        failure = self.failure or WorkerError("nothing was measured")
        return replace(row, error=failure.message, error_kind=failure.kind)

    def row(self, row: Row, budget: Budget, limit_ms: float, *, compared: bool) -> Row:
        """Return ``row`` with what was measured; see :meth:`is_done` on the others."""
        if self.failure is not None or not self.latencies:
            return self.failed(row)
        ratio = self.quiet_ratio(limit_ms) or ratio_of(self.ratios)
        return replace(
            row,
            latency=latency_of(self.latencies),
            images_per_s=row.batch * len(self.latencies) / self.timed_s,
            ratio=ratio,
            settled=self.is_settled(budget, limit_ms) if ratio and compared else None,
            round_ms=tuple(ms for ms, _ in self.rounds),
            round_ratios=tuple(self.ratios),
            round_quiet=tuple(look <= limit_ms for _, look in self.rounds),
            first_call_ms=self.first_call_ms,
            peak_rss_bytes=self.peak_rss,
        )
