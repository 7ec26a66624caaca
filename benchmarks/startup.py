"""How soon the command line answers, and how long loading a network takes.

python -m benchmarks.startup --rounds 9
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from benchmarks.table import Table, options, process_cost
from van_deploy.model.checkpoint import load_van
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS

COMMANDS = ("--help", "list", "export --help")
VARIANT = "van_b2"


def main() -> int:
    """Time the commands, and both ways of loading in turns."""
    rounds = options(__doc__, rounds=9).rounds
    table = Table(("what", "median s", "fastest s"))
    times: dict[str, list[float]] = {}
    for words in COMMANDS:
        command = [sys.executable, "-m", "van_deploy", *words.split()]
        times[f"van-deploy {words}"] = [process_cost(command)[0] for _ in range(rounds + 1)]
    model = VAN(VARIANTS[VARIANT].config)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"state_dict": model.state_dict()}, file.name)

        def bare() -> None:
            network = VAN(model.config)
            network.load_state_dict(torch.load(file.name, weights_only=True)["state_dict"])

        turns = [(_seconds(lambda: load_van(file.name)), _seconds(bare)) for _ in range(rounds + 1)]
    times[f"load_van, {VARIANT}"] = [ours for ours, _ in turns]
    times[f"VAN() + torch.load + load_state_dict, {VARIANT}"] = [theirs for _, theirs in turns]
    for what, (_, *counted) in times.items():
        table.row(what, f"{statistics.median(counted):.3f}", f"{min(counted):.3f}")
    table.notes.append(f"Medians of {rounds} rounds; the first, which fills caches, left out.")
    return table.printed()


def _seconds(way: Callable[[], object]) -> float:
    """Return the processor's seconds of a call."""
    begun = time.process_time()
    way()
    return time.process_time() - begun


if __name__ == "__main__":
    raise SystemExit(main())
