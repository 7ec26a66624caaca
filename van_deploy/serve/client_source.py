"""The example client that goes into a package: one file that needs nothing of this project.

It is the one place where a client's preprocessing is written down for others to
copy, so it is made from the weights' own values and tested to give the same
bytes as :mod:`van_deploy.model.pixels`.
"""

from __future__ import annotations

import json

from van_deploy.metrics import Task
from van_deploy.model.preprocess import Preprocessing

__all__ = ["client_source"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_TEMPLATE = '''\
"""Ask the model what is in some pictures: python client.py [--url HOST:PORT] PICTURE...

Needs: pip install numpy pillow "tritonclient[http]"
"""

import argparse
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from PIL import Image, ImageOps

MODEL = @MODEL@
SIZE = @SIZE@  # side of the square the network sees
RESIZED = @RESIZED@  # pixels that @SIDES@ of the picture is resized to, before the crop
FILTER = Image.Resampling.@FILTER@
MEAN = np.array(@MEAN@, np.float32)
STD = np.array(@STD@, np.float32)
LABELS = Path(__file__).parent / "models" / MODEL / "labels.txt"


def pixels_from_file(path):
    """Return a picture resized and cropped, (SIZE, SIZE, channels) uint8."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("@MODE@")
    width, height = image.size
@RESIZE@
    image = image.resize(size, FILTER)
@CROP@
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def tensor_from_files(paths):
    """Return pictures as the model takes them."""
    pixels = np.stack([pixels_from_file(path) for path in paths])
@PREPARE@


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--url", default="localhost:8000")
    arguments = parser.parse_args()
    names = LABELS.read_text(encoding="utf-8").splitlines() if LABELS.exists() else None
    with triton.InferenceServerClient(arguments.url) as client:
        for path in arguments.pictures:
            tensor = tensor_from_files([path])
            given = triton.InferInput(@INPUT@, list(tensor.shape), @TYPE@)
            given.set_data_from_numpy(tensor)
            wanted = triton.InferRequestedOutput("logits")
            logits = client.infer(MODEL, [given], outputs=[wanted]).as_numpy("logits")[0]
@ODDS@
            for index in np.argsort(-logits, kind="stable")[:5]:
                print(f"{path}\\t{odds[index]:.4f}\\t{names[index] if names else index}")


if __name__ == "__main__":
    main()
'''

_RESIZE = {
    "center": """\
    long_side = int(RESIZED * max(width, height) / min(width, height))
    size = (RESIZED, long_side) if width <= height else (long_side, RESIZED)""",
    "squash": """\
    size = (RESIZED, RESIZED)""",
    "border": """\
    ratio = max(width, height) / RESIZED
    size = (max(1, round(width / ratio)), max(1, round(height / ratio)))""",
}
_CROP = """\
    left, top = (@OFFSET@ for side in size)
    image = image.crop((left, top, left + SIZE, top + SIZE))"""
_PAD = """\
    left, top = (s // 2 if s > 0 else round(s / -2) * -1 for s in (SIZE - side for side in size))
    canvas = Image.new("@MODE@", (SIZE, SIZE), tuple(round(255 * value) for value in MEAN))
    canvas.paste(image, (left, top))
    image = canvas"""
_PREPARE = {
    "uint8": "    return pixels",
    "normalize": "    return pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)",
    "none": """\
    values = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return (values - MEAN.reshape(1, -1, 1, 1)) / STD.reshape(1, -1, 1, 1)""",
}


_ODDS = {
    Task.SINGLE_LABEL: """\
            odds = np.exp(logits - logits.max())
            odds /= odds.sum()""",
    Task.BINARY: """\
            odds = 1 / (1 + np.exp(-logits.astype(np.float64)))""",
    Task.REGRESSION: """\
            odds = logits""",
}


def client_source(
    model: str,
    input_name: str,
    input_type: str,
    embedding: str,
    preprocessing: Preprocessing,
    task: Task = Task.SINGLE_LABEL,
) -> str:
    """Return the source of a client for one model.

    Args:
        model: its name on the server.
        input_name: of its input.
        input_type: the protocol's name of the input's type, such as ``UINT8``.
        embedding: what preprocessing the model has inside.
        preprocessing: of the weights.
        task: how logits become probabilities.
    """
    values = {
        "MODEL": json.dumps(model),
        "SIZE": preprocessing.image_size,
        "RESIZED": preprocessing.resize_size,
        "SIDES": {"center": "the short side", "squash": "each side", "border": "the long side"}[
            preprocessing.crop_mode
        ],
        "RESIZE": _RESIZE[preprocessing.crop_mode],
        "CROP": _PAD if preprocessing.crop_mode == "border" else _CROP,
        "OFFSET": "(side - SIZE) // 2"
        if preprocessing.crop_rounding == "floor"
        else "round((side - SIZE) / 2)",
        "FILTER": preprocessing.interpolation.upper(),
        "MEAN": list(preprocessing.mean),
        "STD": list(preprocessing.std),
        "MODE": _MODES.get(preprocessing.channels, "RGB"),
        "INPUT": json.dumps(input_name),
        "TYPE": json.dumps(input_type),
        "PREPARE": _PREPARE[embedding],
        "ODDS": _ODDS.get(task, _ODDS[Task.BINARY]),
    }
    source = _TEMPLATE
    for key, value in values.items():
        source = source.replace(f"@{key}@", str(value))
    return source
