"""What is known about each VAN variant without opening any weights.

Pure data and arithmetic: nothing heavy is imported, so ``van-deploy list``
answers at once.

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

# Of every VAN.
STAGES = 4
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class VanConfig:
    """The architecture of one Visual Attention Network.

    Attributes:
        embed_dims: channels of the four stages.
        depths: blocks in each stage.
        mlp_ratios: hidden width of each stage's MLP over its channels. A float
            only where a checkpoint says so.
        num_classes: outputs of the head.
        in_chans: channels of the input image.
        lka_kernels: kernel of the depth-wise and of the dilated depth-wise
            convolution of Large Kernel Attention.
        layer_norm_eps: added to the variance in each stage's LayerNorm.
        strides: of the four patch embeddings.
        patch_sizes: kernels of the four patch embeddings.
        head: layers of a sequential head in order, such as ``("dropout", 64, "relu", 10)``,
            a number for a linear layer of so many outputs; empty for one linear layer.
        out_indices: of a backbone, the stages (0 to 3) whose feature maps are its outputs; empty
            for a classifier.
        problem_type: what the logits mean, in Transformers' words:
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
        """The stages that run, from 1: up to the last whose maps are an output."""
        return range(1, max(self.out_indices, default=len(self.depths) - 1) + 2)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What the network gives: ``logits``, or the maps ``stage1`` to ``stage4``."""
        return tuple(f"stage{index + 1}" for index in self.out_indices) or ("logits",)

    def backbone(self, out_indices: tuple[int, ...]) -> VanConfig:
        """Return the architecture without its head, giving feature maps.

        Raises:
            UsageError: a stage is not there, is named twice, or none is.
        """
        wanted = tuple(index for index in range(len(self.depths)) if index in out_indices)
        if not wanted or len(wanted) != len(out_indices):
            given = ", ".join(map(str, out_indices)) or "(none)"
            wrong = f"The stages {given} are not some of 0 to {len(self.depths) - 1}, each once."
            raise UsageError(wrong, "Give --out-indices as timm numbers the stages: 0,1,2,3.")
        return replace(self, num_classes=0, head=(), out_indices=wanted)

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
    def body(self) -> dict[str, tuple[int, ...]]:
        """What a published variant fixes: all but the two ends."""
        names = ("embed_dims", "depths", "hidden_dims", "lka_kernels")
        return {name: getattr(self, name) for name in names}

    @property
    def variant(self) -> str | None:
        """The published variant with this architecture (classes and channels aside), or None."""
        return next((n for n, known in VARIANTS.items() if known.config.body == self.body), None)

    def _kernel_weights(self, stage: int) -> tuple[int, int]:
        """Return the weights, without biases, of a stage's patch embedding and of one block."""
        dim, hidden, (k0, k1) = self.embed_dims[stage], self.hidden_dims[stage], self.lka_kernels
        embed = dim * (self.in_chans, *self.embed_dims)[stage] * self.patch_sizes[stage] ** 2
        return embed, 3 * dim * dim + dim * (k0**2 + k1**2) + hidden * (2 * dim + 9)

    def parameter_count(self) -> int:
        """Trainable parameters (BatchNorm's running statistics not counted).

        >>> VARIANTS["van_b0"].config.parameter_count()
        4105800
        """
        total, width = 0, self.embed_dims[-1]
        for stage, (dim, hidden) in enumerate(zip(self.embed_dims, self.hidden_dims, strict=True)):
            embed, block = self._kernel_weights(stage)
            # and what is one number a channel: biases, norms, layer scales
            total += embed + 5 * dim + self.depths[stage] * (block + 12 * dim + 2 * hidden)
        for layer in self.head or (self.num_classes,):
            if isinstance(layer, int):
                total, width = total + (width + 1) * layer, layer
            elif layer == "batchnorm":
                total += 2 * width
        return total

    def mac_count(self, image_size: ImageSize = 224) -> int:
        """Multiply-adds of one image through the convolutions and the head.

        >>> round(VARIANTS["van_b0"].config.mac_count() / 1e9, 2)
        0.86
        """
        total, sides = 0, height_width(image_size)
        for stage, depth in enumerate(self.depths):
            sides = self.stage_output_size(stage, sides)
            embed, block = self._kernel_weights(stage)
            total += sides[0] * sides[1] * (embed + depth * block)
        linear = (layer for layer in self.head or (self.num_classes,) if isinstance(layer, int))
        return total + sum(i * o for i, o in pairwise((self.embed_dims[-1], *linear)))

    def feature_map_shapes(self, sides: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Return the shape ``(C, h, w)`` of each output of a backbone for images ``(H, W)``.

        >>> VARIANTS["van_b0"].config.backbone((0, 3)).feature_map_shapes((224, 320))
        {'stage1': (32, 56, 80), 'stage4': (256, 7, 10)}
        """
        shapes = {}
        for stage, dim in enumerate(self.embed_dims):
            sides = self.stage_output_size(stage, sides)
            if stage in self.out_indices:
                shapes[f"stage{stage + 1}"] = (dim, *sides)
        return shapes

    def stage_output_size(self, stage: int, sides: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of a stage's maps (0 to 3) from those before it."""
        kernel, stride = self.patch_sizes[stage], self.strides[stage]
        height, width = ((side + kernel // 2 * 2 - kernel) // stride + 1 for side in sides)
        return height, width


@dataclass(frozen=True)
class Variant:
    """A published VAN.

    Attributes:
        name: what timm and this program call it.
        config: its architecture.
        top1: ImageNet-1K validation top-1 in percent as published, or None.
        weights: public ImageNet-1K weights, as ``owner/name[@revision]:file`` on the hub, or None.
        sha256: of that file's bytes, or "" where nobody wrote it down yet.
        weights_note: where weights are if not on the hub, and what to pass.
        aliases: other names it goes by.
    """

    name: str
    config: VanConfig
    top1: float | None = None
    weights: str | None = None
    sha256: str = ""
    weights_note: str = ""
    aliases: tuple[str, ...] = ()


def _public(name: str, dims: Numbers, depths: Numbers, top1: float, size: str) -> Variant:
    """Return a variant with public weights, whose size and accuracy are in their file's name."""
    repo = f"Visual-Attention-Network/VAN-{size.title()}-original"
    weights = f"{repo}:van_{size}_{top1 * 10:.0f}.pth.tar"
    return Variant(name, VanConfig(dims, depths), top1, weights, aliases=(f"van_{size}",))


_USUAL = (64, 128, 320, 512)
_NOTE = "Only mmpretrain has weights (b5, b6: ImageNet-21K's): give --weights FILE, or random."

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _public("van_b0", (32, 64, 160, 256), (3, 3, 5, 2), 75.4, "tiny"),
        _public("van_b1", _USUAL, (2, 2, 4, 2), 81.1, "small"),
        _public("van_b2", _USUAL, (3, 3, 12, 3), 82.8, "base"),
        _public("van_b3", _USUAL, (3, 5, 27, 3), 83.9, "large"),
        Variant("van_b4", VanConfig(_USUAL, (3, 6, 40, 3)), 84.1, weights_note=_NOTE),
        Variant("van_b5", VanConfig((96, 192, 480, 768), (3, 3, 24, 3)), weights_note=_NOTE),
        Variant("van_b6", VanConfig((96, 192, 384, 768), (6, 6, 90, 6)), weights_note=_NOTE),
    )
}

# Every name of a variant.
VARIANT_NAMES = {name: v for v in VARIANTS.values() for name in (v.name, *v.aliases)}


def get_variant(name: str) -> Variant:
    """Return the variant called ``name`` (``van_b1``, or its older name ``van_small``).

    Raises:
        UsageError: there is none; the nearest names are given.
    """
    wanted = name.lower().replace("-", "_")
    if found := VARIANT_NAMES.get(wanted):
        return found
    near = difflib.get_close_matches(wanted, list(VARIANTS), n=3, cutoff=0.5)
    guess = f"Did you mean {' or '.join(near)}? " if near else ""
    known = f"{guess}Known: {', '.join(VARIANTS)}; a checkpoint is given by its path, ./mine.pth."
    raise UsageError(f"There is no VAN variant called '{name}'.", known)


@dataclass(frozen=True)
class WeightsSource:
    """Where a network's weights came from: part of every bundle's manifest.

    Attributes:
        spec: what the user asked for.
        path: the file, or "" for random weights.
        format: ``official``, ``transformers``, ``mmpretrain``, ``random`` or ``embedded``.
        sha256: of the file's bytes; for random weights, of the state dict's.
        seed: of random weights, else None.
        container: key of the file the tensors were under, or ``top level``.
        notes: everything the user should be told, one sentence each.
    """

    spec: str
    path: str
    format: str
    sha256: str
    seed: int | None
    container: str
    notes: tuple[str, ...]


# --- what `van-deploy list` shows ------------------------------------------------------------


@dataclass(frozen=True)
class ListedVariant:
    """One line of the list.

    Attributes:
        name: what ``van-deploy export`` takes.
        parameters: trainable parameters.
        multiply_adds: of one image of ``image_size``.
        image_size: side of a square image, in pixels.
        top1_percent: top-1 accuracy as published, or None.
        top1_on: what the accuracy was measured on.
        weights: the file on the hub, ``embedded``, or None.
        note: what to pass where there are no public weights.
        here: where the weights are on this machine, or None.
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
    """Return the folder of a repository's revision in the hub's cache; it may not exist."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    with contextlib.suppress(OSError):
        revision = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    return folder / "snapshots" / revision


def find_cached_weights(variant: Variant) -> Path | None:
    """Return where a variant's public weights are in the hub's cache, or None."""
    place, _, name = (variant.weights or "").partition(":")
    repo_id, _, revision = place.partition("@")
    with contextlib.suppress(ImportError):  # a host that only runs bundles has no huggingface_hub
        path = cached_snapshot(repo_id, revision or "main") / name
        return path if path.is_file() else None
    return None


def list_variants() -> list[ListedVariant]:
    """Return every published variant, then the network that ships in the package."""

    def row(name: str, config: VanConfig, size: int, *told: Any) -> ListedVariant:
        return ListedVariant(name, config.parameter_count(), config.mac_count(size), size, *told)

    rows, on = [], "ImageNet-1K validation"
    for v in VARIANTS.values():
        here = str(find_cached_weights(v) or "") or None
        rows.append(row(v.name, v.config, 224, v.top1, on, v.weights, v.weights_note, here))
    file = Path(__file__).parent / "digits" / "van_digits.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    top1, here = card["heldout"]["top1_percent"], str(file.with_suffix(".safetensors"))
    told = (top1, "held-out handwritten digits", "embedded", "", here)
    size, config = card["preprocessing"]["image_size"], VanConfig(**card["config"])
    return [*rows, row(card["name"], config, size, *told)]
