"""Share of the time of ``van-deploy evaluate`` that the networks take.

Each round evaluates JPEG files (with decoding, resizing and metrics) and runs the same networks
on the same batches of decoded tensors; the ratio is paired by round.

    python -m benchmarks.evaluate --images FOLDER
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import van_deploy as vd
from benchmarks.table import Table, parse_options
from van_deploy.data.images import decode_item, decoded_batches, image_set
from van_deploy.data.labels import label_images
from van_deploy.data.samples import sample_set
from van_deploy.runners.network import original_network
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner
from van_deploy.runners.pytorch import TorchRunner

BATCH = 32
SHORT_SIDE = 288  # pixels: ImageNet's usual copies are of this size


def main() -> int:
    """Print the table."""
    arguments = parse_options(__doc__, variant="van_b0", images="", count=128, rounds=3)
    table = Table(("round", "evaluate images/s", "decoded tensors images/s", "ratio"))
    shares = []
    with tempfile.TemporaryDirectory() as name:
        bundle = vd.export(arguments.variant, weights="random", output=Path(name) / "bundle")
        images = Path(name) / "images"
        found = image_set(Path(arguments.images)) if arguments.images else sample_set()
        _write_images(found.items, arguments.count, images)
        for number in range(1, arguments.rounds + 1):
            files = bundle.evaluate(images, batch=BATCH, class_order="index").seconds
            ready = _time_networks(bundle, images)
            shares.append(ready / files)
            rates = (f"{arguments.count / seconds:.1f}" for seconds in (files, ready))
            table.row(number, *rates, f"{shares[-1]:.3f}")
    table.row("median", "", "", f"{statistics.median(shares):.3f}")
    table.notes.append(
        f"{arguments.variant} in PyTorch and ONNX Runtime, {arguments.count} JPEG files, batches "
        f"of {BATCH}, {torch.get_num_threads()} threads. Opening the networks counts in both."
    )
    return table.print_json()


def _write_images(items: Sequence[Any], count: int, target: Path) -> None:
    """Write JPEG files to class folders."""
    for index in range(count):
        place = target / str(index % 10) / f"{index:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        image = decode_item(items[index % len(items)])
        scale = SHORT_SIDE / min(image.size)
        image.resize((round(image.width * scale), round(image.height * scale))).save(place)


def _time_networks(bundle: vd.Bundle, images: Path) -> float:
    """Return the seconds that the same networks take for the same batches in memory."""
    artifact = bundle.load()
    loaded = original_network(artifact)
    labelled = label_images(images, loaded.config.num_classes, class_order="index")
    ready = [b.inputs for b in decoded_batches(labelled.items, loaded.preprocessing, BATCH)]
    start = time.perf_counter()
    with OnnxRuntimeRunner(artifact.verified_path("fp32")) as graph:
        for batch in ready:
            TorchRunner(loaded.model).run(batch)
            graph.run(batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
