"""From what a user asked for to a network in evaluation mode, strictly.

``load_van("van_b0")``, ``load_van("./mine.pth")``, ``load_van("owner/name")``: the weights are
found, read without running anything in them, renamed to the official names, checked for sense,
and loaded into the architecture that their own names and shapes describe: depths, widths, MLP
ratios, classes, input channels, kernels and the layers of the head. The dilation follows from
the first kernel (see :attr:`~van_deploy.model.variants.VanConfig.lka_dilation`). What no tensor
tells is read by :mod:`van_deploy.model.metadata`. Every tensor of the file ends in the network,
is named in a note, or stops the load; every parameter comes from the file. What the user should
know is in :attr:`~van_deploy.model.variants.WeightsSource.notes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.embedded import EMBEDDED_NAME, EMBEDDED_WEIGHTS
from van_deploy.model.files import SUFFIXES, find_weights, load_file
from van_deploy.model.keys import TOP_LEVEL, Weights, find_network, official_names
from van_deploy.model.metadata import described
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.van import HEAD_LAYERS, STAGES, VAN, random_van, sha256_of_state
from van_deploy.model.variants import VARIANTS, VanConfig, WeightsSource, variant_named

ALL_STAGES = (0, 1, 2, 3)
EMBEDDED = EMBEDDED_NAME
"""Name of the small trained network inside the package."""


@dataclass(frozen=True)
class LoadedVan:
    """A network ready to be deployed, and where everything about it came from.

    Attributes:
        name: what to call it and its bundle.
        model: evaluation mode, float32, no gradients.
        config: its architecture.
        source: its weights.
        preprocessing: what its input must have gone through.
        class_names: in the order of the logits, or None if nobody says.
    """

    name: str
    model: VAN
    config: VanConfig
    source: WeightsSource
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None


def load_van(
    spec: str,
    *,
    weights: str | None = None,
    expect_sha256: str | None = None,
    offline: bool = False,
    seed: int = 0,
    container: str | None = None,
    layer_norm_eps: float | None = None,
    head: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    own_labels: bool = False,
    out_indices: Sequence[int] | None = None,
) -> LoadedVan:
    """Return the network a user asked for, its weights loaded strictly.

    Args:
        spec: a variant's name, ``van_digits``, a path to a checkpoint or to the folder
            it is in, or ``owner/name[@revision][:file]`` on the hub.
        weights: for a variant, where its weights come from instead: a path, a
            repository, or ``random``.
        expect_sha256: what the digest of the weights file must be.
        offline: never use the network.
        seed: of random weights.
        container: which tensors to take where a file holds several networks: its keys
            joined by dots, and behind them the beginning of the names.
        layer_norm_eps: of every LayerNorm; by default what the checkpoint says, or else
            what the framework uses that its names are of.
        head: the layers of a sequential head, such as ``("linear", "relu", "linear")``.
        preprocessing: values that the caller decides, by the names that
            :meth:`~van_deploy.model.preprocess.Preprocessing.override` takes.
        own_labels: the caller has class names; the checkpoint's are not looked at.
        out_indices: stages (0 to 3) whose feature maps the network is to give, without a head;
            None for logits. A checkpoint without a head gives all four.

    Raises:
        UsageError: the request makes no sense, or a variant has no public weights.
        CheckpointError: the weights cannot be used, or something beside them cannot be followed.
        DownloadError: the weights could not be fetched, or have another digest.

    >>> loaded = load_van("van_b0", weights="random", seed=1)
    >>> loaded.source.format, loaded.config.depths
    ('random', (3, 3, 5, 2))
    """
    given = {name: value for name, value in (preprocessing or {}).items() if value is not None}
    eps: dict[str, Any] = {} if layer_norm_eps is None else {"layer_norm_eps": layer_norm_eps}
    variant = None if _is_place(spec) else variant_named(spec)
    random = weights == "random"
    if (weights and not variant) or (random and (expect_sha256 or container or head)):
        raise UsageError(
            f"'{spec}' does not go with the weights '{weights}', or with what else is asked for: a "
            "checkpoint already says which, and random ones have no digest, container or head.",
            f"Give a checkpoint alone, or a variant's name ({', '.join(VARIANTS)}) with --weights.",
        )
    if eps and not 0 < eps["layer_norm_eps"] < 1:
        raise UsageError(f"LayerNorm's {eps} is not between 0 and 1.", "Give a number: 1e-6.")
    if variant and random:
        config = replace(variant.config, **eps)
        config = config if out_indices is None else config.backbone(tuple(out_indices))
        model, told = random_van(config, seed), ("random weights: the outputs mean nothing",)
        digest = sha256_of_state(model.state_dict())
        source = WeightsSource(spec, "", "random", digest, seed, TOP_LEVEL, told)
        whose = replace(OFFICIAL, source="the official VAN weights' (these ones are random)")
        return LoadedVan(variant.name, model, config, source, whose.override(**given), None)
    place = str(EMBEDDED_WEIGHTS) if spec == EMBEDDED else weights or spec
    if variant and not weights:
        if not variant.weights:
            refusal = f"{variant.name} has no public ImageNet-1K weights on the hub."
            raise UsageError(refusal, variant.weights_note)
        place, expect_sha256 = variant.weights, expect_sha256 or variant.sha256
    found = find_weights(place, offline, expect_sha256)
    file = read_weights(found.path, container)
    config, assumed = config_from_state_dict(file.tensors, head)
    if variant and config.variant != variant.name:
        raise CheckpointError(
            f"The weights are not {variant.name}'s but those of "
            f"{config.variant or 'another'}: {config.body} instead of {variant.config.body}.",
            f"Say {config.variant or 'where the file is, without a name'} instead.",
        )
    indices = out_indices if config.num_classes or out_indices is not None else ALL_STAGES
    decided = given | eps | ({"class_names": ()} if own_labels or indices is not None else {})
    config, stated, names, notes = described(config, file, found, decided)
    config = config if indices is None else config.backbone(tuple(indices))
    if names is None and found.is_official and config.num_classes == 1000:
        names = tuple(map(ImageNetInfo().index_to_description, range(1000)))
    notes = (*found.notes, *file.notes, *assumed, *notes)
    form, path = "embedded" if spec == EMBEDDED else file.format, str(found.path)
    source = WeightsSource(spec, path, form, found.sha256, None, file.container, notes)
    model = network_from_state(file.tensors, config)
    name = variant.name if variant else found.name
    return LoadedVan(name, model, config, source, stated.override(**given), names)


def _is_place(word: str) -> bool:
    """Return whether a word is a path or a repository rather than a variant's name."""
    lowered = word.lower()
    if "/" in word or "\\" in word or lowered.endswith(SUFFIXES) or word == EMBEDDED:
        return True
    known = {name for v in VARIANTS.values() for name in (v.name, *v.aliases)}
    return lowered.replace("-", "_") not in known and Path(word).exists()


