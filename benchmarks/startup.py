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
from pathlib import Path

import torch

from benchmarks.table import Table, process_cost
from van_deploy.model.checkpoint import load_van
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS

WORDS = {"--help": 0.25, "list": 0.5, "export --help": 0.5}
VARIANT, LOADING = "van_b2", 1.2


def main() -> int:
    """Time the commands and both ways of loading, in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    table = Table(("what", "median s", "fastest s"))
    for words, limit in WORDS.items():
        command = [sys.executable, "-m", "van_deploy", *words.split()]
        times = [process_cost(command)[0] for _ in range(rounds + 1)][1:]
        median = statistics.median(times)
        table.row(f"van-deploy {words}", f"{median:.3f}", f"{min(times):.3f}")
        table.claim(f"`van-deploy {words}` within {limit} s", f"{median:.2f} s", median <= limit)
    _loading(table, rounds)
    table.notes.append(f"Medians of {rounds} rounds; the first, which fills caches, left out.")
    return table.printed()


def _loading(table: Table, rounds: int) -> None:
    model = VAN(VARIANTS[VARIANT].config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{VARIANT}.pth"
        torch.save({"state_dict": model.state_dict()}, path)

        def bare() -> None:
            network = VAN(model.config)
            network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])

        ways: dict[str, Callable[[], object]] = {
            "load_van": lambda: load_van(str(path)),
            "VAN() + torch.load + load_state_dict": bare,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                begun = time.process_time()
                way()
                times[name].append(time.process_time() - begun)
    for name, taken in times.items():
        median = statistics.median(taken[1:])
        table.row(f"{name}, {VARIANT}", f"{median:.3f}", f"{min(taken[1:]):.3f}")
    ours, theirs = (statistics.median(taken[1:]) for taken in times.values())
    table.claim(
        f"loading {VARIANT} <= {LOADING} x making it and loading with PyTorch alone",
        f"{ours / theirs:.2f} x",
        ours <= LOADING * theirs,
    )


if __name__ == "__main__":
    raise SystemExit(main())
