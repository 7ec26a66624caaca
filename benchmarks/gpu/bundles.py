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
from pathlib import Path


def main() -> None:
    """Make them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="a trained network")
    parser.add_argument("--calib", type=Path, help="its calibration images, class folders")
    parser.add_argument("--eval", type=Path, help="its labelled images, class folders")
    parser.add_argument("--count", type=int, default=50, help="labelled images kept a class")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    random = ("--weights", "random", "--batch", "1:32:128")
    _made(folder / "van_digits", "van_digits", [], "--calibration", "digits")
    _made(folder / "van_b0", "van_b0", random, "--calibrate-on-noise")
    if not options.checkpoint:
        return
    trained = ("--weights", options.checkpoint, "--image-size", "64", "--crop-pct", "1.0")
    images = ("--images", options.calib, "--eval", options.eval)
    _made(folder / "van_b0_cifar10", "van_b0", trained, *images)
    for group in sorted(path for path in options.eval.iterdir() if path.is_dir()):
        target = folder / "cifar10" / group.name
        target.mkdir(parents=True, exist_ok=True)
        for image in sorted(group.iterdir())[: options.count]:
            shutil.copy(image, target)


def _made(bundle: Path, model: str, how: tuple[object, ...], *calibration: object) -> None:
    """Export a network, and quantise it. A gate that fails is said, and does not end this."""
    _run("export", model, *how, "--output", bundle)
    for precision in ("fp16", "int8"):
        given = calibration if "--eval" in calibration or precision == "int8" else ()
        _run("quantize", bundle, "--precision", precision, *given)


def _run(*words: object) -> None:
    command = ["van-deploy", *map(str, words)]
    done = subprocess.run([sys.executable, "-m", "van_deploy", *command[1:]], check=False)
    print(f"{' '.join(command)}: exit {done.returncode}", flush=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
