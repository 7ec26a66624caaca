"""Train ``van_digits``, the small VAN that ships inside the package.

Reads scikit-learn's handwritten digits, splits them by class with a seed,
trains on the larger part and writes three files: ``van_digits.safetensors``
(official key names), ``van_digits.json`` (what it is, how it was made and its
held-out accuracy) and ``digits.npz`` (both parts of the data, so that nothing
at run time needs scikit-learn)::

    python training/train_digits.py --output DIR
    python training/train_digits.py --evaluate [--output DIR]

``--evaluate`` trains nothing: it sends the held-out images of a finished
folder (by default the one inside the package) through the inference pipeline
and prints the accuracy. It is the same function that fills in the accuracy
after training. Needs the ``dev`` extra (scikit-learn).

Training took 1 min 56 s on two CPU cores. A second run with the same versions
on the same kind of machine gave every tensor bit for bit (the file's metadata
may come in another order); other versions or processors may differ in the last
digits and so by an image or two.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from van_deploy.data.images import decoded_batches
from van_deploy.data.labels import label_images
from van_deploy.files import file_sha256
from van_deploy.model.checkpoint import load_van
from van_deploy.model.embedded import EMBEDDED_FOLDER, EMBEDDED_NAME, write_digits_folder
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

CONFIG = VanConfig((16, 32, 40, 64), (2, 2, 3, 2), mlp_ratios=(4, 4, 2, 2), num_classes=10)
HELD_OUT = 360  # of 1797 images, 20 %
CLASSES = list("0123456789")
LICENCE = "CC BY 4.0"
ATTRIBUTION = (
    "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49. "
    "Its test set, as distributed with scikit-learn; values 0..16 were rescaled to 0..255."
)
VERSIONS = ("torch", "timm", "numpy", "pillow", "scikit-learn")


@dataclass(frozen=True)
class Schedule:
    """How the network is trained; the defaults made the weights that ship."""

    seed: int = 0
    epochs: int = 24
    batch: int = 64
    learning_rate: float = 3e-3
    vector_learning_rate: float = 1e-2  # norms and biases, so that they move away from 1 and 0
    scale_learning_rate: float = 2e-2  # layer scales start at 0.01 and must grow
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    drop_path: float = 0.05
    rotate_degrees: float = 15.0
    shift: float = 0.12  # of half the side
    scale: float = 0.15
    image_size: int = 64


def split_digits() -> dict[str, Any]:
    """Return train and held-out images (uint8 ``(N, 8, 8)``) and labels (uint8).

    The last images in file order are held out, not shuffled ones: neighbours in
    the file often come from the same hand, and a shuffled split would flatter.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.uint8)
    cut = len(images) - HELD_OUT
    parts = {"images_train": images[:cut], "images_heldout": images[cut:]}
    return {**parts, "labels_train": labels[:cut], "labels_heldout": labels[cut:]}


def augment(batch: Tensor, black: Tensor, plan: Schedule, generator: torch.Generator) -> Tensor:
    """Return ``batch`` with each image turned, scaled and shifted a little, on black."""

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(len(batch), *shape, generator=generator) * 2 - 1) * limit

    angle, zoom = uniform(math.radians(plan.rotate_degrees)), 1 / (1 + uniform(plan.scale))
    cosine, sine, shift = zoom * angle.cos(), zoom * angle.sin(), uniform(plan.shift, 2)
    rows = [(cosine, -sine, shift[:, 0]), (sine, cosine, shift[:, 1])]
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (N, 2, 3)
    grid = nn.functional.affine_grid(matrix, list(batch.shape), align_corners=False)
    # grid_sample pads with zeros, which is not black once an image is normalised
    return nn.functional.grid_sample(batch - black, grid, align_corners=False) + black


