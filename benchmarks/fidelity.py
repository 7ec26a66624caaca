"""What each technique brings to INT8: everything on, and each switch left out.

Calibrates on several seeded choices of images, since the differences are small, and
judges on images of neither, against the FP32 logits. ``van_digits`` is inside the
package; ``--checkpoint`` adds a network of your own, with two folders of images, one
folder a class.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py --checkpoint FILE --calibrate DIR --evaluate DIR

A switch is a default only if leaving it out costs SQNR on every network measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from van_deploy.data import decoded_batches, image_set
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import compare
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.precision.equalize import EqualizeSettings, equalize
from van_deploy.precision.initial import initial_plan, nodes_in_scope
from van_deploy.precision.plan import QuantizationPlan, simulate
from van_deploy.precision.ranges import record_ranges
from van_deploy.precision.refine import refine_plan
from van_deploy.precision.refine_settings import RefineSettings
from van_deploy.precision.session import logits_session

CALIBRATION_IMAGES = 256
EQUALIZE_IMAGES = 64
BATCH = 16
CORRECTIONS = ("bias_correction", "rounding")
LEARNT = ("scales", "biases", "turns")

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: what is left out, or added.
        equalize: what is switched on.
        refine: likewise; None for nothing.
        judges: the switch whose place among the defaults this line decides, and
            whether it is a default now; ("", False) where it decides none.
    """

    name: str
    equalize: EqualizeSettings | None
    refine: RefineSettings | None
    judges: tuple[str, bool] = ("", False)


def cases(learning: bool) -> list[Case]:
    """Return the lines of the table, the defaults first."""
    usual, refining = EqualizeSettings(), RefineSettings()
    found = [Case("defaults", usual, refining)]
    for name in (field.name for field in fields(EqualizeSettings)):
        default = bool(getattr(usual, name))
        flipped = replace(usual, **{name: not default})
        word = "without" if default else "with"
        found.append(Case(f"{word} {name}", flipped, refining, (name, default)))
    for name in (*CORRECTIONS, *(LEARNT if learning else ())):
        default = bool(getattr(refining, name))
        less = replace(refining, **{name: not default})
        word = "without" if default else "with"
        found.append(Case(f"{word} {name}", usual, less, (name, default)))
    return [
        *found,
        Case("no equalising", None, refining),
        Case("no refining", usual, None),
        Case("scales by least error only", None, None),
    ]


class Network:
    """One network, its images, and its FP32 answers.

    Args:
        name: of the network, for the table.
        network: to quantise.
        calibrate: folder of images, one folder a class.
        evaluate: likewise.
        threads: of ONNX Runtime.
    """

    def __init__(
        self, name: str, network: LoadedVan, calibrate: Path, evaluate: Path, threads: int
    ) -> None:
        """Read the images and fold the network."""
        self.name, self.threads = name, threads
        self.preprocessing = network.preprocessing
        self.calibration, self.evaluation = self._load(calibrate), self._load(evaluate)
        folded = fold_van(network.model, torch.from_numpy(self.calibration[:2]))
        self.model = onnx_from_van(folded.model, network.preprocessing.image_size)
        self.reference = self._logits(self.model)

    def _load(self, folder: Path) -> Images:
        batches = decoded_batches(image_set(folder).items, self.preprocessing, 64)
        return np.concatenate([batch.inputs for batch in batches])

    def _logits(self, model: Any) -> Images:
        run = logits_session(model, fuse=False, threads=self.threads)
        return np.concatenate([run(part) for part in _batches(self.evaluation)])

    def chosen(self, seed: int) -> Images:
        """Return one choice of calibration images."""
        order = np.random.default_rng(seed).permutation(len(self.calibration))
        return self.calibration[order[:CALIBRATION_IMAGES]]

    def plan(self, case: Case, images: Images) -> QuantizationPlan:
        """Return the plan of one case."""
        model = self.model
        if case.equalize is not None:
            few = _batches(images[:EQUALIZE_IMAGES])
            model = equalize(model, few, nodes_in_scope(model), case.equalize).model
        ranges = record_ranges(model, _batches(images), threads=self.threads)
        plan = initial_plan(model, ranges)
        if case.refine is None:
            return plan
        return refine_plan(plan, _batches(images[:192]), case.refine, threads=self.threads).plan

    def measured(self, case: Case, seeds: int) -> list[tuple[float, float, float]]:
        """Return SQNR in dB, agreement in per cent and the seconds taken, for each choice."""
        found = []
        for seed in range(seeds):
            start = time.perf_counter()
            plan = self.plan(case, self.chosen(seed))
            seconds = time.perf_counter() - start
            figures = compare(self.reference, self._logits(simulate(plan)))
            found.append((figures.sqnr_db, 100 * figures.top1_agreement, seconds))
        return found