# --- the tensors -----------------------------------------------------------------------------


def read_weights(path: Path, container: str | None = None) -> Weights:
    """Return the one VAN in a weights file, under its official names and checked for sense.

    Args:
        path: the file.
        container: which of its tensors, see :func:`~van_deploy.model.keys.find_network`.

    Raises:
        CheckpointError: the file cannot be read, holds another network, mixed formats, or
            tensors beside the network whose part is unknown; or a tensor is not floating point,
            NaN, infinite, a negative variance, or claims more elements than it has.
        UsageError: the file has no such ``container``, or several networks.
    """
    loaded = load_file(path)
    network, tensors, notes = find_network(loaded, container)
    names, more = official_names(network, tensors)
    names = {old: new for old, new in names.items() if not old.endswith("num_batches_tracked")}
    state = {new: _plain(old, tensors[old]) for old, new in names.items()}
    if kinds := {str(tensors[old].dtype)[6:] for old in names} - {"float32"}:
        more.append(f"weights converted to float32 from {', '.join(sorted(kinds))}")
    return Weights(state, network.source, network.place or TOP_LEVEL, loaded, (*notes, *more))


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Return a copy in float32."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.is_cpu
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        fault = "claims more elements than the file holds, or is not plain"
    elif not tensor.is_floating_point():
        fault = "is not floating point: pass the weights from before quantisation"
    else:
        copied = tensor.to(torch.float32, copy=True).contiguous()
        low, high = map(float, torch.aminmax(copied) if copied.numel() else (0, 0))
        if not (math.isfinite(low) and math.isfinite(high)):
            fault = "holds NaN or infinite values"
        elif name.endswith("running_var") and low < 0:
            fault = "is negative"
        else:
            return copied
    raise CheckpointError(
        f"The tensor {name[:200]} {fault}.",
        "The training diverged or the file is damaged: pass an earlier or another checkpoint.",
    )


def network_from_state(state: Mapping[str, Tensor], config: VanConfig) -> VAN:
    """Return the network of an architecture with the weights of a state dict.

    In evaluation mode, float32, without gradients; it shares the tensors'
    memory. A backbone leaves a classifier's head out. Missing ``num_batches_tracked``
    are no fault: they only matter in training.

    Raises:
        CheckpointError: tensors are missing, unexpected or wrongly shaped; they are listed.
    """
    with torch.device("meta"):  # shapes only: no time, no random numbers
        model = VAN(config)
    if config.out_indices:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    try:
        model.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        _, _, differences = " ".join(str(error).split()).partition("for VAN: ")
        raise CheckpointError(
            f"The checkpoint does not fit the VAN its shapes describe: {differences[:1000]}",
            "Nothing is dropped or filled in: save the state dict of one whole VAN.",
        ) from None
    return model.eval().requires_grad_(False)


