"""What differs from one process to the next, and from one moment to the next.

Some processes of eager PyTorch with the C library's own settings, some that keep the
memory they free, some of ONNX Runtime; all of van_b0 at batch 1, in turns. And what each
takes in moments that were quiet or not, as van_deploy/bench/quiet.py sees them.

    python benchmarks/processes.py
    python benchmarks/processes.py --processes 6 --rounds 20
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lineup import prepared
from races import claim, printed

from van_deploy.bench.contender import Contender
from van_deploy.bench.contenders import GIVES_BACK, REFERENCE
from van_deploy.bench.process import WorkerProcess
from van_deploy.bench.quiet import Gauge

KINDS = (GIVES_BACK, REFERENCE, "ort-cpu/fp32")
THREADS, SLICE_S, WARMUP_S = 2, 0.3, 1.0
SPREAD_PERCENT = 5.0


@dataclass
class Timed:
    """One process of a contender: its slices' means in ms and what was seen around each."""

    contender: Contender
    process: WorkerProcess
    ms: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    calls: int = 0
    faults: int = 0

    def time_slice(self, gauge: Gauge) -> None:
        """Time some calls, and look at the machine before and after."""
        before = gauge.look()
        faults = _page_faults(self.process.pid)
        done = self.process.ask("measure", seconds=SLICE_S, calls=1, limit_s=SLICE_S)
        self.faults += _page_faults(self.process.pid) - faults
        self.looks.append(max(before, gauge.look()))
        self.calls += done["calls"]
        self.ms.append(statistics.fmean(done["latencies_ms"]))

    def median(self, limit_ms: float, *, quiet: bool) -> float | None:
        """Return the median slice of the moments that were quiet, or of those that were not."""
        kept = [
            ms for ms, look in zip(self.ms, self.looks, strict=True) if (look <= limit_ms) == quiet
        ]
        return statistics.median(kept) if kept else None


def main() -> int:
    """Print the rows; return 1 if a claim is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=4, help="of each kind")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        contenders, _, _ = prepared("van_b0", folder, [1], with_peers=False)
        found = {contender.name: contender for contender in contenders}
        watcher = stack.enter_context(WorkerProcess(THREADS))
        lanes = [
            _opened(found[kind], folder / "images.npy", stack)
            for kind in KINDS
            if kind in found
            for _ in range(arguments.processes)
        ]
        gauge = Gauge(lambda: float(watcher.ask("gauge")["ms"]))
        for turn in range(arguments.rounds):
            print(f"round {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            for lane in lanes if turn % 2 == 0 else lanes[::-1]:
                lane.time_slice(gauge)
        result = _result(lanes, gauge)
    return printed(result, arguments.json)


def _opened(contender: Contender, images: Path, stack: ExitStack) -> Timed:
    process = stack.enter_context(WorkerProcess(THREADS, keeps_memory=contender.keeps_memory))
    process.ask("load", contender=asdict(contender), threads=THREADS, streams=1)
    process.ask("feed", images=str(images), batch=1, preprocessing=None)
    process.ask("warm", seconds=WARMUP_S, calls=3)
    return Timed(contender, process)


def _result(lanes: Sequence[Timed], gauge: Gauge) -> dict[str, Any]:
    limit = gauge.limit_ms
    rows = []
    spreads: dict[str, float] = {}
    for kind in KINDS:
        own = [lane for lane in lanes if lane.contender.name == kind]
        medians = [ms for lane in own if (ms := lane.median(limit, quiet=True)) is not None]
        disturbed = [ms for lane in own if (ms := lane.median(limit, quiet=False)) is not None]
        if not medians:
            continue
        spreads[kind] = 100 * (max(medians) / min(medians) - 1)
        rows.append(
            [
                kind,
                ", ".join(f"{ms:.1f}" for ms in medians),
                f"{spreads[kind]:.0f} %",
                f"{statistics.median(disturbed):.1f}" if disturbed else "-",
                ", ".join(f"{lane.faults / lane.calls:.0f}" for lane in own),
            ]
        )
    seen = gauge.seen()
    return {
        "columns": [
            "runner",
            "quiet ms, a process",
            "largest over smallest",
            "disturbed ms",
            "page faults a call, a process",
        ],
        "rows": rows,
        "claims": [
            claim(
                f"{kind}: its processes agree within {SPREAD_PERCENT:g} %",
                f"{spreads[kind]:.1f} %",
                met=spreads[kind] <= SPREAD_PERCENT,
            )
            for kind in KINDS[1:]
            if kind in spreads
        ],
        "notes": [
            f"{100 * seen.quiet_share:.0f} % of {seen.looks} looks were quiet: {seen.work} in "
            f"{limit:.2f} ms each or less."
            if seen
            else "Nothing watched how quiet the machine was.",
            "Medians of slices' means. A page fault: the system hands a page of memory out "
            "(`/proc/PID/stat`, minflt).",
        ],
    }


def _page_faults(pid: int) -> int:
    """Return the minor page faults of a process so far (proc(5), field 10 of its stat)."""
    path = Path(f"/proc/{pid}/stat")
    return int(path.read_text().rpartition(")")[2].split()[7]) if path.exists() else 0


if __name__ == "__main__":
    raise SystemExit(main())
