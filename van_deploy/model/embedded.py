"""The network and the images that ship inside the package.

``van_digits`` is a small VAN trained on scikit-learn's handwritten digits by
``training/train_digits.py``. It needs no download, so the demo and the tests
use it: drift is measured on a trained network.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from van_deploy.model.variants import EMBEDDED_NAME as EMBEDDED_NAME

EMBEDDED_FOLDER = Path(__file__).parent / "digits"
# With official key names. In the same folder: ``van_digits.json`` (architecture, preprocessing,
# classes, accuracy, training, licence) and ``digits.npz`` (``images_train``, ``labels_train``,
# ``images_heldout``, ``labels_heldout``).
EMBEDDED_WEIGHTS = EMBEDDED_FOLDER / f"{EMBEDDED_NAME}.safetensors"

DigitsSplit = Literal["train", "heldout"]


def digits_images(split: DigitsSplit) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return one split of the digits: images ``(N, 8, 8)`` uint8 and labels ``(N,)`` int64.

    Strokes are bright (255) on black (0).
    """
    with np.load(EMBEDDED_FOLDER / "digits.npz") as parts:
        return parts[f"images_{split}"], parts[f"labels_{split}"].astype(np.int64)


def write_digits_folder(dest: Path | str, split: DigitsSplit, limit: int | None = None) -> Path:
    """Write one split of the digits to ``dest`` as greyscale 8 x 8 PNGs, and return ``dest``.

    The files are ``<class>/<split>_<index>.png``.

    Args:
        dest: folder to create, with its parents.
        split: of the data.
        limit: maximum number of images, spread evenly over the classes; by default all.
    """
    images, labels = digits_images(split)
    rank = np.array([(labels[:index] == label).sum() for index, label in enumerate(labels)])
    for index in np.lexsort((labels, rank))[:limit]:
        path = Path(dest) / str(labels[index]) / f"{split}_{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(path)
    return Path(dest)
