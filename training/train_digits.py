"""Train ``van_digits``, the small VAN that ships inside the package.

It trains on scikit-learn's handwritten digits and writes three files:
``van_digits.safetensors`` (official key names), ``van_digits.json`` (architecture,
training and held-out accuracy) and ``digits.npz`` (both splits of the data, so that
the package does not need scikit-learn)::

    python training/train_digits.py --output DIR

The held-out accuracy is measured with the inference pipeline.

Training took 1 min 56 s on two CPU cores. A second run with the same versions
on the same kind of machine gave bit-identical tensors (the order of the file's metadata
may differ); other versions or processors may differ by rounding, and so by an image or two.
"""

import argparse
import json
import math
import platform
import tempfile
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
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

CONFIG = VanConfig((16, 32, 40, 64), (2, 2, 3, 2), mlp_ratios=(4, 4, 2, 2), num_classes=10)
HELD_OUT = 360  # of 1797 images, 20 %
RIGHTS = {
    "licence": "CC BY 4.0",
    "attribution": "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49. "
    "Its test set, as distributed with scikit-learn; values 0..16 were rescaled to 0..255.",
}
VERSIONS = ("torch", "timm", "numpy", "pillow", "scikit-learn")


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters; the defaults are those of the packaged weights."""

    seed: int = 0
    epochs: int = 24
    batch: int = 64
    learning_rate: float = 3e-3
    vector_learning_rate: float = 1e-2  # of norms and biases
    scale_learning_rate: float = 2e-2  # of layer scales, which start at 0.01
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    drop_path: float = 0.05
    rotate_degrees: float = 15.0
    shift: float = 0.12  # of half the side
    scale: float = 0.15
    image_size: int = 64


def split_digits() -> dict[str, Any]:
    """Return train and held-out images (uint8 ``(N, 8, 8)``) and labels (uint8).

    The last images in file order are held out. Neighbours in the file often have the same
    writer, so the accuracy on a shuffled split would be too high.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = np.rint(data.images * (255 / 16)), data.target
    splits = {"images_train": images[:-HELD_OUT], "images_heldout": images[-HELD_OUT:]}
    splits |= {"labels_train": labels[:-HELD_OUT], "labels_heldout": labels[-HELD_OUT:]}
    return {name: values.astype(np.uint8) for name, values in splits.items()}


def augment(batch: Tensor, black: Tensor, plan: Schedule, generator: torch.Generator) -> Tensor:
    """Return ``batch`` with each image randomly rotated, scaled and shifted, on black."""

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(len(batch), *shape, generator=generator) * 2 - 1) * limit

    angle, zoom = uniform(math.radians(plan.rotate_degrees)), 1 / (1 + uniform(plan.scale))
    cosine, sine, shift = zoom * angle.cos(), zoom * angle.sin(), uniform(plan.shift, 2)
    rows = [(cosine, -sine, shift[:, 0]), (sine, cosine, shift[:, 1])]
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (N, 2, 3)
    grid = nn.functional.affine_grid(matrix, list(batch.shape), align_corners=False)
    # grid_sample pads with zeros, but black is not 0 in a normalised image
    return nn.functional.grid_sample(batch - black, grid, align_corners=False) + black


def train(inputs: Tensor, labels: Tensor, black: Tensor, plan: Schedule) -> VAN:
    """Return a network trained on ``inputs`` ``(N, 3, S, S)``, in evaluation mode."""
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    model = VAN(CONFIG, drop_path_rate=plan.drop_path).train()
    groups: list[list[Tensor]] = [[], [], []]  # weights, vectors, layer scales
    for name, parameter in sorted(model.named_parameters()):
        groups[2 if "layer_scale" in name else int(parameter.ndim < 2)].append(parameter)
    rates = [plan.learning_rate, plan.vector_learning_rate, plan.scale_learning_rate]
    decays = [plan.weight_decay, 0.0, 0.0]
    pairs = zip(groups, decays, strict=True)
    optimiser = torch.optim.AdamW([{"params": p, "weight_decay": decay} for p, decay in pairs])
    used = len(inputs) // plan.batch * plan.batch  # an incomplete last batch is omitted
    steps = plan.epochs * (used // plan.batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, steps, pct_start=0.2)
    criterion = nn.CrossEntropyLoss(label_smoothing=plan.label_smoothing)
    for _ in range(plan.epochs):
        for index in torch.randperm(len(inputs), generator=generator)[:used].split(plan.batch):
            logits = model(augment(inputs[index], black, plan, generator))
            optimiser.zero_grad()
            criterion(logits, labels[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            scheduler.step()
    return model.eval()


def evaluate(folder: Path) -> dict[str, float]:
    """Return the held-out accuracy of the network in ``folder``, measured as in inference.

    The packaged digits are written as PNGs, read, and preprocessed as the weights require.
    """
    loaded = load_van(str(folder / f"{EMBEDDED_NAME}.safetensors"))
    with tempfile.TemporaryDirectory() as images, torch.inference_mode():
        labelled = label_images(write_digits_folder(images, "heldout"), CONFIG.num_classes)
        (batch,) = decoded_batches(labelled.items, loaded.preprocessing, len(labelled))
        predicted = loaded.model(torch.from_numpy(batch.inputs)).argmax(1).numpy()
    count, correct = len(batch), int((predicted == labelled.labels).sum())
    return {"images": count, "correct": correct, "top1_percent": round(100 * correct / count, 2)}


def make(folder: Path, plan: Schedule) -> None:
    """Train and write the three files to ``folder``.

    The preprocessing is bicubic, without a crop, with mean and standard deviation of the
    training images. It is in the metadata of the weights, and in ``van_digits.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, images_file = folder / f"{EMBEDDED_NAME}.safetensors", folder / "digits.npz"
    splits = split_digits()
    np.savez_compressed(images_file, **splits)
    images, labels = splits["images_train"], splits["labels_train"].astype(np.int64)
    mean, std = ((round(float(x) / 255, 3),) * 3 for x in (images.mean(), images.std()))
    source = f"the training of {EMBEDDED_NAME}"
    preprocessing = Preprocessing(plan.image_size, mean, std, "bicubic", 1.0, source)
    transform = preprocessing.transform()
    inputs = torch.stack([transform(Image.fromarray(image)) for image in images])
    black = transform(Image.new("L", (8, 8)))[None]
    model = train(inputs, torch.from_numpy(labels), black, plan)
    facts = {"preprocessing": preprocessing.as_dict(), "classes": [*"0123456789"]}
    facts["training"] = asdict(plan)
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    weights.write_bytes(save(tensors, {"format": "pt", "name": EMBEDDED_NAME} | RIGHTS | metadata))
    card = {
        "name": EMBEDDED_NAME,
        "config": asdict(CONFIG),
        "parameters": CONFIG.parameter_count(),
        **facts,
        "heldout": evaluate(folder),
        "split": f"the last {HELD_OUT} images of scikit-learn's load_digits(), in file order, "
        f"are held out; the first {len(images)} train",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in VERSIONS},
        "sha256": {file.name: file_sha256(file) for file in (weights, images_file)},
        "data": RIGHTS,
    }
    weights.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the three files")
    folder = parser.parse_args().output
    torch.set_num_threads(2)  # rounding depends on the number of threads
    make(folder, Schedule())
    print(f"held-out: {evaluate(folder)}")
