"""Who runtimes.py races: a bundle's artefacts made by the commands, and the peers' files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import contenders_of
from van_deploy.bundle import Bundle
from van_deploy.environment.hardware import cpu
from van_deploy.files import file_sha256

__all__ = ["PEERS", "SIZE", "prepared"]

SIZE = 224
CALIBRATION_IMAGES = 16
PEERS = {
    "peer:export-today": ("export-today.onnx", "onnxruntime", "fp32"),
    "peer:export-today+sim": ("export-today-sim.onnx", "onnxruntime", "fp32"),
    "peer:torchscript-17": ("torchscript-17.onnx", "onnxruntime", "fp32"),
    "peer:torchscript-17+sim": ("torchscript-17-sim.onnx", "onnxruntime", "fp32"),
    "peer:ort-int8": ("ort-int8.onnx", "onnxruntime", "int8"),
    "peer:openvino-direct": ("openvino-direct.xml", "openvino", "fp32"),
    "peer:openvino-direct-bf16": ("openvino-direct.xml", "openvino", "bf16"),
    "peer:openvino-of-export-today": ("export-today-sim.onnx", "openvino", "fp32"),
}


def prepared(
    variant: str, folder: Path, batches: Sequence[int], *, with_peers: bool = True
) -> tuple[list[Contender], list[Skipped], Any]:
    """Return our bundle's contenders and the peers', and the images, everything in ``folder``."""
    import numpy as np

    images = _images(max(batches))
    np.save(folder / "images.npy", images)
    bundle = _bundle(variant, folder)
    entries = [
        e for e in contenders_of(bundle) if not e.name.startswith(("ort-cuda/", "ort-tensorrt/"))
    ]
    if with_peers:
        entries += _peers(folder, _made(variant, folder))
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    return contenders, [entry for entry in entries if isinstance(entry, Skipped)], images


def _made(variant: str, folder: Path) -> dict[str, str]:
    """Return each peer's file and "made", or what went wrong."""
    peers = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("peers.py")),
            variant,
            str(folder),
            str(folder / "images.npy"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(line.split(": ", 1) for line in peers.stdout.splitlines() if ": " in line)


def _images(count: int) -> Any:
    from van_deploy.data import check_images
    from van_deploy.model.preprocess import OFFICIAL

    return check_images("", OFFICIAL, max(count, CALIBRATION_IMAGES)).inputs


def _bundle(variant: str, folder: Path) -> Bundle:
    """Return a bundle with the FP32 graph and INT8 for CPUs, made by the commands themselves."""
    from van_deploy.data import opened, sample_set

    pictures = folder / "pictures"
    pictures.mkdir()
    for index, item in enumerate(sample_set().items):
        picture = opened(item)
        width, height = picture.size
        for part in range(-(-CALIBRATION_IMAGES // 7)):  # crops of the sample photographs
            inset = part * min(width, height) // 8
            box = (inset, inset, width - inset, height - inset)
            picture.crop(box).save(pictures / f"{index}-{part}.png")
    target = folder / "bundle"
    words = ["export", variant, "--weights", "random", "--output", str(target)]
    _command(words, check=True)
    # How fast INT8 is does not depend on its scales: the quickest way to have some will do.
    quick = ["--method", "minmax", "--no-equalize", "--no-refine"]
    words = ["quantize", str(target), "--precision", "int8", "--target", "cpu"]
    _command([*words, "--images", str(pictures), *quick], check=False)  # its gate is not ours
    return Bundle.open(target)


def _command(words: Sequence[str], *, check: bool) -> None:
    command = [sys.executable, "-m", "van_deploy", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"van-deploy {' '.join(words)}:\n{done.stderr[-2000:]}")
    if done.returncode > 1:
        print(f"van-deploy {' '.join(words)}:\n{done.stderr[-2000:]}", file=sys.stderr)


def _peers(folder: Path, outcomes: dict[str, str]) -> Iterable[Contender | Skipped]:
    bf16 = cpu().has_bfloat16
    for name, (file, runtime, precision) in PEERS.items():
        if outcomes.get(file) != "made":
            yield Skipped(name, outcomes.get(file, "was not made"))
        elif precision == "bf16" and not bf16:
            yield Skipped(name, "this processor has no bfloat16 instructions")
        else:
            path = folder / file
            yield Contender(name, runtime, precision, str(path), sha256=file_sha256(path))
