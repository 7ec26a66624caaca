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
from van_deploy.model.files import WEIGHTS, Found, find_weights, load_file
from van_deploy.model.keys import TOP_LEVEL, Weights, find_network, official_names
from van_deploy.model.metadata import described
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.van import HEAD_LAYERS, VAN, random_van, sha256_of_state
from van_deploy.model.variants import VARIANT_NAMES, VanConfig, Variant, WeightsSource, get_variant

ALL_STAGES = (0, 1, 2, 3)


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
        spec: a variant's name, ``van_digits``, a path to a checkpoint or its folder, or
            ``owner/name[@revision][:file]`` on the hub.
        weights: for a variant, where they come from instead: a path, a repository, ``random``.
        expect_sha256: what the digest of the weights file must be.
        offline: never use the network.
        seed: of random weights.
        container: which tensors, see :func:`~van_deploy.model.keys.find_network`.
        layer_norm_eps: by default what the checkpoint says, or else its framework's own.
        head: the layers of a sequential head, such as ``("linear", "relu", "linear")``.
        preprocessing: what the caller decides, by the names of ``Preprocessing``'s values.
        own_labels: the caller has class names; the checkpoint's are not looked at.
        out_indices: stages (0 to 3) whose feature maps the network gives, instead of logits;
            by default all four of a checkpoint without a head.

    Raises:
        UsageError: the request makes no sense, or a variant has no public weights.
        CheckpointError: the weights cannot be used, or something beside them cannot be followed.
        DownloadError: the weights could not be fetched, or have another digest.

    >>> load_van("van_b0", weights="random", seed=1).config.depths
    (3, 3, 5, 2)
    """
    asked = {**(preprocessing or {}), "layer_norm_eps": layer_norm_eps, "head": head}
    asked |= {"out_indices": out_indices, "class_names": () if own_labels else None}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not 0 < asked.get("layer_norm_eps", 1e-6) < 1:
        raise UsageError(f"layer_norm_eps {layer_norm_eps} is not between 0 and 1.", "Give 1e-6.")
    is_path = re.search(r"[/\\]", spec) or WEIGHTS.search(spec) or Path(spec).exists()
    is_variant = spec.lower().replace("-", "_") in VARIANT_NAMES
    variant = get_variant(spec) if is_variant or not (is_path or spec == EMBEDDED_NAME) else None
    if variant and weights == "random" and not (expect_sha256 or container or head):
        loaded = _random(spec, variant, seed, asked)
    else:
        found = find_weights(*_place(spec, variant, weights, expect_sha256), offline)
        loaded = _from_file(spec, variant, found, read_weights(found.path, container), asked)
    return replace(loaded, preprocessing=loaded.preprocessing.override(**(preprocessing or {})))


def _place(
    spec: str, variant: Variant | None, weights: str | None, expected: str | None
) -> tuple[str, str | None]:
    """Return where the weights are, and what their SHA-256 must be."""
    if weights == "random" or (weights and not variant):
        wrong = f"'{spec}' does not go with the weights '{weights}', or with what else is asked for"
        why = "a checkpoint says which, and random weights have no digest, container or head"
        raise UsageError(f"{wrong}: {why}.", "Give a checkpoint alone, or a variant and --weights.")
    if weights or not variant:
        return weights or (str(EMBEDDED_WEIGHTS) if spec == EMBEDDED_NAME else spec), expected
    if not variant.weights:
        raise UsageError(f"{variant.name} has no public ImageNet-1K weights.", variant.weights_note)
    return variant.weights, expected or variant.sha256


def _random(spec: str, variant: Variant, seed: int, asked: Mapping[str, Any]) -> LoadedVan:
    """Return a variant with random weights."""
    config = replace(variant.config, layer_norm_eps=asked.get("layer_norm_eps", 1e-6))
    config = config.backbone(tuple(asked["out_indices"])) if "out_indices" in asked else config
    model, told = random_van(config, seed), ("random weights: the outputs mean nothing",)
    digest = sha256_of_state(model.state_dict())
    source = WeightsSource(spec, "", "random", digest, seed, TOP_LEVEL, told)
    whose = replace(OFFICIAL, source="the official VAN weights' (these ones are random)")
    return LoadedVan(variant.name, model, config, source, whose, None)


def _from_file(
    spec: str, variant: Variant | None, found: Found, file: Weights, asked: Mapping[str, Any]
) -> LoadedVan:
    """Return the network of a weights file, with all that it and the JSON beside it say."""
    config, assumed = config_from_state_dict(file.tensors, asked.get("head"))
    if variant and config.variant != variant.name:
        whose = config.variant or "another"
        wrong = f"The weights are not {variant.name}'s but those of {whose}: {config.body}."
        raise CheckpointError(wrong, "Give the name that fits, or the file without a name.")
    stages = asked.get("out_indices", () if config.num_classes else ALL_STAGES)
    config, stated, names, notes = described(config, file, found, asked)
    config = config.backbone(tuple(stages)) if stages or "out_indices" in asked else config
    if names is None and found.is_official and config.num_classes == 1000:
        names = tuple(map(ImageNetInfo().index_to_description, range(1000)))
    notes = (*found.notes, *file.notes, *assumed, *notes)
    form, path = "embedded" if spec == EMBEDDED_NAME else file.format, str(found.path)
    source = WeightsSource(spec, path, form, found.sha256, None, file.container, notes)
    model = network_from_state(file.tensors, config)
    name = variant.name if variant else found.name
    return LoadedVan(name, model, config, source, stated, names)


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
    network, choice = find_network(loaded, container)
    names, notes = official_names(network)
    state = {new: _plain(old, network.tensors[old]) for old, new in names.items()}
    if kinds := {str(network.tensors[old].dtype)[6:] for old in names} - {"float32"}:
        notes += (f"weights converted to float32 from {', '.join(sorted(kinds))}",)
    notes = (choice, *notes) if choice else notes
    return Weights(state, network.source, network.place or TOP_LEVEL, loaded, notes)


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Return a copy in float32."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.is_cpu
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        fault = "claims more elements than the file holds, or is not plain"
    elif not tensor.is_floating_point():
        fault = "is not floating point: pass the weights from before quantisation"
    else:
        copied = tensor.to(torch.float32, copy=True).contiguous()
        ends = torch.stack(torch.aminmax(copied)) if copied.numel() else torch.zeros(2)
        if not ends.isfinite().all():
            fault = "holds NaN or infinite values"
        elif name.endswith("running_var") and ends[0] < 0:
            fault = "is negative"
        else:
            return copied
    raise CheckpointError(f"The tensor {name[:200]} {fault}.", "Pass an earlier checkpoint.")


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
        wrong = f"The checkpoint does not fit the VAN its shapes describe: {differences[:1000]}"
        raise CheckpointError(wrong, "Save the state dict of one whole VAN.") from None
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
    stages = [stage + 1 for stage in ALL_STAGES]
    embeds = [_shape(state, f"patch_embed{stage}.proj.weight", 4) for stage in stages]
    hidden = [_shape(state, f"block{stage}.0.mlp.fc1.weight", 4)[0] for stage in stages]
    dims = tuple(shape[0] for shape in embeds)
    ratios = (h / d if h % d else h // d for h, d in zip(hidden, dims, strict=True))
    blocks = {match[1] for name in state if (match := re.match(r"(block\d\.\d+)\.", name))}
    gate = "block1.0.attn.spatial_gating_unit"
    k0, k1 = (_shape(state, f"{gate}.{n}.weight", 4)[3] for n in ("conv0", "conv_spatial"))
    if k0 % 2 == 0 or k1 % 2 == 0:
        wrong = f"The kernels of {gate} are {(k0, k1)}; LKA's are odd (5 and 7)."
        raise CheckpointError(wrong, "Kernels that change the maps' size are not supported.")
    layers, notes = _head(state, head)
    classes = [layer for layer in layers if isinstance(layer, int)]
    if not layers and any(name.startswith("head.") for name in state):
        classes = [_shape(state, "head.weight", 2)[0]]
    config = VanConfig(
        embed_dims=dims,
        depths=tuple(sum(b.startswith(f"block{stage}.") for b in blocks) for stage in stages),
        mlp_ratios=tuple(ratios),
        num_classes=classes[-1] if classes else 0,
        in_chans=embeds[0][1],
        lka_kernels=(k0, k1),
        patch_sizes=tuple(shape[2] for shape in embeds),
        head=layers,
    )
    if (k0, k1) != (5, 7):
        notes += (f"kernels {(k0, k1)}: the dilation {config.lka_dilation} is the paper's",)
    return config, notes


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != dimensions or 0 in shape:
        wrong = f"The checkpoint's {name} is missing or has a shape that no VAN has: {shape}."
        raise CheckpointError(wrong, "Save the state dict of one whole VAN.")
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
    first, last = min(numbers), max(numbers)
    weights = [state.get(f"head.{index}.weight", torch.empty(())) for index in range(last + 1)]
    kinds = ["?" if not w.ndim else "linear" if w.ndim == 2 else "batchnorm" for w in weights]
    told = given or ["dropout"] * first + kinds[first:]
    pairs = zip_longest(kinds, told, fillvalue="?")
    if any(said not in HEAD_LAYERS if kind == "?" else said != kind for kind, said in pairs):
        what = f"--head {','.join(given)} does not fit" if given else "The head is not told"
        wrong = f"{what}: it is {', '.join(kinds)}, and the weights do not say what each '?' is."
        such = f"--head {','.join(kinds).replace('?', 'relu')} (or {', '.join(HEAD_LAYERS)})"
        raise (UsageError if given else CheckpointError)(wrong, f"Say all its layers: {such}.")
    layers = (len(w) if said == "linear" else said for w, said in zip_longest(weights, told))
    note = "the head begins with layers without weights: taken for dropout (--head)"
    return tuple(layers), (note,) if first and not given else ()
