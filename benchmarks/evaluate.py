"""How much of its time `van-deploy evaluate` spends in the networks, and how much around them.

python benchmarks/evaluate.py [--images FOLDER]

Each round evaluates JPEG files (decoding, resizing, statistics and all), and
feeds tensors that are ready to the same networks in the same batches. The ratio of the
two is paired by round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.checks.evaluate import Networks, Settings, evaluate_bundle
from van_deploy.checks.opened import ON_CPU
from van_deploy.config import ModelSettings, Recipe
from van_deploy.data import (
    ImageSet,
    decoded_batches,
    find_images,
    labelled_images,
    opened,
    sample_set,
)
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.pipeline import export_bundle, load_for
from van_deploy.runners.original import original_network

ASKED = 0.85
BATCH = 32
SHORT_SIDE = 288  # pixels: ImageNet's usual copies are of this size


def main() -> int:
    """Print one row a round; return 1 if evaluate is slower than asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="van_b0")
    parser.add_argument("--images", type=Path, help="JPEG files; sample photographs without it")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(arguments, Path(folder))
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return int(not all(claim["met"] for claim in result["claims"]))


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return columns, rows, claims and notes."""
    recipe = Recipe(model=ModelSettings(name=arguments.variant, weights="random"))
    export_bundle(load_for(recipe), recipe, folder / "bundle")
    bundle = Bundle.open(folder / "bundle")
    loaded = original_network(bundle)
    images = folder / "images"
    _write_images(arguments.images, arguments.count, images)
    labelled = labelled_images(images, loaded.config.num_classes)
    rounds = []
    for _ in range(arguments.rounds):
        files, ready = _evaluated(bundle, loaded, labelled), _fed(bundle, loaded, labelled)
        rounds.append((files, ready, ready / files))
    total, ratio = len(labelled), statistics.median(ratio for _, _, ratio in rounds)
    size = loaded.preprocessing.image_size
    return {
        "columns": ["round", "evaluate images/s", "ready tensors images/s", "ratio"],
        "rows": [
            [str(number), f"{total / files:.1f}", f"{total / ready:.1f}", f"{share:.3f}"]
            for number, (files, ready, share) in enumerate(rounds, 1)
        ],
        "claims": [
            {
                "claim": f"evaluate at {100 * ASKED:.0f} % of a loop with ready tensors, or more",
                "measured": f"{100 * ratio:.1f} %",
                "met": ratio >= ASKED,
            }
        ],
        "notes": [
            f"{arguments.variant} (random weights, {size} x {size}) in PyTorch and ONNX Runtime, "
            f"{total} JPEG files, batches of {BATCH}. Opening the networks counts in both; "
            "median of the rounds' own ratios."
        ],
    }


def _write_images(source: Path | None, count: int, dest: Path) -> None:
    """Fill a folder with JPEG files in class folders."""
    paths = find_images(source) if source else []
    samples = [] if source else sample_set().items
    for index in range(count):
        place = dest / str(index % 10) / f"{index:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        if paths:
            shutil.copy(paths[index % len(paths)], place)
            continue
        picture = opened(samples[index % len(samples)])
        scale = SHORT_SIDE / min(picture.size)
        picture.resize((round(picture.width * scale), round(picture.height * scale))).save(place)


def _evaluated(bundle: Bundle, loaded: LoadedVan, labelled: ImageSet) -> float:
    """Return the seconds of one evaluation."""
    labels = np.array([item.label for item in labelled.items], np.int64)
    settings = Settings(batch=BATCH)
    return evaluate_bundle(bundle, loaded, labelled, labels, settings, noise_db=144.0).seconds


def _fed(bundle: Bundle, loaded: LoadedVan, labelled: ImageSet) -> float:
    """Return the seconds the same networks take for the same batches, ready in memory."""
    decoded = list(decoded_batches(labelled.items, loaded.preprocessing, BATCH))
    start = time.perf_counter()
    with Networks(bundle, loaded, list(bundle.artefacts), ON_CPU) as networks:
        for batch in decoded:
            for logits in networks.logits(batch).values():
                if not np.isfinite(logits).all():
                    raise RuntimeError("a network gave a NaN")
    return time.perf_counter() - start


def _text(result: dict[str, Any]) -> str:
    lines = [result["columns"], *result["rows"]]
    claims = [f"{c['claim']}: {c['measured']}" for c in result["claims"]]
    return "\n".join(["  ".join(f"{cell:<24}" for cell in line) for line in lines] + claims)


if __name__ == "__main__":
    raise SystemExit(main())