def _batches(images: Images) -> Iterator[Images]:
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]


def table(networks: list[Network], seeds: int, learning: bool) -> dict[str, Any]:
    """Return the whole result as ``python -m benchmarks`` reads it."""
    rows: list[list[str]] = []
    gains: dict[str, list[tuple[str, float, bool]]] = {}
    for network in networks:
        usual: list[float] = []
        for case in cases(learning):
            found = network.measured(case, seeds)
            quality = [sqnr for sqnr, _, _ in found]
            usual = usual or quality
            costs = [before - after for before, after in zip(usual, quality, strict=True)]
            row = [network.name, case.name, f"{statistics.mean(quality):.2f}"]
            row += [f"{statistics.mean(costs):+.2f} ({min(costs):+.2f} to {max(costs):+.2f})"]
            row += [f"{statistics.mean(share for _, share, _ in found):.2f}"]
            row += [f"{statistics.mean(seconds for _, _, seconds in found):.1f}"]
            rows.append(row)
            print("  ".join(row), file=sys.stderr, flush=True)
            name, default = case.judges
            if name:
                brought = statistics.mean(costs) * (1 if default else -1)
                gains.setdefault(name, []).append((network.name, brought, default))
    return {
        "columns": ["network", "case", "SQNR dB", "costs dB (choices)", "agreement %", "seconds"],
        "rows": rows,
        "claims": [_claim(name, found) for name, found in gains.items()],
        "notes": [
            f"Means over {seeds} choices of {CALIBRATION_IMAGES} calibration images; judged on "
            + ", ".join(f"{len(n.evaluation)} images ({n.name})" for n in networks)
            + ". What a case costs is taken choice by choice.",
        ],
    }


def _claim(name: str, found: list[tuple[str, float, bool]]) -> dict[str, Any]:
    """Return whether a switch is where the rule puts it: on only if it pays everywhere."""
    default = found[0][2]
    pays = all(brought > 0 for _, brought, _ in found)
    return {
        "claim": f"`{name}` is {'a default' if default else 'off by default'}: "
        f"it pays {'on every network' if default else 'not on every network'}",
        "measured": ", ".join(f"{brought:+.2f} dB on {where}" for where, brought, _ in found),
        "met": pays == default,
    }


def main() -> int:
    """Print one JSON document; return 1 if a default breaks the rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", help="a network of your own, besides van_digits")
    parser.add_argument("--calibrate", type=Path, help="folder of images, one folder a class")
    parser.add_argument("--evaluate", type=Path, help="likewise, none of them the same")
    parser.add_argument("--choices", type=int, default=3, help="of calibration images")
    parser.add_argument("--learning", action="store_true", help="gradient descent too: minutes")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.checkpoint and not (arguments.calibrate and arguments.evaluate):
        parser.error("--checkpoint needs --calibrate and --evaluate")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as scratch:
        train = write_digits_folder(Path(scratch) / "train", "train", 520)
        heldout = write_digits_folder(Path(scratch) / "heldout", "heldout")
        threads = arguments.threads
        networks = [Network("van_digits", load_van(EMBEDDED_NAME), train, heldout, threads)]
        if arguments.checkpoint:
            loaded = load_van(arguments.checkpoint)
            name = Path(arguments.checkpoint).name.split(".")[0]
            networks.append(Network(name, loaded, arguments.calibrate, arguments.evaluate, threads))
        result = table(networks, arguments.choices, arguments.learning)
    print(json.dumps(result, indent=1))
    return int(not all(claim["met"] for claim in result["claims"]))


if __name__ == "__main__":
    sys.exit(main())
