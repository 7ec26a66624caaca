"""Makes the bundles that part b of the GPU report reads, on a machine without a GPU.

    python benchmarks/gpu/bundles.py DIR
    python benchmarks/gpu/bundles.py DIR --checkpoint FILE --calib FOLDER --eval FOLDER

``van_b0`` (random weights, 224) and ``van_digits`` always; ``van_b0_cifar10`` with a trained
checkpoint and its images, of which ``--count`` a class are copied beside it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Make them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="a trained network")
    parser.add_argument("--calib", type=Path, help="its calibration images, class folders")
    parser.add_argument("--eval", type=Path, help="its labelled images, class folders")
    parser.add_argument("--count", type=int, default=50, help="labelled images kept a class")
    parser.add_argument("--only", default="", help="one of the three")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.only.split(",") if options.only else ["van_digits", "van_b0", "van_b0_cifar10"]
    if "van_digits" in wanted:
        bundle = str(folder / "van_digits")
        _run("export", "van_digits", "--output", bundle)
        for precision in ("fp16", "int8"):
            _run("quantize", bundle, "--precision", precision, "--calibration", "digits")
    if "van_b0" in wanted:
        bundle = str(folder / "van_b0")
        batch = ["--batch", "1:32:128"]
        _run("export", "van_b0", "--weights", "random", *batch, "--output", bundle)
        _run("quantize", bundle, "--precision", "fp16")
        _run("quantize", bundle, "--precision", "int8", "--calibrate-on-noise")
    if "van_b0_cifar10" in wanted and options.checkpoint:
        bundle = str(folder / "van_b0_cifar10")
        size = ["--image-size", "64", "--crop-pct", "1.0"]
        _run("export", "van_b0", "--weights", str(options.checkpoint), *size, "--output", bundle)
        for precision in ("fp16", "int8"):
            images = ["--images", str(options.calib), "--eval", str(options.eval)]
            _run("quantize", bundle, "--precision", precision, *images)
        for group in sorted(path for path in options.eval.iterdir() if path.is_dir()):
            target = folder / "cifar10" / group.name
            target.mkdir(parents=True, exist_ok=True)
            for image in sorted(group.iterdir())[: options.count]:
                shutil.copy(image, target)


def _run(*arguments: str) -> None:
    """Run a van-deploy command. A gate that fails is said, and does not end this."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "van_deploy", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    print(
        f"van-deploy {' '.join(arguments)}: exit {done.returncode}, "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
