"""Where the time of recording ranges goes: the network, handing its tensors out, counting.

One thread, since threads that share a processor slow each other down; the medians of
several batches. ``van-deploy quantize`` has two workers that do all of it side by side.

    python benchmarks/recording.py
    python benchmarks/recording.py --checkpoint FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx

from van_deploy.bundle import Bundle
from van_deploy.config import QuantizeSettings
from van_deploy.data import check_images
from van_deploy.model.preprocess import Preprocessing
from van_deploy.precision.histogram import Histogram
from van_deploy.precision.observer import Observer, float_tensors
from van_deploy.precision.ranges import lean_batch, record_ranges
from van_deploy.precision.recording import counted_tensors
from van_deploy.precision.session import logits_session
from van_deploy.precision.tensor_range import TensorRange
from van_deploy.runners.pytorch import one_torch_thread

SIZE = 224
ROUNDS = 9
RECORDED = 64  # images, for the whole of it


def main() -> int:
    """Print the parts, and the whole by one worker and by two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="van_b0")
    model = _graph(parser.parse_args().checkpoint)
    batch, counted = lean_batch(model), counted_tensors(model, QuantizeSettings())
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "a benchmark")
    images = check_images("", preprocessing, RECORDED).inputs
    names = float_tensors(model)
    observe = Observer(model, names[1:], threads=1).run_in_own_memory()
    plain = logits_session(model, fuse=False, threads=1)
    values = dict(zip(names, (images[:batch], *observe(images[:batch])), strict=True))
    inside = {name: array for name, array in values.items() if name in counted}
    outside = {name: array for name, array in values.items() if name not in counted}
    parts: dict[str, Callable[[], object]] = {
        "the network alone": lambda: plain(images[:batch]),
        "the network, every tensor handed out": lambda: observe(images[:batch]),
        f"histograms of what {len(inside)} tensors hold": _taking(inside, histogram=True),
        f"extremes of what {len(outside)} others hold": _taking(outside, histogram=False),
    }
    with one_torch_thread():
        took = _in_turns(parts)
    millions = [sum(a.size for a in group.values()) / batch / 1e6 for group in (inside, outside)]
    counts = ["", "", *(f"{count:.1f}" for count in millions)]
    rows = [
        [what, count, f"{ms / batch:.1f}"]
        for (what, ms), count in zip(took.items(), counts, strict=True)
    ]
    batches = [images[i : i + batch] for i in range(0, RECORDED, batch)]
    for threads, who in ((1, "one worker"), (2, "two workers")):
        start = time.perf_counter()
        record_ranges(model, batches, histograms=counted, threads=threads)
        ms = 1e3 * (time.perf_counter() - start) / RECORDED
        rows.append([f"all of it by {who}, opening included", "", f"{ms:.1f}"])
    notes = [f"{SIZE} pixels, {batch} images a batch, {RECORDED} for the whole of it."]
    columns = ["what", "million values an image", "ms an image"]
    print(json.dumps({"columns": columns, "rows": rows, "claims": [], "notes": notes}, indent=1))
    return 0


def _graph(checkpoint: str) -> onnx.ModelProto:
    """Return the exported FP32 graph; of random weights for a variant's name."""
    random = [] if Path(checkpoint).exists() else ["--weights", "random"]
    with tempfile.TemporaryDirectory(prefix="van-deploy-recording-") as folder:
        command = [sys.executable, "-m", "van_deploy", "export", checkpoint, *random]
        command += ["--image-size", str(SIZE), "--output", f"{folder}/bundle"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return onnx.load(Bundle.open(f"{folder}/bundle").verified("fp32"))


def _taking(values: Mapping[str, np.ndarray], *, histogram: bool) -> Callable[[], object]:
    """Return a function that takes a batch's tensors in, as a recording does."""
    records = [TensorRange(histogram=Histogram() if histogram else None) for _ in values]
    bins = np.empty(max(array.size for array in values.values()), np.uint32)
    return lambda: [r.add_(v, bins) for r, v in zip(records, values.values(), strict=True)]


def _in_turns(parts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return each part's median milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
