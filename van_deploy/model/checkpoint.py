"""Load a VAN from a variant's name, a checkpoint or a hub repository, with strict checks.

``load_van("van_b0")``, ``load_van("./mine.pth")``, ``load_van("owner/name")``: the weights file is
located, read without executing code from it, renamed to the official names, validated, and loaded
into the architecture that its names and shapes describe: depths, widths, MLP ratios, classes,
input channels, kernels and the layers of the head. The dilation follows from the first kernel
(see :attr:`~van_deploy.model.variants.VanConfig.lka_dilation`). The values that tensors do not
contain are read by :mod:`van_deploy.model.metadata`. Every tensor of the file is loaded, listed
in a note, or an error; every parameter comes from the file. Notes for the user are in
:attr:`~van_deploy.model.variants.WeightsSource.notes`.
"""

import os
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
from van_deploy.model.files import WEIGHTS_SUFFIX, WeightsFile, find_weights, load_file
from van_deploy.model.keys import TOP_LEVEL, Checkpoint, Notes, State, find_network, official_names
from van_deploy.model.metadata import Values, read_metadata
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.van import HEAD_LAYERS, VAN, random_van, sha256_of_state
from van_deploy.model.variants import VanConfig, Variant, WeightsSource, find_variant, get_variant
from van_deploy.schema import text_argument

ALL_STAGES = (0, 1, 2, 3)
_COMPLETE_HINT = "Save the state dict of one complete VAN."


@dataclass(frozen=True)
class LoadedVan:
    """A network ready for export, with the origin of its weights and metadata.

    Attributes:
        name: default name of the network and its bundle.
        model: in evaluation mode, float32, without gradients.
        config: its architecture.
        source: origin of its weights.
        preprocessing: of its input images.
        class_names: in the order of the logits, or None if unknown.
    """

    name: str
    model: VAN
    config: VanConfig
    source: WeightsSource
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None


