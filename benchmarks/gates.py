"""How surely `evaluate` passes what is right, and whether it passes anything that is wrong.

    python -m benchmarks.gates --checkpoint FILE --calib FOLDER --eval FOLDER [--logits FILE]

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.table import Table
from van_deploy import api
from van_deploy.checks.accuracy import ArtefactLoss, judge_artefact
from van_deploy.checks.evaluate import Networks
from van_deploy.checks.opened import ON_CPU
from van_deploy.checks.predictions import Table as Answers
from van_deploy.checks.predictions import answered
from van_deploy.checks.reference import samples_for
from van_deploy.data import decoded_batches, labelled_images
from van_deploy.metrics import Task
from van_deploy.runners.network import PYTORCH
from van_deploy.runners.original import original_network

COLUMNS = (
    *("artifact", "images", "judged", "PASS", "INCONCLUSIVE", "FAIL"),
    *("lost more than allowed", "of these PASS"),
)
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
    parser.add_argument("--logits", type=Path, help="kept here (.npz), and read where it is there")
    arguments = parser.parse_args()
    if arguments.logits is None or not arguments.logits.exists():
        found = _answers(arguments)
        if arguments.logits is not None:
            np.savez_compressed(arguments.logits, **found)
    else:
        with np.load(arguments.logits, allow_pickle=False) as stored:
            found = dict(stored)
    return measured(found).printed()


def _answers(arguments: argparse.Namespace) -> dict[str, Array]:
    """Return the logits of PyTorch and each artifact by name, the labels, and float32's noise."""
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.bundle
        if place is None:
            place = Path(folder) / "bundle"
            made = api.export(arguments.checkpoint, place, images=arguments.calib)
            made.quantize(precision="fp16")
            made.quantize(precision="int8", images=arguments.calib)
        bundle = api.open_bundle(place).opened()
        loaded = original_network(bundle, None)
        images = labelled_images(arguments.eval, loaded.config.num_classes, loaded.class_names)
        batches = []
        with Networks(bundle, loaded, list(bundle.artefacts), ON_CPU) as networks:
            numeric = networks.classes()
            for batch in decoded_batches(images.items, loaded.preprocessing, BATCH):
                rows = np.array(batch.indices)
                batches.append((rows, networks.logits(batch)))
        order = np.argsort(np.concatenate([rows for rows, _ in batches]))
        found = {
            name: np.concatenate([logits[name] for _, logits in batches])[order]
            for name in (PYTORCH, *(n for n in bundle.artefacts if n in numeric))
        }
        labels = np.array([item.label for item in images.items], np.int64)
        noise = np.array(samples_for(bundle, None, None).noise_db)
        return {**found, "labels": labels, "noise_db": noise}


def measured(found: dict[str, Array]) -> Table:
    """Return both tables as one."""
    labels, noise_db = found.pop("labels"), float(found.pop("noise_db"))
    expected, rng = found.pop(PYTORCH), np.random.default_rng(0)
    table = Table(COLUMNS)
    for name, logits in found.items():
        whole = _judged(name, expected, logits, labels, noise_db).outcome.value
        outcomes = Counter(
            _judged(name, expected[r], logits[r], labels[r], noise_db).outcome.value
            for r in (rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES))
        )
        table.row(name, len(labels), f"{RESAMPLES} resamples", *_counts(outcomes), "-", "-")
        share = f"{100 * outcomes['pass'] / RESAMPLES:.1f} % PASS, {outcomes['fail']} FAIL"
        table.claim(
            f"{name}: PASS on the whole set, on {100 * PASSING:.0f} % of its resamples, and FAIL "
            "on none",
            f"{whole.upper()}; {share}",
            whole == "pass" and outcomes["pass"] >= PASSING * RESAMPLES and not outcomes["fail"],
        )
    wrong = passed = 0
    for name, logits in found.items():
        for size in (size for size in SIZES if size <= len(labels)):
            tried = list(_wrong(name, size, expected, logits, labels, noise_db))
            lost = [loss for loss in tried if _lost_more(loss)]
            through = sum(loss.outcome.value == "pass" for loss in lost)
            counts = _counts(Counter(loss.outcome.value for loss in tried))
            table.row(name, size, f"{len(tried)} wrong", *counts, len(lost), through)
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


def _counts(outcomes: Mapping[str, int]) -> list[int]:
    return [outcomes.get(word, 0) for word in ("pass", "inconclusive", "fail")]


def _judged(
    name: str, expected: Array, found: Array, labels: Array, noise_db: float
) -> ArtefactLoss:
    answers = Answers(len(labels), [PYTORCH, name], expected.shape[1], Task.SINGLE_LABEL)
    logits = {PYTORCH: expected, name: found}
    answers.enter(answered(range(len(labels)), (), logits, PYTORCH, Task.SINGLE_LABEL))
    return judge_artefact(answers, labels, name, name, noise_db)


def _lost_more(loss: ArtefactLoss) -> bool:
    limit = loss.findings[-1].limit
    return limit is not None and loss.loss.loss > limit.value


def _wrong(
    name: str, size: int, expected: Array, logits: Array, labels: Array, noise_db: float
) -> Iterator[ArtefactLoss]:
    """Yield what each wrong artifact is judged on some random subsets of the images."""
    rng = np.random.default_rng(size)
    for fault in FAULTS.values():
        for _ in range(SUBSETS):
            spoiled = fault(logits.copy(), rng)
            rows = rng.choice(len(labels), size, replace=False)
            yield _judged(name, expected[rows], spoiled[rows], labels[rows], noise_db)


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
