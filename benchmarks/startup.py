"""The start-up time of the command line, and the time to load a network.

python -m benchmarks.startup --rounds 9
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from benchmarks.table import Table, measure_process, parse_options
from van_deploy.model.checkpoint import load_van
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS

COMMANDS = ("--help", "list", "export --help")
VARIANT = "van_b2"


def main() -> int:
    """Time the commands, and alternately both ways to load a network."""
    rounds = parse_options(__doc__, rounds=9).rounds
    table = Table(("command or call", "median s", "fastest s"))
    times: dict[str, list[float]] = {}
    for words in COMMANDS:
        command = [sys.executable, "-m", "van_deploy", *words.split()]
        times[f"van-deploy {words}"] = [measure_process(command)[0] for _ in range(rounds + 1)]
    model = VAN(VARIANTS[VARIANT].config)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"state_dict": model.state_dict()}, file.name)

        def load_with_torch() -> None:
            state = torch.load(file.name, weights_only=True)["state_dict"]
            VAN(model.config).load_state_dict(state)

        calls: dict[str, Callable[[], object]] = {
            f"load_van, {VARIANT}": lambda: load_van(file.name),
            f"VAN() + torch.load + load_state_dict, {VARIANT}": load_with_torch,
        }
        for _ in range(rounds + 1):
            for name, call in calls.items():
                start = time.process_time()
                call()
                times.setdefault(name, []).append(time.process_time() - start)
    for name, (_, *counted) in times.items():
        table.row(name, f"{statistics.median(counted):.3f}", f"{min(counted):.3f}")
    table.notes.append(
        f"{rounds} rounds, without the first, which fills caches. Commands: wall time; calls: "
        "processor time."
    )
    return table.print_json()


if __name__ == "__main__":
    raise SystemExit(main())
