"""Processor time of loading van_b2: ``load_van`` against ``torch.load`` and ``load_state_dict``.

Run it alone::

    python -m benchmarks.loading [--rounds 9]

Both read the same file, whose pages are cached, in turns. ``load_van`` also
takes the file's SHA-256, looks at what stands beside it, checks every value and
copies the tensors; ``torch`` alone is measured into a network that is there
already, and with making one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from van_deploy.model.checkpoint import load_van
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS

VARIANT = "van_b2"


def medians_ms(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median processor time of each function in milliseconds, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):  # the first round warms up
        for name, function in functions.items():
            begun = time.process_time()
            function()
            times[name].append(1000 * (time.process_time() - begun))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def main() -> None:
    """Write a file of random weights, time both ways, and print the ratios."""
    parser = argparse.ArgumentParser(description="Time of loading van_b2.")
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    model = VAN(VARIANTS[VARIANT].config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{VARIANT}.pth"
        torch.save({"state_dict": model.state_dict()}, path)

        def into(network: VAN) -> None:
            network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])

        taken = medians_ms(
            {
                "load_van": lambda: load_van(str(path)),
                "torch.load + load_state_dict": lambda: into(model),
                "VAN() + torch.load + load_state_dict": lambda: into(VAN(model.config)),
            },
            rounds,
        )
        size = path.stat().st_size / 2**20
    print(f"{VARIANT}, {size:.0f} MiB, median of {rounds}, {torch.get_num_threads()} threads")
    for name, value in taken.items():
        print(f"{name:38} {value:8.1f} ms   load_van is {taken['load_van'] / value:.2f} x")


if __name__ == "__main__":
    main()
