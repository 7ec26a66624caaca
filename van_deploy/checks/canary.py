"""One picture and its answer, kept in the bundle: does the whole way still give it?

The agreement check compares tensors. The canary starts from a *file*, so it
also catches what happens before the network: another decoder, another resize,
another mean. Its answer is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from van_deploy.bundle import Bundle, Canary, ProbableClass
from van_deploy.checks.opened import ON_CPU, Execution
from van_deploy.data import image_set, open_image, opened, sample_set
from van_deploy.errors import BundleError, ImageError
from van_deploy.files import file_sha256
from van_deploy.metrics import softmax
from van_deploy.model.pixels import pixels_from_image
from van_deploy.model.preprocess import Preprocessing
from van_deploy.runners.base import Logits
from van_deploy.runners.network import PYTORCH, Network

__all__ = [
    "CANARY_FILE",
    "CANARY_TOLERANCE",
    "CanaryReport",
    "canary_entry",
    "check_canary",
    "write_canary_picture",
]

CANARY_FILE = "canary.png"
LONGEST_SIDE = 512  # pixels: large enough to be resized by the pipeline, small enough to keep
TOP = 5

CANARY_TOLERANCE: Mapping[str, float] = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.15}
"""Largest change of a probability, by precision.

One picture says little about accuracy, and INT8 may move an undecided one far;
wrong preprocessing moves it further. Accuracy is judged on many pictures elsewhere.
"""


@dataclass(frozen=True)
class CanaryReport:
    """What an artefact says of the canary.

    Attributes:
        artefact: which one.
        runner: what ran it.
        expected: PyTorch's first classes as ``(class, probability)``.
        found: the artefact's.
        max_change: largest change of an expected class's probability.
        tolerance: what was allowed.
        failures: a sentence for each thing that is wrong.
    """

    artefact: str
    runner: str
    expected: tuple[tuple[int, float], ...]
    found: tuple[tuple[int, float], ...]
    max_change: float
    tolerance: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the answer is PyTorch's."""
        return not self.failures

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, object]:
        """Return the figures, ready for JSON."""
        return {**asdict(self), "passed": self.passed}


def write_canary_picture(
    path: Path, name: str, preprocessing: Preprocessing, folder: Path | None = None
) -> str:
    """Write the canary for a model to ``path`` as PNG and return what it is.

    Args:
        path: where to.
        name: the model's; ``van_digits`` gets one of its held-out digits.
        preprocessing: of the network: 1, 3 or 4 channels.
        folder: the user's images, whose first is taken; None for a sample picture.
    """
    images = image_set(folder) if folder else sample_set(name, preprocessing)
    picture = opened(images.items[0], preprocessing.channels)
    if picture is None:
        raise ImageError(f"The {images.items[0].name} is no image.", "Give images.")
    described = f"'{images.items[0].name}'" if folder else f"the first of: {images.description}"
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    picture.save(path, format="PNG", optimize=True)
    return described


def canary_entry(path: Path, logits: Logits, described: str) -> Canary:
    """Return what the manifest keeps of the canary in ``path``.

    Args:
        path: the file, as it will be in the bundle.
        logits: the original network's for that file, ``(1, K)``.
        described: what the picture is.
    """
    probabilities = softmax(logits.astype(np.float64))[0]
    order = np.argsort(-logits[0], kind="stable")[:TOP]
    return Canary(
        file=CANARY_FILE,
        sha256=file_sha256(path),
        image=described,
        reference="PyTorch, original network, float32",
        top5=tuple(ProbableClass(index=int(i), probability=float(probabilities[i])) for i in order),
    )


def check_canary(
    bundle: Bundle,
    artefact: str = "fp32",
    execution: Execution = ON_CPU,
    *,
    threads: int | None = None,
) -> CanaryReport:
    """Return whether ``artefact`` says of the bundle's canary what PyTorch said.

    Every expected class must keep its probability within the precision's
    tolerance, and the first class must stay first unless the first two were
    closer than that.

    Raises:
        BundleError: the bundle has no canary, or it was changed.
        MissingDependency: nothing here runs the artefact.
    """
    entry = bundle.manifest.canary
    path = bundle.path / CANARY_FILE
    if entry is None:
        raise BundleError(
            f"The bundle '{bundle.path}' has no canary.",
            "Export it again with this version of van-deploy.",
        )
    if not path.is_file() or file_sha256(path) != entry.sha256:
        raise BundleError(
            f"The canary '{path}' is missing or was changed after the manifest was written.",
            "Make the bundle again, or restore the file.",
        )
    network = Network(
        bundle,
        artefact,
        runner=execution.runner,
        threads=threads,
        trust_engine=execution.trust_engine,
    )
    with network:
        image = open_image(path, channels=network.preprocessing.channels)
        pixels = pixels_from_image(image, network.preprocessing)[None]
        outputs = network.run(network.prepare(pixels))
        many = TOP if "top5_classes" in outputs else int(1e9)
        top = network.top(outputs, many)
    found = dict(
        zip(top.classes[0].tolist(), map(float, top.probabilities[0].tolist()), strict=True)
    )
    precision = "fp32" if artefact == PYTORCH else bundle.artefact(artefact).precision
    return _compare(entry, artefact, network.runner, found, CANARY_TOLERANCE.get(precision, 0.01))


def _compare(
    entry: Canary,
    artefact: str,
    runner: str,
    found: Mapping[int, float],
    tolerance: float,
) -> CanaryReport:
    expected = tuple((e.index, e.probability) for e in entry.top5)
    least = min(found.values())  # what a class that is not listed has at most
    changes = {c: abs(p - found.get(c, min(p, least))) for c, p in expected}
    failures = [
        f"class {c} has probability {found.get(c, least):.4f} where PyTorch's has {p:.4f}"
        for c, p in expected
        if not changes[c] <= tolerance
    ]
    first = next(iter(found))
    close = len(expected) > 1 and expected[0][1] - expected[1][1] <= 2 * tolerance
    if first != expected[0][0] and not close:
        failures.append(f"the first class is {first} where PyTorch's is {expected[0][0]}")
    return CanaryReport(
        artefact=artefact,
        runner=runner,
        expected=expected,
        found=tuple(found.items())[: len(expected)],
        max_change=max(changes.values()),
        tolerance=tolerance,
        failures=tuple(failures),
    )
