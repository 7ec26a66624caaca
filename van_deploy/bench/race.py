"""The race: every contender in a process of its own, one awake at a time, in rounds.

In each round every contender is woken, warmed and timed for a slice; the order
turns round from one round to the next. What disturbs the machine for a while so
disturbs all of them, and the ratio of two is taken within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender
from van_deploy.bench.process import WorkerError, WorkerProcess
from van_deploy.bench.timing import Latency, Ratio, latency_of, paired_ratio

__all__ = ["Budget", "Race", "Row", "ceilings_here"]

Progress = Callable[[str], None]

REWARM_CALLS = 2  # unmeasured calls after a process was woken


@dataclass(frozen=True)
class Budget:
    """How long to time one contender at one batch size.

    Attributes:
        seconds: of timed calls, at least.
        calls: at least as many.
        limit_s: of timed calls, at most, even if ``calls`` were not reached.
        rounds: over how many rounds that is spread.
        warmup_s: unmeasured calls before the first round.
    """

    seconds: float = 3.0
    calls: int = 100
    limit_s: float = 10.0
    rounds: int = 6
    warmup_s: float = 1.0


@dataclass(frozen=True)
class Row:
    """One contender at one batch size.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: side of the input in pixels.
        streams: calls in flight at the same time.
        latency: of a call, seen from the process; None where it failed.
        images_per_s: over all streams; None where it failed.
        ratio: times faster than the reference at this batch; None where one of the two failed.
        round_ms: each round's median.
        first_call_ms: the first call with this batch.
        peak_rss_bytes: largest resident memory of the process at this batch.
        device: latency the device itself measured, without transfers; None on a CPU.
        error: why there are no figures; "" where there are.
        error_kind: ``memory``, ``missing``, ``killed``, ``failed``, ``batch`` or "".
    """

    contender: str
    batch: int
    image_size: int
    streams: int
    latency: Latency | None = None
    images_per_s: float | None = None
    ratio: Ratio | None = None
    round_ms: tuple[float, ...] = ()
    first_call_ms: float | None = None
    peak_rss_bytes: int | None = None
    device: Latency | None = None
    error: str = ""
    error_kind: str = ""


@dataclass
class _Lane:
    """A contender, its process, and what was measured of it at the current batch."""

    contender: Contender
    process: WorkerProcess | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    failure: WorkerError | None = None
    latencies: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    round_ms: list[float] = field(default_factory=list)
    images: int = 0
    wall_s: float = 0.0
    first_call_ms: float | None = None
    peak_rss: int = 0

    def forget(self) -> None:
        self.failure = None
        self.latencies, self.device_ms, self.round_ms = [], [], []
        self.images, self.wall_s, self.first_call_ms, self.peak_rss = 0, 0.0, None, 0


class Race:
    """The contenders' processes. Open it with ``with``; it ends them on leaving.

    Args:
        contenders: who runs; names are unique.
        threads: for each process.
        streams: calls each keeps in flight.
        preprocessing: mean and std, for graphs with embedded preprocessing.
        progress: told what is going on.

    Attributes:
        timed_s: seconds of timed calls so far.
        runner_s: seconds the processes were awake: loading, warming, timing.
        own_cpu_s: processor seconds of the timed calls.
        environment: variables of every process.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        threads: int,
        *,
        streams: int = 1,
        preprocessing: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.threads = threads
        self.streams = streams
        self.timed_s = 0.0
        self.timed_cpu_s = 0.0
        self.environment = dict(environment or {})
        self._lanes = [_Lane(contender) for contender in contenders]
        self._preprocessing = preprocessing
        self._say = progress or (lambda _: None)
        self._stack = ExitStack()
        self._spent_s = 0.0

    def __enter__(self) -> Race:
        """Start and load every contender, one after the other."""
        for lane in self._lanes:
            self._start(lane)
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        self._stack.close()

    @property
    def runner_s(self) -> float:
        """Seconds the processes were awake."""
        return self._spent_s + sum(lane.process.busy_s for lane in self._lanes if lane.process)

    def loaded(self) -> dict[str, dict[str, Any]]:
        """Return what loading each contender took, by name; those that failed are absent."""
        return {lane.contender.name: lane.loaded for lane in self._lanes if lane.loaded}

    def run(
        self,
        images: Path,
        batch: int,
        image_size: int,
        budget: Budget,
        reference: str,
        only: set[str] | None = None,
    ) -> list[Row]:
        """Return one row a contender at one batch size.

        Args:
            images: ``.npy`` file of ``(N, C, S, S)`` float32, ``N >= batch``.
            batch: images a call.
            image_size: S.
            budget: how long.
            reference: the contender the others are compared with.
            only: the contenders to run; None for all.
        """
        lanes = [lane for lane in self._lanes if only is None or lane.contender.name in only]
        for lane in lanes:
            self._feed(lane, images, batch, budget)
        for turn in range(budget.rounds):
            self._say(f"Batch {batch}, round {turn + 1} of {budget.rounds}")
            for lane in lanes if turn % 2 == 0 else lanes[::-1]:
                if lane.failure is None:
                    self._round(lane, batch, budget)
        base = next((x for x in lanes if x.contender.name == reference and not x.failure), None)
        return [self._row(lane, batch, image_size, base) for lane in lanes]

    def _start(self, lane: _Lane) -> None:
        self._say(f"Loading {lane.contender.name}")
        if lane.process is not None:
            self._spent_s += lane.process.busy_s
        process = WorkerProcess(self.threads, self.environment)
        lane.process = self._stack.enter_context(process)
        lane.failure = None
        try:
            lane.loaded = process.ask(
                "load",
                contender=lane.contender.as_dict(),
                threads=self.threads,
                streams=self.streams,
            )
        except WorkerError as error:
            lane.failure = error

    def _feed(self, lane: _Lane, images: Path, batch: int, budget: Budget) -> None:
        if lane.failure is not None and lane.failure.kind == "killed":
            self._start(lane)  # a new process for a new batch
        if lane.failure is not None and not lane.loaded:
            return  # it never opened, and will not now
        lane.forget()
        refusal = lane.contender.refuses(batch)
        if refusal:
            lane.failure = WorkerError("batch", refusal)
            return
        self._say(f"Batch {batch}: warming {lane.contender.name}")
        try:
            answer = self._ask(
                lane, "feed", images=str(images), batch=batch, preprocessing=self._preprocessing
            )
            lane.first_call_ms = 1e3 * answer["first_call_s"]
            self._ask(lane, "warm", seconds=budget.warmup_s, calls=REWARM_CALLS)
        except WorkerError as error:
            lane.failure = error

    def _round(self, lane: _Lane, batch: int, budget: Budget) -> None:
        rounds = budget.rounds
        try:
            self._ask(lane, "warm", seconds=0.0, calls=REWARM_CALLS)
            answer = self._ask(
                lane,
                "measure",
                seconds=budget.seconds / rounds,
                calls=-(-budget.calls // rounds),
                limit_s=budget.limit_s / rounds,
            )
        except WorkerError as error:
            lane.failure = error
            return
        lane.latencies += answer["latencies_ms"]
        lane.device_ms += answer["device_ms"]
        lane.round_ms.append(latency_of(answer["latencies_ms"]).p50_ms)
        lane.images += batch * answer["calls"]
        lane.wall_s += answer["wall_s"]
        lane.peak_rss = max(lane.peak_rss, answer["peak_rss_bytes"])
        self.timed_s += answer["wall_s"]
        self.timed_cpu_s += answer["cpu_s"]

    def _ask(self, lane: _Lane, do: str, **arguments: Any) -> dict[str, Any]:
        if lane.process is None:
            raise WorkerError("failed", "it was not started")
        return lane.process.ask(do, **arguments)

    def _row(self, lane: _Lane, batch: int, image_size: int, base: _Lane | None) -> Row:
        row = Row(lane.contender.name, batch, image_size, self.streams)
        if lane.failure is not None or not lane.latencies:
            failure = lane.failure or WorkerError("failed", "nothing was measured")
            return replace(row, error=failure.message, error_kind=failure.kind)
        return replace(
            row,
            latency=latency_of(lane.latencies),
            images_per_s=lane.images / lane.wall_s,
            ratio=paired_ratio(base.round_ms, lane.round_ms) if base else None,
            round_ms=tuple(lane.round_ms),
            first_call_ms=lane.first_call_ms,
            peak_rss_bytes=lane.peak_rss,
            device=latency_of(lane.device_ms) if lane.device_ms else None,
        )


def ceilings_here(threads: int, seconds: float = 0.5) -> Ceilings:
    """Return this machine's measured limits, from a process of their own.

    Raises:
        WorkerError: they could not be measured.
    """
    with WorkerProcess(threads) as process:
        return Ceilings(**process.ask("ceilings", threads=threads, seconds=seconds))
