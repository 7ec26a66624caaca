"""The architecture of a VAN, and the published variants.

Only data and arithmetic: no large package is imported, so ``van-deploy list``
is fast.

Sources: the paper (arXiv 2202.09741, tables 2 and 4), the official repository
``Visual-Attention-Network/VAN-Classification`` (``models/van.py``) and, for
b4's accuracy, mmpretrain's model zoo.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from van_deploy.config.sizes import ImageSize, height_width
from van_deploy.errors import UsageError

STAGES = 4


@dataclass(frozen=True)
class VanConfig:
    """The architecture of one Visual Attention Network.

    Attributes:
        embed_dims: channels of the four stages.
        depths: blocks in each stage.
        mlp_ratios: hidden width of each stage's MLP divided by its channels.
        num_classes: outputs of the head; 0 for a backbone.
        in_chans: channels of the input image.
        lka_kernels: kernel sizes of the depth-wise and of the dilated depth-wise
            convolution of Large Kernel Attention.
        layer_norm_eps: ``eps`` of each stage's LayerNorm.
        strides: of the four patch embeddings.
        patch_sizes: kernel sizes of the four patch embeddings.
        head: layers of a sequential head in order, such as ``("dropout", 64, "relu", 10)``,
            where a number is the outputs of a linear layer; empty for one linear layer.
        out_indices: stages (0 to 3) whose feature maps are the outputs of a backbone; empty
            for a classifier.
        problem_type: meaning of the logits, as in Transformers:
            ``single_label_classification``, ``multi_label_classification`` or ``regression``.
    """

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    num_classes: int = 1000
    in_chans: int = 3
    lka_kernels: tuple[int, int] = (5, 7)
    layer_norm_eps: float = 1e-6
    strides: tuple[int, ...] = (4, 2, 2, 2)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    head: tuple[int | str, ...] = ()
    problem_type: str = "single_label_classification"
    out_indices: tuple[int, ...] = ()

    @property
    def stages(self) -> range:
        """The stages that are computed, from 1: up to the last one that is an output."""
        return range(1, max(self.out_indices, default=len(self.depths) - 1) + 2)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs: ``logits``, or the feature maps ``stage1`` to ``stage4``."""
        return tuple(f"stage{index + 1}" for index in self.out_indices) or ("logits",)

    def backbone(self, out_indices: tuple[int, ...]) -> VanConfig:
        """Return the architecture without its head, with feature maps as outputs.

        Raises:
            UsageError: a stage does not exist or is repeated, or there is none.
        """
        indices = tuple(index for index in range(len(self.depths)) if index in out_indices)
        if not indices or len(indices) != len(out_indices):
            requested = ", ".join(map(str, out_indices)) or "(none)"
            message = f"The stages {requested} are not distinct numbers of 0 to {STAGES - 1}."
            raise UsageError(message, "Give --out-indices as in timm, such as 0,1,2,3.")
        return replace(self, num_classes=0, head=(), out_indices=indices)

    @property
    def lka_dilation(self) -> int:
        """Dilation ``d`` of the second kernel, from the paper's decomposition.

        A ``K x K`` kernel is split into a depth-wise ``(2d-1)`` kernel and a
        depth-wise ``ceil(K/d)`` kernel with dilation ``d`` (arXiv 2202.09741,
        section 3.2), so the first kernel's size gives ``d``.
        """
        return (self.lka_kernels[0] + 1) // 2

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """Channels inside each stage's MLP."""
        return tuple(round(d * r) for d, r in zip(self.embed_dims, self.mlp_ratios, strict=True))

    @property
    def trunk(self) -> dict[str, tuple[int, ...]]:
        """The values that define a published variant: all but input channels and head."""
        names = ("embed_dims", "depths", "hidden_dims", "lka_kernels")
        return {name: getattr(self, name) for name in names}

    @property
    def variant(self) -> str | None:
        """The published variant with this architecture (classes and channels aside), or None."""
        return next((n for n, known in VARIANTS.items() if known.config.trunk == self.trunk), None)

    def _kernel_weights(self, stage: int) -> tuple[int, int]:
        """Return the number of weights (no biases) of a stage's patch embedding and of a block."""
        dim, hidden, (k0, k1) = self.embed_dims[stage], self.hidden_dims[stage], self.lka_kernels
        embed = dim * (self.in_chans, *self.embed_dims)[stage] * self.patch_sizes[stage] ** 2
        return embed, 3 * dim * dim + dim * (k0**2 + k1**2) + hidden * (2 * dim + 9)

    def parameter_count(self) -> int:
        """Return the number of trainable parameters (without BatchNorm's running statistics).

        >>> VARIANTS["van_b0"].config.parameter_count()
        4105800
        """
        total, width = 0, self.embed_dims[-1]
        for stage, (dim, hidden) in enumerate(zip(self.embed_dims, self.hidden_dims, strict=True)):
            embed, block = self._kernel_weights(stage)
            # and the vectors: biases, norms, layer scales
            total += embed + 5 * dim + self.depths[stage] * (block + 12 * dim + 2 * hidden)
        for layer in self.head or (self.num_classes,):
            if isinstance(layer, int):
                total, width = total + (width + 1) * layer, layer
            elif layer == "batchnorm":
                total += 2 * width
        return total

    def mac_count(self, image_size: ImageSize = 224) -> int:
        """Return the multiply-adds of one image in the convolutions and the head.

        Stages after the last output of a backbone are not computed.

        >>> round(VARIANTS["van_b0"].config.mac_count() / 1e9, 2)
        0.86
        """
        total = 0
        for stage, (height, width) in enumerate(self.stage_sizes(image_size)[: len(self.stages)]):
            embed, block = self._kernel_weights(stage)
            total += height * width * (embed + self.depths[stage] * block)
        linear = (layer for layer in self.head or (self.num_classes,) if isinstance(layer, int))
        return total + sum(i * o for i, o in pairwise((self.embed_dims[-1], *linear)))

    def feature_map_shapes(self, sides: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Return the shape ``(C, h, w)`` of each output of a backbone for an image ``(H, W)``.

        >>> VARIANTS["van_b0"].config.backbone((0, 3)).feature_map_shapes((224, 320))
        {'stage1': (32, 56, 80), 'stage4': (256, 7, 10)}
        """
        sizes = self.stage_sizes(sides)
        return {f"stage{i + 1}": (self.embed_dims[i], *sizes[i]) for i in self.out_indices}

    def stage_sizes(self, size: ImageSize) -> list[tuple[int, int]]:
        """Return height and width of each stage's output for an image of ``size``."""
        sizes = [height_width(size)]
        for kernel, stride in zip(self.patch_sizes, self.strides, strict=True):
            height, width = ((side + kernel // 2 * 2 - kernel) // stride + 1 for side in sizes[-1])
            sizes.append((height, width))
        return sizes[1:]


@dataclass(frozen=True)
class Variant:
    """A published VAN.

    Attributes:
        name: in timm and in this program.
        config: its architecture.
        top1: ImageNet-1K validation top-1 in percent as published, or None.
        weights: public ImageNet-1K weights, as ``owner/name[@revision]:file`` on the hub, or None.
        sha256: of that file's bytes, or "" if unknown.
        weights_note: where to get weights that are not on the hub, and the option to pass.
        aliases: other names.
    """

    name: str
    config: VanConfig
    top1: float | None = None
    weights: str | None = None
    sha256: str = ""
    weights_note: str = ""
    aliases: tuple[str, ...] = ()


def _public(name: str, config: VanConfig, top1: float, size: str) -> Variant:
    """Return a variant with public weights, whose file name has the size and accuracy."""
    repo = f"Visual-Attention-Network/VAN-{size.title()}-original"
    weights = f"{repo}:van_{size}_{top1 * 10:.0f}.pth.tar"
    return Variant(name, config, top1, weights, aliases=(f"van_{size}",))


_USUAL = (64, 128, 320, 512)
_NOTE = "Only mmpretrain has weights (b5, b6: ImageNet-21K's): give --weights FILE, or random."

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _public("van_b0", VanConfig((32, 64, 160, 256), (3, 3, 5, 2)), 75.4, "tiny"),
        _public("van_b1", VanConfig(_USUAL, (2, 2, 4, 2)), 81.1, "small"),
        _public("van_b2", VanConfig(_USUAL, (3, 3, 12, 3)), 82.8, "base"),
        _public("van_b3", VanConfig(_USUAL, (3, 5, 27, 3)), 83.9, "large"),
        Variant("van_b4", VanConfig(_USUAL, (3, 6, 40, 3)), 84.1, weights_note=_NOTE),
        Variant("van_b5", VanConfig((96, 192, 480, 768), (3, 3, 24, 3)), weights_note=_NOTE),
        Variant("van_b6", VanConfig((96, 192, 384, 768), (6, 6, 90, 6)), weights_note=_NOTE),
    )
}

EMBEDDED_NAME = "van_digits"  # the network that ships in the package
# Variants by name and alias.
VARIANT_NAMES = {name: v for v in VARIANTS.values() for name in (v.name, *v.aliases)}


def find_variant(name: str) -> Variant | None:
    """Return the variant with this name or alias, in any case and with ``-`` for ``_``, or None."""
    return VARIANT_NAMES.get(name.lower().replace("-", "_"))


def is_published(name: str) -> bool:
    """Return whether a name is of a variant or of the embedded network; a path needs ``./``."""
    return name == EMBEDDED_NAME or find_variant(name) is not None


def get_variant(name: str) -> Variant:
    """Return the variant ``name`` (``van_b1``, or its alias ``van_small``).

    Raises:
        UsageError: there is no such variant; the message has similar names.
    """
    if variant := find_variant(name):
        return variant
    similar = difflib.get_close_matches(name.lower().replace("-", "_"), VARIANTS, cutoff=0.5)
    guess = f"Did you mean {' or '.join(similar)}? " if similar else ""
    remedy = f"{guess}Known: {', '.join(VARIANTS)}, {EMBEDDED_NAME}; or give a checkpoint's path."
    raise UsageError(f"There is no VAN variant and no file called '{name}'.", remedy)


@dataclass(frozen=True)
class WeightsSource:
    """The origin of a network's weights, part of every bundle's manifest.

    Attributes:
        spec: the model argument: a variant, a path or a repository.
        path: the file, or "" for random weights.
        format: ``official``, ``transformers``, ``mmpretrain``, ``random`` or ``embedded``.
        sha256: of the file's bytes; for random weights, of the state dict.
        seed: of random weights, else None.
        container: path of the tensors in the file, keys joined by dots, or ``top level``.
        notes: messages for the user, one sentence each.
    """

    spec: str
    path: str
    format: str
    sha256: str
    seed: int | None
    container: str
    notes: tuple[str, ...]


# --- van-deploy list -------------------------------------------------------------------------


@dataclass(frozen=True)
class ListedVariant:
    """One network of ``van-deploy list``.

    Attributes:
        name: the argument of ``van-deploy export``.
        parameters: trainable parameters.
        multiply_adds: of one image of ``image_size``.
        image_size: side of a square image, in pixels.
        top1_percent: published top-1 accuracy, or None.
        top1_on: evaluation set of the accuracy.
        weights: the file on the hub, ``embedded``, or None.
        note: the option to pass if there are no public weights.
        here: path of the weights on this machine, or None.
    """

    name: str
    parameters: int
    multiply_adds: int
    image_size: int
    top1_percent: float | None
    top1_on: str
    weights: str | None
    note: str
    here: str | None


def cached_snapshot(repo_id: str, revision: str) -> Path:
    """Return the folder of a repository's revision in the hub's cache, which may not exist."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    with contextlib.suppress(OSError):
        revision = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    return folder / "snapshots" / revision


def find_cached_weights(variant: Variant) -> Path | None:
    """Return the path of a variant's public weights in the hub's cache, or None."""
    place, _, name = (variant.weights or "").partition(":")
    repo_id, _, revision = place.partition("@")
    with contextlib.suppress(ImportError):  # a host that only runs bundles may lack it
        path = cached_snapshot(repo_id, revision or "main") / name
        return path if path.is_file() else None
    return None


def list_variants() -> list[ListedVariant]:
    """Return all published variants and the network that ships in the package."""

    def row(name: str, config: VanConfig, size: int, *others: Any) -> ListedVariant:
        return ListedVariant(name, config.parameter_count(), config.mac_count(size), size, *others)

    rows, imagenet = [], "ImageNet-1K validation"
    for v in VARIANTS.values():
        here = str(find_cached_weights(v) or "") or None
        rows.append(row(v.name, v.config, 224, v.top1, imagenet, v.weights, v.weights_note, here))
    file = Path(__file__).parent / "digits" / "van_digits.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    top1, here = card["heldout"]["top1_percent"], str(file.with_suffix(".safetensors"))
    others = (top1, "held-out handwritten digits", "embedded", "", here)
    size, config = card["preprocessing"]["image_size"], VanConfig(**card["config"])
    return [*rows, row(card["name"], config, size, *others)]
