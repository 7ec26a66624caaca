"""What is known about each VAN variant without opening any weights.

Pure data and arithmetic: nothing heavy is imported, so ``van-deploy list``
answers at once.

Sources: the paper (arXiv 2202.09741, tables 2 and 4), the official repository
``Visual-Attention-Network/VAN-Classification`` (``models/van.py``) and, for
b4's accuracy, mmpretrain's model zoo.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from itertools import pairwise

from van_deploy.config.sizes import ImageSize, sides_of
from van_deploy.errors import UsageError

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
"""What stands beside weights, by Transformers' and timm's names."""


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
            UsageError: a stage is not there, or named twice.
        """
        last = len(self.depths) - 1
        wrong = [f"There is no stage {i}." for i in out_indices if not 0 <= i <= last]
        if len(set(out_indices)) != len(out_indices):
            wrong.append(f"A stage is asked for twice: {', '.join(map(str, out_indices))}.")
        if wrong or not out_indices:
            raise UsageError(
                wrong[0] if wrong else "No stage is asked for.",
                f"Give the stages of --out-indices once each; they are numbered from 0 to {last}, "
                "as in OpenMMLab's and timm's out_indices.",
            )
        return replace(self, num_classes=0, head=(), out_indices=tuple(sorted(out_indices)))

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
    def blocks(self) -> int:
        """Blocks in the whole network."""
        return sum(self.depths)

    def parameter_count(self) -> int:
        """Trainable parameters (BatchNorm's running statistics not counted).

        >>> VARIANTS["van_b0"].config.parameter_count()
        4105800
        """
        k0, k1 = self.lka_kernels
        total, previous = 0, self.in_chans
        for dim, hidden, depth, kernel in zip(
            self.embed_dims, self.hidden_dims, self.depths, self.patch_sizes, strict=True
        ):
            embed = dim * previous * kernel**2 + dim + 2 * dim
            attention = 3 * (dim * dim + dim) + dim * (k0**2 + 1) + dim * (k1**2 + 1)
            mlp = dim * hidden + hidden + hidden * (9 + 1) + hidden * dim + dim
            total += embed + depth * (4 * dim + 2 * dim + attention + mlp) + 2 * dim
            previous = dim
        for layer in self.head or (self.num_classes,):
            if isinstance(layer, int):
                total, previous = total + (previous + 1) * layer, layer
            elif layer == "batchnorm":
                total += 2 * previous
        return total

    def mac_count(self, image_size: ImageSize = 224) -> int:
        """Multiply-adds of one image through the convolutions and the head.

        >>> round(VARIANTS["van_b0"].config.mac_count() / 1e9, 2)
        0.86
        """
        k0, k1 = self.lka_kernels
        total, previous, sides = 0, self.in_chans, sides_of(image_size)
        for stage, (dim, hidden, depth) in enumerate(
            zip(self.embed_dims, self.hidden_dims, self.depths, strict=True)
        ):
            sides = self.sides_after(stage, sides)
            kernel = self.patch_sizes[stage]
            block = 3 * dim * dim + dim * (k0**2 + k1**2) + hidden * (2 * dim + 9)
            total += sides[0] * sides[1] * (dim * previous * kernel**2 + depth * block)
            previous = dim
        linear = (layer for layer in self.head or (self.num_classes,) if isinstance(layer, int))
        return total + sum(i * o for i, o in pairwise((previous, *linear)))

    def map_shapes(self, sides: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Return the shape ``(C, h, w)`` of each output of a backbone for images ``(H, W)``.

        >>> VARIANTS["van_b0"].config.backbone((0, 3)).map_shapes((224, 320))
        {'stage1': (32, 56, 80), 'stage4': (256, 7, 10)}
        """
        shapes = {}
        for stage, dim in enumerate(self.embed_dims):
            sides = self.sides_after(stage, sides)
            if stage in self.out_indices:
                shapes[f"stage{stage + 1}"] = (dim, *sides)
        return shapes

    def sides_after(self, stage: int, sides: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of a stage's maps (0 to 3) from those before it."""
        kernel, stride = self.patch_sizes[stage], self.strides[stage]
        height, width = ((side + kernel // 2 * 2 - kernel) // stride + 1 for side in sides)
        return height, width


@dataclass(frozen=True)
class HubFile:
    """One file in a Hugging Face repository.

    Attributes:
        repo_id: ``owner/name`` on the hub.
        filename: path of the file inside the repository.
        revision: the commit it is taken from, or a branch or tag.
        sha256: of its bytes, or "" where nobody wrote it down yet.
    """

    repo_id: str
    filename: str
    revision: str = "main"
    sha256: str = ""

    def __str__(self) -> str:
        """Return ``owner/name/filename``."""
        return f"{self.repo_id}/{self.filename}"


@dataclass(frozen=True)
class Variant:
    """A published VAN.

    Attributes:
        name: what timm and this program call it.
        config: its architecture.
        top1: ImageNet-1K validation top-1 in percent as published, or None.
        weights: public ImageNet-1K weights on the hub, or None.
        weights_note: where weights are if not on the hub, and what to pass.
    """

    name: str
    config: VanConfig
    top1: float | None = None
    weights: HubFile | None = None
    weights_note: str = ""
    aliases: tuple[str, ...] = ()


def _public(
    name: str, dims: tuple[int, ...], depths: tuple[int, ...], top1: float, size: str
) -> Variant:
    """Return a variant with public weights, whose size and accuracy are in their file's name."""
    file = HubFile(
        f"Visual-Attention-Network/VAN-{size.title()}-original",
        f"van_{size}_{top1 * 10:.0f}.pth.tar",
    )
    return Variant(name, VanConfig(dims, depths), top1, file, aliases=(f"van_{size}",))


_USUAL = (64, 128, 320, 512)
_MMPRETRAIN = (
    "the only public ImageNet-1K weights are mmpretrain's "
    "(van-b4_3rdparty_in1k_*.pth): download that file and pass it with --weights FILE"
)
_ONLY_21K = (
    "only ImageNet-21K weights were published (by mmpretrain): pass a checkpoint "
    "of your own with --weights FILE, or try the export with --weights random"
)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _public("van_b0", (32, 64, 160, 256), (3, 3, 5, 2), 75.4, "tiny"),
        _public("van_b1", _USUAL, (2, 2, 4, 2), 81.1, "small"),
        _public("van_b2", _USUAL, (3, 3, 12, 3), 82.8, "base"),
        _public("van_b3", _USUAL, (3, 5, 27, 3), 83.9, "large"),
        Variant("van_b4", VanConfig(_USUAL, (3, 6, 40, 3)), 84.1, weights_note=_MMPRETRAIN),
        Variant("van_b5", VanConfig((96, 192, 480, 768), (3, 3, 24, 3)), weights_note=_ONLY_21K),
        Variant("van_b6", VanConfig((96, 192, 384, 768), (6, 6, 90, 6)), weights_note=_ONLY_21K),
    )
}


def variant_named(name: str) -> Variant:
    """Return the variant called ``name`` (``van_b1``, or its older name ``van_small``).

    Raises:
        UsageError: there is none; the nearest names are given.
    """
    wanted = name.lower().replace("-", "_")
    if found := next((v for v in VARIANTS.values() if wanted in (v.name, *v.aliases)), None):
        return found
    near = difflib.get_close_matches(wanted, list(VARIANTS), n=3, cutoff=0.5)
    guess = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"There is no VAN variant called '{name}'.",
        f"{guess}Known variants: {', '.join(VARIANTS)} (see `van-deploy list`); "
        "a checkpoint is given by its path, such as ./mine.pth.",
    )


def variant_of(config: VanConfig) -> str | None:
    """Return the published variant with this architecture (classes and channels aside)."""
    return next((n for n, known in VARIANTS.items() if known.config.body == config.body), None)
