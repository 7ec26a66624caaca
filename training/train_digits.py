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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from van_deploy.data import decoded_batches, labelled_images
from van_deploy.files import file_sha256
from van_deploy.model.embedded import (
    EMBEDDED_FOLDER,
    EMBEDDED_NAME,
    digits_images,
    embedded_files,
    write_digits_folder,
)
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

CONFIG = VanConfig(
    embed_dims=(16, 32, 40, 64), depths=(2, 2, 3, 2), mlp_ratios=(4, 4, 2, 2), num_classes=10
)
HELD_OUT = 360  # of 1797 images, 20 %
LICENCE = "CC BY 4.0"
ATTRIBUTION = (
    "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49. "
    "Its test set, as distributed with scikit-learn; values 0..16 were rescaled to 0..255."
)


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


def split_digits() -> dict[str, np.ndarray]:
    """Return train and held-out images (uint8 ``(N, 8, 8)``) and labels (uint8).

    The last images in file order are held out, not shuffled ones: neighbours in
    the file often come from the same hand, and a shuffled split would flatter.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.uint8)
    return {
        "images_train": images[:-HELD_OUT],
        "labels_train": labels[:-HELD_OUT],
        "images_heldout": images[-HELD_OUT:],
        "labels_heldout": labels[-HELD_OUT:],
    }


def preprocessing_from_digits(images: np.ndarray, size: int) -> Preprocessing:
    """Return the contract: bicubic, no crop, and the training images' own mean and deviation."""
    mean, std = round(float(images.mean()) / 255, 3), round(float(images.std()) / 255, 3)
    return Preprocessing(
        image_size=size,
        mean=(mean,) * 3,
        std=(std,) * 3,
        interpolation="bicubic",
        crop_pct=1.0,
        source=f"the training of {EMBEDDED_NAME}",
    )


