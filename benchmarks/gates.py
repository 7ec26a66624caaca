"""How surely `evaluate` passes what is right, and whether it passes anything that is wrong.

    python -m benchmarks.gates --checkpoint FILE --calib FOLDER --eval FOLDER

Every network answers every image once; all that follows is computed from these logits.

Resamples: the gate of each artifact on bootstrap resamples of the evaluation set. Right artifacts
should pass, and none should fail.

Wrong artifacts: the logits of each artifact negated, set to 0, shifted by one image in each batch,
with two classes swapped, drowned in noise, or wrong on a known share of the images; judged on
random subsets of 5, 50, 500 and 2,000 images. None that lost more than is allowed may pass.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.table import Table
from van_deploy import api
from van_deploy.checks.evaluate import Answers, ArtefactLoss, Truth, judge_artefact
from van_deploy.checks.gates import allowed_loss
from van_deploy.checks.golden import golden_samples
from van_deploy.checks.judging import Networks
from van_deploy.config import EvaluationSettings
from van_deploy.data.images import decoded_batches
from van_deploy.data.labels import labelled_images
from van_deploy.metrics import Task
from van_deploy.runners.network import PYTORCH, original_network

COLUMNS = (
    *("artifact", "images", "judged", "PASS", "INCONCLUSIVE", "FAIL"),
    *("lost more than allowed", "of these PASS"),
)
OUTCOMES = ("pass", "inconclusive", "fail")
PASSING = 0.95  # share of the resamples
RESAMPLES, SUBSETS = 200, 20
SIZES = (5, 50, 500, 2000)
BATCH = 32
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.2)
"""Shares of the images on which a wrong artifact says another class than PyTorch."""

Array = npt.NDArray[Any]
Fault = Callable[[Array, np.random.Generator], Array]


def main() -> int:
    """Print both tables; return 1 if a claim is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="van_digits")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", type=Path, required=True, help="labelled images")
    parser.add_argument("--bundle", type=Path, help="of the checkpoint in fp32, fp16 and int8")
    return measured(_answers(parser.parse_args())).printed()


def _answers(arguments: argparse.Namespace) -> dict[str, Array]:
    """Return the logits of PyTorch and each artifact by name, the labels, and float32's noise."""
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.bundle or Path(folder) / "bundle"
        if arguments.bundle is None:
            made = api.export(arguments.checkpoint, place, images=arguments.calib)
            made.quantize(precision="fp16")
            made.quantize(precision="int8", images=arguments.calib)
        bundle = api.open_bundle(place).opened()
        loaded = original_network(bundle, None)
        images = labelled_images(arguments.eval, loaded.config.num_classes, loaded.class_names)
        asked = EvaluationSettings(images=arguments.eval)
        with Networks(bundle, loaded, asked) as networks:
            batches = decoded_batches(images.items, loaded.preprocessing, BATCH)
            logits = [networks.logits(batch) for batch in batches]
            found = {name: np.concatenate([y[name] for y in logits]) for name in networks.runners}
        labels = np.array([item.label for item in images.items], np.int64)
        noise = np.array(golden_samples(bundle).noise_db)
        return {**found, "labels": labels, "noise_db": noise}


def measured(found: dict[str, Array]) -> Table:
    """Return both tables as one."""
    labels, noise_db = found.pop("labels"), float(found.pop("noise_db"))
    expected, rng = found.pop(PYTORCH), np.random.default_rng(0)
    table, wrong, passed = Table(COLUMNS), 0, 0
    for name, logits in found.items():
        judged = partial(_judged, name, expected, labels=labels, noise_db=noise_db)
        whole = judged(logits, np.arange(len(labels))).outcome.value
        drawn = (rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES))
        counts = Counter(judged(logits, rows).outcome.value for rows in drawn)
        shown = [counts[word] for word in OUTCOMES]
        table.row(name, len(labels), f"{RESAMPLES} resamples", *shown, "-", "-")
        table.claim(
            f"{name}: PASS on the whole set, on {100 * PASSING:.0f} % of its resamples, and FAIL "
            "on none",
            f"{whole.upper()}; {counts['pass'] / RESAMPLES:.1%} PASS, {counts['fail']} FAIL",
            whole == "pass" and counts["pass"] >= PASSING * RESAMPLES and not counts["fail"],
        )
        for size in (size for size in SIZES if size <= len(labels)):
            picks = np.random.default_rng(size)
            tried = [
                judged(fault(logits.copy(), picks), picks.choice(len(labels), size, replace=False))
                for fault in FAULTS.values()
                for _ in range(SUBSETS)
            ]
            lost = [loss for loss in tried if loss.loss.loss > allowed_loss(name).value]
            through = sum(loss.outcome.value == "pass" for loss in lost)
            counts = Counter(loss.outcome.value for loss in tried)
            shown = [counts[word] for word in OUTCOMES]
            table.row(name, size, f"{len(tried)} wrong", *shown, len(lost), through)
            wrong, passed = wrong + len(lost), passed + through
    table.claim(
        "no artifact passes that lost more than is allowed on the images it is judged on",
        f"{passed} of {wrong}",
        passed == 0 and wrong > 0,
    )
    table.notes.append(
        f"Wrong artifacts: {', '.join(FAULTS)}, each on {SUBSETS} random subsets of each size. "
        "Resampled and spoiled are stored logits; every network answered each image once."
    )
    return table


def _judged(
    name: str, expected: Array, found: Array, rows: Array, labels: Array, noise_db: float
) -> ArtefactLoss:
    """Return the gate's verdict on some of the images."""
    before = Answers.of(expected[rows])
    after = Answers.of(found[rows], reference=expected[rows])
    truth = Truth(labels[rows], expected.shape[1], Task.SINGLE_LABEL, noise_db)
    return judge_artefact(before, after, truth, name)


def _shifted(logits: Array, rng: np.random.Generator) -> Array:
    batches = [logits[i : i + BATCH] for i in range(0, len(logits), BATCH)]
    return np.concatenate([np.roll(batch, 1, axis=0) for batch in batches])


def _swapped(logits: Array, rng: np.random.Generator) -> Array:
    return logits[:, [1, 0, *range(2, logits.shape[1])]]


def _noisy(logits: Array, rng: np.random.Generator) -> Array:
    spread = float(np.sqrt(np.square(logits).mean()))
    return logits + rng.normal(0, spread, logits.shape).astype(logits.dtype)


def _wrong_on(share: float) -> Fault:
    """Return a fault that makes another class the first one on a share of the images."""

    def fault(logits: Array, rng: np.random.Generator) -> Array:
        rows = rng.choice(len(logits), max(1, round(share * len(logits))), replace=False)
        best, worst = logits[rows].argmax(axis=1), logits[rows].argmin(axis=1)
        logits[rows, best], logits[rows, worst] = logits[rows, worst], logits[rows, best]
        return logits

    return fault


FAULTS: dict[str, Fault] = {
    "negated": lambda logits, rng: -logits,
    "zeroed": lambda logits, rng: np.zeros_like(logits),
    "shifted by one image in each batch": _shifted,
    "two classes swapped": _swapped,
    "noise as loud as the logits": _noisy,
    **{f"wrong on {100 * share:g} % of the images": _wrong_on(share) for share in SHARES},
}


if __name__ == "__main__":
    raise SystemExit(main())
