"""The interleaved benchmark on a CPU: each contender in its own process, one running at a time.

In each round every contender is resumed, warmed up and timed for one slice, and the reference
before and after every few of them. A contender's ratio in that round is to the reference's time
just before and just after, interpolated to its own position, which cancels a steady drift. The
order is reversed in every other round. A contender is timed until its ratio has settled or its
budget is spent.

Other load on the same CPU slows some runtimes more than others, and load figures do not show it;
the time of a matrix product does. The product is timed next to every slice, and rounds in which
it took over 10 % longer than undisturbed are excluded from a ratio, unless too few rounds remain.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.bench.document import Contender, Latency, ProfileLine, Ratio, Row
from van_deploy.bench.worker import WorkerError, WorkerExitError, WorkerProcess
from van_deploy.config import BenchSettings, Budget
from van_deploy.config.commands import MIN_ROUNDS
from van_deploy.config.sizes import ImageSize
from van_deploy.stopwatch import Progress

PROBE_SIDE, PROBE_PRODUCTS = 384, 10  # about 10 ms on two cores
# A round is quiet up to this multiple of the undisturbed probe time, which is this quantile.
QUIET_LIMIT, UNDISTURBED_QUANTILE = 1.1, 0.1


class TimedProcess(WorkerProcess):
    """A contender's process and its measurements at the current batch size.

    Args:
        contender: to measure.
        images: a ``.npy`` file of its inputs.
        image_size: size of the inputs.
        settings: threads and streams.

    Attributes:
        load_s: seconds to load it; None before loading and after a failure.
        failure: why it does not run at this batch size.
        latencies: of all calls, in ms.
        rounds: for each round the mean latency in ms, the largest probe time next to it, and the
            ratio to the reference or None.
        timed_s: seconds of timed calls at this batch size.
        call_ms: fastest call during warm-up.
        row: results at this batch size so far.
    """

    def __init__(
        self, contender: Contender, images: Path, image_size: ImageSize, settings: BenchSettings
    ) -> None:
        super().__init__(settings.threads or 1)
        self.contender, self.images, self.streams = contender, images, settings.streams
        self.name, self.row = contender.name, Row(contender.name, 0, image_size)
        self.load_s: float | None = None
        self.failure: WorkerError | None = None

    def __enter__(self) -> TimedProcess:
        """Start the process and load the contender in it; a failure is recorded."""
        super().__enter__()
        self.failure = None
        arguments = {"contender": self.contender, "threads": self.threads, "streams": self.streams}
        self.load_s = self.try_request("load", **arguments)
        return self

    def begin_batch(self, batch: int) -> dict[str, Any]:
        """Reset the measurements; return the arguments that select the images of this batch."""
        self.latencies, self.timed_s, self.call_ms = list[float](), 0.0, 0.0
        self.rounds = list[tuple[float, float, float | None]]()
        self.row = Row(self.name, batch, self.row.image_size, self.load_s)
        low, high = self.contender.min_batch, self.contender.max_batch
        if self.load_s:  # else the failure to load stays
            message = f"batch {batch} is outside the batches of the file ({low} to {high})"
            self.failure = None if low <= batch <= (high or batch) else WorkerError(message)
        return {"images": self.images, "batch": batch}

    def warm_up(self, batch: int, budget: Budget) -> None:
        """Load a batch and warm up; a failure is recorded."""
        arguments = {**self.begin_batch(batch), "warmup_s": budget.warmup_s}
        if times := self.try_request("warm_up", **arguments):
            first_ms, self.call_ms = times
            self.row = replace(self.row, first_call_ms=first_ms)

    def measure_on_gpu(self, batch: int, budget: Budget) -> None:
        """Measure a batch with the buffers on the GPU; a failure is recorded."""
        arguments = {**self.begin_batch(batch), "seconds": budget.seconds, "calls": budget.calls}
        if fields := self.try_request("time_resident", **arguments):
            self.row = replace(self.row, **fields)

    def time_slice(self, seconds: float) -> float:
        """Time calls for ``seconds``, at least one; return their mean in ms, 0 on failure.

        The mean, because a median ignores a short disturbance in a slice of many calls but not in
        a slice of one call, which would favour the faster of two contenders.
        """
        if (result := self.try_request("time_calls", seconds=seconds)) is None:
            return 0.0
        latencies, wall_s, peak_rss = result
        self.latencies += latencies
        self.timed_s += wall_s
        self.row = replace(self.row, peak_rss_bytes=peak_rss)
        return statistics.fmean(latencies)

    def profile(self) -> tuple[ProfileLine, ...]:
        """Return the time by kind of layer at the last batch that was loaded; () on failure."""
        self.failure = None
        return tuple(self.try_request("profile") or ())

    def try_request(self, method: str, **arguments: Any) -> Any:
        """Return the result of a request; after a failure None, and the row has the error."""
        if self.failure is None:
            try:
                return self.request(method, **arguments)
            except WorkerError as error:
                self.failure = error
        self.row = replace(self.row, error=self.failure.message)
        return None

    def quiet_ratio(self, limit_ms: float) -> Ratio | None:
        """Return the ratio over the quiet rounds, or None if there are too few."""
        quiet = [ratio for _, probe_ms, ratio in self.rounds if probe_ms <= limit_ms and ratio]
        return Ratio.of(quiet) if len(quiet) >= MIN_ROUNDS else None


class InterleavedBenchmark(ExitStack):
    """The processes of all contenders; use it as a context manager, which ends them.

    Args:
        processes: with unique names.
        settings: budget, threads, streams and the name of the reference.
        progress: called with the current step.

    Attributes:
        probe_times: of the matrix product, in ms.
    """

    def __init__(
        self, processes: list[TimedProcess], settings: BenchSettings, progress: Progress
    ) -> None:
        super().__init__()
        self.processes, self.settings, self._progress = processes, settings, progress
        self.probe_times: list[float] = []

    def __enter__(self) -> InterleavedBenchmark:
        """Start and load all contenders, one after the other."""
        for process in self.processes:
            self._progress(f"Loading {process.name}")
            self.enter_context(process)
        return self

    def run(self) -> list[Row]:
        """Return the rows of all batch sizes; a contender over the latency limit drops out."""
        rows, processes, limit_ms = list[Row](), self.processes, self.settings.p99_ms or math.inf
        for batch in sorted(set(self.settings.batches)):
            rows += self.run_batch(batch, processes)
            slow = {r.contender for r in rows if r.latency and r.latency.p99_ms > limit_ms}
            processes = [process for process in processes if process.name not in slow]
        return rows

    def run_batch(self, batch: int, processes: Sequence[TimedProcess]) -> list[Row]:
        """Return one row for each contender at one batch size."""
        budget, on_gpu = self.settings.budget, self.settings.device != "cpu"
        for process in processes:
            if isinstance(process.failure, WorkerExitError):
                process.__exit__()
                process.__enter__()  # restarted for the next batch size
            self._progress(f"Batch {batch}: warming up {process.name}")
            prepare = process.measure_on_gpu if on_gpu else process.warm_up
            prepare(batch, budget)
        active = [] if on_gpu else [process for process in processes if not process.failure]
        reference = next((p for p in active if p.name == self.settings.reference), None)
        slice_s = budget.slice_s(reference.call_ms / 1e3 if reference else 0.0)
        for number in count(1):
            reference = None if reference and reference.failure else reference
            waiting = [process for process in active if not self._is_done(process, reference)]
            if not waiting:
                break
            more = f", {len(waiting)} not settled yet" * (number > budget.rounds)
            self._progress(f"Batch {batch}, round {number} of {max(budget.rounds, number)}{more}")
            self._run_round(waiting if number % 2 else waiting[::-1], reference, slice_s)
        for process in active:
            if not process.failure:
                self._fill_row(process, reference)
        return [process.row for process in processes]

    def _fill_row(self, process: TimedProcess, reference: TimedProcess | None) -> None:
        """Add the results of all rounds to a contender's row."""
        limit_ms, ratios = self._quiet_limit_ms, [ratio for *_, ratio in process.rounds if ratio]
        ratio = (process.quiet_ratio(limit_ms) or Ratio.of(ratios)) if reference else None
        process.row = replace(
            process.row,
            latency=Latency.of(process.latencies),
            images_per_s=process.row.batch * len(process.latencies) / process.timed_s,
            ratio=ratio,
            settled=self._is_settled(process) if ratio and process is not reference else None,
            rounds=len(process.rounds),
            quiet_rounds=sum(probe_ms <= limit_ms for _, probe_ms, _ in process.rounds),
        )

    def time_probe(self) -> float:
        """Time a product of two matrices; return milliseconds."""
        a = np.full((PROBE_SIDE, PROBE_SIDE), 0.5, np.float32)
        start = time.perf_counter()
        for _ in range(PROBE_PRODUCTS):
            a @ a
        self.probe_times.append(1e3 * (time.perf_counter() - start) / PROBE_PRODUCTS)
        return self.probe_times[-1]

    @property
    def _quiet_limit_ms(self) -> float:
        """The longest probe time of a quiet round, from all probe times so far."""
        times = self.probe_times or [math.inf]
        return QUIET_LIMIT * float(np.quantile(times, UNDISTURBED_QUANTILE, method="inverted_cdf"))

    def _is_done(self, process: TimedProcess, reference: TimedProcess | None) -> bool:
        """Return whether a contender needs no more rounds at this batch size."""
        budget, rounds = self.settings.budget, len(process.rounds)
        if process.failure is not None or budget.is_exhausted(process.timed_s, rounds):
            return True
        is_complete = budget.is_complete(process.timed_s, len(process.latencies), rounds)
        return is_complete and (reference in (None, process) or self._is_settled(process))

    def _is_settled(self, process: TimedProcess) -> bool:
        """Return whether the ratio over the quiet rounds is within the tolerance."""
        ratio = process.quiet_ratio(self._quiet_limit_ms)
        tolerance = self.settings.budget.tolerance_percent
        return ratio is not None and ratio.uncertainty_percent <= tolerance

    def _run_round(
        self, waiting: Sequence[TimedProcess], reference: TimedProcess | None, slice_s: float
    ) -> None:
        """Time one slice of each contender, and of the reference between them."""
        others = [process for process in waiting if process is not reference]
        order = others if reference is None else round_order(others, reference)
        times: list[float] = []  # 0 after a failure
        probes = [self.time_probe()]
        for process in order:
            times.append(process.time_slice(slice_s))
            probes.append(self.time_probe())
        positions = [i for i, process in enumerate(order) if process is reference and times[i]]
        base_ms = [times[i] for i in positions]
        for i, (process, ms) in enumerate(zip(order, times, strict=True)):
            if process is reference or not ms:
                continue
            nearest = [*[p for p in positions if p < i][-1:], *[p for p in positions if p > i][:1]]
            probe_ms = max(max(probes[p : p + 2]) for p in (i, *nearest))
            # logarithms, so that a drift by a constant percentage cancels
            ratio = math.exp(np.interp(i, positions, np.log(base_ms))) / ms if positions else None
            process.rounds.append((ms, probe_ms, ratio))
        if reference is not None and base_ms:
            reference.rounds.append((statistics.geometric_mean(base_ms), max(probes), 1.0))


def round_order(others: Sequence[TimedProcess], reference: TimedProcess) -> list[TimedProcess]:
    """Return the order of a round: the reference first, last, and after every few others.

    Of ``n`` others, after each group of about the square root of ``n``: the reference is part of
    every ratio, and more of its slices hardly improve the ratios (Dunnett, 1955, on comparisons
    with a control).
    """
    size = math.isqrt(max(len(others), 1) - 1) + 1  # the square root, rounded up
    groups = [others[start : start + size] for start in range(0, len(others), size)]
    return [reference, *(process for group in groups for process in (*group, reference))]
