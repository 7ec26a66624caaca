"""False outcomes of the `evaluate` gate on correct and faulty artifacts.

    python -m benchmarks.gates --checkpoint FILE --calib FOLDER --eval FOLDER

Every network runs on every image once; all results are computed from these logits.

Resamples: the gate of each artifact on bootstrap resamples of the evaluation set. Correct artifacts
should pass, and none should fail.

Faulty artifacts: the logits of each artifact negated, set to 0, shifted by one image in each batch,
with two classes swapped, with noise, or with wrong classes on a known share of the images,
evaluated on random subsets of 5, 50, 500 and 2,000 images. None with a loss over the limit should
pass.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.table import Table, parse_options
from van_deploy import api
from van_deploy.checks.evaluate import ArtifactLoss, GroundTruth, Predictions, compare_predictions
from van_deploy.checks.gates import allowed_loss
from van_deploy.checks.golden import golden_samples
from van_deploy.checks.outputs import Networks
from van_deploy.config import EvaluationSettings
from van_deploy.data.images import decoded_batches
from van_deploy.data.labels import label_images
from van_deploy.metrics import Task
from van_deploy.runners.network import PYTORCH, original_network

COLUMNS = (
    *("artifact", "images", "evaluations", "PASS", "INCONCLUSIVE", "FAIL"),
    *("loss over the limit", "of these PASS"),
)
OUTCOMES = ("pass", "inconclusive", "fail")
RESAMPLES, SUBSETS = 200, 20
SIZES = (5, 50, 500, 2000)
BATCH = 32
# Shares of the images on which a faulty artifact predicts another class than PyTorch.
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.2)

Array = npt.NDArray[Any]
Fault = Callable[[Array, np.random.Generator], Array]


def main() -> int:
    """Print both tables as one."""
    args = parse_options(__doc__, checkpoint="van_digits", calib="", eval="", bundle="")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(args.bundle or f"{folder}/bundle")
        if not args.bundle:
            exported = api.export(args.checkpoint, place, images=args.calib or None)
            exported.quantize(precision="fp16")
            exported.quantize(precision="int8", images=args.calib or None)
        bundle = api.open_bundle(place).load()
        loaded = original_network(bundle, None)
        images = label_images(Path(args.eval), loaded.config.num_classes, loaded.class_names)
        settings = EvaluationSettings(images=Path(args.eval))
        with Networks(bundle, loaded, settings) as networks:
            batches = decoded_batches(images.items, loaded.preprocessing, BATCH)
            logits = [networks.logits(batch) for batch in batches]
        all_logits = {name: np.concatenate([y[name] for y in logits]) for name in logits[0]}
        labels = np.array([item.label for item in images.items], np.int64)
        return gate_table(all_logits, labels, golden_samples(bundle).noise_db).print_json()


def gate_table(all_logits: Mapping[str, Array], labels: Array, noise_db: float) -> Table:
    """Return both tables as one.

    Args:
        all_logits: logits ``(N, K)`` of PyTorch and each artifact by name.
        labels: ``(N,)``.
        noise_db: SQNR of PyTorch's float32 against its float64.
    """
    table, rng = Table(COLUMNS), np.random.default_rng(0)

    def evaluate(name: str, logits: Array, rows: Array) -> ArtifactLoss:
        """Return the gate's verdict on some of the images."""
        expected = all_logits[PYTORCH][rows]
        before, after = Predictions.of(expected), Predictions.of(logits[rows], reference=expected)
        truth = GroundTruth(labels[rows], expected.shape[1], Task.SINGLE_LABEL, noise_db)
        return compare_predictions(before, after, truth, name)

    def row(name: str, size: int, kind: str, losses: Sequence[ArtifactLoss]) -> None:
        counts = Counter(loss.outcome.value for loss in losses)
        over_limit = [loss for loss in losses if loss.loss.loss > allowed_loss(name).value]
        passed = sum(loss.outcome.value == "pass" for loss in over_limit)
        cells = (counts[outcome] for outcome in OUTCOMES)
        table.row(name, size, f"{len(losses)} {kind}", *cells, len(over_limit), passed)

    for name, logits in all_logits.items():
        if name == PYTORCH:
            continue
        drawn = [rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES)]
        row(name, len(labels), "whole", [evaluate(name, logits, np.arange(len(labels)))])
        row(name, len(labels), "resamples", [evaluate(name, logits, rows) for rows in drawn])
        for size in (size for size in SIZES if size <= len(labels)):
            picks, losses = np.random.default_rng(size), []
            for fault in FAULTS.values():
                for _ in range(SUBSETS):
                    faulty = fault(logits.copy(), picks)
                    rows = picks.choice(len(labels), size, replace=False)
                    losses.append(evaluate(name, faulty, rows))
            row(name, size, "faulty", losses)
    table.notes.append(
        f"Faulty artifacts: {', '.join(FAULTS)}, each on {SUBSETS} random subsets of each size. "
        "Resamples and faults use stored logits; every network ran on each image once."
    )
    return table


def _shifted(logits: Array, rng: np.random.Generator) -> Array:
    batches = [logits[i : i + BATCH] for i in range(0, len(logits), BATCH)]
    return np.concatenate([np.roll(batch, 1, axis=0) for batch in batches])


def _noisy(logits: Array, rng: np.random.Generator) -> Array:
    spread = float(np.sqrt(np.square(logits).mean()))
    return logits + rng.normal(0, spread, logits.shape).astype(logits.dtype)


def _wrong_class(share: float, logits: Array, rng: np.random.Generator) -> Array:
    """Make another class the top-1 class on a share of the images."""
    rows = rng.choice(len(logits), max(1, round(share * len(logits))), replace=False)
    best, worst = logits[rows].argmax(axis=1), logits[rows].argmin(axis=1)
    logits[rows, best], logits[rows, worst] = logits[rows, worst], logits[rows, best]
    return logits


FAULTS: Mapping[str, Fault] = {
    "negated": lambda logits, rng: -logits,
    "zeroed": lambda logits, rng: np.zeros_like(logits),
    "shifted by one image in each batch": _shifted,
    "two classes swapped": lambda logits, rng: logits[:, [1, 0, *range(2, logits.shape[1])]],
    "noise with the RMS of the logits": _noisy,
    **{
        f"wrong on {100 * share:g} % of the images": partial(_wrong_class, share)
        for share in SHARES
    },
}


if __name__ == "__main__":
    raise SystemExit(main())
