"""From the tensors of a file to a network in evaluation mode, strictly.

Every tensor of the file ends in the network, is named in a note, or stops the
load; every parameter of the network comes from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from van_deploy.errors import CheckpointError
from van_deploy.model.architecture import config_from_state_dict
from van_deploy.model.keys import translate_keys, unwrap_prefixes
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

__all__ = ["NamedState", "network_from_state", "official_state"]

_LONGEST = 200  # characters of a name in a message
_LISTED = 10  # names in a message before "and N more"


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


def official_state(tensors: Mapping[str, Tensor]) -> NamedState:
    """Return a state dict under its official names, in float32, checked for sense.

    Raises:
        CheckpointError: the names are another network's or of mixed formats; a
            tensor is not floating point, NaN, infinite, a negative variance, or
            claims more elements than it has.
    """
    plain, _ = unwrap_prefixes(tensors)
    translation = translate_keys(plain)
    notes = []
    if translation.unused:
        notes.append(
            f"{', '.join(sorted(translation.unused))}: in the file, but VanForImageClassification "
            "does not compute with them either; left out"
        )
    if translation.format == "mmpretrain":
        notes.append(
            "mmpretrain runs its LayerNorms with eps 1e-5; the official 1e-6, which the published "
            "weights were trained with, is used (the state dict does not say)"
        )
    used = {new: plain[old] for old, new in translation.names.items()}
    _refuse_unusable(used)
    other = sorted({str(t.dtype) for n, t in used.items() if _is_weight(n)} - {"torch.float32"})
    if other:
        notes.append(f"weights converted to float32 from {', '.join(other)}".replace("torch.", ""))
    converted = {
        name: tensor.to(torch.float32 if _is_weight(name) else torch.int64, copy=True).contiguous()
        for name, tensor in used.items()
    }
    _refuse_senseless(converted)
    return NamedState(converted, translation.format, tuple(notes))


def network_from_state(
    state: Mapping[str, Tensor], *, layer_norm_eps: float = 1e-6
) -> tuple[VAN, VanConfig]:
    """Return the network a state dict with official names describes, and its architecture.

    The network is in evaluation mode, float32, without gradients, and shares
    the tensors' memory. Missing ``num_batches_tracked`` are no fault: they only
    matter in training.

    Raises:
        CheckpointError: tensors are missing, unexpected or wrongly shaped; they are listed.
    """
    config = config_from_state_dict(state, layer_norm_eps=layer_norm_eps)
    with torch.device("meta"):  # shapes only: no time and no random numbers spent
        model = VAN(config)
    expected = model.state_dict()
    counters = {name for name in expected if not _is_weight(name)}
    complete = {**dict.fromkeys(counters, torch.tensor(0)), **state}
    _refuse_difference(expected, complete)
    model.load_state_dict(complete, assign=True)
    return model.eval().requires_grad_(False), config


def _is_weight(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _listed(names: Iterable[str]) -> str:
    names = [name[:_LONGEST] for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _refuse_unusable(state: Mapping[str, Tensor]) -> None:
    hollow = [
        name
        for name, t in state.items()
        if t.layout != torch.strided
        or t.is_quantized
        or t.device.type != "cpu"
        or t.numel() * t.element_size() > t.untyped_storage().nbytes()
    ]
    if hollow:
        raise CheckpointError(
            f"Tensors claim more elements than the file holds, or are not plain: "
            f"{_listed(hollow)}.",
            "The file is damaged or made to harm: get it from a source you trust.",
        )
    wrong = [
        f"{name} ({str(t.dtype).removeprefix('torch.')})"
        for name, t in state.items()
        if _is_weight(name) and not t.is_floating_point()
    ]
    if wrong:
        raise CheckpointError(
            f"Weights are not floating point: {_listed(wrong)}.",
            "Pass the weights from before quantisation; quantising is this program's job.",
        )


def _refuse_senseless(state: Mapping[str, Tensor]) -> None:
    broken = [name for name, t in state.items() if _is_weight(name) and not t.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{len(broken)} tensors hold NaN or infinite values: {_listed(broken)}.",
            "The training diverged or the file is damaged: pass an earlier checkpoint.",
        )
    negative = [name for name, t in state.items() if name.endswith("running_var") and (t < 0).any()]
    if negative:
        raise CheckpointError(
            f"Running variances are negative: {_listed(negative)}.",
            "The file is damaged: pass an earlier checkpoint.",
        )


def _refuse_difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
    parts = [f"{len(names)} {what}: {_listed(names)}" for what, names in found if names]
    if parts:
        raise CheckpointError(
            f"The checkpoint does not fit the VAN its shapes describe. {'; '.join(parts)}.",
            "Nothing is dropped or filled in: save the state dict of one whole VAN classifier.",
        )
