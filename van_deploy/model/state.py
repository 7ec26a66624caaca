"""From the tensors of a file to a network in evaluation mode, strictly.

The whole architecture is read back from the tensors' names and shapes, so a
checkpoint needs no variant name: depths, widths, MLP ratios, classes, input
channels, kernels and the layers of the head. The dilation follows from the first
kernel (see :attr:`~van_deploy.model.variants.VanConfig.lka_dilation`). What no
tensor tells (strides, LayerNorm's ``eps``) is read by
:mod:`van_deploy.model.metadata`. Every tensor of the file ends in the network, is
named in a note, or stops the load; every parameter comes from the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.files import TOP_LEVEL
from van_deploy.model.keys import STAGES, translate_keys
from van_deploy.model.van import HEAD_LAYERS, VAN
from van_deploy.model.variants import VanConfig

_COUNTER = "num_batches_tracked"  # BatchNorm's, of no meaning at inference


@dataclass(frozen=True)
class NamedState:
    """A state dict with official names, in float32.

    Attributes:
        tensors: official names to contiguous float32 tensors (int64 for
            ``num_batches_tracked``), none of them sharing memory with a file.
        format: the format the names were in.
        notes: what was done that the user should be told.
    """

    tensors: dict[str, Tensor]
    format: str
    notes: tuple[str, ...]


def official_state(tensors: Mapping[str, Tensor], container: str = "") -> NamedState:
    """Return a state dict under its official names, in float32, checked for sense.

    Args:
        tensors: names as in the file.
        container: where in the file they were, for the advice to take others.

    Raises:
        CheckpointError: the names are another network's, or of mixed formats; tensors stand
            beside the network whose part is unknown; or one is not floating point, NaN,
            infinite, a negative variance, or claims more elements than it has.
        UsageError: there are several networks.
    """
    container = "" if container == TOP_LEVEL else container
    names, source, notes = translate_keys(list(tensors), container)
    state = {new: _plain(old, tensors[old]) for old, new in names.items()}
    floats = (tensors[old] for old in names if not old.endswith(_COUNTER))
    other = sorted({str(t.dtype).removeprefix("torch.") for t in floats} - {"float32"})
    converted = (f"weights converted to float32 from {', '.join(other)}",) if other else ()
    return NamedState(state, source, notes + converted)


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Return a copy in float32, or int64 of a counter."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.is_cpu
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        fault = "claims more elements than the file holds, or is not plain"
    elif name.endswith(_COUNTER):
        return tensor.to(torch.int64, copy=True)
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
    blocks = {match[1] for name in state if (match := re.match(r"(block\d\.\d+)\.", name))}
    hidden = [_shape(state, f"block{stage}.0.mlp.fc1.weight", 4) for stage in stages]
    gate = "block1.0.attn.spatial_gating_unit"
    first, second = (_shape(state, f"{gate}.{n}.weight", 4)[3] for n in ("conv0", "conv_spatial"))
    if first % 2 == 0 or second % 2 == 0:
        raise CheckpointError(
            f"The kernels of {gate} are {first} and {second}; LKA's are odd (5 and 7).",
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
            h // e if h % e == 0 else h / e for (h, *_), (e, *_) in zip(hidden, embeds, strict=True)
        ),
        num_classes=classes[-1] if classes else 0,
        in_chans=embeds[0][1],
        lka_kernels=(first, second),
        patch_sizes=tuple(shape[2] for shape in embeds),
        head=layers,
    )
    if (first, second) != (5, 7):
        notes += (
            f"kernels {first} and {second}: the dilation {config.lka_dilation} is the "
            "paper's for the first, the weights do not say",
        )
    return config, notes


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"The checkpoint {f'has {name} of the shape {shape}' if shape else f'lacks {name}'}, "
            f"which tells the architecture and has {dimensions} dimensions in a VAN.",
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
