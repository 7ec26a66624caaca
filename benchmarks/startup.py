"""How soon the command line answers, and how long loading a network takes.

python -m benchmarks.startup --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from benchmarks.table import Table, process_cost
from van_deploy.model.checkpoint import load_van
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS

WORDS = {"--help": 0.25, "list": 0.5, "export --help": 0.5}
VARIANT, LOADING = "van_b2", 1.2


def main() -> int:
    """Time the commands, and both ways of loading in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    table = Table(("what", "median s", "fastest s"))
    for words, limit in WORDS.items():
        command = [sys.executable, "-m", "van_deploy", *words.split()]
        times = [process_cost(command)[0] for _ in range(rounds + 1)]
        median = _row(table, f"van-deploy {words}", times)
        table.claim(f"`van-deploy {words}` within {limit} s", f"{median:.2f} s", median <= limit)
    model = VAN(VARIANTS[VARIANT].config)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"state_dict": model.state_dict()}, file.name)

        def bare() -> None:
            network = VAN(model.config)
            network.load_state_dict(torch.load(file.name, weights_only=True)["state_dict"])

        ours, theirs = [], []
        for _ in range(rounds + 1):
            ours.append(_seconds(lambda: load_van(file.name)))
            theirs.append(_seconds(bare))
    factor = _row(table, f"load_van, {VARIANT}", ours)
    factor /= _row(table, f"VAN() + torch.load + load_state_dict, {VARIANT}", theirs)
    table.claim(
        f"loading {VARIANT} <= {LOADING} x making it and loading with PyTorch alone",
        f"{factor:.2f} x",
        factor <= LOADING,
    )
    table.notes.append(f"Medians of {rounds} rounds; the first, which fills caches, left out.")
    return table.printed()


def _row(table: Table, what: str, times: list[float]) -> float:
    """Add a row, and return its median; the first time does not count."""
    median = statistics.median(times[1:])
    table.row(what, f"{median:.3f}", f"{min(times[1:]):.3f}")
    return median


def _seconds(way: Callable[[], object]) -> float:
    """Return the processor's seconds of a call."""
    begun = time.process_time()
    way()
    return time.process_time() - begun


if __name__ == "__main__":
    raise SystemExit(main())