# --- the architecture ------------------------------------------------------------------------


def config_from_state_dict(
    state: Mapping[str, Tensor], head: Sequence[str] | None = None
) -> tuple[VanConfig, tuple[str, ...]]:
    """Return the architecture of a state dict with official names, and what was assumed.

    Args:
        state: official names to tensors; only shapes are looked at.
        head: the layers of a sequential head by name (``linear``, ``batchnorm`` or one of
            :data:`~van_deploy.model.van.HEAD_LAYERS`), which the weights tell only in part.

    Raises:
        CheckpointError: a tensor that tells the architecture is missing or has a shape no VAN
            has, or the head's layers are not known.
        UsageError: ``head`` is not this head.
    """
    stages = range(1, STAGES + 1)
    embeds = [_shape(state, f"patch_embed{stage}.proj.weight", 4) for stage in stages]
    hidden = [_shape(state, f"block{stage}.0.mlp.fc1.weight", 4)[0] for stage in stages]
    blocks = {match[1] for name in state if (match := re.match(r"(block\d\.\d+)\.", name))}
    gate = "block1.0.attn.spatial_gating_unit"
    kernels = tuple(_shape(state, f"{gate}.{n}.weight", 4)[3] for n in ("conv0", "conv_spatial"))
    if any(kernel % 2 == 0 for kernel in kernels):
        raise CheckpointError(
            f"The kernels of {gate} are {kernels}; LKA's are odd (5 and 7).",
            "The gate needs maps of the same size as its input: other kernels are not supported.",
        )
    layers, notes = _head(state, head)
    classes = [layer for layer in layers if isinstance(layer, int)]
    if not layers and any(name.startswith("head.") for name in state):
        classes = [_shape(state, "head.weight", 2)[0]]
    config = VanConfig(
        embed_dims=tuple(shape[0] for shape in embeds),
        depths=tuple(sum(b.startswith(f"block{stage}.") for b in blocks) for stage in stages),
        mlp_ratios=tuple(
            h // e if h % e == 0 else h / e for h, (e, *_) in zip(hidden, embeds, strict=True)
        ),
        num_classes=classes[-1] if classes else 0,
        in_chans=embeds[0][1],
        lka_kernels=(kernels[0], kernels[1]),
        patch_sizes=tuple(shape[2] for shape in embeds),
        head=layers,
    )
    if kernels != (5, 7):
        told = f"the dilation {config.lka_dilation} is the paper's, the weights do not say"
        notes += (f"kernels {kernels}: {told}",)
    return config, notes


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"The checkpoint's {name}, which tells the architecture, is missing or has another "
            f"shape than in a VAN: {shape}.",
            "It is incomplete or damaged: save the state dict of the whole network.",
        )
    return shape


def _head(
    state: Mapping[str, Tensor], given: Sequence[str] | None
) -> tuple[tuple[int | str, ...], tuple[str, ...]]:
    """Return the layers of a sequential head, empty for a linear one, and what was assumed."""
    pattern = re.compile(r"head\.(\d{1,3})\.(weight|running_mean)")
    numbers = {int(match[1]) for name in state if (match := pattern.fullmatch(name))}
    if not numbers or "head.weight" in state:
        if given is not None:
            raise UsageError("The head is no sequence of layers.", "Leave out --head.")
        return (), ()
    kinds, widths = [], []
    for index in range(max(numbers) + 1):
        weight = state.get(f"head.{index}.weight", torch.empty(0))
        kinds.append("?" if index not in numbers else "linear" if weight.ndim == 2 else "batchnorm")
        widths.append(len(weight))
    first = min(numbers)
    told = given or ["dropout"] * first + kinds[first:]
    pairs = list(zip_longest(kinds, told, fillvalue="?"))
    if any(said not in HEAD_LAYERS if kind == "?" else said != kind for kind, said in pairs):
        wrong = (
            f"--head {','.join(given)} is not the checkpoint's" if given else "The head is not told"
        )
        raise (UsageError if given else CheckpointError)(
            f"{wrong}: it is {', '.join(kinds)}, and the weights do not say what each '?' is.",
            f"Say all its layers, such as --head {','.join(kinds).replace('?', 'relu')}; without "
            f"weights there are {', '.join(HEAD_LAYERS)}.",
        )
    layers = tuple(w if said == "linear" else said for w, said in zip_longest(widths, told))
    note = "the head begins with layers without weights: taken for dropout (--head)"
    return layers, (note,) if first and not given else ()