def load_van(
    spec: str | Path,
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
    """Load a network strictly.

    Args:
        spec: a variant's name, ``van_digits``, a path to a checkpoint or its folder, or
            ``owner/name[@revision][:file]`` on the hub.
        weights: for a variant, other weights: a path, a repository, or ``random``.
        expect_sha256: expected SHA-256 of the weights file.
        offline: do not use the network.
        seed: of random weights.
        container: of the tensors in the file, see :func:`~van_deploy.model.keys.find_network`.
        layer_norm_eps: by default the checkpoint's, or else its framework's default.
        head: the layers of a sequential head, such as ``("linear", "relu", "linear")``.
        preprocessing: values of ``Preprocessing`` that override the checkpoint's.
        own_labels: ignore the checkpoint's class names, since the caller has others.
        out_indices: stages (0 to 3) whose feature maps the network returns instead of logits;
            by default all four of a checkpoint without a head.

    Raises:
        UsageError: ``spec`` is empty or no text, the arguments are contradictory, or a variant has
            no public weights.
        CheckpointError: the weights or their metadata cannot be used.
        DownloadError: the download failed, or the file has another digest.

    >>> load_van("van_b0", weights="random", seed=1).config.depths
    (3, 3, 5, 2)
    """
    spec = text_argument("spec", spec)
    overrides = {**(preprocessing or {}), "layer_norm_eps": layer_norm_eps, "head": head}
    overrides |= {"out_indices": out_indices, "class_names": () if own_labels else None}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if not 0 < overrides.get("layer_norm_eps", 1e-6) < 1:
        raise UsageError(f"layer_norm_eps {layer_norm_eps} is not between 0 and 1.", "Give 1e-6.")
    is_path = re.search(r"[/\\]", spec) or WEIGHTS_SUFFIX.search(spec) or os.path.exists(spec)
    is_variant = find_variant(spec) is not None
    variant = get_variant(spec) if is_variant or not (is_path or spec == EMBEDDED_NAME) else None
    if variant and weights == "random" and not (expect_sha256 or container or head):
        loaded = _load_random(spec, variant, seed, overrides)
    elif weights == "random" or (weights and not variant):
        message = f"'{spec}' cannot be combined with --weights {weights} and the other options"
        reason = "only variants take --weights; random weights have no digest, container or head"
        raise UsageError(f"{message}: {reason}.", "Give a checkpoint, or a variant and --weights.")
    elif variant and not (weights or variant.weights):
        raise UsageError(f"{variant.name} has no public ImageNet-1K weights.", variant.weights_note)
    else:
        notes: Notes = ()
        if variant and not weights:
            weights, expect_sha256 = variant.weights, expect_sha256 or variant.sha256
            if os.path.exists(spec):
                notes = (f"the public weights are used, not the path '{spec}' (give './{spec}')",)
        location = weights or (str(EMBEDDED_WEIGHTS) if spec == EMBEDDED_NAME else spec)
        file = find_weights(location, expect_sha256, offline)
        file = file._replace(notes=file.notes + notes)
        loaded = _load_weights(spec, variant, file, read_weights(file.path, container), overrides)
    return replace(loaded, preprocessing=loaded.preprocessing.override(**(preprocessing or {})))


def _load_random(spec: str, variant: Variant, seed: int, overrides: Values) -> LoadedVan:
    """Return a variant with random weights."""
    config = replace(variant.config, layer_norm_eps=overrides.get("layer_norm_eps", 1e-6))
    if "out_indices" in overrides:
        config = config.backbone(tuple(overrides["out_indices"]))
    model, notes = random_van(config, seed), ("random weights: the outputs are meaningless",)
    digest = sha256_of_state(model.state_dict())
    source = WeightsSource(spec, "", "random", digest, seed, TOP_LEVEL, notes)
    preprocessing = replace(OFFICIAL, source="the official VAN weights' (these ones are random)")
    return LoadedVan(variant.name, model, config, source, preprocessing, None)


def _load_weights(
    spec: str, variant: Variant | None, file: WeightsFile, checkpoint: Checkpoint, overrides: Values
) -> LoadedVan:
    """Return the network of a weights file, with its metadata."""
    config, assumed = config_from_state(checkpoint.tensors, overrides.get("head"))
    if variant and config.variant != variant.name:
        other = config.variant or "another architecture"
        message = f"The weights are not of {variant.name} but of {other}: {config.trunk}."
        raise CheckpointError(message, "Give that name, or the file without a name.")
    stages = overrides.get("out_indices", () if config.num_classes else ALL_STAGES)
    config, preprocessing, names, notes = read_metadata(config, checkpoint, file, overrides)
    config = config.backbone(tuple(stages)) if stages or "out_indices" in overrides else config
    if names is None and file.is_official and config.num_classes == 1000:
        names = tuple(map(ImageNetInfo().index_to_description, range(1000)))
    if config.head[-1:] == ("sigmoid",) and config.problem_type != "regression":
        message = "The head ends with a sigmoid: its outputs are probabilities, not logits."
        raise UsageError(message, "Omit it from --head: logits are converted to probabilities.")
    notes = (*file.notes, *checkpoint.notes, *assumed, *notes)
    form, path = "embedded" if spec == EMBEDDED_NAME else checkpoint.format, str(file.path)
    source = WeightsSource(spec, path, form, file.sha256, None, checkpoint.container, notes)
    model = network_from_state(checkpoint.tensors, config)
    name = variant.name if variant else file.name
    return LoadedVan(name, model, config, source, preprocessing, names)


# --- the tensors -----------------------------------------------------------------------------


def read_weights(path: Path, container: str | None = None) -> Checkpoint:
    """Return the only VAN in a weights file, with official names and validated tensors.

    Args:
        path: the file.
        container: of the tensors in the file, see :func:`~van_deploy.model.keys.find_network`.

    Raises:
        CheckpointError: the file cannot be read, contains another network, mixed formats or
            unknown tensors; or a tensor is not floating point, has NaN or infinite values or a
            negative variance, or claims more elements than are stored.
        UsageError: the file has no such ``container``, or several networks.
    """
    content = load_file(path)
    network, choice = find_network(content, container)
    names, notes = official_names(network)
    state = {new: _copy_as_float32(old, network.tensors[old]) for old, new in names.items()}
    if dtypes := {str(network.tensors[old].dtype)[6:] for old in names} - {"float32"}:
        notes += (f"weights converted to float32 from {', '.join(sorted(dtypes))}",)
    return Checkpoint(state, network.format, network.path or TOP_LEVEL, content, (*choice, *notes))


def _copy_as_float32(name: str, tensor: Tensor) -> Tensor:
    """Return a validated float32 copy."""
    dense = tensor.layout == torch.strided and tensor.is_cpu
    if not tensor.is_floating_point():
        problem = "is not floating point: pass the weights from before quantisation"
    elif not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        problem = "claims more elements than the file contains, or is not a dense CPU tensor"
    else:
        copied = tensor.to(torch.float32, copy=True).contiguous()
        limits = torch.stack(torch.aminmax(copied)) if copied.numel() else torch.zeros(2)
        if not limits.isfinite().all():
            problem = "contains NaN or infinite values"
        elif name.endswith("running_var") and limits[0] < 0:
            problem = "is negative"
        else:
            return copied
    raise CheckpointError(f"The tensor {name[:200]} {problem}.", "Pass an earlier checkpoint.")


def network_from_state(state: State, config: VanConfig) -> VAN:
    """Return the network of an architecture with the weights of a state dict.

    It is in evaluation mode, float32, without gradients, and shares the tensors'
    memory. A backbone ignores a classifier's head. ``num_batches_tracked`` may be missing:
    it only matters in training.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the message shape; they are listed.
    """
    with torch.device("meta"):  # shapes only, which is fast and draws no random numbers
        model = VAN(config)
    if config.out_indices:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    try:
        model.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        _, _, differences = " ".join(str(error).split()).partition("for VAN: ")
        message = f"The checkpoint does not match the VAN of its shapes: {differences[:1000]}"
        raise CheckpointError(message, _COMPLETE_HINT) from None
    return model.eval().requires_grad_(False)


# --- the architecture ------------------------------------------------------------------------


def config_from_state(state: State, head: Sequence[str] | None = None) -> tuple[VanConfig, Notes]:
    """Return the architecture of a state dict with official names, and notes on assumptions.

    Args:
        state: official names to tensors; only their shapes are used.
        head: the layers of a sequential head by name (``linear``, ``batchnorm`` or one of
            :data:`~van_deploy.model.van.HEAD_LAYERS`), since only some layers have weights.

    Raises:
        CheckpointError: a tensor that determines the architecture is missing or has an invalid
            shape, or layers of the head are unknown.
        UsageError: ``head`` does not match the weights.
    """
    stages = [stage + 1 for stage in ALL_STAGES]
    embeds = [_shape(state, f"patch_embed{stage}.proj.weight", 4) for stage in stages]
    hidden = [_shape(state, f"block{stage}.0.mlp.fc1.weight", 4)[0] for stage in stages]
    dims = tuple(shape[0] for shape in embeds)
    ratios = (h / d if h % d else h // d for h, d in zip(hidden, dims, strict=True))
    blocks = {match[1] for name in state if (match := re.match(r"(block\d\.\d+)\.", name))}
    lka = "block1.0.attn.spatial_gating_unit"
    k0, k1 = (_shape(state, f"{lka}.{n}.weight", 4)[3] for n in ("conv0", "conv_spatial"))
    if k0 % 2 == 0 or k1 % 2 == 0:
        message = f"The kernel sizes of {lka} are {(k0, k1)}; LKA's are odd (5 and 7)."
        raise CheckpointError(message, "Pass a VAN with odd kernels, which keep the maps' size.")
    layers, notes = _head_layers(state, head)
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
        notes += (f"kernels {(k0, k1)}: dilation {config.lka_dilation}, by the paper's formula",)
    return config, notes


def _shape(state: State, name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != dimensions or 0 in shape:
        message = f"The checkpoint's {name} is missing or has an invalid shape: {shape}."
        raise CheckpointError(message, _COMPLETE_HINT)
    return shape


def _head_layers(state: State, head: Sequence[str] | None) -> tuple[tuple[int | str, ...], Notes]:
    """Return the layers of a sequential head (empty for a linear one), and notes."""
    pattern = re.compile(r"head\.(\d{1,3})\.(weight|running_mean)")
    numbers = {int(match[1]) for name in state if (match := pattern.fullmatch(name))}
    if not numbers or "head.weight" in state:
        if head is not None:
            raise UsageError("The head is not a sequence of layers.", "Omit --head.")
        return (), ()
    first, last = min(numbers), max(numbers)
    weights = [state.get(f"head.{index}.weight", torch.empty(())) for index in range(last + 1)]
    kinds = ["?" if not w.ndim else "linear" if w.ndim == 2 else "batchnorm" for w in weights]
    names = head or ["dropout"] * first + kinds[first:]
    pairs = zip_longest(kinds, names, fillvalue="?")
    if any(name not in HEAD_LAYERS if kind == "?" else name != kind for kind, name in pairs):
        what = f"--head {','.join(head)} does not match" if head else "Unknown head"
        message = f"{what}: its layers are {', '.join(kinds)}; the weights do not define each '?'."
        such = f"--head {','.join(kinds).replace('?', 'relu')} (or {', '.join(HEAD_LAYERS)})"
        raise (UsageError if head else CheckpointError)(message, f"Name all layers: {such}.")
    layers = (len(w) if name == "linear" else name for w, name in zip_longest(weights, names))
    note = "the head begins with layers without weights, assumed to be dropout (--head)"
    return tuple(layers), (note,) if first and not head else ()