def train(inputs: Tensor, labels: Tensor, black: Tensor, plan: Schedule) -> VAN:
    """Return a network trained on ``inputs`` ``(N, 3, S, S)``, in eval mode."""
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    model = VAN(CONFIG, drop_path_rate=plan.drop_path).train()
    named = sorted(model.named_parameters())
    scales = [value for name, value in named if "layer_scale" in name]
    others = [value for name, value in named if "layer_scale" not in name]
    weights, vectors = [v for v in others if v.ndim >= 2], [v for v in others if v.ndim < 2]
    rates = [plan.learning_rate, plan.vector_learning_rate, plan.scale_learning_rate]
    groups = [{"params": group, "weight_decay": 0.0} for group in (weights, vectors, scales)]
    groups[0]["weight_decay"] = plan.weight_decay
    optimiser = torch.optim.AdamW(groups)
    whole = len(inputs) // plan.batch * plan.batch  # an incomplete last batch is left out
    steps = plan.epochs * (whole // plan.batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, steps, pct_start=0.2)
    criterion = nn.CrossEntropyLoss(label_smoothing=plan.label_smoothing)
    for epoch in range(plan.epochs):
        started, right = time.perf_counter(), 0
        for index in torch.randperm(len(inputs), generator=generator)[:whole].split(plan.batch):
            logits = model(augment(inputs[index], black, plan, generator))
            optimiser.zero_grad()
            criterion(logits, labels[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            rate.step()
            right += int((logits.argmax(1) == labels[index]).sum())
        took, top1 = time.perf_counter() - started, 100 * right / whole
        print(f"epoch {epoch + 1:2}/{plan.epochs}  train top-1 {top1:.2f} %  {took:.1f} s")
    return model.eval()


def evaluate(folder: Path) -> dict[str, float]:
    """Return the held-out accuracy of the network in ``folder``, as inference would see it.

    The packaged digits go through PNG files, the image reader and the preprocessing that the
    weights carry.
    """
    loaded, right, count = load_van(str(folder / f"{EMBEDDED_NAME}.safetensors")), 0, 0
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        items = label_images(write_digits_folder(scratch, "heldout"), CONFIG.num_classes).items
        for batch in decoded_batches(items, loaded.preprocessing, 64):
            predicted = loaded.model(torch.from_numpy(batch.inputs)).argmax(1).tolist()
            right += sum(p == items[i].label for p, i in zip(predicted, batch.indices, strict=True))
            count += len(predicted)
    return {"images": count, "correct": right, "top1_percent": round(100 * right / count, 2)}


def make(folder: Path, plan: Schedule) -> None:
    """Train and write the three files into ``folder``.

    The preprocessing is bicubic, without a crop, with the training images' own mean and
    deviation. It and what else belongs to the weights is their metadata; ``van_digits.json``
    says it, too, with the accuracy that was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, images_file = folder / f"{EMBEDDED_NAME}.safetensors", folder / "digits.npz"
    parts = split_digits()
    np.savez_compressed(images_file, **parts)
    images, labels = parts["images_train"], parts["labels_train"].astype(np.int64)
    mean, std = ((round(float(x) / 255, 3),) * 3 for x in (images.mean(), images.std()))
    source = f"the training of {EMBEDDED_NAME}"
    preprocessing = Preprocessing(plan.image_size, mean, std, "bicubic", 1.0, source)
    transform = preprocessing.transform()
    inputs = torch.stack([transform(Image.fromarray(image)) for image in images])
    black = transform(Image.new("L", (8, 8)))[None]
    model = train(inputs, torch.from_numpy(labels), black, plan)
    said = {"preprocessing": preprocessing.as_dict(), "classes": CLASSES, "training": asdict(plan)}
    metadata = {
        "format": "pt",
        "name": EMBEDDED_NAME,
        "licence": LICENCE,
        "attribution": ATTRIBUTION,
    }
    metadata |= {name: json.dumps(value) for name, value in said.items()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    weights.write_bytes(save(tensors, metadata))
    card = {
        "name": EMBEDDED_NAME,
        "config": asdict(CONFIG),
        "parameters": CONFIG.parameter_count(),
        **said,
        "heldout": evaluate(folder),
        "split": f"the last {HELD_OUT} images of scikit-learn's load_digits(), in file order, "
        f"are held out; the first {len(images)} train",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in VERSIONS},
        "sha256": {file.name: file_sha256(file) for file in (weights, images_file)},
        "data": {"licence": LICENCE, "attribution": ATTRIBUTION},
    }
    weights.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line, then train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the three files")
    parser.add_argument("--evaluate", action="store_true", help="measure only, train nothing")
    given = parser.parse_args()
    if not (given.evaluate or given.output):
        parser.error("give --output DIR to train, or --evaluate to measure the packaged network")
    torch.set_num_threads(2)  # the order of sums, and so the last digits, depend on it
    if not given.evaluate:
        make(given.output, Schedule())
    print(f"held-out: {evaluate(given.output or EMBEDDED_FOLDER)}")


if __name__ == "__main__":
    main()