def inputs_from_digits(images: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """Return the network's input ``(N, 3, S, S)`` float32, made as at inference."""
    transform = preprocessing.transform()
    return torch.stack([transform(Image.fromarray(image)) for image in images])


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


def parameter_groups(model: VAN, plan: Schedule) -> list[dict[str, Any]]:
    """Return AdamW's groups: weights decay, vectors do not, layer scales learn faster."""
    named = dict(model.named_parameters())
    scales = {name for name in named if "layer_scale" in name}
    vectors = {name for name, value in named.items() if value.ndim < 2} - scales
    decay = plan.weight_decay

    def group(names: set[str], rate: float, decay: float) -> dict[str, Any]:
        return {"params": [named[n] for n in sorted(names)], "max_lr": rate, "weight_decay": decay}

    return [
        group(named.keys() - scales - vectors, plan.learning_rate, decay),
        group(vectors, plan.vector_learning_rate, 0.0),
        group(scales, plan.scale_learning_rate, 0.0),
    ]


def batches_of(count: int, plan: Schedule, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield indices of one shuffled epoch; the incomplete last batch is left out."""
    order = torch.randperm(count, generator=generator)
    return iter(order[: count - count % plan.batch].split(plan.batch))


def train(inputs: Tensor, labels: Tensor, black: Tensor, plan: Schedule) -> VAN:
    """Return a network trained on ``inputs`` ``(N, 3, S, S)``, in eval mode."""
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    model = VAN(CONFIG, drop_path_rate=plan.drop_path).train()
    groups = parameter_groups(model, plan)
    rates = [group.pop("max_lr") for group in groups]
    optimiser = torch.optim.AdamW(groups)
    steps = plan.epochs * (len(inputs) // plan.batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, steps, pct_start=0.2)
    for epoch in range(plan.epochs):
        started, right, seen = time.perf_counter(), 0, 0
        for index in batches_of(len(inputs), plan, generator):
            logits = model(augment(inputs[index], black, plan, generator))
            loss = nn.functional.cross_entropy(
                logits, labels[index], label_smoothing=plan.label_smoothing
            )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            rate.step()
            right, seen = right + int((logits.argmax(1) == labels[index]).sum()), seen + len(index)
        print(
            f"epoch {epoch + 1:2}/{plan.epochs}  train top-1 {100 * right / seen:.2f} %  "
            f"{time.perf_counter() - started:.1f} s",
            flush=True,
        )
    return model.eval()


def evaluate(folder: Path) -> dict[str, float]:
    """Return the held-out accuracy of the network in ``folder``, as inference would see it.

    The images go through PNG files, the image reader and the preprocessing
    that the weights carry.
    """
    files = embedded_files(folder)
    with safe_open(files.weights, framework="pt") as file:
        preprocessing = Preprocessing.from_dict(json.loads(file.metadata()["preprocessing"]))
    model = VAN(CONFIG).eval()
    model.load_state_dict(load_file(files.weights))
    right = count = 0
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        dest = write_digits_folder(Path(scratch) / "d", "heldout", folder=folder)
        images = labelled_images(dest, CONFIG.num_classes)
        for batch in decoded_batches(images.items, preprocessing, 64):
            predicted = model(torch.from_numpy(batch.inputs)).argmax(1)
            right += sum(
                int(p) == images.items[i].label
                for p, i in zip(predicted, batch.indices, strict=True)
            )
            count += len(batch.indices)
    return {"images": count, "correct": right, "top1_percent": round(100 * right / count, 2)}


def write_weights(model: VAN, preprocessing: Preprocessing, plan: Schedule, folder: Path) -> None:
    """Write ``van_digits.safetensors`` with what belongs to the weights as its metadata."""
    metadata = {
        "format": "pt",
        "name": EMBEDDED_NAME,
        "preprocessing": json.dumps(preprocessing.as_dict()),
        "classes": json.dumps([str(digit) for digit in range(10)]),
        "training": json.dumps(asdict(plan)),
        "licence": LICENCE,
        "attribution": ATTRIBUTION,
    }
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    embedded_files(folder).weights.write_bytes(save(tensors, metadata))


def card_of(preprocessing: Preprocessing, plan: Schedule, folder: Path) -> dict[str, object]:
    """Return what ``van_digits.json`` says, the measured accuracy included."""
    files = embedded_files(folder)
    return {
        "name": EMBEDDED_NAME,
        "config": asdict(CONFIG),
        "parameters": CONFIG.parameter_count(),
        "preprocessing": preprocessing.as_dict(),
        "classes": [str(digit) for digit in range(10)],
        "heldout": evaluate(folder),
        "split": f"the last {HELD_OUT} images of scikit-learn's load_digits(), in file order, "
        f"are held out; the first {len(digits_images('train', folder)[0])} train",
        "training": asdict(plan),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "scikit-learn": version("scikit-learn"),
        },
        "sha256": {file.name: file_sha256(file) for file in (files.weights, files.images)},
        "data": {"licence": LICENCE, "attribution": ATTRIBUTION},
    }


def make(folder: Path, plan: Schedule) -> None:
    """Train and write the three files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = dict(split_digits())
    np.savez_compressed(embedded_files(folder).images, **parts)
    images, labels = digits_images("train", folder)
    preprocessing = preprocessing_from_digits(images, plan.image_size)
    inputs = inputs_from_digits(images, preprocessing)
    black = inputs_from_digits(np.zeros((1, 8, 8), np.uint8), preprocessing)
    model = train(inputs, torch.from_numpy(labels), black, plan)
    write_weights(model, preprocessing, plan, folder)
    card = json.dumps(card_of(preprocessing, plan, folder), indent=2)
    embedded_files(folder).card.write_text(card + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line, then train or evaluate."""
    parser = argparse.ArgumentParser(
        description="Train van_digits, or measure the accuracy of a finished one."
    )
    parser.add_argument("--output", type=Path, help="folder of the three files")
    parser.add_argument("--evaluate", action="store_true", help="measure only, train nothing")
    for name in ("seed", "epochs"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Schedule, name))
    arguments = parser.parse_args()
    if not (arguments.evaluate or arguments.output):
        parser.error("give --output DIR to train, or --evaluate to measure the packaged network")
    torch.set_num_threads(2)  # the order of sums, and so the last digits, depend on it
    folder = arguments.output or EMBEDDED_FOLDER
    if not arguments.evaluate:
        make(folder, Schedule(seed=arguments.seed, epochs=arguments.epochs))
    result = evaluate(folder)
    print(
        f"held-out top-1 {result['top1_percent']} % "
        f"({result['correct']} of {result['images']} images)"
    )


if __name__ == "__main__":
    main()
